// Vector clocks over the agents of one cluster: its warps, then one slot per asynchronous operation
// in flight.
#pragma once

#include <algorithm>
#include <memory>
#include <utility>
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

  // Whether everything that `other` knows is known here.
  bool covers(const VectorClock& other) const {
    for (std::size_t i = 0; i < other.clocks_.size(); ++i) {
      if (of(static_cast<Agent>(i)) < other.clocks_[i]) return false;
    }
    return true;
  }

  void clear() {
    ++version_;
    clocks_.clear();
  }

 private:
  std::vector<u32> clocks_;
  u64 version_ = 0;
};

// What is known of the agents of other clusters: one immutable snapshot a cluster, sorted by the
// cluster's number. Shared, since most warps of a grid know nothing or the same.
using ClusterId = u32;
struct Past {
  VectorClock happened, fenced;
};
using Foreign = std::vector<std::pair<ClusterId, std::shared_ptr<const Past>>>;
using ForeignPtr = std::shared_ptr<const Foreign>;

void merge_foreign(ForeignPtr& into, const ForeignPtr& other);  // both hold something
inline void join_foreign(ForeignPtr& into, const ForeignPtr& other) {
  if (other && other != into) merge_foreign(into, other);
}

// What an agent knows to have happened, and the part of it that a fence.proxy.async has made
// visible to the asynchronous proxy. Both travel along the same synchronisation edges. `happened`
// and `fenced` are about the agent's own cluster, `foreign` about all others.
struct Knowledge {
  VectorClock happened;
  VectorClock fenced;
  VectorClock drained;
  ForeignPtr foreign;  // null: nothing
  // Of fences at .gpu and .sys scope: what a strong store after one releases, and what strong loads
  // saw that a later one acquires. They travel with the rest, so that threads may fence, meet at a
  // barrier, and let one of them store the flag, as CUDA programs have always done.
  ForeignPtr flushed[2], seen[2];

  void join(const Knowledge& other) {
    happened.join(other.happened);
    fenced.join(other.fenced);
    drained.join(other.drained);
    join_foreign(foreign, other.foreign);
    for (int k = 0; k < 2; ++k) {
      join_foreign(flushed[k], other.flushed[k]);
      join_foreign(seen[k], other.seen[k]);
    }
  }
  void clear() {
    happened.clear();
    fenced.clear();
    drained.clear();
    foreign.reset();
    for (int k = 0; k < 2; ++k) flushed[k].reset(), seen[k].reset();
  }
};

}  // namespace dsk::emu::check
