// Parameters of prefill attention. Letters: t rows (tokens) of a ragged batch of b requests,
// h heads. Shapes that the kernel and its launcher agree on.
#pragma once

#include <cstdint>

#include "cuda/params/tensor_map.hpp"

namespace dsk {

constexpr int kPrefillWidth = 192;   // of q and k: 128 without position, 64 RoPE
constexpr int kPrefillValues = 128;  // of v and out
constexpr int kPrefillRows = 128;    // query rows of a CTA, 64 for each of two warpgroups
constexpr int kPrefillBlock = 128;   // keys taken at a time
constexpr int kPrefillStages = 2;

// Bytes of MlaPrefillSmem: Q, stages of K and V, barriers.
constexpr int mla_prefill_shared_bytes() {
  const int q = kPrefillRows * kPrefillWidth * 2;
  const int stage = kPrefillBlock * (kPrefillWidth + kPrefillValues) * 2;
  const int barriers = 2 * kPrefillStages * 2 * 8;
  return (q + kPrefillStages * stage + barriers + 1023) / 1024 * 1024;
}

struct MlaPrefillParams {
  TensorMapBytes q;             // [h, t, 192] bf16, box [1, 64, 64], 128B swizzle
  TensorMapBytes k;             // [h, keys, 192] bf16, box [1, 128, 64], 128B swizzle
  TensorMapBytes v;             // [h, keys, 128] bf16, box [1, 128, 64], 128B swizzle
  const int32_t* cu_seqlens_q;  // [b + 1]
  const int32_t* cu_seqlens_k;  // [b + 1]
  void* out;                    // [t, h, 128] bf16, contiguous
  float* lse;                   // [h, t], natural logarithm
  int32_t b;
  int32_t h;
  int32_t t;
  int32_t causal;
  float scale_log2;  // softmax scale * log2(e)
};

}  // namespace dsk
