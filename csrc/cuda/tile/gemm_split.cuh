// Split-K: the CTAs of a cluster each sum a share of k of one tile. Their partial sums meet in
// shared memory and are added in the order of the shares, so the result does not depend on timing;
// each CTA finishes a part of the tile. No workspace, no atomics, no second kernel.
//
// The launcher gives every cluster exactly one tile, so the stages' memory is free by then.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "cuda/params/gemm.hpp"
#include "cuda/ptx/cluster.cuh"
#include "cuda/tile/gemm_result.cuh"

namespace dsk {

// One CTA's partial sums, row by row. Rows are padded: eight rows of a fragment hit other banks.
template <int kRows_, int kColumns_>
struct PartialTile {
  static constexpr int kRows = kRows_;
  static constexpr int kColumns = kColumns_;
  float value[kRows][kColumns + 8];
};

// A warpgroup's 64 x kN fragment into the CTA's PartialTile, from row `first` on.
template <int kN, class Tile>
__device__ __forceinline__ void write_partial(Tile& to, int first, const float (&sum)[kN / 2]) {
  const int lane = threadIdx.x % 32;
  const int row = first + threadIdx.x % kWarpgroup / 32 * 16 + lane / 4;
#pragma unroll
  for (int i = 0; i < kN / 2; i += 2) {
    float* pair = &to.value[row + i % 4 / 2 * 8][i / 4 * 8 + lane % 4 * 2];
    *reinterpret_cast<float2*>(pair) = make_float2(sum[i], sum[i + 1]);
  }
}

__device__ __forceinline__ float4 add(const float4& x, const float4& y) {
  return make_float4(__fadd_rn(x.x, y.x), __fadd_rn(x.y, y.y), __fadd_rn(x.z, y.z),
                     __fadd_rn(x.w, y.w));
}

__device__ __forceinline__ float4 load_four(const void* from, ElementType type, int64_t index) {
  if (type == ElementType::kFloat32)
    return *reinterpret_cast<const float4*>(static_cast<const float*>(from) + index);
  const auto* pair = static_cast<const __nv_bfloat16*>(from) + index;
  const float2 low = load_pair(pair), high = load_pair(pair + 2);
  return make_float4(low.x, low.y, high.x, high.y);
}

__device__ __forceinline__ void store_four(void* to, ElementType type, int64_t index,
                                           const float4& x) {
  if (type == ElementType::kFloat32) {
    *reinterpret_cast<float4*>(static_cast<float*>(to) + index) = x;
  } else {
    const __nv_bfloat162 low = __floats2bfloat162_rn(x.x, x.y);
    const __nv_bfloat162 high = __floats2bfloat162_rn(x.z, x.w);
    *reinterpret_cast<uint2*>(static_cast<__nv_bfloat16*>(to) + index) = make_uint2(
        *reinterpret_cast<const uint32_t*>(&low), *reinterpret_cast<const uint32_t*>(&high));
  }
}

// The sum of the shares' partial sums at `own`, in order. Four loads are under way at once.
__device__ __forceinline__ float4 sum_shares(float* own, int shares) {
  constexpr int kAtOnce = 4;
  float4 total = make_float4(0.f, 0.f, 0.f, 0.f);
  for (int first = 0; first < shares; first += kAtOnce) {
    float4 part[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int share = min(first + i, shares - 1);  // a few loads too many, no branches
      part[i] = *reinterpret_cast<const float4*>(ptx::map_to_rank(own, share));
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (first + i < shares) total = first + i == 0 ? part[0] : add(total, part[i]);
    }
  }
  return total;
}

// By all kThreads math threads of every CTA, after each has written its PartialTile. `at` is the
// whole tile's place.
template <int kThreads, class Tile>
__device__ __forceinline__ void reduce_and_store(const GemmResult& to, int n, const ResultPlace& at,
                                                 Tile& mine) {
  constexpr int kFours = Tile::kColumns / 4;
  const int shares = ptx::cluster_size();
  sync_cluster();
  for (int i = ptx::cluster_rank() * kThreads + threadIdx.x; i < at.rows_left * kFours;
       i += shares * kThreads) {
    const int row = i / kFours;
    const int column = i % kFours * 4;
    if (at.column + column >= n) continue;
    float* own = &mine.value[row][column];
    float4 total = sum_shares(own, shares);
    const int64_t index = (at.row + row) * n + at.column + column;
    const int64_t bias_index = int64_t(at.group) * n + at.column + column;
    if (to.c) total = add(total, load_four(to.c, to.c_type, index));
    if (to.bias) total = add(total, load_four(to.bias, to.bias_type, bias_index));
    store_four(to.d, to.d_type, index, total);
  }
  // Others may still be reading this CTA's shared memory.
  meet_cluster();
}

}  // namespace dsk
