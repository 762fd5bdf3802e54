// FP8 GEMM for few tokens: D[m, n] = A[m, k] * B[n, k]^T with m of a few rows, or a few rows for
// each expert. The weights B take wgmma's M side (64 rows a warpgroup) and the tokens its N side,
// which may be as narrow as 8: a step of decoding pays for the tokens it has, not for a tile of 64.
//
// The two floors, 16 x 4096 x 7168 on an H800: 0.94 GFLOP at 1979 TFLOP/s = 0.5 us of tensor core;
// 29 MB of weights at 3.35 TB/s = 8.8 us of memory. So the schedule is all about memory: a deep
// ring of weight tiles, and, where there are fewer tiles than SMs, clusters that split k (see
// tile/gemm_split.cuh) so that every SM streams weights.
//
// The products and their order are those of gemm_fp8_1d2d.cuh, so the bits are too (unless k is
// split).
#pragma once

#include <cuda/ptx>

#include "cuda/gemm_shape.hpp"
#include "cuda/params/gemm.hpp"
#include "cuda/tile/gemm_promote.cuh"
#include "cuda/tile/gemm_roles.cuh"
#include "cuda/tile/gemm_scales.cuh"
#include "cuda/tile/gemm_scheduler.cuh"
#include "cuda/tile/gemm_split.cuh"
#include "cuda/tile/gemm_swapped.cuh"
#include "cuda/tile/ring.cuh"
#include "cuda/tile/smem_layout.cuh"

namespace dsk {

template <int kTokens_, int kNumStages_>
struct GemmFp8SwappedShape {
  static constexpr int kTokens = kTokens_;
  static constexpr int kBlockN = 128;  // rows of B: one block of its scales
  static constexpr int kNumStages = kNumStages_;
  static constexpr int kMathWarpgroups = kBlockN / kMmaM;
  static constexpr int kMathThreads = kMathWarpgroups * kWarpgroup;
  static constexpr int kStageBytes =
      (kTokens + kBlockN) * kFp8BlockK + kTokens * int(sizeof(float)) + StageScales<1>::kBytes;
  static_assert(kTokens % 16 == 0, "stmatrix stores 16 tokens at a time");
};

template <class Shape>
struct alignas(1024) GemmFp8SwappedSmem {
  uint8_t b[Shape::kNumStages][Shape::kBlockN * kFp8BlockK];
  uint8_t a[Shape::kNumStages][Shape::kTokens * kFp8BlockK];
  alignas(1024) TokenPanel<Shape::kTokens> d[Shape::kMathWarpgroups];
  // A TMA copy lands on a multiple of 128 bytes.
  static constexpr int kScales = Shape::kTokens < 32 ? 32 : Shape::kTokens;
  alignas(128) float sfa[Shape::kNumStages][kScales];
  StageScales<1> sfb[Shape::kNumStages];
  Ring<Shape::kNumStages> ring;
  TileQueue queue;

  using Partial = PartialTile<Shape::kTokens, Shape::kBlockN>;
  static_assert(sizeof(Partial) <= sizeof(b), "partial sums take the stages' place");
  __device__ Partial& partial() { return *reinterpret_cast<Partial*>(b); }
};

// One scale of B for the whole tile; A's by column of the fragment.
template <class Shape>
class BlockAndColumnScales {
 public:
  static constexpr bool kReadsLate = false;

  __device__ __forceinline__ explicit BlockAndColumnScales(const GemmFp8SwappedSmem<Shape>& smem)
      : sfa_(kept(smem.sfa[0][threadIdx.x % 4 * 2])), sfb_(kept(smem.sfb)) {}

  __device__ __forceinline__ void read(int stage) {
    const float sb = sfb_[stage].row[0][0];
    const float* tokens = &sfa_ + stage * GemmFp8SwappedSmem<Shape>::kScales;
#pragma unroll
    for (int i = 0; i < Shape::kTokens / 8; ++i) {
      const float2 sa = *reinterpret_cast<const float2*>(tokens + i * 8);
      scale_[i] = make_float2(__fmul_rn(sa.x, sb), __fmul_rn(sa.y, sb));
    }
  }

  __device__ __forceinline__ void promote(float (&sum)[Shape::kTokens / 2],
                                          const float (&partial)[Shape::kTokens / 2]) const {
#pragma unroll
    for (int i = 0; i < Shape::kTokens / 2; i += 2) {
      sum[i] = __fmaf_rn(scale_[i / 4].x, partial[i], sum[i]);
      sum[i + 1] = __fmaf_rn(scale_[i / 4].y, partial[i + 1], sum[i + 1]);
    }
  }

 private:
  const float& sfa_;  // of this thread's first token, in the first stage
  const StageScales<1> (&sfb_)[Shape::kNumStages];
  float2 scale_[Shape::kTokens / 8];
};

template <class Shape>
__device__ __forceinline__ void gemm_fp8_swapped(const GemmFp8Params& p) {
  extern __shared__ __align__(1024) uint8_t shared_memory[];
  auto& smem = *reinterpret_cast<GemmFp8SwappedSmem<Shape>*>(shared_memory);
  static_assert(sizeof(smem) == gemm_fp8_swapped_shared_bytes(Shape::kTokens, Shape::kNumStages));
  using Scheduler = GemmScheduler<Shape::kTokens, Shape::kBlockN, kFp8BlockK>;
  constexpr int kSharers = 1;

  const auto load = [&](const GemmTile& tile, int k_block, int stage, uint64_t* full) {
    using namespace cuda::ptx;
    const int k_blocks = (p.extent.k + kFp8BlockK - 1) / kFp8BlockK;
    const int32_t a_at[2] = {k_block * kFp8BlockK, tile.a_row};
    const int32_t b_at[2] = {k_block * kFp8BlockK, tile.group * p.extent.n + tile.n_start};
    const int32_t sfa_at[2] = {tile.row, tile.plane * k_blocks + k_block};
    cp_async_bulk_tensor(space_cluster, space_global, smem.b[stage], &p.b, b_at, full);
    cp_async_bulk_tensor(space_cluster, space_global, smem.a[stage], &p.a, a_at, full);
    cp_async_bulk_tensor(space_cluster, space_global, smem.sfa[stage], &p.sfa, sfa_at, full);
    load_scales<1>(smem.sfb[stage], p, tile, {tile.n_start / 128}, k_block, full);
  };
  const auto compute = [&](int warpgroup) {
    constexpr int kN = Shape::kTokens;
    const int first_column = warpgroup * kMmaM;
    const StageDescriptors left(smem.b[0] + first_column * kFp8BlockK,
                                smem.b[1] + first_column * kFp8BlockK);
    const StageDescriptors right(smem.a[0], smem.a[1]);
    auto& ring = kept(smem.ring);
    const StageRelease release(ring, kSharers);
    RingPosition<Shape::kNumStages> at;
    BlockAndColumnScales<Shape> scales(smem);
    for_each_tile(smem.queue, [&](const GemmTile& tile) {
      float sum[kN / 2];
      ResultPlace place;
      promoted_sum<kN, kOverlapsItself<kN, Shape::kMathWarpgroups>>(
          ring, at, release, tile.k_begin, tile.k_end, left, right, scales, sum, [&] {
            place = {tile.a_row, min(tile.row_end - tile.a_row, kN), tile.n_start, tile.group,
                     ends_with_map(p.extent, tile)};
            await_panels(warpgroup);
          });
      if (p.extent.cluster == ClusterUse::kSplitK) {
        ptx::named_barrier_sync(kMathBarrier, Shape::kMathThreads);  // stages are free
        write_partial_swapped<kN>(smem.partial(), first_column, sum);
        reduce_and_store<Shape::kMathThreads>(p.result, p.extent.n, place, smem.partial());
      } else {
        place.column += first_column;
        finish_swapped<kN>(p.result, p.extent.n, place, smem.d[warpgroup], warpgroup, sum);
      }
    });
    drain_stores();
  };
  const auto producer = make_producer<Scheduler>(smem, p.extent, Shape::kStageBytes, load);
  run_roles<Shape::kMathWarpgroups>(smem, kSharers, producer, compute);
}

}  // namespace dsk
