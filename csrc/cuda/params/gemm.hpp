// Parameters of the GEMM kernels.
#pragma once

#include <cstdint>

#include "cuda/params/tensor_map.hpp"

namespace dsk {

// FP8 GEMM with 1x128 scales of A and 128x128 scales of B. G = num_groups (1 when dense).
struct GemmFp8Params {
  TensorMapBytes a;           // [rows of A, k] e4m3, box [BLOCK_M, 128], 128B swizzle
  TensorMapBytes b;           // [G * n, k] e4m3, box [BLOCK_N, 128], 128B swizzle
  TensorMapBytes sfa;         // [G or 1 * ceil(k / 128), rows] fp32, box [1, BLOCK_M]
  TensorMapBytes d;           // [rows of D, n] bf16, box [64, 64], 128B swizzle
  const float* sfb;           // [G, ceil(n / 128), ceil(k / 128)] fp32, contiguous
  void* d_rows;               // D again, for tiles that end inside a group: [rows, n] bf16
  const int32_t* group_rows;  // [G] rows of each group, on the device; null when dense
  int32_t m;                  // rows (dense), rows allotted to each group (masked)
  int32_t n;
  int32_t k;
  int32_t num_groups;
};

}  // namespace dsk
