#include "emu/check/early_arrivals.hpp"

#include <algorithm>

namespace dsk::emu::check {

void EarlyArrivals::arrive(Epoch when, const Warp& w, const LaneOrder& lanes, u32 mask, u32 pc) {
  const u32 interval = lanes.now(w.index);
  if (interval == 0 || (lanes.touched(w.index) & ~mask) == 0) return;
  // Lanes may arrive one by one, at whichever barriers.
  for (Arrival& a : arrivals_) {
    if (a.interval != interval || a.when.agent != when.agent) continue;
    a.lanes |= mask;
    return;
  }
  if (arrivals_.size() == kKept) arrivals_.erase(arrivals_.begin());
  arrivals_.push_back({when, &w, pc, interval, mask, 0});
}

void EarlyArrivals::meet(Epoch now, u32 touched) {
  if (arrivals_.empty()) return;
  std::erase_if(arrivals_, [&](const Arrival& a) {
    return a.when.agent == now.agent && a.ordered == 0 && (touched & ~a.lanes) == 0;
  });
  for (Arrival& a : arrivals_) {
    if (a.when.agent == now.agent && a.ordered == 0) a.ordered = now.clock;
  }
}

std::optional<EarlyArrivals::Finding> EarlyArrivals::find(const LaneOrder& lanes, Agent agent,
                                                          const VectorClock& known, AccessKind kind,
                                                          u32 offset, u32 bytes) const {
  const auto relied_on = [&](const Arrival& a) {
    return a.when.agent != agent && known.knows(a.when) &&
           (a.ordered == 0 || !known.knows({a.when.agent, a.ordered}));
  };
  u32 oldest = ~0u;
  for (const Arrival& a : arrivals_) {
    if (relied_on(a)) oldest = std::min(oldest, a.interval);
  }
  std::optional<Finding> found;
  if (oldest == ~0u) return found;
  lanes.for_each_since(oldest, offset, bytes, [&](u32 interval, LaneOrder::Finding access) {
    if (!access.wrote && kind == AccessKind::Read) return false;
    for (const Arrival& a : arrivals_) {
      if (a.interval != interval || (access.lanes & ~a.lanes) == 0 || !relied_on(a)) continue;
      access.lanes &= ~a.lanes;
      found = Finding{a.warp, a.pc, a.lanes, access};
      return true;
    }
    return false;
  });
  return found;
}

}  // namespace dsk::emu::check
