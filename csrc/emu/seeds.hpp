// DSK_EMU_SEEDS=8: every launch runs over that many random schedules as well, each from the memory
// that the first one found, and results that differ in a bit are a hazard.
#pragma once

#include "emu/system.hpp"

namespace dsk::emu {

// The variable's value when the process asked first; 0: off.
u32 seeds_wanted();

// Waits for all queued work, then runs the kernel under the fixed schedule and `seeds` random ones.
// Memory ends as the first run left it, whose number is returned. The kernel must not wait for
// launches that come later. Throws HazardError "order-dependent-result", and what a run throws.
u64 launch_over_seeds(System& system, StreamId s, const std::shared_ptr<const Module>& m,
                      const std::string& kernel, LaunchConfig config, const void* params,
                      std::size_t param_bytes, u32 seeds);

}  // namespace dsk::emu
