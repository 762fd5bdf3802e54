// What bulk and tensor copies share.
#pragma once

#include "emu/decode.hpp"
#include "emu/machine.hpp"

namespace dsk::emu {

struct SharedSpot {
  u32 rank = 0, offset = 0;
};

// Address checks at issue, against the cluster's CTAs.
SharedSpot shared_spot(Warp& w, u64 address, int lane, u32 bytes, u32 align, const char* what);
u8* shared_bytes(Warp& w, const SharedSpot& s);
void check_multicast(Warp& w, u32 rank, u32 offset, u32 bytes, int lane);
// complete_tx on the mbarrier at (rank, offset).
void complete_bytes(Warp& w, u32 rank, u32 offset, u64 bytes, int lane, const char* what);

// Instructions with several addresses keep them in Ext: r[which] the base register, v[which] the
// displacement times two, plus one when the register is 64 bits wide.
u64 pair_address(Warp& w, const Ext& x, int which, int lane);
void bind_pair_address(Decoder& d, Ext& x, int which, const ptx::Operand& o);

// Bulk reductions: `op` as reduce_op() gives it. Element by element, atomic on the host.
u8 reduce_op(const Decoder& d);
void reduce_bytes(u8* dst, const u8* src, u64 bytes, Type type, u8 op);

}  // namespace dsk::emu
