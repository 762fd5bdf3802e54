// Parameter structs of the CUDA kernels: plain data, passed by value, the same on host and device.
#pragma once

#include <cstdint>

namespace dsk {

enum class ScaleFormat : int { kFp32 = 0, kUe8m0 = 1 };

struct QuantizeParams {
  const void* x;     // [rows, cols] bf16 or fp32, row stride ld_x elements
  uint8_t* data;     // [rows, cols] e4m3, row stride ld_data bytes
  float* scale;      // [rows, ceil(cols / 128)] fp32, MN-major: strides (1, ld_scale)
  int64_t ld_x;      // elements
  int64_t ld_data;   // bytes
  int64_t ld_scale;  // floats; align(rows, 4) so that TMA can read a column of scales
  int32_t rows;
  int32_t cols;
};

// The driver's 128-byte tensor map, opaque; kernels only pass its address to TMA.
struct alignas(128) TensorMapBytes {
  uint64_t opaque[16];
};

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
