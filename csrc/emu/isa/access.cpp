#include "emu/isa/access.hpp"

#include <bit>
#include <cstdio>

#include "emu/decode.hpp"
#include "emu/system.hpp"

namespace dsk::emu {
namespace {

std::string hex(u64 v) {
  char buffer[32];
  std::snprintf(buffer, sizeof buffer, "0x%llx", static_cast<unsigned long long>(v));
  return buffer;
}

void check_alignment(Warp& w, u64 address, int lane, u32 bytes) {
  if ((address & (bytes - 1)) != 0) {
    fail(w, 1u << lane, "misaligned-access",
         "address " + hex(address) + " is not a multiple of the access size " +
             std::to_string(bytes));
  }
}

Place resolve_local(Warp& w, u64 offset, int lane, u32 bytes) {
  if (offset + bytes > w.local_stride || offset > w.local_stride) {
    fail(w, 1u << lane, "local-out-of-bounds",
         "local offset " + hex(offset) + " + " + std::to_string(bytes) + " bytes is outside the " +
             std::to_string(w.local_stride) + " bytes of the thread");
  }
  return {w.local.get() + static_cast<std::size_t>(lane) * w.local_stride + offset, Space::Local, 0,
          offset};
}

}  // namespace

Place resolve_shared(Warp& w, u64 address, int lane, u32 bytes, bool cluster) {
  Cta* cta = w.cta;
  const u32 a = static_cast<u32>(address);
  const u32 rank = a >> kRankShift;
  const u32 offset = a & kSharedOffsetMask;
  if (rank != cta->rank) {
    if (!cluster || rank >= cta->cluster->ctas.size()) {
      fail(w, 1u << lane, "shared-out-of-bounds",
           "shared address " + hex(a) + " is outside this CTA's window" +
               (cluster ? " and names no CTA of the cluster" : ""));
    }
    cta = cta->cluster->ctas[rank].get();
    if (cta->done()) {
      fail(w, 1u << lane, "dsmem-exited-cta",
           "shared address " + hex(a) + " belongs to CTA " + std::to_string(rank) +
               " of the cluster, which has exited");
    }
  }
  if (offset < kSharedReserved || offset + bytes > cta->shared_bytes) {
    fail(w, 1u << lane, offset < kSharedReserved ? "null-access" : "shared-out-of-bounds",
         "shared offset " + std::to_string(i64{offset} - i64{kSharedReserved}) + " + " +
             std::to_string(bytes) + " bytes is outside the " +
             std::to_string(cta->shared_bytes - kSharedReserved) + " bytes of the CTA");
  }
  return {cta->shared + offset, Space::Shared, cta->rank, offset};
}

Place resolve(Warp& w, Space space, u64 address, int lane, u32 bytes, bool write) {
  check_alignment(w, address, lane, bytes);
  switch (space) {
    case Space::Shared:
    case Space::SharedCluster:
      // A generic address of shared memory handed to a .shared instruction loses its window.
      return resolve_shared(w, address, lane, bytes, space == Space::SharedCluster);
    case Space::Local:
      return resolve_local(w, address >= kLocalWindow ? address - kLocalWindow : address, lane,
                           bytes);
    case Space::Param: {
      const Grid& grid = *w.cta->cluster->grid;
      if (address + bytes > grid.program->param_bytes || address > grid.program->param_bytes) {
        fail(w, 1u << lane, "param-out-of-bounds",
             "parameter offset " + hex(address) + " is outside the " +
                 std::to_string(grid.program->param_bytes) + " bytes of parameters");
      }
      return {grid.params + address, Space::Param, 0, address};
    }
    default:
      break;
  }
  if (space == Space::Generic && (address >> kWindowShift) != 0) {
    if ((address >> kWindowShift) == (kSharedWindow >> kWindowShift)) {
      return resolve_shared(w, address, lane, bytes, true);
    }
    if ((address >> kWindowShift) == (kLocalWindow >> kWindowShift)) {
      return resolve_local(w, address - kLocalWindow, lane, bytes);
    }
  }
  const Grid& grid = *w.cta->cluster->grid;
  const u64 offset = address - reinterpret_cast<u64>(grid.params);  // cvta.param: __grid_constant__
  if (!write && offset < grid.program->param_bytes && offset + bytes <= grid.program->param_bytes) {
    return {grid.params + offset, Space::Param, 0, offset};
  }
  u8* host = global_pointer(w, address, bytes, 1u << lane, write);
  return {host, Space::Global, 0, address};
}

Cta& shared_owner(Warp& w, u32 address, int lane, u32 bytes, u32 align, const char* what,
                  u32* offset) {
  if (address % align != 0) {
    fail(
        w, 1u << lane, "misaligned-access",
        std::string(what) + " " + hex(address) + " must be a multiple of " + std::to_string(align));
  }
  const Place p = resolve_shared(w, address, lane, bytes, true);
  *offset = static_cast<u32>(p.where);
  return *w.cta->cluster->ctas[p.rank];
}

void observe(Warp& w, const Inst& i, u32 mask, AccessKind kind, u32 bytes, const Place* places,
             bool atomic) {
  // Lanes of one generic instruction may go to different spaces: one event per space.
  for (const Space space : {Space::Global, Space::Shared, Space::Local}) {
    u64 where[kLanes];
    u32 rank[kLanes];
    u32 lanes = 0;
    for (u32 m = mask; m != 0; m &= m - 1) {
      const int l = std::countr_zero(m);
      if (places[l].space != space) continue;
      where[l] = places[l].where;
      rank[l] = places[l].rank;
      lanes |= 1u << l;
    }
    if (lanes == 0) continue;
    Access access;
    access.kind = kind;
    access.space = space;
    access.atomic = atomic;
    access.semantics = semantics_of(i);
    access.scope = scope_of(i);
    access.size = bytes;
    for (auto& o : w.cta->cluster->observers) {
      o->on_access(w, w.current_pc, lanes, access, where, space == Space::Shared ? rank : nullptr);
    }
  }
}

void observe_value(Warp& w, const Inst& i, u32 mask, AccessKind kind, u32 bytes, const u64* host,
                   bool atomic) {
  u32 in_shared = 0;
  u64 where[kLanes];
  u32 rank[kLanes];
  for (u32 m = mask; m != 0; m &= m - 1) {
    const int l = std::countr_zero(m);
    where[l] = host[l];
    for (const auto& cta : w.cta->cluster->ctas) {
      const u64 offset = host[l] - reinterpret_cast<u64>(cta->shared);
      if (offset >= cta->shared_bytes) continue;
      where[l] = offset;
      rank[l] = cta->rank;
      in_shared |= 1u << l;
    }
  }
  for (const bool shared : {false, true}) {
    const u32 lanes = shared ? in_shared : mask & ~in_shared;
    if (lanes == 0) continue;
    const Access access{kind,   Proxy::Generic,  shared ? Space::Shared : Space::Global,
                        atomic, semantics_of(i), scope_of(i),
                        bytes};
    for (auto& o : w.cta->cluster->observers) {
      o->on_value(w, w.current_pc, lanes, access, where, shared ? rank : nullptr);
    }
  }
}

void bind_space(const Decoder& d, Inst& i) {
  Semantics sem = Semantics::Weak;
  Scope scope = Scope::None;
  for (const std::string& m : d.in().modifiers) {
    if (m == "global")
      i.space = Space::Global;
    else if (m == "shared" || m == "shared::cta")
      i.space = Space::Shared;
    else if (m == "shared::cluster")
      i.space = Space::SharedCluster;
    else if (m == "local")
      i.space = Space::Local;
    else if (m == "const")
      i.space = Space::Const;
    else if (m.rfind("param", 0) == 0)
      i.space = Space::Param;
    else if (m == "volatile")
      sem = Semantics::Volatile;
    else if (m == "relaxed")
      sem = Semantics::Relaxed;
    else if (m == "acquire")
      sem = Semantics::Acquire;
    else if (m == "release")
      sem = Semantics::Release;
    else if (m == "acq_rel")
      sem = Semantics::AcqRel;
    else if (m == "sc")
      sem = Semantics::Sc;
    else if (m == "cta")
      scope = Scope::Cta;
    else if (m == "cluster")
      scope = Scope::Cluster;
    else if (m == "gpu")
      scope = Scope::Gpu;
    else if (m == "sys")
      scope = Scope::Sys;
  }
  i.sem = static_cast<u8>(static_cast<u8>(sem) | static_cast<u8>(scope) << 4);
}

}  // namespace dsk::emu
