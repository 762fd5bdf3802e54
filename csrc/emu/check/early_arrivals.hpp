// Lanes that arrive at an mbarrier for their warp. An arrival releases what its own lane did; what
// other lanes did to shared memory since they last met is not ordered before it. For the warps'
// clocks a warp is one, so this is kept beside them: which lanes arrived in which interval of
// LaneOrder, and from which clock of the warp on its accesses of that interval are ordered after
// all.
#pragma once

#include <optional>
#include <vector>

#include "emu/check/lane_order.hpp"
#include "emu/check/vector_clock.hpp"
#include "emu/machine.hpp"

namespace dsk::emu::check {

class EarlyArrivals {
 public:
  struct Finding {
    const Warp* warp = nullptr;  // that arrived
    u32 pc = 0;                  // there
    u32 arrived = 0;             // lanes
    LaneOrder::Finding access;   // of the lanes that did not
  };

  bool empty() const { return arrivals_.empty(); }
  // Lanes of a warp arrive, at clock `when` of it.
  void arrive(Epoch when, const Warp& w, const LaneOrder& lanes, u32 mask, u32 pc);
  // All lanes of the warp meet; `touched`: those that touched shared memory before.
  void meet(Epoch now, u32 touched);
  // Somebody who knows `known` accesses [offset, offset + bytes). What did an arrival leave out
  // that conflicts with it?
  std::optional<Finding> find(const LaneOrder& lanes, Agent agent, const VectorClock& known,
                              AccessKind kind, u32 offset, u32 bytes) const;

 private:
  struct Arrival {
    Epoch when;
    const Warp* warp = nullptr;
    u32 pc = 0, interval = 0, lanes = 0;
    u32 ordered = 0;  // the warp's clock when its lanes met afterwards; 0: not yet
  };
  static constexpr std::size_t kKept = 64;

  std::vector<Arrival> arrivals_;  // oldest first
};

}  // namespace dsk::emu::check
