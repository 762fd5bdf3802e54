// The happens-before checker: races and missing proxy fences in shared memory.
//
// Every warp has a vector clock. Barriers, mbarriers, cluster barriers and release/acquire accesses
// are edges along which clocks travel. Every asynchronous operation (TMA, wgmma, cp.async,
// st.async) is an agent of its own: what it reads and writes happens at some time between its issue
// and its completion, so whoever touches the same bytes must come before the issue or have waited
// for the completion. Knowledge of a fence.proxy.async travels beside the clocks: a generic write
// that is ordered before an asynchronous access, but not fenced, is an error too.
//
// Precision: warps, not lanes, are agents, so two lanes of one warp never race; a race is reported
// when no order exists in this run's synchronisation, whichever way the bytes happened to go.
#pragma once

#include <memory>

#include "emu/observer.hpp"

namespace dsk::emu::check {

// Throws HazardError at the access that completes a race; formal findings go to the launch's stats.
std::shared_ptr<Observer> make_race_checker();

}  // namespace dsk::emu::check
