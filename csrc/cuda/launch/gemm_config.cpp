#include "cuda/launch/gemm_config.hpp"

#include <algorithm>
#include <cstdio>
#include <stdexcept>

#include "cuda/gemm_shape.hpp"

namespace dsk::launch {
namespace {

constexpr GemmConfig plain(const char* kernel, GemmKind kind, int block_m, int block_n,
                           int num_stages) {
  GemmConfig config;
  config.kernel = kernel;
  config.kind = kind;
  config.block_m = block_m;
  config.block_n = block_n;
  config.num_stages = num_stages;
  config.threads = (block_m / 64 + 1) * 128;  // a warpgroup for each 64 rows, and the producer's
  config.shared_bytes = kind == GemmKind::kAlongK
                            ? gemm_fp8_column_shared_bytes(block_m, block_n, num_stages)
                            : gemm_fp8_shared_bytes(block_m, block_n, num_stages);
  return config;
}

constexpr GemmConfig paired(GemmConfig config, int pair_m, int pair_n) {
  config.pair_m = pair_m;
  config.pair_n = pair_n;
  return config;
}

constexpr GemmConfig splitting(GemmConfig config) {
  config.can_split = true;
  return config;
}

constexpr GemmConfig swapped(const char* kernel, GemmKind kind, int tokens, int num_stages) {
  GemmConfig config;
  config.kernel = kernel;
  config.kind = kind;
  config.swapped = true;
  config.block_m = tokens;
  config.block_n = 128;
  config.num_stages = num_stages;
  config.threads = 3 * 128;
  config.shared_bytes = gemm_fp8_swapped_shared_bytes(tokens, num_stages);
  config.can_split = kind == GemmKind::kDense;
  return config;
}

constexpr GemmConfig swiglu(const char* kernel, GemmKind kind, int num_stages) {
  GemmConfig config;
  config.kernel = kernel;
  config.kind = kind;
  config.swiglu = true;
  config.block_m = 64;
  config.block_n = 256;
  config.num_stages = num_stages;
  config.threads = 3 * 128;
  config.shared_bytes = gemm_fp8_swiglu_shared_bytes(num_stages);
  return config;
}

using enum GemmKind;
constexpr GemmConfig kConfigs[] = {
    swapped("gemm_fp8_dense_16", kDense, 16, 8),
    swapped("gemm_fp8_dense_32", kDense, 32, 8),
    splitting(plain("gemm_fp8_dense_64x128", kDense, 64, 128, 8)),
    plain("gemm_fp8_dense_128x128", kDense, 128, 128, 5),
    paired(plain("gemm_fp8_dense_128x192", kDense, 128, 192, 4), 2, 1),
    plain("gemm_fp8_contiguous_64x128", kContiguous, 64, 128, 8),
    paired(plain("gemm_fp8_contiguous_128x128", kContiguous, 128, 128, 5), 1, 2),
    swapped("gemm_fp8_masked_16", kMasked, 16, 8),
    swapped("gemm_fp8_masked_32", kMasked, 32, 8),
    plain("gemm_fp8_masked_64x128", kMasked, 64, 128, 8),
    paired(plain("gemm_fp8_masked_128x128", kMasked, 128, 128, 5), 1, 2),
    plain("gemm_fp8_along_k_128x128", kAlongK, 128, 128, 5),
    paired(swiglu("gemm_fp8_contiguous_swiglu", kContiguous, 5), 2, 1),
    swiglu("gemm_fp8_masked_swiglu", kMasked, 5),
};

// Rates of an H100 or H800 SXM, per clock cycle at 1.755 GHz.
constexpr double kMemoryBytes = 3.35e12 / 1.755e9;  // of the device
constexpr double kL2Bytes = 6.5e12 / 1.755e9;       // of the device
constexpr double kL2BytesPerSm = 64;
constexpr double kMinWgmma = 16;  // cycles of the narrowest wgmma

long long ceil_div(long long a, long long b) { return (a + b - 1) / b; }

// Clusters' worth of tiles; a pair counts once.
long long count_clusters(const GemmProblem& problem, const GemmConfig& config) {
  const long long n_blocks = ceil_div(problem.n, config.block_n * config.pair_n);
  const int rows = config.block_m * config.pair_m;
  long long m_blocks = ceil_div(problem.m, rows);
  if (problem.kind == kMasked || problem.kind == kAlongK) m_blocks *= problem.num_groups;
  // Each group's last block is partly empty: half a block a group, on average.
  if (problem.kind == kContiguous) m_blocks += problem.num_groups / 2;
  return m_blocks * n_blocks;
}

// What tensor cores and CUDA cores need for one k block. Warpgroups take turns: while one promotes,
// the others' wgmma runs.
double math_cycles(const GemmConfig& config) {
  int warpgroups = (config.swapped ? config.block_n : config.block_m) / 64;
  int columns = config.swapped ? config.block_m : config.block_n;
  if (config.swiglu) {  // two warpgroups side by side
    warpgroups = 2;
    columns /= 2;
  }
  const double wgmma = 4 * std::max(columns / 2.0, kMinWgmma);
  const double promotion = columns / 2.0 * (config.kind == kAlongK ? 2 : 1);
  constexpr double kHandover = 90;  // barrier, first wgmma's latency, scales
  return std::max(warpgroups * wgmma, wgmma + promotion + kHandover);
}

double operand_cycles(const GemmConfig& config, double active_ctas) {
  const double bytes =
      128.0 * (config.block_m / double(config.pair_n) + config.block_n / double(config.pair_m));
  return bytes / std::min(kL2BytesPerSm, kL2Bytes / active_ctas);
}

// Filling the pipeline, and storing the result.
double fixed_cycles(const GemmConfig& config, int split) {
  constexpr double kFill = 1000, kStoreLatency = 500, kStoreBytes = 32;
  const double bytes = config.block_m * config.block_n * (config.kind == kAlongK ? 4.0 : 2.0);
  const double reduction = split > 1 ? 1200 + config.block_m * config.block_n * 4 / 48.0 : 0;
  return kFill + kStoreLatency + bytes / kStoreBytes + reduction;
}

double memory_cycles(const GemmProblem& problem) {
  const double planes = problem.kind == kMasked ? problem.num_groups : 1;
  const double a = planes * problem.m * problem.k;
  const double b = double(problem.kind == kAlongK ? 1 : problem.num_groups) * problem.n * problem.k;
  const double results = problem.kind == kAlongK ? problem.num_groups * 8.0 : planes * 2.0;
  return (a + b + results * problem.m * problem.n) / kMemoryBytes;
}

// Rows of blocks under way together: the fewest bytes of A and B for one wave of CTAs.
int choose_raster(const GemmProblem& problem, const GemmConfig& config) {
  int best = 8;
  double fewest = 0;
  for (const int rows : {8, 16}) {
    const double columns = double(ceil_div(problem.num_sms, rows));
    const double footprint = rows * config.block_m + columns * config.block_n;
    if (fewest > 0 && footprint >= fewest) continue;
    best = rows;
    fewest = footprint;
  }
  return std::max(1, best / config.pair_m);
}

bool is_candidate(const GemmProblem& problem, const GemmConfig& config, int split) {
  if (config.kind != problem.kind || config.swiglu != problem.swiglu) return false;
  if (config.pair_m * config.pair_n > problem.num_sms) return false;
  if (!problem.forced_kernel.empty())
    return config.kernel == problem.forced_kernel && split == problem.forced_split;
  return true;
}

// Splitting k only pays, and is only possible, while every cluster gets one tile.
bool may_split(const GemmProblem& problem, const GemmConfig& config, int split) {
  if (split == 1) return true;
  const int blocks_each = problem.forced_kernel.empty() ? 2 : 1;
  return config.can_split && !problem.deterministic &&
         count_clusters(problem, config) * split <= problem.num_sms &&
         ceil_div(problem.k, 128) >= blocks_each * split;
}

std::string explain(const GemmProblem& problem, const GemmChoice& choice) {
  const GemmConfig& config = choice.config;
  char text[240];
  std::snprintf(text, sizeof(text), "%lld tiles of %dx%d%s in %lld wave(s) on %d SMs, %d stages",
                choice.tiles, config.block_m, config.block_n,
                config.swapped ? " with the weights on the M side" : "",
                std::max(1LL, ceil_div(choice.tiles * choice.split, problem.num_sms)),
                problem.num_sms, config.num_stages);
  std::string reason = text;
  if (choice.split > 1) reason += ", k split " + std::to_string(choice.split) + " ways";
  if (config.pair_m > 1) reason += ", pairs share B";
  if (config.pair_n > 1) reason += ", pairs share A";
  if (config.swiglu) reason += ", SwiGLU in the epilogue";
  return reason;
}

}  // namespace

std::span<const GemmConfig> gemm_configs() { return kConfigs; }

double gemm_cycles(const GemmProblem& problem, const GemmConfig& config, int split) {
  const int pair = config.pair_m * config.pair_n;
  const long long clusters = count_clusters(problem, config);
  const long long slots = std::max(1, problem.num_sms / (pair * split));
  const long long waves = std::max(1LL, ceil_div(clusters, slots));
  const double active = double(std::min(clusters, slots) * pair * split);
  double k_blocks = double(ceil_div(ceil_div(problem.k, 128), split));
  if (problem.kind == kAlongK) k_blocks = std::max(1.0, k_blocks / std::max(1, problem.num_groups));
  const double block = std::max(math_cycles(config), operand_cycles(config, std::max(1.0, active)));
  const double tile = k_blocks * block + fixed_cycles(config, split);
  return std::max(double(waves) * tile, memory_cycles(problem) + fixed_cycles(config, split));
}

GemmChoice choose_gemm(const GemmProblem& problem) {
  GemmChoice best;
  for (const GemmConfig& config : kConfigs) {
    for (const int split : {1, 2, 4, 8}) {
      if (!is_candidate(problem, config, split) || !may_split(problem, config, split)) continue;
      const double cycles = gemm_cycles(problem, config, split);
      if (best.config.kernel && cycles >= best.modelled_cycles) continue;
      best.config = config;
      best.split = split;
      best.modelled_cycles = cycles;
    }
  }
  if (!best.config.kernel) {
    throw std::invalid_argument("no GEMM kernel fits: " + std::to_string(problem.num_sms) +
                                " SMs, forced kernel '" + problem.forced_kernel +
                                "', forced split " + std::to_string(problem.forced_split));
  }
  const int pair = best.config.pair_m * best.config.pair_n;
  const long long clusters = count_clusters(problem, best.config);
  best.cluster = pair * best.split;
  best.raster = choose_raster(problem, best.config);
  best.tiles = clusters * pair;
  const long long slots = std::max(1, problem.num_sms / best.cluster);
  // Contiguous groups may need more tiles than were guessed: take every SM.
  const long long used = problem.kind == kContiguous ? slots : std::min(clusters, slots);
  best.num_ctas = int(std::max(1LL, used)) * best.cluster;
  best.reason = explain(problem, best);
  return best;
}

}  // namespace dsk::launch
