// Each token's rows, weighted and summed in fp32 in the order of its choices, rounded once.
//
// Bound by memory: 4096 tokens x 8 rows of 7168 bf16 are 470 MB read and 59 MB written, 158 us at
// 3.35 TB/s. A CTA takes 1024 columns of a token, a thread 4 of them, and has up to 8 rows (fp32:
// 4) on their way before it adds the first; more would cost registers, and so CTAs. Product and sum
// are rounded separately: the reference's bits.
#pragma once

#include "cuda/params/moe.hpp"
#include "cuda/tile/each.cuh"
#include "cuda/tile/quantize.cuh"

namespace dsk {

constexpr int kUnpermuteColumns = 4;  // of a thread
template <typename T>
constexpr int kRowsInFlight = 16 / sizeof(T);

// Adds the rows of a token's choices from `first` on to total; kWhole: every run is whole and
// aligned.
template <typename T, bool kWhole>
__device__ __forceinline__ void add_rows(const MoeUnpermuteParams& p, int token, int first,
                                         int column, float (&total)[kUnpermuteColumns]) {
  const int weighted = p.weights ? p.topk - p.shared : 0;
  using W = typename Word<kUnpermuteColumns * sizeof(T)>::Type;
  const T* y = static_cast<const T*>(p.y) + column;
  constexpr int kRows = kRowsInFlight<T>;
  int row[kRows];
  float weight[kRows];
  alignas(16) T value[kRows][kUnpermuteColumns];
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const int choice = first + i;
    row[i] = choice < p.topk ? int(__ldg(p.row_map + int64_t(token) * p.topk + choice)) : -1;
    weight[i] = choice < weighted ? __ldg(p.weights + int64_t(token) * weighted + choice) : 1.f;
  }
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const T* at = y + int64_t(row[i]) * p.depth;
    if (row[i] < 0) continue;
    if constexpr (kWhole) {
      *reinterpret_cast<W*>(value[i]) = __ldg(reinterpret_cast<const W*>(at));
    } else {
#pragma unroll
      for (int c = 0; c < kUnpermuteColumns; ++c) {
        if (column + c < p.depth) value[i][c] = at[c];
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    if (row[i] < 0) continue;
#pragma unroll
    for (int c = 0; c < kUnpermuteColumns; ++c) {
      total[c] = __fadd_rn(total[c], __fmul_rn(to_float(value[i][c]), weight[i]));
    }
  }
}

template <typename T>
__device__ __forceinline__ void sum_rows(const MoeUnpermuteParams& p, int token, int column) {
  if (column >= p.depth) return;
  const bool whole = p.depth % kUnpermuteColumns == 0 &&
                     reinterpret_cast<uintptr_t>(p.y) % (kUnpermuteColumns * sizeof(T)) == 0;
  float total[kUnpermuteColumns] = {};
  for (int first = 0; first < p.topk; first += kRowsInFlight<T>) {
    if (whole) {
      add_rows<T, true>(p, token, first, column, total);
    } else {
      add_rows<T, false>(p, token, first, column, total);
    }
  }
  store_run(static_cast<T*>(p.out) + int64_t(token) * p.depth + column, p.depth - column, total);
}

__device__ __forceinline__ void unpermute_rows(const MoeUnpermuteParams& p) {
  const int width = blockDim.x * kUnpermuteColumns;
  const int pieces = (p.depth + width - 1) / width;
  for (int64_t at = blockIdx.x; at < int64_t(p.tokens) * pieces; at += gridDim.x) {
    const int token = int(at / pieces);
    const int column = int(at % pieces) * width + int(threadIdx.x) * kUnpermuteColumns;
    if (p.type == WideType::kBfloat16) {
      sum_rows<__nv_bfloat16>(p, token, column);
    } else {
      sum_rows<float>(p, token, column);
    }
  }
}

// Backward of one slot, by one warp: dy = weight * grad, d weight = <grad, y>. Returns the latter.
template <typename T>
__device__ __forceinline__ float slot_backward(const MoeUnpermuteBackwardParams& p, int64_t slot,
                                               int64_t row) {
  const T* grad = static_cast<const T*>(p.grad) + slot / p.topk * p.depth;
  const T* y = static_cast<const T*>(p.y) + row * p.depth;
  T* dy = static_cast<T*>(p.dy) + row * p.depth;
  const float weight = p.weights ? __ldg(p.weights + slot) : 1.f;
  float dot = 0.f;
  each_run_in_warp(p.depth, [&](int column, int left) {
    float g[4], value[4];
    load_run(grad + column, left, g);
    load_run(y + column, left, value);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      dot = __fmaf_rn(g[i], value[i], dot);
      g[i] = __fmul_rn(g[i], weight);
    }
    store_run(dy + column, left, g);
  });
  return warp_sum(dot);
}

// Bound by memory: a row of y read and one of dy written for each slot; the gradient's row is
// shared by a token's slots and comes from L2. 4096 x 8 x 7168 bf16: 0.94 GB, 280 us at 3.35 TB/s.
__device__ __forceinline__ void unpermute_rows_backward(const MoeUnpermuteBackwardParams& p) {
  const int64_t slots = int64_t(p.tokens) * p.topk;
  const int warps = blockDim.x / kWarp;
  for (int64_t slot = int64_t(blockIdx.x) * warps + threadIdx.x / kWarp; slot < slots;
       slot += int64_t(gridDim.x) * warps) {
    const int64_t row = __ldg(p.row_map + slot);
    if (row < 0) continue;
    const float dot = p.type == WideType::kBfloat16 ? slot_backward<__nv_bfloat16>(p, slot, row)
                                                    : slot_backward<float>(p, slot, row);
    if (threadIdx.x % kWarp == 0) p.dweights[slot] = dot;
  }
}

}  // namespace dsk
