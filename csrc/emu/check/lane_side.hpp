// The checker's findings about the lanes of one warp: that they share memory without meeting, and
// that one of them arrives at an mbarrier for the others. All are formal.
#pragma once

#include <memory>
#include <set>
#include <utility>
#include <vector>

#include "emu/check/early_arrivals.hpp"
#include "emu/check/lane_order.hpp"

namespace dsk::emu::check {

class LaneSide {
 public:
  struct Agency {  // who, and what it knows
    Agent agent;
    const VectorClock& knows;
  };

  explicit LaneSide(const Cluster& cluster);

  // The lanes of the warp have met; `now`: its clock.
  void meet(const Warp& w, Epoch now);
  // Lanes of `mask` arrive at an mbarrier.
  void arrive(const Warp& w, Epoch when, u32 mask, u32 pc);
  // A weak access of shared memory.
  void access(const Warp& w, u32 pc, u32 mask, const Access& access, const u64* place,
              const u32* rank);
  // A copy reads what one lane of its warp may give away: its own words.
  void source(const AsyncInfo& info, const Footprint& part);
  // An access of a CTA's shared memory, which may rely on another warp's arrival.
  void relies(const Warp& w, u32 pc, const Agency& who, AccessKind kind, u32 cta, u32 offset,
              u32 bytes) {
    if (!early_[cta].empty()) check_arrivals(w, pc, who, kind, cta, offset, bytes);
  }

 private:
  void add(const Warp& w, u32 pc, u32 mask, const LaneOrder::Finding& found, const char* act);
  void check_arrivals(const Warp& w, u32 pc, const Agency& who, AccessKind kind, u32 cta,
                      u32 offset, u32 bytes);

  const Cluster& cluster_;
  std::vector<std::unique_ptr<LaneOrder>> lanes_;  // of each CTA
  std::vector<EarlyArrivals> early_;               // of each CTA
  std::set<std::pair<u32, u32>> reported_;
};

// " (PTX line 3, source line 7)"
std::string place_of(const Grid& grid, u32 pc);

}  // namespace dsk::emu::check
