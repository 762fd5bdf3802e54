// Making the state of a grid: checks of a launch, and clusters ready to run.
#pragma once

#include <memory>
#include <vector>

#include "emu/system.hpp"

namespace dsk::emu {

// Throws Error, naming what is wrong: block size, shared memory, cluster shape, parameter bytes.
void check_launch(const Program& program, const LaunchConfig& config, std::size_t param_bytes,
                  const DeviceProperties& device);
// Cluster number `linear` of the grid, its warps at the first instruction.
std::unique_ptr<Cluster> make_cluster(Grid& grid, u32 linear);
// Clusters that one device holds at once.
u32 resident_clusters(const Grid& grid, const DeviceProperties& device);
// Adds a finished cluster's counts to its grid.
void account(Grid& grid, const Cluster& cluster);

}  // namespace dsk::emu
