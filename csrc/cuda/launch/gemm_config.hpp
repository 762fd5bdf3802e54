// Which instance runs a shape, and why: a pure function, tested on the host over thousands of
// shapes.
#pragma once

#include <span>
#include <string>

namespace dsk::launch {

enum class GemmKind { kDense, kContiguous, kMasked };

struct GemmProblem {
  GemmKind kind = GemmKind::kDense;
  int m = 0;  // rows: all of them; masked: rows expected in each group
  int n = 0;
  int k = 0;
  int num_groups = 1;
  int num_sms = 132;
};

struct GemmConfig {
  const char* kernel = nullptr;  // name in csrc/cuda/instances/gemm.def
  GemmKind kind = GemmKind::kDense;
  int block_m = 0;
  int block_n = 0;
  int num_stages = 0;
  int threads = 0;
  int shared_bytes = 0;
};

struct GemmChoice {
  GemmConfig config;
  int num_ctas = 0;
  long long tiles = 0;
  double modelled_cycles = 0;  // an estimate to compare configurations by, nothing more
  std::string reason;          // one printable sentence
};

// Every shipped configuration.
std::span<const GemmConfig> gemm_configs();

// The shipped configuration with the fewest modelled cycles.
GemmChoice choose_gemm(const GemmProblem& problem);

}  // namespace dsk::launch
