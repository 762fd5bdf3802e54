#include "emu/timing/profiler.hpp"

#include "emu/launch.hpp"

namespace dsk::emu::timing {

void Profiler::start() {
  System::instance().set_launch_hook([this](Grid& grid) { on_launch(grid); });
  on_ = true;
}

void Profiler::stop() {
  if (on_) System::instance().set_launch_hook({});
  on_ = false;
}

std::vector<std::shared_ptr<Recording>> Profiler::recordings() const {
  const std::lock_guard lock(mutex_);
  return recordings_;
}

void Profiler::on_launch(Grid& grid) {
  auto r = std::make_shared<Recording>();
  LaunchConfig& config = grid.config;
  const u32 total = static_cast<u32>(config.grid.count() / config.cluster.count());
  r->sample = sample_of(total, sample_);
  // Kernels that do not multiply on tensor cores are cheap, and often what later launches go by:
  // they sort, count and place.
  if (!complete_.value_or(!grid.program->uses_wgmma)) config.only = r->sample;
  if (!check_) config.check = false;
  if (fast_) config.numerics = Numerics::Fast;
  r->module = grid.module;
  r->program = grid.program;
  r->config = config;
  r->config.observers.clear();
  r->num_sms = grid.num_sms;
  r->shared_bytes = grid.shared_bytes();
  r->clusters_total = total;
  config.observers.push_back(make_recorder(r));
  const std::lock_guard lock(mutex_);
  recordings_.push_back(std::move(r));
}

}  // namespace dsk::emu::timing
