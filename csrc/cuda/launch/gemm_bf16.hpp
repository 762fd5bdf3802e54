// Host launcher of the BF16 GEMM.
#pragma once

#include "cuda/launch/gemm.hpp"

namespace dsk::launch {

// D[., n] = A * B^T (+ C) (+ bias); along k, a is [m, k], b [n, k], d [groups, m, n]. Pointers are
// device addresses; leading dimensions count elements.
struct GemmBf16Args {
  GemmKind kind = GemmKind::kDense;
  const void* a = nullptr;  // [m, k] bf16 (masked: [groups, m, k]), row stride lda, 8 | lda
  const void* b = nullptr;  // [groups * n, k] bf16, row stride ldb, 8 | ldb
  GemmTensor d;             // [m, n] (masked: [groups, m, n]), 8 | n
  GemmTensor c;             // as d, or null; may be d itself
  GemmTensor bias;          // [groups, n], or null
  const int32_t* group_rows = nullptr;  // as in GemmFp8Args; along k: multiples of 64
  const int32_t* runs = nullptr;
  int m = 0, n = 0, k = 0;
  int expected_m = 0;
  int num_groups = 1;
  int64_t lda = 0, ldb = 0;
  int num_sms = 0;
  std::string kernel;  // for tests and benchmarks: this instance; empty: choose
};

// The instance with the fewest modelled cycles; never in clusters. Throws std::invalid_argument
// for a kernel that does not exist.
GemmChoice choose_gemm_bf16(const GemmProblem& problem, const std::string& kernel = {});

// As gemm_fp8.
void gemm_bf16(Context& context, const GemmBf16Args& args, device::cu::Stream stream);

}  // namespace dsk::launch
