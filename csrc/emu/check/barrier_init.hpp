// Who initialised the mbarriers that another CTA of the cluster arrives at or counts bytes for. The
// initialisation is a write of its thread: the other CTA must come after it by an edge that orders
// memory, or by a barrier.cluster that orders none and a fence.mbarrier_init before it.
#pragma once

#include <map>
#include <string>
#include <utility>

#include "emu/check/lane_side.hpp"
#include "emu/check/vector_clock.hpp"
#include "emu/machine.hpp"

namespace dsk::emu::check {

class BarrierInits {
 public:
  void init(u64 rank, u64 offset, Epoch when, const Warp& w, u32 pc) {
    inits_[{rank, offset}] = {when, 0, &w, pc};
  }

  // A warp, whose clock is `now`, fences what it has initialised.
  void fence(Epoch now) {
    for (auto& [place, init] : inits_) {
      if (init.when.agent == now.agent && init.fenced == 0) init.fenced = now.clock;
    }
  }

  // Warp `w` touches the mbarrier at instruction `pc`. `known` is what is ordered before it, and
  // `executed` what has only been executed. Throws HazardError.
  void use(u64 rank, u64 offset, const Warp& w, u32 pc, u32 lanes, const VectorClock& known,
           const VectorClock& executed) const {
    const auto it = w.cta->rank == rank ? inits_.end() : inits_.find({rank, offset});
    if (it == inits_.end()) return;
    const Init& init = it->second;
    if (known.knows(init.when)) return;
    if (init.fenced != 0 && executed.knows({init.when.agent, init.fenced})) return;
    throw HazardError({make_hazard(
        w, pc, lanes, "mbarrier-init-unordered",
        "touches the mbarrier at shared offset " + std::to_string(offset - kSharedReserved) +
            " of cluster CTA " + std::to_string(rank) + ", which warp " +
            std::to_string(init.warp->index) + " there initialised" +
            place_of(*w.cta->cluster->grid, init.pc) +
            "; neither an order of memory nor fence.mbarrier_init and a cluster barrier between")});
  }

 private:
  struct Init {
    Epoch when;
    u32 fenced = 0;  // the initialiser's clock then; 0: not yet
    const Warp* warp = nullptr;
    u32 pc = 0;
  };
  std::map<std::pair<u64, u64>, Init> inits_;  // by CTA and offset
};

}  // namespace dsk::emu::check
