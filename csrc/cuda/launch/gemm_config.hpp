// Which instance runs a shape, and why: pure functions, tested on the host over thousands of
// shapes.
#pragma once

#include <span>
#include <string>

namespace dsk::launch {

enum class GemmKind { kDense, kContiguous, kMasked, kAlongK };

struct GemmProblem {
  GemmKind kind = GemmKind::kDense;
  int m = 0;  // rows: all of them; masked: rows expected in each group
  int n = 0;
  int k = 0;  // along k: of all groups together
  int num_groups = 1;
  int num_sms = 132;
  bool swiglu = false;         // b = [gate; up] of n rows: D has n / 2 columns
  bool deterministic = false;  // a row's bits must not depend on the other rows: never split k
  // For tests and benchmarks: this instance and no other, k split so many ways.
  std::string forced_kernel;
  int forced_split = 1;
};

struct GemmConfig {
  const char* kernel = nullptr;  // name in csrc/cuda/instances/gemm.def
  GemmKind kind = GemmKind::kDense;
  bool swapped = false;  // rows of A on wgmma's N side
  int block_m = 0;       // rows of D in a tile
  int block_n = 0;       // columns
  int num_stages = 0;
  int threads = 0;
  int shared_bytes = 0;
  int pair_m = 1;  // tiles, one above the other or side by side, of a cluster that shares
  int pair_n = 1;  // an operand
  bool swiglu = false;
  bool can_split = false;  // clusters may share the k of one tile
};

struct GemmChoice {
  GemmConfig config;
  int split = 1;    // CTAs that share the k of one tile
  int cluster = 1;  // CTAs of a cluster
  int raster = 1;   // blocks of rows walked before the next block of columns
  int num_ctas = 0;
  long long tiles = 0;
  double modelled_cycles = 0;  // an estimate to compare configurations by, nothing more
  std::string reason;          // one printable sentence
};

// Every shipped configuration.
std::span<const GemmConfig> gemm_configs();

// An estimate of the time of `config` with k split `split` ways, in clock cycles. Any tile sizes
// will do, shipped or not.
double gemm_cycles(const GemmProblem& problem, const GemmConfig& config, int split);

// The shipped configuration with the fewest modelled cycles. Throws std::invalid_argument if none
// fits: a forced kernel that does not run this kind of problem, or cannot split k like that.
GemmChoice choose_gemm(const GemmProblem& problem);

}  // namespace dsk::launch
