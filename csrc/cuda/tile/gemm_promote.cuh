// The FP8 main loop: tensor cores sum 128 of k, CUDA cores scale that sum and add it in fp32.
//
// Hopper's tensor core keeps about 14 bits while it accumulates FP8 products, so sums over a long K
// lose what training needs. Every 128 of K the partial sum therefore leaves the tensor core and is
// added on the CUDA cores, together with the scales it needs anyway (V3 report, 3.3.2).
//
// A Scales type says which scale belongs to which accumulator:
//   read(k_block, stage)   fetch this block's scales, while the tensor core works
//   read_rest(stage)       fetch those that found no register beside the accumulators in flight
//   promote(sum, partial)  sum[i] = fma(scale of A * scale of B, partial[i], sum[i])
#pragma once

#include <cstdint>

#include "cuda/ptx/wgmma.cuh"
#include "cuda/tile/gemm_roles.cuh"
#include "cuda/tile/smem_layout.cuh"

namespace dsk {

constexpr int kFp8BlockK = 128;  // e4m3 values: a swizzled row, and what one scale covers
constexpr int kFp8MmaK = 32;     // e4m3 values one wgmma consumes

// sum = one warpgroup's 64 x kN sums over k blocks [k_begin, k_end), in the wgmma accumulator
// layout. left(stage) and right(stage) are the stage's operands: 64 and kN swizzled rows.
template <int kN, class Stages, class Left, class Right, class Scales>
__device__ __forceinline__ void promoted_sum(Stages& ring, typename Stages::Position& at,
                                             int sharers, int k_begin, int k_end, Left left,
                                             Right right, Scales& scales, float (&sum)[kN / 2]) {
#pragma unroll
  for (float& value : sum) value = 0.f;

  const StageDescriptors a(left(0), left(1)), b(right(0), right(1));
  for (int k_block = k_begin; k_block < k_end; ++k_block) {
    ring.await(at);
    float partial[kN / 2];
    ptx::fence_accumulators(partial);
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < kFp8BlockK; k += kFp8MmaK) {
      ptx::WgmmaE4m3<kN>::mma(partial, a.at(at.stage, k), b.at(at.stage, k), k != 0);
    }
    ptx::wgmma_commit_group();
    scales.read(k_block, at.stage);
    ptx::fence_accumulators(partial);
    ptx::wgmma_wait_group<0>();
    ptx::fence_accumulators(partial);
    scales.read_rest(at.stage);
    ring.release(at, sharers);
    at.advance();

    scales.promote(sum, partial);
  }
}

}  // namespace dsk
