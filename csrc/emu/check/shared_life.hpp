// Who reaches into a CTA's shared memory: all of it must be over, and known to be, before the CTA's
// last warp leaves, or the memory may be another CTA's by then.
#pragma once

#include <map>
#include <vector>

#include "emu/check/vector_clock.hpp"
#include "emu/machine.hpp"

namespace dsk::emu::check {

class SharedLife {
 public:
  explicit SharedLife(std::size_t ctas) : visits_(ctas) {}

  // An access of another CTA's warp, or a copy (wherever it comes from) that writes shared memory
  // of cluster CTA `rank`.
  void visit(u32 rank, Epoch when, const Warp& w, u32 pc) {
    visits_[rank][when.agent] = {when.clock, pc, &w};
  }
  bool visited(u32 rank) const { return !visits_[rank].empty(); }

  // CTA `rank` leaves; `known` is what its warps know to be over. Throws HazardError.
  void leave(u32 rank, const VectorClock& known) const {
    for (const auto& [agent, visit] : visits_[rank]) {
      if (known.knows({agent, visit.clock})) continue;
      const bool own = visit.warp->cta->rank == rank;
      throw HazardError({make_hazard(
          *visit.warp, visit.pc, visit.warp->live, own ? "copy-outlives-cta" : "dsmem-exited-cta",
          own ? "writes shared memory of its CTA, which exits without waiting for it"
              : "touches shared memory of cluster CTA " + std::to_string(rank) +
                    ", which exits without waiting for it")});
    }
  }

 private:
  struct Visit {
    u32 clock = 0;
    u32 pc = 0;
    const Warp* warp = nullptr;
  };
  // The last one of each agent: it implies the earlier ones.
  std::vector<std::map<Agent, Visit>> visits_;  // of each CTA
};

}  // namespace dsk::emu::check
