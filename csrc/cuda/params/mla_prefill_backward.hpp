// Parameters of prefill attention's gradients. Letters: t rows (tokens) of a ragged batch of b
// requests, h heads. Widths are those of the forward.
#pragma once

#include <cstdint>

#include "cuda/params/mla_prefill.hpp"
#include "cuda/params/tensor_map.hpp"

namespace dsk {

constexpr int kBackwardKept = 128;  // rows of a CTA, 64 for each of two warpgroups
constexpr int kBackwardBlock = 64;  // rows of the other side taken at a time
constexpr int kBackwardStages = 3;

// The side whose gradients a CTA computes. It keeps rows of that side; the other side passes.
enum class PrefillSide { kQueries, kKeys };

// What the gradients need to know of a query.
struct alignas(8) PrefillStatistics {
  float lse;   // in base 2; +inf where nothing was attended
  float mean;  // of dP over the row: sum(grad out) - grad lse
};

// Rows of PrefillStatistics for one head: a request's begin at a multiple of a block.
constexpr int64_t prefill_statistics_rows(int64_t t, int64_t b) {
  return (t / kBackwardBlock + b) * kBackwardBlock;
}

// Bytes of PrefillBackwardSmem: the kept rows, stages of passing rows, barriers.
constexpr int prefill_backward_shared_bytes() {
  const int row = (kPrefillWidth + kPrefillValues) * 2;
  const int stage = kBackwardBlock * (row + int(sizeof(PrefillStatistics)));
  const int barriers = kBackwardStages * 2 * 8;
  return (kBackwardKept * row + kBackwardStages * stage + barriers + 1023) / 1024 * 1024;
}

struct PrefillStatisticsParams {
  const void* out;                // [t, h, 128] bf16, contiguous
  const void* grad;               // [t, h, 128] bf16, contiguous
  const float* lse;               // [h, t], natural logarithm
  const float* grad_lse;          // [h, t]
  const int32_t* cu_seqlens_q;    // [b + 1]
  PrefillStatistics* statistics;  // [h, prefill_statistics_rows(t, b)], written
  int32_t b;
  int32_t h;
  int32_t t;
};

struct PrefillBackwardParams {
  TensorMapBytes q;                     // [h, t, 192] bf16; boxes [1, 64, 64], 128B swizzle
  TensorMapBytes k;                     // [h, keys, 192] bf16
  TensorMapBytes v;                     // [h, keys, 128] bf16
  TensorMapBytes grad;                  // [h, t, 128] bf16
  const PrefillStatistics* statistics;  // [h, prefill_statistics_rows(t, b)]
  const int32_t* cu_seqlens_q;          // [b + 1]
  const int32_t* cu_seqlens_k;          // [b + 1]
  void* dq;                             // [t, h, 192] bf16, contiguous
  void* dk;                             // [keys, h, 192] bf16, contiguous
  void* dv;                             // [keys, h, 128] bf16, contiguous
  int32_t b;
  int32_t h;
  int32_t t;
  int32_t keys;
  int32_t causal;
  float scale;       // of the scores
  float scale_log2;  // scale * log2(e)
};

}  // namespace dsk
