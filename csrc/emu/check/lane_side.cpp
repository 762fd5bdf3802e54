#include "emu/check/lane_side.hpp"

#include <bit>
#include <cstdio>

#include "emu/machine.hpp"
#include "emu/system.hpp"

namespace dsk::emu::check {
namespace {

std::string hex(u32 lanes) {
  char text[16];
  std::snprintf(text, sizeof text, "0x%08x", lanes);
  return text;
}

}  // namespace

std::string place_of(const Grid& grid, u32 pc) {
  const InstInfo& info = grid.program->info[pc];
  std::string text = " (PTX line " + std::to_string(info.ptx_line);
  if (info.source.line) text += ", source line " + std::to_string(info.source.line);
  return text + ")";
}

LaneSide::LaneSide(const Cluster& cluster) : cluster_(cluster), early_(cluster.ctas.size()) {
  for (const auto& cta : cluster.ctas) {
    lanes_.push_back(std::make_unique<LaneOrder>(cta->shared_bytes, cta->warps.size()));
  }
}

void LaneSide::meet(const Warp& w, Epoch now) {
  LaneOrder& lanes = *lanes_[w.cta->rank];
  early_[w.cta->rank].meet(now, lanes.touched(w.index));
  lanes.meet(w.index);
}

void LaneSide::arrive(const Warp& w, Epoch when, u32 mask, u32 pc) {
  early_[w.cta->rank].arrive(when, w, *lanes_[w.cta->rank], mask, pc);
}

void LaneSide::access(const Warp& w, u32 pc, u32 mask, const Access& access, const u64* place,
                      const u32* rank) {
  if (access.pattern == Pattern::Scattered && cluster_.ctas.size() > 1) {
    for (u32 m = mask; m != 0; m &= m - 1) {
      if (rank[std::countr_zero(m)] != w.cta->rank) return;
    }
  }
  if (const auto found = lanes_[w.cta->rank]->access(w.index, pc, mask, access, place)) {
    add(w, pc, mask, *found, access.kind == AccessKind::Read ? "reads" : "writes");
  }
}

void LaneSide::source(const AsyncInfo& info, const Footprint& part) {
  if (part.kind != AccessKind::Read) return;
  const auto found = lanes_[part.rank]->source(
      info.warp->index, info.lane, static_cast<u32>(part.address), static_cast<u32>(part.bytes));
  if (found) add(*info.warp, info.pc, 1u << info.lane, *found, "reads");
}

void LaneSide::add(const Warp& w, u32 pc, u32 mask, const LaneOrder::Finding& found,
                   const char* act) {
  if (!reported_.insert({pc, found.pc}).second) return;
  note_formal(
      *cluster_.grid,
      make_hazard(w, pc, mask, "missing-warp-sync",
                  std::string(act) + " shared offset " +
                      std::to_string(found.offset - kSharedReserved) + ", which lanes " +
                      hex(found.lanes) + " of the same warp " + (found.wrote ? "wrote" : "read") +
                      place_of(*cluster_.grid, found.pc) +
                      " and no __syncwarp or other meeting of the lanes between"));
}

void LaneSide::check_arrivals(const Warp& w, u32 pc, const Agency& who, AccessKind kind, u32 cta,
                              u32 offset, u32 bytes) {
  const auto found = early_[cta].find(*lanes_[cta], who.agent, who.knows, kind, offset, bytes);
  if (!found || !reported_.insert({found->pc, found->access.pc}).second) return;
  const LaneOrder::Finding& access = found->access;
  note_formal(
      *cluster_.grid,
      make_hazard(*found->warp, found->pc, found->arrived, "early-arrival",
                  "arrives without lanes " + hex(access.lanes) + ", which " +
                      (access.wrote ? "wrote" : "read") + " shared offset " +
                      std::to_string(access.offset - kSharedReserved) +
                      place_of(*cluster_.grid, access.pc) + "; no __syncwarp between, and warp " +
                      std::to_string(w.index) + " relies on it" + place_of(*cluster_.grid, pc)));
}

}  // namespace dsk::emu::check
