// Gradients of prefill attention. With P = 2^(S scale - lse), S = Q K^T, and dP = dO V^T:
//
//   dS = P * (dP - mean),   dQ = scale dS K,   dK = scale dS^T Q,   dV = P^T dO.
//
// Two kernels from one text, and no atomics. A CTA keeps 128 rows of one side, 64 for each of two
// warpgroups, and the other side passes in blocks of 64 rows through a ring of three stages: keys
// stay for dK and dV, queries for dQ. Both compute S and dP, so there are 7 products instead of 5;
// for that every gradient is one ordered sum in registers, whose bits do not depend on the batch
// around the request, and nothing but the gradients is written.
//
// The side that stays gives the rows of S (or S^T), so a thread's weights are the A operand of the
// second product as they stand in its registers; what passes is read by both products, K-major by
// the first and MN-major by the second.
//
// The two floors, one request of 4096 tokens, 128 heads, causal: 2.5 TFLOP at 989 TFLOP/s = 2.5 ms
// of tensor core; 2.1 GB at 3.35 TB/s = 0.6 ms of memory.
//
// Rows of a block behind a request's end may be somebody else's. Where they pass they are set to
// zero, and their weights are 0; where they stay they harm only rows of the result that are not
// stored.
#pragma once

#include <cuda/ptx>

#include "cuda/params/mla_prefill_backward.hpp"
#include "cuda/ptx/control.cuh"
#include "cuda/ptx/math.cuh"
#include "cuda/ptx/matrix.cuh"
#include "cuda/ptx/wgmma_bf16.cuh"
#include "cuda/tile/prefill_backward_load.cuh"

namespace dsk {

constexpr int kBackwardWarpgroup = 128;
constexpr int kBackwardMath = 2 * kBackwardWarpgroup;  // threads
constexpr int kBackwardScores = kBackwardBlock / 2;    // accumulators of a thread
constexpr int kBackwardWideSums = kPrefillWidth / 2;
constexpr int kBackwardNarrowSums = kPrefillValues / 2;

// Named barriers; 0 is __syncthreads.
enum PrefillBackwardBarrier : uint32_t {
  kBackwardBoth = 1,          // both math warpgroups
  kBackwardWarpgroupOnly = 2  // one for each math warpgroup from here on
};

// Adjacent columns in bf16 pairs: four registers for every 16 columns, the A operand of wgmma.
__device__ __forceinline__ void pack_operand(const float (&from)[kBackwardScores],
                                             uint32_t (&to)[kBackwardScores / 2]) {
#pragma unroll
  for (int i = 0; i < kBackwardScores / 2; ++i) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(from[2 * i], from[2 * i + 1]);
    to[i] = *reinterpret_cast<const uint32_t*>(&pair);
  }
}

// d = A B^T of 64 rows each, both in K-major tiles; left in flight as one group.
template <int kTiles>
__device__ __forceinline__ void issue_scores(float (&d)[kBackwardScores],
                                             const uint8_t (&a)[kTiles][kBackwardTile],
                                             const uint8_t (&b)[kTiles][kBackwardTile]) {
  ptx::fence_accumulators(d);
  ptx::wgmma_fence();
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    const uint64_t left = k_major_descriptor(a[tile]), right = k_major_descriptor(b[tile]);
#pragma unroll
    for (int byte = 0; byte < kSwizzleBytes; byte += 32) {
      ptx::WgmmaBf16<kBackwardBlock>::mma<ptx::Major::kK, ptx::Major::kK>(
          d, advance_k(left, byte), advance_k(right, byte), tile + byte != 0);
    }
  }
  ptx::wgmma_commit_group();
}

// d += A B, A in registers, B the 64 rows of the tiles; left in flight as one group.
template <int kTiles>
__device__ __forceinline__ void issue_sums(float (&d)[kTiles * 32],
                                           const uint32_t (&a)[kBackwardScores / 2],
                                           const uint8_t (&b)[kTiles][kBackwardTile]) {
  const uint64_t rows = mn_major_descriptor(b, kBackwardTile);
  ptx::fence_accumulators(d);
  ptx::wgmma_fence();
#pragma unroll
  for (int k = 0; k < kBackwardBlock / 16; ++k) {
    ptx::WgmmaBf16<kTiles * 64>::template mma_registers<ptx::Major::kMn>(
        d, a + 4 * k, advance_k_rows(rows, 16 * k), 1);
  }
  ptx::wgmma_commit_group();
}

// One math warpgroup's view of the job.
template <PrefillSide kSide>
struct PrefillBackwardMath {
  static constexpr bool kKeys = kSide == PrefillSide::kKeys;
  // Keys have two gradients.
  static constexpr int kNarrowSums = kKeys ? kBackwardNarrowSums : 1;

  const PrefillBackwardParams& p;
  const PrefillBackwardJob& job;
  PrefillBackwardSmem& smem;
  int half;                       // which 64 of the kept rows
  PrefillStatistics own[2] = {};  // of this thread's two rows, where queries are kept

  // Row, within the request, that accumulator half 0 belongs to; half 1 is 8 further.
  __device__ __forceinline__ int first_row() const {
    const int thread = threadIdx.x % kBackwardWarpgroup;
    return job.kept + half * kBackwardBlock + thread / 32 * 16 + thread % 32 / 4;
  }

  __device__ __forceinline__ void load_statistics() {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = first_row() + 8 * i;
      const int read = min(row, job.kept_length - 1);  // those behind the end are not stored
      own[i] = p.statistics[blockIdx.y * prefill_statistics_rows(p.t, p.b) + job.statistics + read];
    }
  }

  // Of the query that element i of a tile belongs to.
  __device__ __forceinline__ PrefillStatistics
  statistics(int i, const RingPosition<kBackwardStages>& at) const {
    if constexpr (kKeys) {
      const auto* pairs = reinterpret_cast<const float4*>(smem.statistics[at.stage]);
      const float4 pair = pairs[i / 4 * 4 + threadIdx.x % 4];  // of columns 2c and 2c + 1
      return i % 2 ? PrefillStatistics{pair.z, pair.w} : PrefillStatistics{pair.x, pair.y};
    } else {
      return own[i / 2 % 2];
    }
  }

  // Waits for a block, and sets its rows behind the request's end to zero.
  __device__ __forceinline__ void await_block(int block,
                                              const RingPosition<kBackwardStages>& at) const {
    smem.ring.await(at);
    const int filled = job.passing_length - block * kBackwardBlock;
    if (filled >= kBackwardBlock) return;
    constexpr int kTiles = kBackwardWide + kBackwardNarrow;
    for (int i = filled * 8 * kTiles + int(threadIdx.x); i < kBackwardBlock * 8 * kTiles;
         i += kBackwardMath) {
      const int row = i / (8 * kTiles), tile = i / 8 % kTiles;
      uint8_t* to = tile < kBackwardWide ? smem.wide[at.stage][tile]
                                         : smem.narrow[at.stage][tile - kBackwardWide];
      *reinterpret_cast<uint4*>(to + row * kSwizzleBytes + i % 8 * 16) = uint4{0, 0, 0, 0};
    }
    cuda::ptx::fence_proxy_async(cuda::ptx::space_shared);
    ptx::named_barrier_sync(kBackwardBoth, kBackwardMath);
  }

  // Hides the pairs of query and key that do not meet.
  __device__ __forceinline__ void mask(float (&s)[kBackwardScores], int block) const {
    const int passing = block * kBackwardBlock + threadIdx.x % 4 * 2;
    const int half_row = job.kept + half * kBackwardBlock;
    if constexpr (kKeys) {
      // Queries behind the end have zeros for rows and an infinite lse.
      if (!p.causal || half_row + kBackwardBlock <= block * kBackwardBlock + job.shift) return;
#pragma unroll
      for (int i = 0; i < kBackwardScores; ++i) {
        const int query = passing + i / 4 * 8 + i % 2;
        if (first_row() + i / 2 % 2 * 8 > query + job.shift) s[i] = -INFINITY;
      }
    } else {
      // No query of the request meets keys behind its end; what others meet is not stored.
      const int met = p.causal ? half_row + job.shift : job.passing_length;
      if ((block + 1) * kBackwardBlock <= met) return;
      int end[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        end[i] = p.causal ? first_row() + 8 * i + job.shift + 1 : job.passing_length;
      }
#pragma unroll
      for (int i = 0; i < kBackwardScores; ++i) {
        if (passing + i / 4 * 8 + i % 2 >= end[i / 2 % 2]) s[i] = -INFINITY;
      }
    }
  }

  // Scores to weights: 2^(s - lse).
  __device__ __forceinline__ void weigh(float (&s)[kBackwardScores],
                                        const RingPosition<kBackwardStages>& at) const {
#pragma unroll
    for (int i = 0; i < kBackwardScores; ++i) {
      s[i] = ptx::exp2_approx(fmaf(s[i], p.scale_log2, -statistics(i, at).lse));
    }
  }

  // dP to dS.
  __device__ __forceinline__ void weigh_gradient(float (&dp)[kBackwardScores],
                                                 const float (&s)[kBackwardScores],
                                                 const uint32_t (&weights)[kBackwardScores / 2],
                                                 const RingPosition<kBackwardStages>& at) const {
#pragma unroll
    for (int i = 0; i < kBackwardScores; ++i) {
      dp[i] = weight(s, weights, i) * (dp[i] - statistics(i, at).mean);
    }
  }

  // The sums of two gradients, scores and weights in full do not fit a thread's registers: for keys
  // the weights are the rounded ones, which dV is made of.
  __device__ __forceinline__ static float weight(const float (&s)[kBackwardScores],
                                                 const uint32_t (&weights)[kBackwardScores / 2],
                                                 int i) {
    if constexpr (!kKeys) return s[i];
    const uint32_t pair = weights[i / 2];
    return __uint_as_float(i % 2 ? pair & 0xffff0000u : pair << 16);
  }

  // All blocks of the other side. Leaves sums that are not yet scaled. A block's groups of products
  // are S, dP, dV (for keys), then dK or dQ; its S is on its way before the block before is done.
  __device__ __forceinline__ void run(float (&wide)[kBackwardWideSums],
                                      float (&narrow)[kNarrowSums]) const {
    const bool speaks = threadIdx.x % 32 == 0;
    RingPosition<kBackwardStages> at, before;
    float s[kBackwardScores], dp[kBackwardScores];
    uint32_t weights[kBackwardScores / 2], dscores[kBackwardScores / 2];
    for (int block = job.first; block < job.last; ++block) {
      await_block(block, at);
      if constexpr (kKeys) ptx::wgmma_wait_group<1>();  // dV before: frees its weights
      issue_scores(s, smem.kept_wide[half], smem.wide[at.stage]);
      ptx::wgmma_wait_group<1>();  // the last sums of the block before
      if (speaks && block > job.first) smem.ring.consume(before);
      if constexpr (!kKeys) issue_scores(dp, smem.kept_narrow[half], smem.narrow[at.stage]);
      ptx::fence_accumulators(s);
      ptx::wgmma_wait_group<kKeys ? 0 : 1>();
      ptx::fence_accumulators(s);
      mask(s, block);
      weigh(s, at);
      if constexpr (kKeys) {
        pack_operand(s, weights);
        issue_scores(dp, smem.kept_narrow[half], smem.narrow[at.stage]);
        issue_sums(narrow, weights, smem.narrow[at.stage]);
      }
      ptx::fence_accumulators(dp);
      ptx::wgmma_wait_group<kKeys ? 1 : 0>();
      ptx::fence_accumulators(dp);
      weigh_gradient(dp, s, weights, at);
      pack_operand(dp, dscores);
      issue_sums(wide, dscores, smem.wide[at.stage]);
      before = at;
      at.advance();
    }
    ptx::fence_accumulators(wide);
    ptx::fence_accumulators(narrow);
    ptx::wgmma_wait_group<0>();
    ptx::fence_accumulators(wide);
    ptx::fence_accumulators(narrow);
  }

  // A gradient, scaled and rounded, to the place of the rows that were kept.
  template <int kTiles>
  __device__ __forceinline__ void stage_result(const float (&sums)[kTiles * 32], float scale,
                                               uint8_t (&to)[kTiles][kBackwardTile]) const {
    const int lane = threadIdx.x % 32;
    const int row = threadIdx.x % kBackwardWarpgroup / 32 * 16 + lane % 16;
#pragma unroll
    for (int column = 0; column < kTiles * 64; column += 16) {
      uint32_t packed[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int at = column / 2 + 2 * i;
        const __nv_bfloat162 pair = __floats2bfloat162_rn(sums[at] * scale, sums[at + 1] * scale);
        packed[i] = *reinterpret_cast<const uint32_t*>(&pair);
      }
      const uint32_t chunk = swizzle128(row, column % 64 / 8 + lane / 16);
      ptx::stmatrix_x4(shared_address(to[column / 64]) + chunk, packed[0], packed[1], packed[2],
                       packed[3]);
    }
  }

  // The request's rows of it, to memory.
  template <int kTiles>
  __device__ __forceinline__ void store_rows(const uint8_t (&from)[kTiles][kBackwardTile],
                                             void* to) const {
    constexpr int kChunks = kTiles * 8;
    const int first = job.kept + half * kBackwardBlock;
    const int rows = min(job.kept_length - first, kBackwardBlock);
    for (int i = threadIdx.x % kBackwardWarpgroup; i < rows * kChunks; i += kBackwardWarpgroup) {
      const int row = i / kChunks, chunk = i % kChunks;
      const int64_t token = job.kept_begin + first + row;
      static_cast<uint4*>(to)[(token * p.h + blockIdx.y) * kChunks + chunk] =
          *reinterpret_cast<const uint4*>(from[chunk / 8] + swizzle128(row, chunk % 8));
    }
  }

  __device__ __forceinline__ void store(const float (&wide)[kBackwardWideSums],
                                        const float (&narrow)[kNarrowSums]) const {
    // Nobody reads the kept rows any more: a warp's wait was for the whole warpgroup's products.
    stage_result(wide, p.scale, smem.kept_wide[half]);
    if constexpr (kKeys) stage_result(narrow, 1.f, smem.kept_narrow[half]);
    ptx::named_barrier_sync(kBackwardWarpgroupOnly + half, kBackwardWarpgroup);
    store_rows(smem.kept_wide[half], kKeys ? p.dk : p.dq);
    if constexpr (kKeys) store_rows(smem.kept_narrow[half], p.dv);
  }
};

template <PrefillSide kSide>
__device__ __forceinline__ void prefill_backward(const PrefillBackwardParams& p) {
  extern __shared__ __align__(1024) uint8_t shared_memory[];
  auto& smem = *reinterpret_cast<PrefillBackwardSmem*>(shared_memory);
  static_assert(sizeof(smem) == prefill_backward_shared_bytes());
  PrefillBackwardJob job;
  if (!find_backward_job<kSide>(p, blockIdx.x, job)) return;  // the whole CTA
  if (threadIdx.x == 0) {
    smem.ring.init(kBackwardMath / 32);
  }
  __syncthreads();

  if (threadIdx.x >= kBackwardMath) {
    ptx::setmaxnreg_dec<24>();
    if (threadIdx.x == kBackwardMath && job.first < job.last) backward_load<kSide>(p, job, smem);
    return;
  }
  ptx::setmaxnreg_inc<240>();
  const int half = __shfl_sync(0xffffffffu, threadIdx.x / kBackwardWarpgroup, 0);
  PrefillBackwardMath<kSide> math{p, job, smem, half};
  float wide[kBackwardWideSums], narrow[math.kNarrowSums];
#pragma unroll
  for (float& value : wide) value = 0.f;
#pragma unroll
  for (float& value : narrow) value = 0.f;
  if (job.first < job.last) {
    if constexpr (!math.kKeys) math.load_statistics();
    math.run(wide, narrow);
  }
  math.store(wide, narrow);
}

}  // namespace dsk
