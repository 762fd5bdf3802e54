// BF16 GEMM, D[m, n] = A[m, k] * B[n, k]^T (+ C) (+ bias): the training baseline that FP8 is
// measured against. Dense, grouped by rows, masked and grouped along k: one main loop, the
// scheduler differs.
//
// The two floors, 4096 x 4096 x 7168 on an H800: 0.24 TFLOP at 989 TFLOP/s = 243 us of tensor core;
// 151 MB of operands and result at 3.35 TB/s = 45 us of memory.
//
// BF16 needs no scales and no promotion: Hopper's accumulator keeps all of fp32's mantissa, so the
// sums stay in it over all of k. Nothing happens between two k blocks; the wgmma of the next one is
// issued while the last one's runs, and a stage is freed one block late, when its reader is done.
// Producer, tile queue and epilogue are those of the FP8 kernels.
#pragma once

#include <cuda/ptx>

#include "cuda/gemm_shape.hpp"
#include "cuda/params/gemm.hpp"
#include "cuda/ptx/wgmma_bf16.cuh"
#include "cuda/tile/gemm_result.cuh"
#include "cuda/tile/gemm_roles.cuh"
#include "cuda/tile/gemm_scheduler.cuh"
#include "cuda/tile/ring.cuh"
#include "cuda/tile/smem_layout.cuh"

namespace dsk {

constexpr int kBf16BlockK = kSwizzleBytes / 2;  // values of a swizzled row
constexpr int kBf16MmaK = 16;                   // values one wgmma consumes

template <int kBlockM_, int kBlockN_, int kNumStages_>
struct GemmBf16Shape {
  static constexpr int kBlockM = kBlockM_;
  static constexpr int kBlockN = kBlockN_;
  static constexpr int kNumStages = kNumStages_;
  static constexpr int kMathWarpgroups = kBlockM / kMmaM;
  static constexpr int kStageBytes = (kBlockM + kBlockN) * kSwizzleBytes;
  static_assert(kBlockM % kMmaM == 0 && kBlockN % gemm_panel_columns(kBlockN) == 0);
  static_assert(kNumStages >= 2, "a stage is freed while the next one is read");
};

template <class Shape>
struct alignas(1024) GemmBf16Smem {
  uint8_t a[Shape::kNumStages][Shape::kBlockM * kSwizzleBytes];
  uint8_t b[Shape::kNumStages][Shape::kBlockN * kSwizzleBytes];
  ResultPanels<Shape::kBlockN> d[Shape::kMathWarpgroups];
  Ring<Shape::kNumStages> ring;
  TileQueue queue;
};

// sum = one warpgroup's 64 x kN sums over k blocks [k_begin, k_end), in the wgmma accumulator
// layout. left(stage) and right(stage) are the stage's operands: 64 and kN swizzled rows; an
// MN-major right one is kN / 64 tiles of 64 rows of k.
template <int kN, ptx::Major kRight = ptx::Major::kK, class Stages, class Left, class Right>
__device__ __forceinline__ void running_sum(Stages& ring, typename Stages::Position& at,
                                            int sharers, int k_begin, int k_end, Left left,
                                            Right right, float (&sum)[kN / 2]) {
#pragma unroll
  for (float& value : sum) value = 0.f;
  constexpr bool kTransposed = kRight == ptx::Major::kMn;
  typename Stages::Position last = at;
  const StageRelease release(ring, sharers);

  for (int k_block = k_begin; k_block < k_end; ++k_block) {
    ring.await(at);
    const uint64_t desc_a = k_major_descriptor(left(at.stage));
    const uint64_t desc_b = kTransposed
                                ? mn_major_descriptor(right(at.stage), kBf16BlockK * kSwizzleBytes)
                                : k_major_descriptor(right(at.stage));
    ptx::wgmma_fence(sum);
#pragma unroll
    for (int k = 0; k < kBf16BlockK; k += kBf16MmaK) {
      const uint64_t next_b = kTransposed ? advance_k_rows(desc_b, k) : advance_k(desc_b, k * 2);
      ptx::WgmmaBf16<kN>::template mma<ptx::Major::kK, kRight>(sum, advance_k(desc_a, k * 2),
                                                               next_b, 1);
    }
    ptx::wgmma_commit_group();
    // All but this block's products are done: nobody reads the last block's stage any more.
    ptx::wgmma_wait_group<1>();
    if (k_block > k_begin) release(last.stage);
    last = at;
    at.advance();
  }
  ptx::wgmma_wait_group<0>(sum);
  if (k_begin < k_end) release(last.stage);
}

template <class Shape>
__device__ __forceinline__ void gemm_bf16(const GemmBf16Params& p) {
  extern __shared__ __align__(1024) uint8_t shared_memory[];
  auto& smem = *reinterpret_cast<GemmBf16Smem<Shape>*>(shared_memory);
  static_assert(sizeof(smem) ==
                gemm_bf16_shared_bytes(Shape::kBlockM, Shape::kBlockN, Shape::kNumStages));
  using Scheduler = GemmScheduler<Shape::kBlockM, Shape::kBlockN, kBf16BlockK>;
  const int sharers = p.extent.sharers();
  const bool along_k = p.extent.kind == GroupKind::kAlongK;

  const auto load = [&](const GemmTile& tile, int k_block, int stage, uint64_t* full) {
    const int k = k_block * kBf16BlockK;
    const int b_row = (along_k ? 0 : tile.group * p.extent.n) + tile.n_start;
    load_tile<Shape::kBlockM>(smem.a[stage], p.a, k, tile.a_row,
                              p.extent.cluster == ClusterUse::kSharedA, full);
    load_tile<Shape::kBlockN>(smem.b[stage], p.b, k, b_row,
                              p.extent.cluster == ClusterUse::kSharedB, full);
  };
  const auto compute = [&](int warpgroup) {
    constexpr int kN = Shape::kBlockN;
    const int first_row = warpgroup * kMmaM;
    const auto left = [&](int stage) { return smem.a[stage] + first_row * kSwizzleBytes; };
    const auto right = [&](int stage) { return smem.b[stage]; };
    RingPosition<Shape::kNumStages> at;
    for_each_tile(smem.queue, [&](const GemmTile& tile) {
      float sum[kN / 2];
      running_sum<kN>(smem.ring, at, sharers, tile.k_begin, tile.k_end, left, right, sum);
      const int row = tile.a_row + first_row;
      const ResultPlace place{(along_k ? int64_t(tile.group) * p.extent.m : 0) + row,
                              tile.row_end - row, tile.n_start, tile.group,
                              ends_with_map(p.extent, tile)};
      await_panels(warpgroup);
      finish_tile<kN>(p.result, p.extent.n, place, smem.d[warpgroup], warpgroup, sum);
    });
    drain_stores();
  };
  const auto producer = make_producer<Scheduler>(smem, p.extent, Shape::kStageBytes, load);
  run_roles<Shape::kMathWarpgroups>(smem, sharers, producer, compute);
}

}  // namespace dsk
