// Which results of the approximate functions a launch asked for.
#pragma once

#include "emu/machine.hpp"
#include "emu/num/approx.hpp"
#include "emu/system.hpp"

namespace dsk::emu {

inline num::ApproxCtx approx_context(const Warp& w) {
  const LaunchConfig& config = w.cta->cluster->grid->config;
  if (config.numerics != Numerics::Worst) return {};
  return {num::ApproxMode::worst, config.seed};
}

}  // namespace dsk::emu
