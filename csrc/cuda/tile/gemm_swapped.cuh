// Results of swapped products: weights lie on wgmma's M side and tokens on its N side, so a
// warpgroup's fragment is a transposed piece of D: 64 columns of D by kTokens rows.
//
// Accumulator i = 4 (token / 8) + 2 half + e of a thread is the product of token
// 8 (i / 4) + 2 (lane % 4) + e and weight row 16 warp + lane / 4 + 8 half.
#pragma once

#include <cstdint>

#include "cuda/tile/gemm_result.cuh"
#include "cuda/tile/gemm_split.cuh"

namespace dsk {

// kTokens rows of 64 bf16 columns, swizzled: one TMA store.
template <int kTokens>
struct TokenPanel {
  uint8_t row[kTokens * kSwizzleBytes];
};

// Calls visit(i, row, column) for every accumulator of this thread that lies in D.
template <int kTokens, class Visit>
__device__ __forceinline__ void for_each_swapped(const ResultPlace& at, int n, Visit visit) {
  const int lane = threadIdx.x % 32;
  const int first_column = threadIdx.x % kWarpgroup / 32 * 16 + lane / 4;
#pragma unroll
  for (int i = 0; i < kTokens / 2; ++i) {
    const int row = i / 4 * 8 + lane % 4 * 2 + i % 2;
    const int column = first_column + i % 4 / 2 * 8;
    if (row < at.rows_left && at.column + column < n) visit(i, row, column);
  }
}

template <int kTokens, class T>
__device__ __forceinline__ void add_swapped(const T* c, int64_t row_stride, int n,
                                            const ResultPlace& at, float (&sum)[kTokens / 2]) {
  for_each_swapped<kTokens>(at, n, [&](int i, int row, int column) {
    sum[i] = __fadd_rn(sum[i], float(c[row * row_stride + column]));
  });
}

template <int kTokens>
__device__ __forceinline__ void add_terms_swapped(const GemmResult& to, int n,
                                                  const ResultPlace& at,
                                                  float (&sum)[kTokens / 2]) {
  const auto add = [&](const void* from, ElementType type, int64_t first, int64_t row_stride) {
    if (type == ElementType::kFloat32)
      add_swapped<kTokens>(static_cast<const float*>(from) + first, row_stride, n, at, sum);
    else
      add_swapped<kTokens>(static_cast<const __nv_bfloat16*>(from) + first, row_stride, n, at, sum);
  };
  if (to.c) add(to.c, to.c_type, at.row * n + at.column, n);
  if (to.bias) add(to.bias, to.bias_type, int64_t(at.group) * n + at.column, 0);
}

// stmatrix.trans turns the fragments around: each 8x8 matrix of weights x tokens lands as 8 rows of
// D with 8 neighbouring columns each.
template <int kTokens>
__device__ __forceinline__ void write_panel_swapped(TokenPanel<kTokens>& to,
                                                    const float (&sum)[kTokens / 2]) {
  // Matrices 0..3: weights 0-7 and 8-15 by tokens 0-7, then by tokens 8-15.
  const int lane = threadIdx.x % 32;
  const int chunk = threadIdx.x % kWarpgroup / 32 * 2 + lane / 8 % 2;
#pragma unroll
  for (int token = 0; token < kTokens; token += 16) {
    uint32_t packed[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const __nv_bfloat162 pair =
          __floats2bfloat162_rn(sum[token / 2 + 2 * i], sum[token / 2 + 2 * i + 1]);
      packed[i] = *reinterpret_cast<const uint32_t*>(&pair);
    }
    const int row = token + lane / 16 * 8 + lane % 8;
    ptx::stmatrix_x4_trans(shared_address(to.row) + swizzle128(row, chunk), packed[0], packed[1],
                           packed[2], packed[3]);
  }
}

// As finish_tile, for a warpgroup whose 64 columns of D start at at.column.
template <int kTokens>
__device__ __forceinline__ void finish_swapped(const GemmResult& to, int n, const ResultPlace& at,
                                               TokenPanel<kTokens>& panel, int warpgroup,
                                               float (&sum)[kTokens / 2]) {
  using namespace cuda::ptx;
  const bool issuer = threadIdx.x % kWarpgroup == 0;
  if (!to.plain()) {
    add_terms_swapped<kTokens>(to, n, at, sum);
    if (to.d_type == ElementType::kFloat32) {
      float* corner = static_cast<float*>(to.d) + at.row * n + at.column;
      for_each_swapped<kTokens>(
          at, n, [&](int i, int row, int column) { corner[int64_t(row) * n + column] = sum[i]; });
      return;
    }
  }
  write_panel_swapped<kTokens>(panel, sum);

  const bool whole = at.rows_left >= kTokens || at.clipped;
  if (whole) fence_proxy_async(space_shared);
  ptx::named_barrier_sync(kEpilogueBarrier + warpgroup, kWarpgroup);
  if (!whole) {
    copy_panel_rows<64>(to, n, at, [&](int) { return panel.row; });
  } else if (issuer && at.column < n) {
    const int32_t d_at[2] = {at.column, int32_t(at.row)};
    cp_async_bulk_tensor(space_global, space_shared, &to.map, d_at, panel.row);
    cp_async_bulk_commit_group();
  }
}

// A warpgroup's fragment into the CTA's PartialTile [kTokens][columns], from column `first` on.
template <int kTokens, class Tile>
__device__ __forceinline__ void write_partial_swapped(Tile& to, int first,
                                                      const float (&sum)[kTokens / 2]) {
  const int lane = threadIdx.x % 32;
  const int column = first + threadIdx.x % kWarpgroup / 32 * 16 + lane / 4;
#pragma unroll
  for (int i = 0; i < kTokens / 2; ++i) {
    to.value[i / 4 * 8 + lane % 4 * 2 + i % 2][column + i % 4 / 2 * 8] = sum[i];
  }
}

}  // namespace dsk
