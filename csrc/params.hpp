// What the launchers and the CPU kernels are given: plain structs, a shape on every pointer.
// Strides count elements; the last dimension of every matrix is contiguous unless it has a stride.
#pragma once

#include <cstdint>

namespace dsk {

enum class Type : int { kF32, kBF16, kF16, kE4M3 };

struct Matrix {
  const void* data = nullptr;  // [rows, columns]
  int64_t stride = 0;          // between rows
  Type type = Type::kF32;
};

struct MutableMatrix {
  void* data = nullptr;  // [rows, columns]
  int64_t stride = 0;
  Type type = Type::kF32;
};

struct Scales {
  float* data = nullptr;  // [ceil(m / block_m), ceil(k / block_k)]
  int64_t stride_m = 0;
  int64_t stride_k = 0;
};

// One struct for every op that ends in a row: quantise, RMSNorm, SwiGLU and their fusions.
struct RowwiseParams {
  int64_t m = 0, k = 0;        // of the result
  Matrix x;                    // [m, k]; SwiGLU [m, 2 k] = [gate; up]
  Matrix residual;             // [m, k] or null
  Matrix weight;               // [k]
  float eps = 0;
  MutableMatrix y;             // [m, k] or null
  MutableMatrix sum;           // [m, k] or null: x + residual
  uint8_t* data = nullptr;     // e4m3 [m, k] or null
  int64_t data_stride = 0;
  Scales scale;
  int64_t block_m = 1, block_k = 128;
  bool pow2 = false;
  int threads = 1;
};

struct RopeParams {
  int64_t t = 0, h = 0, r = 0;
  const void* x = nullptr;  // [t, h, r], strides x_t, x_h, 1
  int64_t x_t = 0, x_h = 0;
  const float* cos = nullptr;  // [t, r / 2]
  const float* sin = nullptr;  // [t, r / 2]
  int64_t angle_t = 0;
  void* y = nullptr;  // [t, h, r], strides y_t, y_h, 1
  int64_t y_t = 0, y_h = 0;
  Type type = Type::kF32;
  bool interleaved = true, inverse = false;
  int threads = 1;
};

// y [m, n] = x [m, k] times weights [n, k] transposed, + c, + bias.
struct GemmParams {
  int64_t m = 0, n = 0, k = 0;
  Matrix x;                             // [m, k]: e4m3, bf16, fp16 or fp32
  Scales scale_x;                       // [m, ceil(k / 128)] for e4m3
  const uint8_t* weights = nullptr;     // packed (csrc/cpu/packed.hpp)
  const uint8_t* nan_blocks = nullptr;  // [ceil(n / 64), ceil(k / 128)]
  Scales scale_w;                       // [ceil(n / 128), ceil(k / 128)]
  Matrix c;                             // [m, n] or null
  Matrix bias;                          // [n] or null
  MutableMatrix y;                      // [m, n]
  int threads = 1;
};

}  // namespace dsk
