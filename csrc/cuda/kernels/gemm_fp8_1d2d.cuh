// FP8 GEMM, D[m, n] = A[m, k] * B[n, k]^T, with one scale per 1x128 of A and per 128x128 of B.
// Dense, grouped contiguous (any group sizes) and masked groups: one main loop, another scheduler.
//
// The two floors, 4096 x 4096 x 7168 on an H800: 0.24 TFLOP at 1979 TFLOP/s = 122 us of tensor
// core; 92 MB of operands and result at 3.35 TB/s = 27 us of memory.
//
// Each math warpgroup multiplies 64 rows. While one of them promotes (CUDA cores; see
// tile/gemm_promote.cuh), the other's wgmma runs, so tensor cores stay busy as long as there are
// two. A bf16 result goes through shared memory to a TMA store, except in a tile that ends inside a
// group: its last rows belong to somebody else.
#pragma once

#include <cuda/ptx>

#include "cuda/gemm_shape.hpp"
#include "cuda/params/gemm.hpp"
#include "cuda/tile/gemm_promote.cuh"
#include "cuda/tile/gemm_result.cuh"
#include "cuda/tile/gemm_roles.cuh"
#include "cuda/tile/gemm_scales.cuh"
#include "cuda/tile/gemm_scheduler.cuh"
#include "cuda/tile/gemm_split.cuh"
#include "cuda/tile/ring.cuh"
#include "cuda/tile/smem_layout.cuh"

namespace dsk {

template <int kBlockM_, int kBlockN_, int kNumStages_>
struct GemmFp8Shape {
  static constexpr int kBlockM = kBlockM_;
  static constexpr int kBlockN = kBlockN_;
  static constexpr int kNumStages = kNumStages_;
  static constexpr int kMathWarpgroups = kBlockM / kMmaM;
  static constexpr int kMathThreads = kMathWarpgroups * kWarpgroup;
  // A tile wider than one scale block, or not aligned to it, meets two scales of B.
  static constexpr int kRowsOfScales = 128 % kBlockN == 0 ? 1 : 2;
  using ScalesOfB = StageScales<kRowsOfScales>;
  static constexpr int kStageBytes =
      (kBlockM + kBlockN) * kFp8BlockK + kBlockM * int(sizeof(float)) + ScalesOfB::kBytes;
  static_assert(kBlockM % kMmaM == 0 && kBlockN % gemm_panel_columns(kBlockN) == 0);
  static_assert(kBlockN <= 192, "accumulators and running sums must fit the register file");
};

template <class Shape>
struct alignas(1024) GemmFp8Smem {
  uint8_t a[Shape::kNumStages][Shape::kBlockM * kFp8BlockK];
  uint8_t b[Shape::kNumStages][Shape::kBlockN * kFp8BlockK];
  ResultPanels<Shape::kBlockN> d[Shape::kMathWarpgroups];
  alignas(128) float sfa[Shape::kNumStages][Shape::kBlockM];
  typename Shape::ScalesOfB sfb[Shape::kNumStages];
  Ring<Shape::kNumStages> ring;
  TileQueue queue;

  using Partial = PartialTile<Shape::kBlockM, Shape::kBlockN>;
  static_assert(sizeof(Partial) <= sizeof(a) + sizeof(b), "partial sums take the stages' place");
  __device__ Partial& partial() { return *reinterpret_cast<Partial*>(a); }
};

// The scales of a tile at n_start: A's by row, B's for its columns up to a boundary and behind it.
template <class Shape>
class RowAndBlockScales {
 public:
  static constexpr bool kReadsLate = false;

  __device__ __forceinline__ RowAndBlockScales(const GemmFp8Smem<Shape>& smem, int warpgroup)
      : sfb_(kept(smem.sfb)),
        sfa_(kept(smem.sfa[0][warpgroup * kMmaM + threadIdx.x % kWarpgroup / 32 * 16 +
                              threadIdx.x % 32 / 4])) {}

  __device__ __forceinline__ void place(uint32_t n_start) { begin_ = n_start % 128; }

  __device__ __forceinline__ void read(int stage) {
    const float* rows = &sfa_ + stage * Shape::kBlockM;
    const float sa[2] = {rows[0], rows[8]};
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      const float sb = sfb_[stage].row[row][0];
      scale_[row][0] = __fmul_rn(sa[0], sb);
      scale_[row][1] = __fmul_rn(sa[1], sb);
    }
  }

  __device__ __forceinline__ void promote(float (&sum)[Shape::kBlockN / 2],
                                          const float (&partial)[Shape::kBlockN / 2]) const {
#pragma unroll
    for (int column = 0; column < Shape::kBlockN; column += 8) {
      // Tiles start at multiples of a panel, so the scale changes between panels, if at all.
      constexpr int kPanel = gemm_panel_columns(Shape::kBlockN);
      const int panel = column / kPanel * kPanel;
      const bool second = begin_ + panel >= 128;
#pragma unroll
      for (int half = 0; half < 2; ++half) {  // rows r and r + 8 of the fragment
        const float scale = second ? scale_[kRows - 1][half] : scale_[0][half];
        const int i = column / 2 + half * 2;
        sum[i] = __fmaf_rn(scale, partial[i], sum[i]);
        sum[i + 1] = __fmaf_rn(scale, partial[i + 1], sum[i + 1]);
      }
    }
  }

 private:
  static constexpr int kRows = Shape::kRowsOfScales;

  const typename Shape::ScalesOfB (&sfb_)[Shape::kNumStages];
  const float& sfa_;  // of this thread's first row, in the first stage
  int begin_ = 0;     // the tile's first column, in its block of scales
  float scale_[kRows][2];
};

template <class Shape>
__device__ __forceinline__ void gemm_fp8_1d2d(const GemmFp8Params& p) {
  extern __shared__ __align__(1024) uint8_t shared_memory[];
  auto& smem = *reinterpret_cast<GemmFp8Smem<Shape>*>(shared_memory);
  static_assert(sizeof(smem) ==
                gemm_fp8_shared_bytes(Shape::kBlockM, Shape::kBlockN, Shape::kNumStages));
  using Scheduler = GemmScheduler<Shape::kBlockM, Shape::kBlockN, kFp8BlockK>;
  const int sharers = p.extent.sharers();

  const auto load = [&](const GemmTile& tile, int k_block, int stage, uint64_t* full) {
    using namespace cuda::ptx;
    const int k_blocks = (p.extent.k + kFp8BlockK - 1) / kFp8BlockK;
    const int k = k_block * kFp8BlockK;
    const int b_row = tile.group * p.extent.n + tile.n_start;
    load_tile<Shape::kBlockM>(smem.a[stage], p.a, k, tile.a_row,
                              p.extent.cluster == ClusterUse::kSharedA, full);
    load_tile<Shape::kBlockN>(smem.b[stage], p.b, k, b_row,
                              p.extent.cluster == ClusterUse::kSharedB, full);
    const int32_t sfa_at[2] = {tile.row, tile.plane * k_blocks + k_block};
    cp_async_bulk_tensor(space_cluster, space_global, smem.sfa[stage], &p.sfa, sfa_at, full);
    const int block_row = tile.n_start / 128;
    if constexpr (Shape::kRowsOfScales == 2)
      load_scales<2>(smem.sfb[stage], p, tile, {block_row, block_row + 1}, k_block, full);
    else
      load_scales<1>(smem.sfb[stage], p, tile, {block_row}, k_block, full);
  };
  const auto compute = [&](int warpgroup) {
    constexpr int kN = Shape::kBlockN;
    const int first_row = warpgroup * kMmaM;
    const StageDescriptors left(smem.a[0] + first_row * kFp8BlockK,
                                smem.a[1] + first_row * kFp8BlockK);
    const StageDescriptors right(smem.b[0], smem.b[1]);
    auto& ring = kept(smem.ring);
    const StageRelease release(ring, sharers);
    RingPosition<Shape::kNumStages> at;
    RowAndBlockScales<Shape> scales(smem, warpgroup);
    for_each_tile(smem.queue, [&](const GemmTile& tile) {
      float sum[kN / 2];
      scales.place(tile.n_start);
      ResultPlace place;
      promoted_sum<kN, kOverlapsItself<kN, Shape::kMathWarpgroups>>(
          ring, at, release, tile.k_begin, tile.k_end, left, right, scales, sum, [&] {
            place = {tile.a_row, tile.row_end - tile.a_row, tile.n_start, tile.group,
                     ends_with_map(p.extent, tile)};
            await_panels(warpgroup);
          });
      if (p.extent.cluster == ClusterUse::kSplitK) {
        ptx::named_barrier_sync(kMathBarrier, Shape::kMathThreads);  // stages are free
        write_partial<kN>(smem.partial(), first_row, sum);
        place.rows_left = min(place.rows_left, Shape::kBlockM);
        reduce_and_store<Shape::kMathThreads>(p.result, p.extent.n, place, smem.partial());
      } else {
        place.row += first_row;
        place.rows_left -= first_row;
        finish_tile<kN>(p.result, p.extent.n, place, smem.d[warpgroup], warpgroup, sum);
      }
    });
    drain_stores();
  };
  const auto producer = make_producer<Scheduler>(smem, p.extent, Shape::kStageBytes, load);
  run_roles<Shape::kMathWarpgroups>(smem, sharers, producer, compute);
}

}  // namespace dsk
