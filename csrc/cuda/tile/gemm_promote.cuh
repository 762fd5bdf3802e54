// The FP8 main loop: tensor cores sum 128 of k, CUDA cores scale that sum and add it in fp32.
//
// Hopper's tensor core keeps about 14 bits while it accumulates FP8 products, so sums over a long K
// lose what training needs. Every 128 of K the partial sum therefore leaves the tensor core and is
// added on the CUDA cores, together with the scales it needs anyway (V3 report, 3.3.2).
//
// A Scales type says which scale belongs to which accumulator:
//   read(stage)            fetch this block's scales, while the tensor core works
//   kReadsLate             whether some find no register beside the accumulators in flight
//   read_rest(stage)       fetch those, if so, when the products are done
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
constexpr bool kOverlapsItself = kN * kMathWarpgroups <= 128;

// The products of one warpgroup, k block after k block: its 64 rows by kN columns.
template <int kN, class Stages, class Scales>
class PromotingLoop {
 public:
  using Position = typename Stages::Position;
  using Sums = float[kN / 2];  // in the wgmma accumulator layout

  __device__ __forceinline__ PromotingLoop(Stages& ring, Position& at, const StageRelease& release,
                                           const StageDescriptors& left,
                                           const StageDescriptors& right, Scales& scales, Sums& sum)
      : ring_(ring),
        at_(at),
        release_(release),
        left_(left),
        right_(right),
        scales_(scales),
        sum_(sum) {}

  // Starts the products of the next stage, and returns its number.
  __device__ __forceinline__ int start_next(Sums& partial) {
    const int stage = at_.stage;
    start(at_, partial);
    at_.advance();
    return stage;
  }

  __device__ __forceinline__ void start(const Position& at, Sums& partial) {
    const int stage = at.stage;
    ring_.await(at);
    ptx::wgmma_fence(partial);
#pragma unroll
    for (int k = 0; k < kFp8BlockK; k += kFp8MmaK) {
      ptx::WgmmaE4m3<kN>::mma(partial, left_.at(stage, k), right_.at(stage, k), k != 0);
    }
    ptx::wgmma_commit_group();
  }

  // Waits for the oldest products, which `stage` holds and of which at most kPending newer ones are
  // under way; frees the stage and adds them to the sums.
  template <int kPending>
  __device__ __forceinline__ void finish(int stage, Sums& partial) {
    scales_.read(stage);
    ptx::wgmma_wait_group<kPending>(partial);
    if constexpr (Scales::kReadsLate) {
      scales_.read_rest(stage);
      scales_.promote(sum_, partial);
      __syncwarp();  // one lane frees what all have read
      release_(stage);
    } else {
      release_(stage);
      scales_.promote(sum_, partial);
    }
  }

  // One block at a time, round after round of the ring: stages, and with them all addresses, are
  // constants.
  __device__ __forceinline__ void round_after_round(int blocks) {
    constexpr int kStages = Stages::kStages;
    int end = at_.stage + blocks;  // counted from this round's stage 0
    while (at_.stage != end) {
      const int stop = min(end, kStages);
      const uint32_t mine = (1u << stop) - (1u << at_.stage);
#pragma unroll
      for (int stage = 0; stage < kStages; ++stage) {
        if ((mine >> stage & 1) == 0) continue;
        float partial[kN / 2];
        start({stage, at_.phase}, partial);
        finish<0>(stage, partial);
      }
      at_.stage = stop;
      if (stop == kStages) {
        end -= kStages;
        at_.stage = 0;
        at_.phase ^= 1;
      }
    }
  }

 private:
  Stages& ring_;
  Position& at_;  // to be started
  const StageRelease& release_;
  const StageDescriptors &left_, &right_;
  Scales& scales_;
  Sums& sum_;
};

// sum = one warpgroup's sums over k blocks [k_begin, k_end) of operands `left` (64 swizzled rows)
// and `right` (kN). prepare() gets ready for what follows: where warps wait for the last products
// anyway, if they wait at all.
template <int kN, bool kOverlapped, class Stages, class Scales, class Prepare>
__device__ __forceinline__ void promoted_sum(Stages& ring, typename Stages::Position& at,
                                             const StageRelease& release, int k_begin, int k_end,
                                             const StageDescriptors& left,
                                             const StageDescriptors& right, Scales& scales,
                                             float (&sum)[kN / 2], Prepare prepare) {
#pragma unroll
  for (float& value : sum) value = 0.f;
  PromotingLoop<kN, Stages, Scales> loop(ring, at, release, left, right, scales, sum);
  if constexpr (!kOverlapped) {
    loop.round_after_round(k_end - k_begin);
    prepare();
  } else if (k_begin < k_end) {
    float even[kN / 2], odd[kN / 2];
    int in_even = loop.start_next(even);  // the stage
    int left_over = k_end - k_begin - 1;  // to be started
    for (; left_over >= 2; left_over -= 2) {
      const int in_odd = loop.start_next(odd);
      loop.template finish<1>(in_even, even);
      in_even = loop.start_next(even);
      loop.template finish<1>(in_odd, odd);
    }
    if (left_over == 1) {
      const int in_odd = loop.start_next(odd);
      loop.template finish<1>(in_even, even);
      prepare();
      loop.template finish<0>(in_odd, odd);
    } else {
      prepare();
      loop.template finish<0>(in_even, even);
    }
  } else {
    prepare();
  }
}

}  // namespace dsk
