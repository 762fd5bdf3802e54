// MLA decode of few rows, the other way round: a request's kN rows are wgmma's columns, tokens and
// latents its 64 rows. A thread holds two of every eight columns, in rows r and r + 8 of its warp.
#pragma once

#include <cuda_bf16.h>

#include <cuda/ptx>

#include "cuda/ptx/math.cuh"
#include "cuda/ptx/matrix.cuh"
#include "cuda/ptx/wgmma_bf16.cuh"
#include "cuda/tile/mla_result.cuh"
#include "cuda/tile/mla_softmax.cuh"

namespace dsk {

// Column of a thread's i-th value of a row: i of 0 .. kN / 4 - 1.
__device__ __forceinline__ int mla_column(int i) { return i / 2 * 8 + threadIdx.x % 4 * 2 + i % 2; }

// Index of that value in the accumulators; half 1 is 8 rows further.
__device__ __forceinline__ constexpr int mla_value(int i, int half) {
  return i / 2 * 4 + half * 2 + i % 2;
}

// Largest (kMax) or sum over the eight lanes that hold the same columns.
template <bool kMax>
__device__ __forceinline__ float across_rows(float value) {
#pragma unroll
  for (int offset = 4; offset < 32; offset *= 2) {
    const float other = __shfl_xor_sync(0xffffffffu, value, offset);
    value = kMax ? fmaxf(value, other) : value + other;
  }
  return value;
}

// Accumulators [16 rows of the warp, kN] as bf16 -> a swizzled tile [kN][64 rows].
template <int kN>
__device__ __forceinline__ void store_transposed(const float (&d)[kN / 2], const uint8_t* tile) {
  const int lane = threadIdx.x % 32;
  const int chunk = threadIdx.x % kMlaWarpgroup / 32 * 2 + lane / 8 % 2;
#pragma unroll
  for (int column = 0; column < kN; column += 16) {
    uint32_t packed[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const __nv_bfloat162 pair =
          __floats2bfloat162_rn(d[column / 2 + 2 * i], d[column / 2 + 2 * i + 1]);
      packed[i] = *reinterpret_cast<const uint32_t*>(&pair);
    }
    const int row = column + lane / 16 * 8 + lane % 8;
    ptx::stmatrix_x4_trans(shared_address(tile) + swizzle128(row, chunk), packed[0], packed[1],
                           packed[2], packed[3]);
  }
}

// P of the block in `buffer`: behind the rows of Q that are used. Not in the block's RoPE columns
// as with many rows: both sides read it there, and each would have to release them.
__device__ __forceinline__ uint8_t* mla_few_weights(MlaDecodeSmem& smem, int buffer) {
  return smem.q[buffer] + kMlaTileBytes / 2;
}

// Running statistics of this thread's columns.
template <int kN>
struct MlaColumns {
  static_assert(kN <= kMlaRows / 2);
  float peak[kN / 4];
  float sum[kN / 4];  // of this thread's rows, of the blocks this warpgroup scored

  __device__ __forceinline__ MlaColumns() {
#pragma unroll
    for (int i = 0; i < kN / 4; ++i) {
      peak[i] = kMlaLowest;
      sum[i] = 0.f;
    }
  }

  __device__ __forceinline__ void follow(const float (&row_max)[kMlaRows],
                                         float (&factor)[kN / 4]) {
#pragma unroll
    for (int i = 0; i < kN / 4; ++i) {
      const float raised = row_max[mla_column(i)];
      factor[i] = ptx::exp2_approx(peak[i] - raised);
      peak[i] = raised;
      sum[i] *= factor[i];
    }
  }

  // s -> P, in place. All warps of the side take part; afterwards none of them reads the block any
  // more.
  __device__ __forceinline__ void softmax(float (&s)[kN / 2], float scale, bool one_block,
                                          MlaDecodeSmem& smem, MlaSide side,
                                          float (&factor)[kN / 4]) {
    float highest[kN / 4];
#pragma unroll
    for (int i = 0; i < kN / 4; ++i) {
      highest[i] = across_rows<true>(fmaxf(s[mla_value(i, 0)], s[mla_value(i, 1)]));
    }
    show(highest, smem, side);
    ptx::named_barrier_sync(kMlaWarpgroupOnly + side, kMlaWarpgroup);
#pragma unroll
    for (int i = 0; i < kN / 4; ++i) {
      float largest = smem.column[side][0][mla_column(i)];
#pragma unroll
      for (int w = 1; w < 4; ++w) largest = fmaxf(largest, smem.column[side][w][mla_column(i)]);
      const float raised = raised_peak(peak[i], largest * scale, one_block);
      factor[i] = ptx::exp2_approx(peak[i] - raised);
      peak[i] = raised;
      float added = 0.f;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float& value = s[mla_value(i, half)];
        value = ptx::exp2_approx(fmaf(value, scale, -raised));
        added += value;
      }
      sum[i] = fmaf(sum[i], factor[i], added);
    }
  }

  // Hands P and the maxima to both warpgroups; this one may use them at once, the other after the
  // arrival that follows.
  __device__ __forceinline__ void publish(const float (&s)[kN / 2], MlaDecodeSmem& smem,
                                          MlaSide side) const {
    store_transposed<kN>(s, mla_few_weights(smem, side));
    if (threadIdx.x % kMlaWarpgroup / 4 == 0) {
#pragma unroll
      for (int i = 0; i < kN / 4; ++i) smem.row_max[side][mla_column(i)] = peak[i];
    }
    cuda::ptx::fence_proxy_async(cuda::ptx::space_shared);
    ptx::named_barrier_sync(kMlaWarpgroupOnly + side, kMlaWarpgroup);
  }

  // Sums of whole columns, from all warps of both warpgroups.
  __device__ __forceinline__ void join(MlaDecodeSmem& smem, MlaSide side,
                                       float (&total)[kN / 4]) const {
    float mine[kN / 4];
#pragma unroll
    for (int i = 0; i < kN / 4; ++i) mine[i] = across_rows<false>(sum[i]);
    show(mine, smem, side);
    ptx::named_barrier_sync(kMlaBoth, kMlaMathThreads);
#pragma unroll
    for (int i = 0; i < kN / 4; ++i) {
      total[i] = 0.f;
#pragma unroll
      for (int w = 0; w < 8; ++w) total[i] += smem.column[w / 4][w % 4][mla_column(i)];
    }
  }

 private:
  // A warp's statistics, to all warps. Apart from the shuffles, which a branch between them would
  // make wait for each other.
  __device__ static __forceinline__ void show(const float (&values)[kN / 4], MlaDecodeSmem& smem,
                                              MlaSide side) {
    if (threadIdx.x % 32 / 4 != 0) return;
    const int warp = threadIdx.x % kMlaWarpgroup / 32;
#pragma unroll
    for (int i = 0; i < kN / 4; ++i) smem.column[side][warp][mla_column(i)] = values[i];
  }
};

// s [64 tokens, kN] = K Q^T of the block in `buffer`.
template <int kN>
__device__ __forceinline__ void score_tokens(float (&s)[kN / 2], MlaDecodeSmem& smem, int buffer,
                                             uint32_t phase) {
  smem.kv_ring[buffer].await({0, phase});
  ptx::fence_accumulators(s);
  ptx::wgmma_fence();
#pragma unroll
  for (int tile = 0; tile < kMlaTiles; ++tile) {
    if (tile == 4) {
      smem.kv_ring[buffer].await({1, phase});
      ptx::wgmma_fence();  // or ptxas serialises wgmma, for the loop in between
    }
    const uint64_t q = k_major_descriptor(smem.q[tile]);
    const uint64_t k = k_major_descriptor(smem.kv[buffer][tile]);
#pragma unroll
    for (int byte = 0; byte < kSwizzleBytes; byte += 32) {
      ptx::WgmmaBf16<kN>::template mma<ptx::Major::kK, ptx::Major::kK>(
          s, advance_k(k, byte), advance_k(q, byte), tile + byte != 0);
    }
  }
  ptx::wgmma_commit_group();
  finish(s);
}

// o[tile] [64 latents, kN] += V^T P of four tiles of V.
template <int kN>
__device__ __forceinline__ void multiply_latents(float (&o)[4][kN / 2], const uint8_t* p,
                                                 const uint8_t (*v)[kMlaTileBytes]) {
  const uint64_t weights = k_major_descriptor(p);
#pragma unroll
  for (int tile = 0; tile < 4; ++tile) ptx::fence_accumulators(o[tile]);
  ptx::wgmma_fence();
#pragma unroll
  for (int tile = 0; tile < 4; ++tile) {
    const uint64_t values = mn_major_descriptor(v[tile], 0);  // A has 64 rows, one tile
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      ptx::WgmmaBf16<kN>::template mma<ptx::Major::kMn, ptx::Major::kK>(
          o[tile], advance_k_rows(values, 16 * k), advance_k(weights, 32 * k), 1);
    }
  }
  ptx::wgmma_commit_group();
#pragma unroll
  for (int tile = 0; tile < 4; ++tile) ptx::fence_accumulators(o[tile]);
  ptx::wgmma_wait_group<0>();
#pragma unroll
  for (int tile = 0; tile < 4; ++tile) ptx::fence_accumulators(o[tile]);
}

template <int kN>
__device__ __forceinline__ void rescale_columns(float (&o)[4][kN / 2],
                                                const float (&factor)[kN / 4]) {
#pragma unroll
  for (int tile = 0; tile < 4; ++tile) {
#pragma unroll
    for (int i = 0; i < kN / 4; ++i) {
      o[tile][mla_value(i, 0)] *= factor[i];
      o[tile][mla_value(i, 1)] *= factor[i];
    }
  }
}

// Hides the tokens that a column's query may not attend; columns behind the last are unused.
template <int kN>
__device__ __forceinline__ void mask_tokens(const MlaDecodeParams& p, const MlaPiece& piece,
                                            float (&s)[kN / 2], int block) {
  const int first = block * kMlaBlock;
  const int seen_by_all = p.causal ? piece.length - p.s + 1 : piece.length;
  if (first + kMlaBlock <= seen_by_all) return;
  const int token = first + mla_first_row();
#pragma unroll
  for (int i = 0; i < kN / 4; ++i) {
    const int end = p.causal ? seen_by_all + mla_column(i) / p.h : piece.length;
    if (token >= end) s[mla_value(i, 0)] = -INFINITY;
    if (token + 8 >= end) s[mla_value(i, 1)] = -INFINITY;
  }
}

// As store_result of mla_result.cuh.
template <int kN>
__device__ __forceinline__ void store_columns(const MlaDecodeParams& p, const MlaPiece& piece,
                                              MlaDecodeSmem& smem, MlaSide side,
                                              const MlaColumns<kN>& columns,
                                              float (&o)[4][kN / 2]) {
  float total[kN / 4], inverse[kN / 4];
  columns.join(smem, side, total);
  const int rows = p.s * p.h;
#pragma unroll
  for (int i = 0; i < kN / 4; ++i) inverse[i] = total[i] == 0.f ? 0.f : 1.f / total[i];
  rescale_columns<kN>(o, inverse);
  if (piece.slot < 0) {
#pragma unroll
    for (int tile = 0; tile < 4; ++tile) store_transposed<kN>(o[tile], smem.q[side * 4 + tile]);
    send_result(p, piece, smem, side);
  }
#pragma unroll
  for (int i = 0; i < kN / 4; ++i) {
    const int row = mla_column(i);
    if (row >= rows) continue;
    if (piece.slot >= 0) {
      float* to = p.out_partial + (int64_t(piece.slot) * rows + row) * kMlaLatent + side * 256 +
                  mla_first_row();
#pragma unroll
      for (int tile = 0; tile < 4; ++tile) {
        to[tile * 64] = o[tile][mla_value(i, 0)];
        to[tile * 64 + 8] = o[tile][mla_value(i, 1)];
      }
    }
    if (threadIdx.x / 4 == 0) store_row_lse(p, piece, row, columns.peak[i], total[i]);
  }
}

}  // namespace dsk
