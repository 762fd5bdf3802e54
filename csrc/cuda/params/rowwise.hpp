// Parameters of the row-wise kernels. "Scales, MN-major" are fp32 [rows, groups] with strides
// (1, ld_scale), so that TMA can read a column of them.
#pragma once

#include <cstdint>

namespace dsk {

enum class ScaleFormat : int { kFp32 = 0, kUe8m0 = 1 };
enum class NarrowType : int { kE4m3 = 0, kE5m6 = 1 };  // E5M6 is held in float16, 4 low bits zero
enum class WideType : int { kBfloat16 = 0, kFloat32 = 1 };

// Groups of 1 x 128. With several planes, each has `rows` rows and scales of its own.
struct QuantizeParams {
  const void* x;        // [planes * rows, cols] bf16 or fp32, row stride ld_x
  void* data;           // [planes * rows, cols] e4m3 (bytes) or E5M6 (float16), contiguous
  float* scale;         // [planes][rows, ceil(cols / 128)], MN-major
  int64_t ld_x;         // elements
  int64_t ld_scale;     // floats; align(rows, 4)
  int64_t plane_scale;  // floats between two planes' scales
  int32_t planes;
  int32_t rows;
  int32_t cols;
  ScaleFormat format;
  NarrowType type;
};

// Blocks of 128 x 128.
struct QuantizeBlockParams {
  const void* x;  // [planes, rows, cols] bf16 or fp32, contiguous
  uint8_t* data;  // [planes, rows, cols] e4m3, contiguous
  float* scale;   // [planes, ceil(rows / 128), ceil(cols / 128)], contiguous
  int32_t planes;
  int32_t rows;
  int32_t cols;
  ScaleFormat format;
};

// Quantise x^T in groups of 1 x 128, that is x in groups of 128 x 1.
struct QuantizeTransposeParams {
  const void* x;         // [rows, cols] bf16, fp32 or e4m3, row stride ld_x
  uint8_t* data;         // [cols, rows] e4m3, contiguous
  float* scale;          // [cols, ceil(rows / 128)], MN-major
  const float* x_scale;  // e4m3 only: one per x_block_rows x 128 of x, the strides below
  int64_t ld_x;          // elements
  int64_t ld_scale;      // floats; align(cols, 4)
  int64_t x_scale_row;   // floats
  int64_t x_scale_col;   // floats
  int32_t x_block_rows;
  int32_t rows;
  int32_t cols;
  ScaleFormat format;
};

struct RmsNormParams {
  const void* x;         // [rows, cols] bf16 or fp32, contiguous; all of this type
  const void* residual;  // [rows, cols], added to x first; or null
  const void* weight;    // [cols] of weight_type
  void* total;           // [rows, cols] x + residual, where there is a residual
  void* y;               // [rows, cols]; e4m3 where there is a scale
  float* scale;          // [planes][plane_rows, ceil(cols / 128)], MN-major; null: no quantisation
  int64_t ld_scale;
  int64_t plane_scale;
  int32_t rows;
  int32_t cols;
  int32_t plane_rows;
  float eps;
  WideType weight_type;
  ScaleFormat format;
};

struct RopeParams {
  const void* x;     // [tokens * heads, 2 * half], contiguous
  const float* cos;  // [tokens, half], contiguous
  const float* sin;  // [tokens, half], contiguous
  void* y;           // [tokens * heads, 2 * half], contiguous
  int32_t rows;      // tokens * heads
  int32_t heads;
  int32_t half;
  int32_t interleaved;  // pairs (2p, 2p + 1), else (p, p + half)
  int32_t inverse;      // turn by the negative angle
  WideType type;
};

struct SwigluParams {
  const void* x;     // [planes * rows, 2 * cols] = [gate; up] bf16 or fp32, row stride ld_x
  const void* grad;  // backward only: [rows, cols], x's type, contiguous
  void* y;       // [planes * rows, cols] x's type (e4m3 where there is a scale); backward: like x
  float* scale;  // [planes][rows, ceil(cols / 128)], MN-major; null: no quantisation
  int64_t ld_x;
  int64_t ld_scale;
  int64_t plane_scale;
  int32_t planes;
  int32_t rows;
  int32_t cols;
  ScaleFormat format;
  WideType type;
};

struct DequantizeParams {
  const void* data;    // [planes, rows, cols] e4m3 or E5M6 (float16), contiguous
  const float* scale;  // one per block_rows x block_cols, the strides below
  void* y;             // [planes, rows, cols], contiguous
  int64_t scale_plane;
  int64_t scale_row;
  int64_t scale_col;
  int32_t block_rows;
  int32_t block_cols;
  int32_t planes;
  int32_t rows;
  int32_t cols;
  NarrowType type;
  WideType out;
};

// E5M6 between float16 and its storage of 12 bits an element.
struct PackE5m6Params {
  uint16_t* wide;   // [rows, cols] float16 bits, contiguous
  uint8_t* packed;  // [rows, 3 * ceil(cols / 2)], contiguous
  int32_t rows;
  int32_t cols;
  int32_t unpack;  // direction
};

}  // namespace dsk
