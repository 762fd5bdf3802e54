// Vector clocks over the agents of one cluster: its warps, then one slot per asynchronous operation
// in flight.
#pragma once

#include <algorithm>
#include <vector>

#include "emu/types.hpp"

namespace dsk::emu::check {

using Agent = u32;

// A point in one agent's time. Clock 0 is "never".
struct Epoch {
  Agent agent = 0;
  u32 clock = 0;
};

class VectorClock {
 public:
  u32 of(Agent a) const { return a < clocks_.size() ? clocks_[a] : 0; }
  bool knows(Epoch e) const { return of(e.agent) >= e.clock; }

  // Counts the changes of this clock: equal versions of one clock mean equal contents.
  u64 version() const { return version_; }

  void set(Agent a, u32 clock) {
    ++version_;
    if (a >= clocks_.size()) clocks_.resize(a + 1, 0);
    clocks_[a] = std::max(clocks_[a], clock);
  }

  void join(const VectorClock& other) {
    ++version_;
    if (other.clocks_.size() > clocks_.size()) clocks_.resize(other.clocks_.size(), 0);
    for (std::size_t i = 0; i < other.clocks_.size(); ++i) {
      clocks_[i] = std::max(clocks_[i], other.clocks_[i]);
    }
  }

  void clear() {
    ++version_;
    clocks_.clear();
  }

 private:
  std::vector<u32> clocks_;
  u64 version_ = 0;
};

// What an agent knows to have happened, and the part of it that a fence.proxy.async has made
// visible to the asynchronous proxy. Both travel along the same synchronisation edges.
struct Knowledge {
  VectorClock happened;
  VectorClock fenced;

  void join(const Knowledge& other) {
    happened.join(other.happened);
    fenced.join(other.fenced);
  }
  void clear() {
    happened.clear();
    fenced.clear();
  }
};

}  // namespace dsk::emu::check
