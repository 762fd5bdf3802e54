// Host launcher of the FP8 GEMM family.
#pragma once

#include <cstdint>

#include "cuda/launch/context.hpp"
#include "cuda/launch/gemm_config.hpp"
#include "cuda/params/gemm.hpp"

namespace dsk::launch {

// A matrix or vector; contiguous.
struct GemmTensor {
  void* address = nullptr;
  ElementType type = ElementType::kBfloat16;
  float* scale = nullptr;  // e4m3: [planes * ceil(n / 128), rows] fp32, row stride ld_scale
  int64_t ld_scale = 0;
};

// D[., n] = A * B^T (+ C) (+ bias); along k, a is [m, k], b [n, k], d [groups, m, n]. Pointers are
// device addresses; leading dimensions count elements.
struct GemmFp8Args {
  GemmKind kind = GemmKind::kDense;
  const void* a = nullptr;     // [m, k] e4m3 (masked: [groups, m, k]), row stride lda, 16 | lda
  const float* sfa = nullptr;  // [ceil(k/128), m] (masked: [groups, ...]), row stride ld_sfa, 4 |
  const void* b = nullptr;     // [groups * n, k] e4m3, row stride ldb, 16 | ldb
  const float* sfb = nullptr;  // [groups, ceil(n/128), ceil(k/128)], contiguous; along k: as sfa
  GemmTensor d;                // [m, n] (masked: [groups, m, n]), 8 | n; SwiGLU: n / 2 columns
  GemmTensor c;                // as d, or null; may be d itself
  GemmTensor bias;             // [groups, n], or null
  // On the device: rows of each group (along k: its columns, multiples of 128), or, for contiguous
  // groups, what gemm_runs found.
  const int32_t* group_rows = nullptr;  // [groups]
  const int32_t* runs = nullptr;        // [1 + 3 m]
  // Masked, instead of group_rows: [groups] 1 + rows of a group, stored by another kernel when the
  // rows are there. The call only queues, on the emulator too, to which all memory must be lent.
  int32_t* arrived = nullptr;
  int m = 0, n = 0, k = 0;  // masked: m is the rows allotted to each group
  int expected_m = 0;       // masked: rows expected in each group, for the choice only
  int num_groups = 1;
  int64_t lda = 0, ldb = 0, ld_sfa = 0, ld_sfb = 0;  // ld_sfb: along k
  int num_sms = 0;                                   // 0: all
  bool swiglu = false;  // d = silu(gate) * up; with type e4m3 quantised in blocks of 1x128
  bool deterministic = false;
  GemmForce force;
};

// The groups in a list of each row's group: see GemmRunsParams.
void gemm_runs(Context& context, const GemmRunsParams& params, device::cu::Stream stream);

// On the emulator the call returns when the kernel has run, on a GPU it is queued on `stream`.
// Empty problems (m or n of 0) launch nothing. Throws DeviceError on anything the driver refuses.
void gemm_fp8(Context& context, const GemmFp8Args& args, device::cu::Stream stream);

}  // namespace dsk::launch
