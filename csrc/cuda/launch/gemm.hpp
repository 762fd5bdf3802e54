// Host launcher of the FP8 GEMM family.
#pragma once

#include <cstdint>

#include "cuda/launch/context.hpp"
#include "cuda/launch/gemm_config.hpp"
#include "cuda/params/gemm.hpp"

namespace dsk::launch {

// A matrix or vector of fp32 or bf16 values; contiguous.
struct GemmTensor {
  void* address = nullptr;
  ElementType type = ElementType::kBfloat16;
};

// D[., n] = A * B^T (+ C) (+ bias). Pointers are device addresses; leading dimensions count
// elements.
struct GemmFp8Args {
  GemmKind kind = GemmKind::kDense;
  const void* a = nullptr;     // [m, k] e4m3 (masked: [groups, m, k]), row stride lda, 16 | lda
  const float* sfa = nullptr;  // [ceil(k/128), m] (masked: [groups, ...]), row stride ld_sfa, 4 |
  const void* b = nullptr;     // [groups * n, k] e4m3, row stride ldb, 16 | ldb
  const float* sfb = nullptr;  // [groups, ceil(n/128), ceil(k/128)], contiguous
  GemmTensor d;                // [m, n] (masked: [groups, m, n]), 8 | n
  GemmTensor c;                // as d, or null; may be d itself
  GemmTensor bias;             // [groups, n], or null
  const int32_t* group_rows = nullptr;  // [groups] on the device: rows of each group
  int m = 0, n = 0, k = 0;              // masked: m is the rows allotted to each group
  int expected_m = 0;                   // masked: rows expected in each group, for the choice only
  int num_groups = 1;
  int64_t lda = 0, ldb = 0, ld_sfa = 0;
  int num_sms = 0;  // 0: all
};

// On the emulator the call returns when the kernel has run, on a GPU it is queued on `stream`.
// Empty problems (m or n of 0) launch nothing. Throws DeviceError on anything the driver refuses.
void gemm_fp8(Context& context, const GemmFp8Args& args, device::cu::Stream stream);

}  // namespace dsk::launch
