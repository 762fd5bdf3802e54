// Parameters of what surrounds latent attention. Letters: t tokens, h heads.
#pragma once

#include <cstdint>

#include "cuda/params/gemm.hpp"
#include "cuda/params/rowwise.hpp"

namespace dsk {

constexpr int kMlaQueryLatent = 1536;  // width of the queries' latent
constexpr int kMlaNope = 128;          // of a head's query, without position
constexpr int kMlaRope = 64;           // with position
constexpr int kMlaValues = 128;        // of a head's output

// One token's latents: normalised, rotated, stored. Strides of bf16 tensors count elements.
struct MlaLatentsParams {
  const void* q;              // [t, 1536] bf16, row stride ld_q; null: no query latent
  const void* latent;         // [t, 512] bf16, row stride ld_latent
  const void* k_rope;         // [t, 64] bf16, row stride ld_rope
  const void* q_weight;       // [1536]
  const void* latent_weight;  // [512]; null: the latent is stored as it comes
  const float* cos;           // [t, 32]; null: k_rope is stored as it comes
  const float* sin;           // [t, 32]
  const int64_t* slots;       // [t]: page * tokens of a page + offset; -1 skips the token
  void* q_out;                // [t, 1536] bf16, contiguous
  uint8_t* cache;             // rows of 576 bf16 or 656 bytes, 16-byte aligned
  int64_t ld_q;
  int64_t ld_latent;
  int64_t ld_rope;
  int64_t ld_page;   // bytes
  int64_t ld_token;  // bytes
  int64_t num_slots;
  int32_t t;
  int32_t page;  // tokens of a page
  int32_t fp8;
  int32_t interleaved;
  float eps;
  WideType q_weight_type;
  WideType latent_weight_type;
};

// A product for each head: y[t, h, n] = x[t, h, k] times w[h], and the rotation of queries.
struct MlaAbsorbParams {
  TensorMapBytes x;     // [t, h * x_columns] bf16, box [64, 64], 128B swizzle
  TensorMapBytes w;     // [rows, 512] bf16, box [64 or 128, 64], 128B swizzle; head i at i * w_rows
  GemmResult y;         // [t, h * y_columns] bf16
  const void* rope_in;  // [t, h, 64] bf16, strides ld_in, ld_in_head; queries only
  void* rope_out;       // [t, h, 64] bf16, strides h * y_columns, y_columns
  const float* cos;     // [t, 32]
  const float* sin;
  int64_t ld_in;
  int64_t ld_in_head;
  int32_t t;
  int32_t h;
  int32_t n;
  int32_t k;
  int32_t x_columns;  // between two heads
  int32_t y_columns;
  int32_t w_rows;
  int32_t interleaved;
};

}  // namespace dsk
