// FP8 GEMM, D[m, n] = A[m, k] * B[n, k]^T, with one scale per 1x128 of A and per 128x128 of B.
// Dense, grouped contiguous (any group sizes) and masked groups: one main loop, another scheduler.
//
// Hopper's tensor core keeps about 14 bits while it accumulates FP8 products, so sums over a long K
// lose what training needs. Every 128 of K the partial sum therefore leaves the tensor core and is
// added in fp32 on the CUDA cores, together with the scales it needs anyway (V3 report, 3.3.2).
//
// The two floors, 4096 x 4096 x 7168 on an H800: 0.24 TFLOP at 1979 TFLOP/s = 122 us of tensor
// core; 92 MB of operands and result at 3.35 TB/s = 27 us of memory.
//
// Roles: the last warpgroup's first thread issues TMA loads into a ring of stages; each of the
// other warpgroups multiplies 64 rows. While one math warpgroup promotes (CUDA cores), the other's
// wgmma runs, so tensor cores stay busy as long as there are two. Results go through shared memory
// to a TMA store, except in a tile that ends inside a group: its last rows belong to somebody else.
#pragma once

#include <cuda_bf16.h>

#include <cuda/ptx>

#include "cuda/gemm_shape.hpp"
#include "cuda/params/gemm.hpp"
#include "cuda/ptx/control.cuh"
#include "cuda/ptx/matrix.cuh"
#include "cuda/ptx/wgmma.cuh"
#include "cuda/tile/gemm_scheduler.cuh"
#include "cuda/tile/ring.cuh"
#include "cuda/tile/smem_layout.cuh"

namespace dsk {

constexpr int kWarpgroup = 128;    // threads
constexpr int kBlockK = 128;       // bytes of a swizzled row, and one scale
constexpr int kMmaK = 32;          // e4m3 values one wgmma consumes
constexpr int kMmaM = 64;          // rows of one warpgroup
constexpr int kStoreColumns = 64;  // bf16 columns of one swizzled TMA store

template <int kBlockM_, int kBlockN_, int kNumStages_>
struct GemmFp8Shape {
  static constexpr int kBlockM = kBlockM_;
  static constexpr int kBlockN = kBlockN_;
  static constexpr int kNumStages = kNumStages_;
  static constexpr int kMathWarpgroups = kBlockM / kMmaM;
  static constexpr int kMathThreads = kMathWarpgroups * kWarpgroup;
  static constexpr int kThreads = kMathThreads + kWarpgroup;
  static constexpr int kStageBytes =
      kBlockM * kBlockK + kBlockN * kBlockK + kBlockM * int(sizeof(float));
  // A tile wider than one scale block, or not aligned to it, meets two scales of B.
  static constexpr bool kTwoScales = 128 % kBlockN != 0;
  static constexpr int kProducerRegisters = 40;
  static constexpr int kMathRegisters = kMathWarpgroups == 1 ? 248 : 232;
  static_assert(kBlockM % kMmaM == 0 && kBlockN % kStoreColumns == 0);
  static_assert(kBlockN <= 192, "accumulators and running sums must fit the register file");
};

template <class Shape>
struct alignas(1024) GemmFp8Smem {
  uint8_t a[Shape::kNumStages][Shape::kBlockM * kBlockK];
  uint8_t b[Shape::kNumStages][Shape::kBlockN * kBlockK];
  // [warpgroup][64 columns][64 rows x 128 bytes]
  uint8_t d[Shape::kMathWarpgroups][Shape::kBlockN / kStoreColumns][kMmaM * kSwizzleBytes];
  alignas(128) float sfa[Shape::kNumStages][Shape::kBlockM];
  Ring<Shape::kNumStages> ring;
};

// Named barriers; 0 is __syncthreads.
enum GemmBarrier : uint32_t { kEpilogueBarrier = 1 };  // one for each math warpgroup from here on

template <class Shape, GroupKind kKind>
__device__ __forceinline__ void gemm_fp8_producer(const GemmFp8Params& p,
                                                  GemmFp8Smem<Shape>& smem) {
  using namespace cuda::ptx;
  GemmScheduler<kKind, Shape::kBlockM, Shape::kBlockN> scheduler(p);
  RingPosition<Shape::kNumStages> at;
  const int num_k_blocks = (p.k + kBlockK - 1) / kBlockK;
  GemmTile tile;
  while (scheduler.next(tile)) {
    const int b_row = tile.group * p.n + tile.n_start;
    for (int k_block = 0; k_block < num_k_blocks; ++k_block) {
      smem.ring.acquire(at, Shape::kStageBytes);
      uint64_t* full = &smem.ring.full[at.stage];
      const int32_t a_at[2] = {k_block * kBlockK, tile.a_row};
      const int32_t b_at[2] = {k_block * kBlockK, b_row};
      const int32_t sfa_at[2] = {tile.sfa_start, tile.sfa_row + k_block};
      cp_async_bulk_tensor(space_cluster, space_global, smem.a[at.stage], &p.a, a_at, full);
      cp_async_bulk_tensor(space_cluster, space_global, smem.b[at.stage], &p.b, b_at, full);
      cp_async_bulk_tensor(space_cluster, space_global, smem.sfa[at.stage], &p.sfa, sfa_at, full);
      at.advance();
    }
  }
}

// B's scales of one tile, fetched one k block ahead so that their latency hides behind the wgmma.
template <bool kTwo>
class ScalesOfB {
 public:
  __device__ __forceinline__ ScalesOfB(const GemmFp8Params& p, const GemmTile& tile,
                                       int num_k_blocks) {
    const int rows = (p.n + 127) / 128;
    const int row = tile.n_start / 128;
    first_ = p.sfb + (int64_t(tile.group) * rows + row) * num_k_blocks;
    // The tile's columns from boundary() on use the next row, if B has one.
    second_ = kTwo && row + 1 < rows ? first_ + num_k_blocks : first_;
    last_ = num_k_blocks - 1;
    fetch(0);
  }

  __device__ __forceinline__ void take(int k_block, float (&scale)[2]) {
    scale[0] = next_[0];
    scale[1] = next_[1];
    fetch(min(k_block + 1, last_));
  }

  __device__ static __forceinline__ int boundary(const GemmTile& tile) {
    return 128 - tile.n_start % 128;
  }

 private:
  __device__ __forceinline__ void fetch(int k_block) {
    next_[0] = __ldg(first_ + k_block);
    next_[1] = kTwo ? __ldg(second_ + k_block) : next_[0];
  }

  const float* first_;
  const float* second_;
  int last_;
  float next_[2];
};

// sum += (scale of A * scale of B) * partial, one fp32 FMA each: what the reference computes.
template <class Shape>
__device__ __forceinline__ void promote(float (&sum)[Shape::kBlockN / 2],
                                        const float (&partial)[Shape::kBlockN / 2],
                                        const float (&sa)[2], const float (&sb)[2], int boundary) {
  const float first[2] = {__fmul_rn(sa[0], sb[0]), __fmul_rn(sa[1], sb[0])};
  const float second[2] = {__fmul_rn(sa[0], sb[1]), __fmul_rn(sa[1], sb[1])};
#pragma unroll
  for (int column = 0; column < Shape::kBlockN; column += 8) {
    const bool use_second = Shape::kTwoScales && column >= boundary;
#pragma unroll
    for (int half = 0; half < 2; ++half) {  // rows r and r + 8 of the fragment
      const float scale = use_second ? second[half] : first[half];
      const int i = column / 2 + half * 2;
      sum[i] = __fmaf_rn(scale, partial[i], sum[i]);
      sum[i + 1] = __fmaf_rn(scale, partial[i + 1], sum[i + 1]);
    }
  }
}

// One tile's sum over K. Leaves it in `sum` in the wgmma accumulator layout.
template <class Shape>
__device__ __forceinline__ void multiply_tile(const GemmFp8Params& p, const GemmTile& tile,
                                              GemmFp8Smem<Shape>& smem, int warpgroup,
                                              RingPosition<Shape::kNumStages>& at,
                                              float (&sum)[Shape::kBlockN / 2]) {
  const int lane = threadIdx.x % 32;
  const int row = warpgroup * kMmaM + threadIdx.x % kWarpgroup / 32 * 16 + lane / 4;
  const int num_k_blocks = (p.k + kBlockK - 1) / kBlockK;
  const int boundary = ScalesOfB<Shape::kTwoScales>::boundary(tile);
  ScalesOfB<Shape::kTwoScales> scales_of_b(p, tile, num_k_blocks);
#pragma unroll
  for (float& value : sum) value = 0.f;

  for (int k_block = 0; k_block < num_k_blocks; ++k_block) {
    float sb[2];
    scales_of_b.take(k_block, sb);
    smem.ring.await(at);
    const float sa[2] = {smem.sfa[at.stage][row], smem.sfa[at.stage][row + 8]};

    float partial[Shape::kBlockN / 2];
    const uint64_t desc_a = k_major_descriptor(smem.a[at.stage] + warpgroup * kMmaM * kBlockK);
    const uint64_t desc_b = k_major_descriptor(smem.b[at.stage]);
    ptx::fence_accumulators(partial);
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < kBlockK; k += kMmaK) {
      ptx::WgmmaE4m3<Shape::kBlockN>::mma(partial, advance_k(desc_a, k), advance_k(desc_b, k),
                                          k != 0);
    }
    ptx::wgmma_commit_group();
    ptx::fence_accumulators(partial);
    ptx::wgmma_wait_group<0>();
    ptx::fence_accumulators(partial);
    if (lane == 0) smem.ring.consume(at);
    at.advance();

    promote<Shape>(sum, partial, sa, sb, boundary);
  }
}

// Rows [0, rows_left) of a warpgroup's 64 x BLOCK_N result, from shared memory to D.
template <class Shape>
__device__ __forceinline__ void store_rows(const GemmFp8Params& p, const GemmTile& tile,
                                           GemmFp8Smem<Shape>& smem, int warpgroup, int rows_left) {
  constexpr int kChunks = Shape::kBlockN / 8;  // 16-byte chunks of a row
  const int thread = threadIdx.x % kWarpgroup;
  const int64_t first_row = tile.a_row + warpgroup * kMmaM;
  auto* d = static_cast<__nv_bfloat16*>(p.d_rows);
  for (int i = thread; i < rows_left * kChunks; i += kWarpgroup) {
    const int row = i / kChunks;
    const int chunk = i % kChunks;
    const int column = tile.n_start + chunk * 8;
    if (column >= p.n) continue;
    const uint8_t* from = smem.d[warpgroup][chunk / 8] + swizzle128(row, chunk % 8);
    *reinterpret_cast<uint4*>(d + (first_row + row) * p.n + column) =
        *reinterpret_cast<const uint4*>(from);
  }
}

// Round to bf16 and hand the warpgroup's 64 x BLOCK_N result to memory.
template <class Shape, GroupKind kKind>
__device__ __forceinline__ void store_tile(const GemmFp8Params& p, const GemmTile& tile,
                                           GemmFp8Smem<Shape>& smem, int warpgroup,
                                           const float (&sum)[Shape::kBlockN / 2]) {
  using namespace cuda::ptx;
  const int thread = threadIdx.x % kWarpgroup;
  const int lane = thread % 32;
  const uint32_t barrier = kEpilogueBarrier + warpgroup;
  const int first_row = tile.a_row + warpgroup * kMmaM;
  const int rows_left = min(tile.row_end - first_row, kMmaM);

  // The previous tile's store must have read the buffer before it is written again.
  if (thread == 0) cp_async_bulk_wait_group_read(n32_t<0>{});
  ptx::named_barrier_sync(barrier, kWarpgroup);

  // Matrices 0..3 of one stmatrix: rows 0-7 and 8-15 of columns 0-7, then of columns 8-15.
  const int row = thread / 32 * 16 + lane % 16;
#pragma unroll
  for (int column = 0; column < Shape::kBlockN; column += 16) {
    uint32_t packed[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const __nv_bfloat162 pair =
          __floats2bfloat162_rn(sum[column / 2 + 2 * i], sum[column / 2 + 2 * i + 1]);
      packed[i] = *reinterpret_cast<const uint32_t*>(&pair);
    }
    const uint32_t chunk = column % kStoreColumns / 8 + lane / 16;
    const uint32_t buffer = shared_address(smem.d[warpgroup][column / kStoreColumns]);
    ptx::stmatrix_x4(buffer + swizzle128(row, chunk), packed[0], packed[1], packed[2], packed[3]);
  }

  // A dense tile may hang over the end of D (the tensor map clips it); a group's tile may not.
  const bool whole = rows_left == kMmaM || kKind == GroupKind::kDense;
  if (whole) fence_proxy_async(space_shared);
  ptx::named_barrier_sync(barrier, kWarpgroup);
  if (!whole) {
    store_rows<Shape>(p, tile, smem, warpgroup, rows_left);
  } else if (thread == 0) {
#pragma unroll
    for (int column = 0; column < Shape::kBlockN; column += kStoreColumns) {
      const int32_t d_at[2] = {tile.n_start + column, first_row};
      if (d_at[0] < p.n) {
        cp_async_bulk_tensor(space_global, space_shared, &p.d, d_at,
                             smem.d[warpgroup][column / kStoreColumns]);
      }
    }
    cp_async_bulk_commit_group();
  }
}

template <class Shape, GroupKind kKind>
__device__ __forceinline__ void gemm_fp8_math(const GemmFp8Params& p, GemmFp8Smem<Shape>& smem) {
  const int warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / kWarpgroup, 0);
  GemmScheduler<kKind, Shape::kBlockM, Shape::kBlockN> scheduler(p);
  RingPosition<Shape::kNumStages> at;
  GemmTile tile;
  while (scheduler.next(tile)) {
    float sum[Shape::kBlockN / 2];
    multiply_tile<Shape>(p, tile, smem, warpgroup, at, sum);
    store_tile<Shape, kKind>(p, tile, smem, warpgroup, sum);
  }
  // Shared memory must outlive the last store's reads.
  if (threadIdx.x % kWarpgroup == 0) cuda::ptx::cp_async_bulk_wait_group(cuda::ptx::n32_t<0>{});
}

template <class Shape, GroupKind kKind>
__device__ __forceinline__ void gemm_fp8_1d2d(const GemmFp8Params& p) {
  extern __shared__ __align__(1024) uint8_t shared_memory[];
  auto& smem = *reinterpret_cast<GemmFp8Smem<Shape>*>(shared_memory);
  constexpr int kMathWarps = Shape::kMathThreads / 32;
  static_assert(sizeof(smem) ==
                gemm_fp8_shared_bytes(Shape::kBlockM, Shape::kBlockN, Shape::kNumStages));
  if (threadIdx.x == 0) smem.ring.init(kMathWarps);
  __syncthreads();

  if (threadIdx.x >= Shape::kMathThreads) {
    ptx::setmaxnreg_dec<Shape::kProducerRegisters>();
    if (threadIdx.x == Shape::kMathThreads) gemm_fp8_producer<Shape, kKind>(p, smem);
  } else {
    ptx::setmaxnreg_inc<Shape::kMathRegisters>();
    gemm_fp8_math<Shape, kKind>(p, smem);
  }
}

}  // namespace dsk
