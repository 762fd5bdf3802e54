#include "cuda/launch/gemm_config.hpp"

#include <algorithm>
#include <cstdio>

#include "cuda/gemm_shape.hpp"

namespace dsk::launch {
namespace {

constexpr GemmConfig make(const char* kernel, GemmKind kind, int block_m, int block_n,
                          int num_stages) {
  // One warpgroup for each 64 rows, and the producer's.
  return {kernel,
          kind,
          block_m,
          block_n,
          num_stages,
          (block_m / 64 + 1) * 128,
          gemm_fp8_shared_bytes(block_m, block_n, num_stages)};
}

constexpr GemmConfig kConfigs[] = {
    make("gemm_fp8_dense_64x128", GemmKind::kDense, 64, 128, 8),
    make("gemm_fp8_dense_128x128", GemmKind::kDense, 128, 128, 5),
    make("gemm_fp8_dense_128x192", GemmKind::kDense, 128, 192, 4),
    make("gemm_fp8_contiguous_128x128", GemmKind::kContiguous, 128, 128, 5),
    make("gemm_fp8_masked_64x128", GemmKind::kMasked, 64, 128, 8),
};

long long ceil_div(long long a, long long b) { return (a + b - 1) / b; }

long long count_tiles(const GemmProblem& problem, const GemmConfig& config) {
  const long long n_blocks = ceil_div(problem.n, config.block_n);
  long long m_blocks = ceil_div(problem.m, config.block_m);
  if (problem.kind == GemmKind::kMasked) m_blocks *= problem.num_groups;
  // Each group's last block is partly empty: half a block a group, on average.
  if (problem.kind == GemmKind::kContiguous) m_blocks += problem.num_groups / 2;
  return m_blocks * n_blocks;
}

// Cycles of one tile: tensor core (m64nNk32 takes N / 2 cycles; a lone warpgroup cannot hide its
// promotion), plus filling the pipeline and storing the result.
double tile_cycles(const GemmProblem& problem, const GemmConfig& config) {
  constexpr double kWgmmaPerBlock = 4;
  constexpr double kPromotion = 0.75;  // FMAs of one k block over its wgmma time, per warpgroup
  constexpr double kFillAndStore = 1800;
  const double k_blocks = double(ceil_div(problem.k, 128));
  const int warpgroups = config.block_m / 64;
  const double wgmma = kWgmmaPerBlock * config.block_n / 2.0;
  const double exposed = warpgroups == 1 ? kPromotion * wgmma : 0.15 * wgmma;
  return k_blocks * (warpgroups * wgmma + exposed) + kFillAndStore;
}

}  // namespace

std::span<const GemmConfig> gemm_configs() { return kConfigs; }

GemmChoice choose_gemm(const GemmProblem& problem) {
  GemmChoice best;
  for (const GemmConfig& config : kConfigs) {
    if (config.kind != problem.kind) continue;
    const long long tiles = count_tiles(problem, config);
    const long long waves = std::max(1LL, ceil_div(tiles, problem.num_sms));
    const double cycles = double(waves) * tile_cycles(problem, config);
    if (best.config.kernel && cycles >= best.modelled_cycles) continue;
    best = {config, int(std::clamp<long long>(tiles, 1, problem.num_sms)), tiles, cycles, ""};
  }
  char text[160];
  std::snprintf(text, sizeof(text), "%lld tiles of %dx%d in %lld wave(s) on %d SMs, %d stages",
                best.tiles, best.config.block_m, best.config.block_n,
                std::max(1LL, ceil_div(best.tiles, problem.num_sms)), problem.num_sms,
                best.config.num_stages);
  best.reason = text;
  return best;
}

}  // namespace dsk::launch
