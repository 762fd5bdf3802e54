// What agents learn of other clusters: snapshots, taken at a release and joined at an acquire.
#pragma once

#include "emu/check/vector_clock.hpp"

namespace dsk::emu::check {

// A snapshot of all that an agent of cluster `self` knows.
ForeignPtr publish(ClusterId self, const Knowledge& knowledge);
// An agent of cluster `self` learns a snapshot.
void absorb(Knowledge& knowledge, ClusterId self, const ForeignPtr& snapshot);
// The part of a snapshot that is about one cluster; null if there is none.
const Past* past_of(const ForeignPtr& snapshot, ClusterId cluster);
// After a fence.proxy.async: all that happened is fenced as well.
void fence_foreign(ForeignPtr& foreign);

}  // namespace dsk::emu::check
