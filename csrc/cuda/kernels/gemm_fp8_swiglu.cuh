// An expert's up-projection with SwiGLU and the next product's quantisation in its epilogue:
// D[m, i] = silu(A B_gate^T) * (A B_up^T), B = [gate; up] of 2i rows, FP8 in, and FP8 out in blocks
// of 1x128 with MN-major scales (or bf16, or fp32), so that the hidden values never reach memory in
// 16 bits and the down-projection can start at once. Dense (one group), contiguous and masked.
//
// The two floors, 8 experts x 1024 rows, k = 7168, i = 2048 on an H800: 0.48 TFLOP at 1979 TFLOP/s
// = 243 us of tensor core; 235 MB of weights, 59 MB of A and 17 MB of D at 3.35 TB/s = 93 us. The
// bf16 detour that is saved would move another 84 MB.
//
// A tile is 64 rows by 128 columns of D. Each of the two math warpgroups owns 64 of the columns:
// the gate's 64 rows of B and the up-projection's lie one behind the other in its half of the
// stage, so one m64n128 wgmma yields both halves of 64 results in the same thread. A block of 128
// columns belongs to both warpgroups: they exchange the rows' maxima through shared memory. Pairs
// of CTAs, one above the other, share B (contiguous groups).
#pragma once

#include <cuda/ptx>

#include "cuda/gemm_shape.hpp"
#include "cuda/params/gemm.hpp"
#include "cuda/ptx/fp8.cuh"
#include "cuda/tile/gemm_promote.cuh"
#include "cuda/tile/gemm_result.cuh"
#include "cuda/tile/gemm_roles.cuh"
#include "cuda/tile/gemm_scales.cuh"
#include "cuda/tile/gemm_scheduler.cuh"
#include "cuda/tile/ring.cuh"
#include "cuda/tile/smem_layout.cuh"

namespace dsk {

template <int kNumStages_>
struct GemmSwigluShape {
  static constexpr int kBlockM = kMmaM;
  static constexpr int kBlockN = 256;  // rows of B: 128 of the gate, 128 of the up-projection
  static constexpr int kNumStages = kNumStages_;
  static constexpr int kMathWarpgroups = 2;
  static constexpr int kMathThreads = kMathWarpgroups * kWarpgroup;
  static constexpr int kColumns = 64;  // of D, for each warpgroup
  static constexpr int kStageBytes =
      (kBlockM + kBlockN) * kFp8BlockK + kBlockM * int(sizeof(float)) + StageScales<3>::kBytes;
};

template <class Shape>
struct alignas(1024) GemmSwigluSmem {
  uint8_t a[Shape::kNumStages][Shape::kBlockM * kFp8BlockK];
  // [warpgroup][gate, up][64 rows]
  uint8_t b[Shape::kNumStages][2][2][Shape::kColumns * kFp8BlockK];
  union {
    ResultPanels<Shape::kColumns> wide[2];              // bf16, each warpgroup its own
    uint8_t quantised[Shape::kBlockM * kSwizzleBytes];  // e4m3, both together
  } d;
  alignas(128) float sfa[Shape::kNumStages][Shape::kBlockM];
  StageScales<3> sfb[Shape::kNumStages];  // of the gate; of the up-projection, and the next row
  float amax[2][Shape::kBlockM];          // [warpgroup][row]
  Ring<Shape::kNumStages> ring;
  TileQueue queue;
};

// A's scales by row; B's by block: one for the gate's 128 rows, up to two for the up-projection's,
// which start wherever i ends.
template <class Shape, class Smem>
class SwigluScales {
 public:
  static constexpr bool kReadsLate = false;

  // `up`: the up-projection's first row in B, from which all tiles' are multiples of 128 away;
  // `column`: the warpgroup's first.
  __device__ __forceinline__ SwigluScales(const Smem& smem, int up, int column)
      : sfb_(kept(smem.sfb)),
        sfa_(kept(smem.sfa[0][threadIdx.x % kWarpgroup / 32 * 16 + threadIdx.x % 32 / 4])),
        boundary_(128 - up % 128 - column) {}

  __device__ __forceinline__ void read(int stage) {
    const float* rows = &sfa_ + stage * Shape::kBlockM;
    const float sa[2] = {rows[0], rows[8]};
#pragma unroll
    for (int which = 0; which < 3; ++which) {
      const float sb = sfb_[stage].row[which][0];
      scale_[which][0] = __fmul_rn(sa[0], sb);
      scale_[which][1] = __fmul_rn(sa[1], sb);
    }
  }

  __device__ __forceinline__ void promote(float (&sum)[Shape::kColumns],
                                          const float (&partial)[Shape::kColumns]) const {
#pragma unroll
    for (int column = 0; column < 2 * Shape::kColumns; column += 8) {
      const bool gate = column < Shape::kColumns;
      const bool second = !gate && column - Shape::kColumns >= boundary_;
#pragma unroll
      for (int half = 0; half < 2; ++half) {  // rows r and r + 8 of the fragment
        const float up = second ? scale_[2][half] : scale_[1][half];
        const float scale = gate ? scale_[0][half] : up;
        const int i = column / 2 + half * 2;
        sum[i] = __fmaf_rn(scale, partial[i], sum[i]);
        sum[i + 1] = __fmaf_rn(scale, partial[i + 1], sum[i + 1]);
      }
    }
  }

 private:
  const StageScales<3> (&sfb_)[Shape::kNumStages];
  const float& sfa_;    // of this thread's first row, in the first stage
  const int boundary_;  // the columns from here on use the up-projection's next row of scales
  float scale_[3][2];
};

// Accumulators 0..31 are the gate's 64 columns, 32..63 the up-projection's.
__device__ __forceinline__ void swiglu(const float (&sum)[64], float (&h)[32]) {
#pragma unroll
  for (int i = 0; i < 32; ++i) {
    const float gate = sum[i];
    h[i] = __fmul_rn(__fdividef(gate, 1.f + __expf(-gate)), sum[i + 32]);
  }
}

// The largest magnitude of each of this thread's two rows over both warpgroups' columns; columns
// behind the end of D do not count.
template <class Shape>
__device__ __forceinline__ void row_maxima(float (&amax)[2][Shape::kBlockM], int warpgroup,
                                           int columns_left, const float (&h)[32],
                                           float (&maximum)[2]) {
  const int lane = threadIdx.x % 32;
  const int row = threadIdx.x % kWarpgroup / 32 * 16 + lane / 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    maximum[half] = 0.f;
#pragma unroll
    for (int column = 0; column < Shape::kColumns; column += 8) {
      if (column >= columns_left) continue;
      const int i = column / 2 + half * 2;
      // fmaxf drops NaN, as the specification does.
      maximum[half] = fmaxf(maximum[half], fmaxf(fabsf(h[i]), fabsf(h[i + 1])));
    }
    maximum[half] = fmaxf(maximum[half], __shfl_xor_sync(0xffffffffu, maximum[half], 1));
    maximum[half] = fmaxf(maximum[half], __shfl_xor_sync(0xffffffffu, maximum[half], 2));
    if (lane % 4 == 0) amax[warpgroup][row + half * 8] = maximum[half];
  }
  ptx::named_barrier_sync(kMathBarrier, Shape::kMathThreads);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    maximum[half] = fmaxf(maximum[half], amax[1 - warpgroup][row + half * 8]);
  }
}

// e4m3 values and their scales to D.
template <class Shape, class Smem>
__device__ __forceinline__ void store_quantised(const GemmFp8Params& p, const GemmTile& tile,
                                                const ResultPlace& at, Smem& smem, int warpgroup,
                                                const float (&h)[32]) {
  using namespace cuda::ptx;
  const int n = p.extent.n / 2;
  const int lane = threadIdx.x % 32;
  const int row = threadIdx.x % kWarpgroup / 32 * 16 + lane / 4;
  // The previous tile's store must have read the panel before it is written again; the barrier in
  // row_maxima tells the others.
  if (threadIdx.x == 0) cp_async_bulk_wait_group_read(n32_t<0>{});
  float maximum[2];
  const int columns_left = n - at.column - warpgroup * Shape::kColumns;
  row_maxima<Shape>(smem.amax, warpgroup, columns_left, h, maximum);

  const int64_t scale_row = int64_t(tile.plane) * ((n + 127) / 128) + at.column / 128;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float scale = __fdiv_rn(fmaxf(maximum[half], 1e-4f), 448.f);
    const int r = row + half * 8;
    if (warpgroup == 0 && lane % 4 == 0 && r < at.rows_left) {
      p.result.scale[scale_row * p.result.ld_scale + tile.row + r] = scale;
    }
#pragma unroll
    for (int column = 0; column < Shape::kColumns; column += 8) {
      const int i = column / 2 + half * 2;
      const uint16_t pair = ptx::cvt_e4m3x2(__fdiv_rn(h[i], scale), __fdiv_rn(h[i + 1], scale));
      const int byte = warpgroup * Shape::kColumns + column + lane % 4 * 2;
      uint8_t* to = smem.d.quantised + swizzle128(r, byte / 16) + byte % 16;
      *reinterpret_cast<uint16_t*>(to) = pair;
    }
  }

  const bool whole = at.rows_left >= Shape::kBlockM || at.clipped;
  if (whole) fence_proxy_async(space_shared);
  ptx::named_barrier_sync(kMathBarrier, Shape::kMathThreads);
  if (whole) {
    if (threadIdx.x == 0) {
      const int32_t d_at[2] = {at.column, int32_t(at.row)};
      cp_async_bulk_tensor(space_global, space_shared, &p.result.map, d_at, smem.d.quantised);
      cp_async_bulk_commit_group();
    }
    return;
  }
  for (int i = threadIdx.x; i < at.rows_left * 8; i += Shape::kMathThreads) {
    const int column = at.column + i % 8 * 16;
    if (column >= n) continue;
    *reinterpret_cast<uint4*>(static_cast<uint8_t*>(p.result.d) + (at.row + i / 8) * n + column) =
        *reinterpret_cast<const uint4*>(smem.d.quantised + swizzle128(i / 8, i % 8));
  }
}

template <class Shape>
__device__ __forceinline__ void gemm_fp8_swiglu(const GemmFp8Params& p) {
  extern __shared__ __align__(1024) uint8_t shared_memory[];
  using Smem = GemmSwigluSmem<Shape>;
  auto& smem = *reinterpret_cast<Smem*>(shared_memory);
  static_assert(sizeof(smem) == gemm_fp8_swiglu_shared_bytes(Shape::kNumStages));
  using Scheduler = GemmScheduler<Shape::kBlockM, Shape::kBlockN, kFp8BlockK>;
  const int sharers = p.extent.sharers();

  const auto load = [&](const GemmTile& tile, int k_block, int stage, uint64_t* full) {
    using namespace cuda::ptx;
    const int k_blocks = (p.extent.k + kFp8BlockK - 1) / kFp8BlockK;
    const int k = k_block * kFp8BlockK;
    load_tile<Shape::kBlockM>(smem.a[stage], p.a, k, tile.a_row, false, full);
#pragma unroll
    for (int warpgroup = 0; warpgroup < 2; ++warpgroup) {
      const int gate = tile.group * p.extent.n + tile.n_start / 2 + warpgroup * Shape::kColumns;
      uint8_t (&to)[2][Shape::kColumns * kFp8BlockK] = smem.b[stage][warpgroup];
      load_tile<Shape::kColumns>(to[0], p.b, k, gate, sharers > 1, full);
      load_tile<Shape::kColumns>(to[1], p.b, k, gate + p.extent.n / 2, sharers > 1, full);
    }
    const int32_t sfa_at[2] = {tile.row, tile.plane * k_blocks + k_block};
    cp_async_bulk_tensor(space_cluster, space_global, smem.sfa[stage], &p.sfa, sfa_at, full);
    const int gate_row = tile.n_start / 2 / 128;
    const int up_row = (p.extent.n + tile.n_start) / 2 / 128;
    load_scales<3>(smem.sfb[stage], p, tile, {gate_row, up_row, up_row + 1}, k_block, full);
  };
  const auto compute = [&](int warpgroup) {
    const StageDescriptors left(smem.a[0], smem.a[1]);
    const StageDescriptors right(smem.b[0][warpgroup][0], smem.b[1][warpgroup][0]);
    auto& ring = kept(smem.ring);
    const StageRelease release(ring, sharers);
    RingPosition<Shape::kNumStages> at;
    SwigluScales<Shape, Smem> scales(smem, p.extent.n / 2, warpgroup * Shape::kColumns);
    for_each_tile(smem.queue, [&](const GemmTile& tile) {
      float sum[2 * Shape::kColumns / 2];
      promoted_sum<2 * Shape::kColumns,
                   kOverlapsItself<2 * Shape::kColumns, Shape::kMathWarpgroups>>(
          ring, at, release, tile.k_begin, tile.k_end, left, right, scales, sum, [] {});
      float h[Shape::kColumns / 2];
      swiglu(sum, h);
      ResultPlace place{tile.a_row, tile.row_end - tile.a_row, tile.n_start / 2, tile.group,
                        ends_with_map(p.extent, tile)};
      if (p.result.d_type == ElementType::kE4m3) {
        store_quantised<Shape>(p, tile, place, smem, warpgroup, h);
      } else {
        place.column += warpgroup * Shape::kColumns;
        await_panels(warpgroup);
        finish_tile<Shape::kColumns>(p.result, p.extent.n / 2, place, smem.d.wide[warpgroup],
                                     warpgroup, h);
      }
    });
    drain_stores();
  };
  const auto producer = make_producer<Scheduler>(smem, p.extent, Shape::kStageBytes, load);
  run_roles<Shape::kMathWarpgroups>(smem, sharers, producer, compute);
}

}  // namespace dsk
