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
};

// What the CTAs of a cluster do together: a pair shares an operand, or several split k.
struct GemmCluster {
  int pair_m = 1;  // 2: two tiles, one above the other, share B
  int pair_n = 1;  // 2: two tiles, side by side, share A
  int split = 1;   // CTAs that share the k of one tile
  int size() const { return pair_m * pair_n * split; }
};

enum class GemmFamily {
  kPlain,    // rows of A on wgmma's M side; scales of B by block
  kSwapped,  // rows of A on wgmma's N side
  kColumns,  // scales of B by row: along k
  kSwiglu,
};

struct GemmConfig {
  const char* kernel = nullptr;  // name in csrc/cuda/instances/gemm.def
  GemmFamily family = GemmFamily::kPlain;
  int block_m = 0;  // rows of D in a tile
  int block_n = 0;  // rows of B; columns of D, but for SwiGLU
  int num_stages = 0;
  int threads = 0;
  int shared_bytes = 0;
};

// For tests and benchmarks: this instance and this cluster, and no other.
struct GemmForce {
  std::string kernel;  // empty: choose
  GemmCluster cluster;
};

struct GemmChoice {
  GemmConfig config;
  GemmCluster cluster;
  int raster = 1;  // blocks of rows (or pairs) walked before the next block of columns
  int num_ctas = 0;
  long long tiles = 0;
  double modelled_cycles = 0;  // an estimate to compare configurations by, nothing more
  std::string reason;          // one printable sentence
};

// Every shipped configuration.
std::span<const GemmConfig> gemm_configs();

// An estimate of the time in clock cycles. Any tile sizes will do, shipped or not.
double gemm_cycles(const GemmProblem& problem, const GemmConfig& config,
                   const GemmCluster& cluster);

// The shipped configuration with the fewest modelled cycles. Throws std::invalid_argument if none
// fits: a forced kernel that does not run this kind of problem, or not in such a cluster.
GemmChoice choose_gemm(const GemmProblem& problem, const GemmForce& force = {});

}  // namespace dsk::launch
