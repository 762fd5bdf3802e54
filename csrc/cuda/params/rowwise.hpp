// Parameters of the row-wise kernels.
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

}  // namespace dsk
