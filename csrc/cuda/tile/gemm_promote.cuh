// The FP8 main loop: tensor cores sum 128 of k, CUDA cores scale that sum and add it in fp32.
//
// Hopper's tensor core keeps about 14 bits while it accumulates FP8 products, so sums over a long K
// lose what training needs. Every 128 of K the partial sum therefore leaves the tensor core and is
// added on the CUDA cores, together with the scales it needs anyway (V3 report, 3.3.2).
//
// A Scales type says which scale belongs to which accumulator:
//   read(stage)            fetch this block's scales, while the tensor core works
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

// Whether a second set of partial sums finds room beside the first: then a k block's products are
// under way while the block before is promoted, and one warpgroup alone keeps the tensor cores
// busy.
template <int kN, int kMathWarpgroups>
constexpr bool kOverlapsItself = kN <= 64 || (kN <= 128 && kMathWarpgroups == 1);

// The products of one warpgroup, k block after k block: its 64 rows by kN columns.
template <int kN, class Stages, class Scales>
class PromotingLoop {
 public:
  using Position = typename Stages::Position;
  using Sums = float[kN / 2];  // in the wgmma accumulator layout

  __device__ __forceinline__ PromotingLoop(Stages& ring, Position& at, int sharers,
                                           const StageDescriptors& left,
                                           const StageDescriptors& right, Scales& scales, Sums& sum)
      : ring_(ring),
        next_(at),
        done_(at),
        sharers_(sharers),
        left_(left),
        right_(right),
        scales_(scales),
        sum_(sum) {}

  // Starts the products of the next stage.
  __device__ __forceinline__ void start(Sums& partial) {
    ring_.await(next_);
    ptx::fence_accumulators(partial);
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < kFp8BlockK; k += kFp8MmaK) {
      ptx::WgmmaE4m3<kN>::mma(partial, left_.at(next_.stage, k), right_.at(next_.stage, k), k != 0);
    }
    ptx::wgmma_commit_group();
    ptx::fence_accumulators(partial);
    next_.advance();
  }

  // Waits for the oldest products, of which at most kPending newer ones are under way; frees their
  // stage and adds them to the sums.
  template <int kPending>
  __device__ __forceinline__ void finish(Sums& partial) {
    scales_.read(done_.stage);
    ptx::wgmma_wait_group<kPending>();
    ptx::fence_accumulators(partial);
    scales_.read_rest(done_.stage);
    ring_.release(done_, sharers_);
    done_.advance();
    scales_.promote(sum_, partial);
  }

 private:
  Stages& ring_;
  Position& next_;  // to be started
  Position done_;   // to be finished
  const int sharers_;
  const StageDescriptors left_, right_;
  Scales& scales_;
  Sums& sum_;
};

// sum = one warpgroup's sums over k blocks [k_begin, k_end). left(stage) and right(stage) are the
// stage's operands: 64 and kN swizzled rows. prepare() gets ready for what follows: where warps
// wait for the last products anyway, if they wait at all.
template <int kN, bool kOverlapped, class Stages, class Left, class Right, class Scales,
          class Prepare>
__device__ __forceinline__ void promoted_sum(Stages& ring, typename Stages::Position& at,
                                             int sharers, int k_begin, int k_end, Left left,
                                             Right right, Scales& scales, float (&sum)[kN / 2],
                                             Prepare prepare) {
#pragma unroll
  for (float& value : sum) value = 0.f;
  PromotingLoop<kN, Stages, Scales> loop(ring, at, sharers, {left(0), left(1)},
                                         {right(0), right(1)}, scales, sum);
  if constexpr (!kOverlapped) {
    for (int left_over = k_end - k_begin; left_over > 0; --left_over) {
      float partial[kN / 2];
      loop.start(partial);
      loop.template finish<0>(partial);
    }
    prepare();
  } else if (k_begin < k_end) {
    float even[kN / 2], odd[kN / 2];
    loop.start(even);
    int left_over = k_end - k_begin - 1;  // to be started
    for (; left_over >= 2; left_over -= 2) {
      loop.start(odd);
      loop.template finish<1>(even);
      loop.start(even);
      loop.template finish<1>(odd);
    }
    if (left_over == 1) {
      loop.start(odd);
      loop.template finish<1>(even);
      prepare();
      loop.template finish<0>(odd);
    } else {
      prepare();
      loop.template finish<0>(even);
    }
  } else {
    prepare();
  }
}

}  // namespace dsk
