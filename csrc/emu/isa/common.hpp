// Small helpers of the handlers that are compiled once.
#pragma once

#include <bit>
#include <cstring>
#include <span>

#include "emu/decode.hpp"
#include "emu/isa/access.hpp"
#include "emu/isa/groups.hpp"
#include "emu/machine.hpp"
#include "emu/system.hpp"

namespace dsk::emu {

// Calls f(lane) for the lanes of `mask`, lowest first.
template <class F>
inline void each_lane(u32 mask, F f) {
  for (u32 m = mask; m != 0; m &= m - 1) f(std::countr_zero(m));
}

inline void set_pred(Warp& w, u32 offset, u32 mask, u32 value) {
  if (offset == kNoReg) return;
  u32& p = w.pred(offset);
  p = (p & ~mask) | (value & mask);
}

// Value of a register that is 4 or 8 bytes wide.
inline u64 read_wide(Warp& w, u32 reg, bool wide, int lane) {
  return wide ? w.reg<u64>(reg)[lane] : w.reg<u32>(reg)[lane];
}

inline void make_blocking(Inst& i, BlockingHandler h) {
  i.kind = Kind::Blocking;
  i.blocking = h;
}

}  // namespace dsk::emu
