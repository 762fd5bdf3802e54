// From an emulated address to the bytes behind it, one lane at a time: every check is here. The
// vector paths of isa/memory.cpp shortcut the common cases and come here for all others.
#pragma once

#include "emu/machine.hpp"

namespace dsk::emu {

// Where an access really goes.
struct Place {
  u8* host = nullptr;
  Space space = Space::Global;  // Global, Shared, Local or Param
  u32 rank = 0;                 // Shared: CTA of the cluster
  u64 where = 0;                // Shared and Local: offset; otherwise the host address
};

// The address operand of `i` in one lane, displacement added.
inline u64 lane_address(Warp& w, const Inst& i, int lane) {
  if (i.flags & kAddress64) return w.reg<u64>(i.a)[lane] + static_cast<u64>(i.imm);
  return static_cast<u32>(w.reg<u32>(i.a)[lane] + static_cast<u32>(i.imm));
}

// Resolves `address` in `space`. Throws HazardError: null, misaligned, out of bounds, wrong space.
Place resolve(Warp& w, Space space, u64 address, int lane, u32 bytes, bool write);
// A shared address that may belong to any CTA of the cluster.
Place resolve_shared(Warp& w, u64 address, int lane, u32 bytes, bool cluster);
// The CTA and offset of a shared address (mbarrier operands, TMA destinations).
Cta& shared_owner(Warp& w, u32 address, int lane, u32 bytes, u32 align, const char* what,
                  u32* offset);

// Tells the observers about one lane, or about a whole warp's access (places of set lanes only).
void observe(Warp& w, const Inst& i, u32 mask, AccessKind kind, u32 bytes, const Place* places,
             bool atomic);

// A strong load or an atomic has its value; `host` as the access resolved it.
void observe_value(Warp& w, const Inst& i, u32 mask, AccessKind kind, u32 bytes, const u64* host,
                   bool atomic);

inline Semantics semantics_of(const Inst& i) { return static_cast<Semantics>(i.sem & 15); }
inline Scope scope_of(const Inst& i) { return static_cast<Scope>(i.sem >> 4); }

class Decoder;
// Space, semantics and scope modifiers of ld, st, atom, red, mbarrier into the instruction.
void bind_space(const Decoder& d, Inst& i);

}  // namespace dsk::emu
