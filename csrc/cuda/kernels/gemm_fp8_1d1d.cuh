// FP8 GEMM with one scale per 1x128 of A and per 1x128 of B: the weight gradients of FP8 training,
// D[m, n] = A[m, k] * B[n, k]^T (+ C), and those of all experts in one launch: A [m, sum k] and
// B [n, sum k] hold the experts' tokens one after the other along k, D is [G, m, n].
//
// The groups are ranges of k blocks of the same two tensors, so one tensor map each serves them all
// and nothing is edited between groups. An expert without tokens loads nothing: its tiles are C, or
// zero, or already there.
//
// The two floors, 7168 x 4096 from 4096 tokens on an H800: 0.24 TFLOP at 1979 TFLOP/s = 122 us of
// tensor core; 46 MB of operands and, accumulating in place, 235 MB of fp32 result read and written
// at 3.35 TB/s = 84 us of memory.
//
// The main loop is that of gemm_fp8_1d2d.cuh, with a second column of scales in each stage: one for
// each column of the tile, so the scale products cost one multiplication for each addition.
#pragma once

#include <cuda/ptx>

#include "cuda/gemm_shape.hpp"
#include "cuda/params/gemm.hpp"
#include "cuda/tile/gemm_promote.cuh"
#include "cuda/tile/gemm_result.cuh"
#include "cuda/tile/gemm_roles.cuh"
#include "cuda/tile/gemm_scheduler.cuh"
#include "cuda/tile/ring.cuh"
#include "cuda/tile/smem_layout.cuh"

namespace dsk {

template <int kBlockM_, int kBlockN_, int kNumStages_>
struct GemmFp8ColumnShape {
  static constexpr int kBlockM = kBlockM_;
  static constexpr int kBlockN = kBlockN_;
  static constexpr int kNumStages = kNumStages_;
  static constexpr int kMathWarpgroups = kBlockM / kMmaM;
  static constexpr int kStageBytes = (kBlockM + kBlockN) * (kFp8BlockK + int(sizeof(float)));
  static_assert(kBlockM % kMmaM == 0 && kBlockN % gemm_panel_columns(kBlockN) == 0);
  static_assert(kBlockN <= 128, "sums, partial sums and column scales must fit the registers");
};

template <class Shape>
struct alignas(1024) GemmFp8ColumnSmem {
  uint8_t a[Shape::kNumStages][Shape::kBlockM * kFp8BlockK];
  uint8_t b[Shape::kNumStages][Shape::kBlockN * kFp8BlockK];
  ResultPanels<Shape::kBlockN> d[Shape::kMathWarpgroups];
  alignas(128) float sfa[Shape::kNumStages][Shape::kBlockM];
  alignas(128) float sfb[Shape::kNumStages][Shape::kBlockN];
  Ring<Shape::kNumStages> ring;
  TileQueue queue;
};

// Both operands' scales from the stage: two rows and kBlockN / 4 columns for each thread.
template <class Shape>
class RowAndColumnScales {
 public:
  static constexpr bool kReadsLate = true;

  __device__ __forceinline__ RowAndColumnScales(const GemmFp8ColumnSmem<Shape>& smem, int warpgroup)
      : sfa_(kept(smem.sfa[0][warpgroup * kMmaM + threadIdx.x % kWarpgroup / 32 * 16 +
                              threadIdx.x % 32 / 4])),
        sfb_(kept(smem.sfb[0][threadIdx.x % 4 * 2])) {}

  __device__ __forceinline__ void read(int stage) {
    const float* rows = &sfa_ + stage * Shape::kBlockM;
    row_scale_[0] = rows[0];
    row_scale_[1] = rows[8];
    read_columns<0>(stage);
  }

  // Half of the columns wait until the products are done: sums, partial sums and all columns
  // together do not fit the registers.
  __device__ __forceinline__ void read_rest(int stage) { read_columns<kColumns / 2>(stage); }

  __device__ __forceinline__ void promote(float (&sum)[Shape::kBlockN / 2],
                                          const float (&partial)[Shape::kBlockN / 2]) const {
#pragma unroll
    for (int column = 0; column < Shape::kBlockN; column += 8) {
      const float2 sb = column_scale_[column / 8];
#pragma unroll
      for (int half = 0; half < 2; ++half) {  // rows r and r + 8 of the fragment
        const int i = column / 2 + half * 2;
        sum[i] = __fmaf_rn(__fmul_rn(row_scale_[half], sb.x), partial[i], sum[i]);
        sum[i + 1] = __fmaf_rn(__fmul_rn(row_scale_[half], sb.y), partial[i + 1], sum[i + 1]);
      }
    }
  }

 private:
  static constexpr int kColumns = Shape::kBlockN / 8;  // pairs of columns of this thread

  template <int kFirst>
  __device__ __forceinline__ void read_columns(int stage) {
    const float* columns = &sfb_ + stage * Shape::kBlockN;
#pragma unroll
    for (int i = kFirst; i < kFirst + kColumns / 2; ++i) {
      column_scale_[i] = *reinterpret_cast<const float2*>(columns + i * 8);
    }
  }

  // Of this thread's first row and column, in the first stage.
  const float& sfa_;
  const float& sfb_;
  float row_scale_[2];
  float2 column_scale_[kColumns];
};

template <class Shape>
__device__ __forceinline__ void gemm_fp8_1d1d(const GemmFp8Params& p) {
  extern __shared__ __align__(1024) uint8_t shared_memory[];
  auto& smem = *reinterpret_cast<GemmFp8ColumnSmem<Shape>*>(shared_memory);
  static_assert(sizeof(smem) ==
                gemm_fp8_column_shared_bytes(Shape::kBlockM, Shape::kBlockN, Shape::kNumStages));
  using Scheduler = GemmScheduler<Shape::kBlockM, Shape::kBlockN, kFp8BlockK>;
  const int sharers = p.extent.sharers();

  const auto load = [&](const GemmTile& tile, int k_block, int stage, uint64_t* full) {
    using namespace cuda::ptx;
    const int k = k_block * kFp8BlockK;
    load_tile<Shape::kBlockM>(smem.a[stage], p.a, k, tile.a_row,
                              p.extent.cluster == ClusterUse::kSharedA, full);
    load_tile<Shape::kBlockN>(smem.b[stage], p.b, k, tile.n_start,
                              p.extent.cluster == ClusterUse::kSharedB, full);
    const int32_t sfa_at[2] = {tile.a_row, k_block};
    const int32_t sfb_at[2] = {tile.n_start, k_block};
    cp_async_bulk_tensor(space_cluster, space_global, smem.sfa[stage], &p.sfa, sfa_at, full);
    cp_async_bulk_tensor(space_cluster, space_global, smem.sfb[stage], &p.sfb, sfb_at, full);
  };
  const auto compute = [&](int warpgroup) {
    constexpr int kN = Shape::kBlockN;
    const StageDescriptors left(smem.a[0] + warpgroup * kMmaM * kFp8BlockK,
                                smem.a[1] + warpgroup * kMmaM * kFp8BlockK);
    const StageDescriptors right(smem.b[0], smem.b[1]);
    auto& ring = kept(smem.ring);
    const StageRelease release(ring, sharers);
    RingPosition<Shape::kNumStages> at;
    RowAndColumnScales<Shape> scales(smem, warpgroup);
    for_each_tile(smem.queue, [&](const GemmTile& tile) {
      float sum[kN / 2];
      promoted_sum<kN, kOverlapsItself<kN, Shape::kMathWarpgroups>>(
          ring, at, release, tile.k_begin, tile.k_end, left, right, scales, sum,
          [&] { await_panels(warpgroup); });
      const int row = tile.a_row + warpgroup * kMmaM;
      const ResultPlace place{int64_t(tile.group) * p.extent.m + row, tile.row_end - row,
                              tile.n_start, tile.group, false};
      finish_tile<kN>(p.result, p.extent.n, place, smem.d[warpgroup], warpgroup, sum);
    });
    drain_stores();
  };
  const auto producer = make_producer<Scheduler>(smem, p.extent, Shape::kStageBytes, load);
  run_roles<Shape::kMathWarpgroups>(smem, sharers, producer, compute);
}

}  // namespace dsk
