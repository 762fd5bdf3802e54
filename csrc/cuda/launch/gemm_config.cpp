#include "cuda/launch/gemm_config.hpp"

#include <algorithm>
#include <cstdio>
#include <stdexcept>

#include "cuda/gemm_shape.hpp"

namespace dsk::launch {
namespace {

constexpr GemmConfig make(const char* kernel, GemmFamily family, int block_m, int block_n,
                          int num_stages) {
  GemmConfig config{kernel, family, block_m, block_n, num_stages, 0, 0};
  int warpgroups = 2;
  switch (family) {
    case GemmFamily::kPlain:
      warpgroups = block_m / 64;
      config.shared_bytes = gemm_fp8_shared_bytes(block_m, block_n, num_stages);
      break;
    case GemmFamily::kSwapped:
      config.shared_bytes = gemm_fp8_swapped_shared_bytes(block_m, num_stages);
      break;
    case GemmFamily::kColumns:
      config.shared_bytes = gemm_fp8_column_shared_bytes(block_m, block_n, num_stages);
      break;
    case GemmFamily::kSwiglu:
      config.shared_bytes = gemm_fp8_swiglu_shared_bytes(num_stages);
      break;
  }
  config.threads = (warpgroups + 1) * 128;  // and the producer's
  return config;
}

using enum GemmFamily;
constexpr GemmConfig kConfigs[] = {
    make("gemm_fp8_tokens_16", kSwapped, 16, 128, 11),
    make("gemm_fp8_tokens_32", kSwapped, 32, 128, 10),
    make("gemm_fp8_64x64", kPlain, 64, 64, 8),
    make("gemm_fp8_64x128", kPlain, 64, 128, 8),
    make("gemm_fp8_128x64", kPlain, 128, 64, 8),
    make("gemm_fp8_128x128", kPlain, 128, 128, 5),
    make("gemm_fp8_128x160", kPlain, 128, 160, 5),
    make("gemm_fp8_128x192", kPlain, 128, 192, 4),
    make("gemm_fp8_along_k_128x128", kColumns, 128, 128, 5),
    make("gemm_fp8_swiglu", kSwiglu, 64, 256, 5),
};

constexpr GemmCluster kClusters[] = {{1, 1, 1}, {2, 1, 1}, {1, 2, 1},
                                     {1, 1, 2}, {1, 1, 4}, {1, 1, 8}};

// An H100 or H800 SXM in clock cycles at 1.755 GHz, as the emulator's timing model has it: that
// model replays the kernels themselves, and these few numbers reproduce its order of preference.
constexpr double kMemoryBytes = 1680;   // per cycle, of the device
constexpr double kL2Bytes = 5400;       // per cycle, of the device
constexpr double kL2BytesPerSm = 64;    // per cycle, that TMA can bring into one SM
constexpr double kMinWgmma = 16;        // the narrowest wgmma
constexpr double kHandover = 150;       // barrier, first wgmma's latency, scales
constexpr double kIssue = 200;          // what one warp issues for a k block, but for promotion
constexpr double kIssueOfTwo = 270;     // the same where two warps share a scheduler
constexpr double kStart = 3300;         // launch, first bytes from memory
constexpr double kStoreBytes = 32;      // per cycle, of one CTA's epilogue
constexpr double kExposed = 0.3;        // of the last k block and store, behind the last bytes
constexpr double kPair = 300;           // what waiting for each other costs two CTAs
constexpr double kReduction = 900;      // two cluster barriers and what lies between
constexpr double kReductionBytes = 32;  // per cycle, of partial sums

long long ceil_div(long long a, long long b) { return (a + b - 1) / b; }

// Clusters' worth of tiles; a pair counts once.
long long count_clusters(const GemmProblem& problem, const GemmConfig& config,
                         const GemmCluster& cluster) {
  const long long n_blocks = ceil_div(problem.n, config.block_n * cluster.pair_n);
  long long m_blocks = ceil_div(problem.m, config.block_m * cluster.pair_m);
  if (problem.kind == GemmKind::kMasked || problem.kind == GemmKind::kAlongK)
    m_blocks *= problem.num_groups;
  // Each group's last block is partly empty: half a block a group, on average.
  if (problem.kind == GemmKind::kContiguous) m_blocks += problem.num_groups / 2;
  return m_blocks * n_blocks;
}

// What tensor cores and CUDA cores need for one k block. Warpgroups take turns: while one promotes,
// the others' wgmma runs, or its own where registers hold two sets of partial sums.
double math_cycles(const GemmConfig& config) {
  int warpgroups = config.block_m / 64;
  int columns = config.block_n;
  if (config.family == kSwapped) {
    warpgroups = config.block_n / 64;
    columns = config.block_m;
  } else if (config.family == kSwiglu) {  // two warpgroups side by side
    warpgroups = 2;
    columns /= 2;
  }
  const bool overlaps_itself =
      config.family != kColumns && (columns <= 64 || (columns <= 128 && warpgroups == 1));
  const double wgmma = 4 * std::max(columns / 2.0, kMinWgmma);
  const double promotion = columns / 2.0 * (config.family == kColumns ? 2 : 1);
  const double one = !overlaps_itself  ? wgmma + promotion + kHandover
                     : warpgroups == 1 ? kIssue + 0.8 * columns
                                       : kIssueOfTwo + 1.2 * columns;
  return std::max(warpgroups * wgmma, one);
}

double operand_cycles(const GemmConfig& config, const GemmCluster& cluster, double active_ctas) {
  const double bytes =
      128.0 * (config.block_m / double(cluster.pair_n) + config.block_n / double(cluster.pair_m));
  const double arriving = 128.0 * (config.block_m + config.block_n);  // its peer's loads included
  return std::max(arriving / kL2BytesPerSm, bytes / (kL2Bytes / active_ctas));
}

double store_cycles(const GemmConfig& config) {
  return config.block_m * config.block_n * (config.family == kColumns ? 4 : 2) / kStoreBytes;
}

double reduction_cycles(const GemmConfig& config, int split) {
  if (split == 1) return 0;
  return kReduction + config.block_m * config.block_n * 4 / kReductionBytes;
}

double memory_cycles(const GemmProblem& problem) {
  const bool along_k = problem.kind == GemmKind::kAlongK;
  const double planes = problem.kind == GemmKind::kMasked ? problem.num_groups : 1;
  const double a = planes * problem.m * problem.k;
  const double b = double(along_k ? 1 : problem.num_groups) * problem.n * problem.k;
  const double results = along_k ? problem.num_groups * 8.0 : planes * 2.0;
  return (a + b + results * problem.m * problem.n) / kMemoryBytes;
}

// Blocks of rows under way together: the fewest bytes of A and B for one wave of CTAs.
int choose_raster(const GemmProblem& problem, const GemmConfig& config,
                  const GemmCluster& cluster) {
  int best = 8;
  double fewest = 0;
  for (const int rows : {8, 16}) {
    const double columns = double(ceil_div(problem.num_sms, rows));
    const double footprint = rows * config.block_m + columns * config.block_n;
    if (fewest > 0 && footprint >= fewest) continue;
    best = rows;
    fewest = footprint;
  }
  return best / cluster.pair_m;
}

bool runs(const GemmProblem& problem, GemmFamily family) {
  if (problem.swiglu) return family == kSwiglu;
  if (problem.kind == GemmKind::kAlongK) return family == kColumns;
  if (problem.kind == GemmKind::kContiguous) return family == kPlain;
  return family == kPlain || family == kSwapped;
}

bool fits(const GemmProblem& problem, const GemmConfig& config, const GemmCluster& cluster,
          int k_blocks_each) {
  if (cluster.size() > std::max(1, problem.num_sms)) return false;
  const bool pair = cluster.pair_m * cluster.pair_n > 1;
  if (pair && config.family == kSwapped) return false;
  if (cluster.pair_n > 1 && config.family == kSwiglu) return false;
  if (cluster.split == 1) return true;
  // Splitting k only pays, and is only possible, while every cluster gets one tile.
  return problem.kind == GemmKind::kDense && !problem.swiglu && !problem.deterministic &&
         count_clusters(problem, config, cluster) * cluster.split <= problem.num_sms &&
         ceil_div(problem.k, 128) >= k_blocks_each * cluster.split;
}

// Whether the second tile of a pair is there more often than not.
bool pairs_up(const GemmProblem& problem, const GemmConfig& config, const GemmCluster& cluster) {
  const bool shared_rows = problem.kind == GemmKind::kContiguous;
  const long long rows = shared_rows ? ceil_div(problem.m, problem.num_groups) : problem.m;
  return (cluster.pair_m == 1 || ceil_div(rows, config.block_m) > 1) &&
         (cluster.pair_n == 1 || ceil_div(problem.n, config.block_n) > 1);
}

bool is_candidate(const GemmProblem& problem, const GemmConfig& config, const GemmCluster& cluster,
                  const GemmForce& force) {
  if (!runs(problem, config.family)) return false;
  if (force.kernel.empty())
    return pairs_up(problem, config, cluster) && fits(problem, config, cluster, 2);
  return config.kernel == force.kernel && cluster.pair_m == force.cluster.pair_m &&
         cluster.pair_n == force.cluster.pair_n && cluster.split == force.cluster.split &&
         fits(problem, config, cluster, 1);
}

std::string explain(const GemmProblem& problem, const GemmChoice& choice) {
  const GemmConfig& config = choice.config;
  const int split = choice.cluster.split;
  char text[240];
  std::snprintf(text, sizeof(text), "%lld tiles of %dx%d%s in %lld wave(s) on %d SMs, %d stages",
                choice.tiles, config.block_m, config.block_n,
                config.family == kSwapped ? " with the weights on the M side" : "",
                std::max(1LL, ceil_div(choice.tiles * split, problem.num_sms)), problem.num_sms,
                config.num_stages);
  std::string reason = text;
  if (split > 1) reason += ", k split " + std::to_string(split) + " ways";
  if (choice.cluster.pair_m > 1) reason += ", pairs share B";
  if (choice.cluster.pair_n > 1) reason += ", pairs share A";
  if (config.family == kSwiglu) reason += ", SwiGLU in the epilogue";
  return reason;
}

}  // namespace

std::span<const GemmConfig> gemm_configs() { return kConfigs; }

double gemm_cycles(const GemmProblem& problem, const GemmConfig& config,
                   const GemmCluster& cluster) {
  const long long clusters = count_clusters(problem, config, cluster);
  const long long slots = std::max(1, problem.num_sms / cluster.size());
  const long long waves = std::max(1LL, ceil_div(clusters, slots));
  const double active = double(std::min(clusters, slots) * cluster.size());
  double k_blocks = double(ceil_div(ceil_div(problem.k, 128), cluster.split));
  if (problem.kind == GemmKind::kAlongK)
    k_blocks = std::max(1.0, k_blocks / std::max(1, problem.num_groups));
  const double block =
      std::max(math_cycles(config), operand_cycles(config, cluster, std::max(1.0, active)));
  const double tiles = double(waves) * (k_blocks * block + store_cycles(config));
  const double memory = memory_cycles(problem) + kExposed * (block + store_cycles(config));
  const double pair = cluster.pair_m * cluster.pair_n > 1 ? kPair : 0;
  return kStart + std::max(tiles, memory) + pair + reduction_cycles(config, cluster.split);
}

GemmChoice choose_gemm(const GemmProblem& problem, const GemmForce& force) {
  GemmChoice best;
  for (const GemmConfig& config : kConfigs) {
    for (const GemmCluster& cluster : kClusters) {
      if (!is_candidate(problem, config, cluster, force)) continue;
      const double cycles = gemm_cycles(problem, config, cluster);
      if (best.config.kernel && cycles >= best.modelled_cycles) continue;
      best.config = config;
      best.cluster = cluster;
      best.modelled_cycles = cycles;
    }
  }
  if (!best.config.kernel) {
    throw std::invalid_argument("no GEMM kernel fits: " + std::to_string(problem.num_sms) +
                                " SMs, forced kernel '" + force.kernel + "' in clusters of " +
                                std::to_string(force.cluster.size()));
  }
  const long long clusters = count_clusters(problem, best.config, best.cluster);
  best.raster = choose_raster(problem, best.config, best.cluster);
  best.tiles = clusters * best.cluster.pair_m * best.cluster.pair_n;
  const long long slots = std::max(1, problem.num_sms / best.cluster.size());
  // Contiguous groups may need more tiles than were guessed: take every SM.
  const long long used = problem.kind == GemmKind::kContiguous ? slots : std::min(clusters, slots);
  best.num_ctas = int(std::max(1LL, used)) * best.cluster.size();
  best.reason = explain(problem, best);
  return best;
}

}  // namespace dsk::launch
