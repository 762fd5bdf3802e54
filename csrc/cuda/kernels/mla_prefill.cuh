// Attention of a ragged batch with 192-wide queries and keys and 128-wide values: the prefill and
// training form of MLA, after its up-projections. S = Q K^T, P = softmax(S), O = P V.
//
// The two floors, one request of 4096 tokens, 128 heads, causal: 0.69 TFLOP at 989 TFLOP/s = 695 us
// of tensor core; 0.69 GB of q, k, v and out at 3.35 TB/s = 205 us of memory. The exponentials,
// 1.1 G of them at 16 a clock and SM, are 290 us: they have to hide behind the products.
//
// Roles: a producer thread loads blocks of 128 keys and values into a ring of two stages; each of
// two math warpgroups owns 64 query rows. Within a warpgroup the scores of the next block are in
// flight together with the values' product of this one, and its softmax runs while the other
// warpgroup's products do.
//
// Keys behind a request's end may be somebody else's: their scores are masked, and their rows of V
// set to zero, since 0 * NaN would not be 0.
#pragma once

#include <cuda/ptx>

#include "cuda/params/mla_prefill.hpp"
#include "cuda/ptx/control.cuh"
#include "cuda/ptx/matrix.cuh"
#include "cuda/ptx/wgmma_bf16.cuh"
#include "cuda/tile/prefill_job.cuh"
#include "cuda/tile/prefill_softmax.cuh"
#include "cuda/tile/ring.cuh"
#include "cuda/tile/smem_layout.cuh"

namespace dsk {

constexpr int kPrefillWarpgroup = 128;
constexpr int kPrefillMath = 2 * kPrefillWarpgroup;          // threads
constexpr int kPrefillHalf = kPrefillRows / 2;               // rows of a warpgroup
constexpr int kPrefillQTile = kPrefillHalf * kSwizzleBytes;  // bytes; 64 columns
constexpr int kPrefillKTile = kPrefillBlock * kSwizzleBytes;
constexpr int kKeyTiles = kPrefillWidth / 64;
constexpr int kValueTiles = kPrefillValues / 64;

// Named barriers; 0 is __syncthreads.
enum PrefillBarrier : uint32_t {
  kPrefillBoth = 1,          // both math warpgroups
  kPrefillWarpgroupOnly = 2  // one for each math warpgroup from here on
};

struct alignas(1024) MlaPrefillSmem {
  uint8_t q[2][kKeyTiles][kPrefillQTile];  // by warpgroup; at the end its first tiles take O
  uint8_t k[kPrefillStages][kKeyTiles][kPrefillKTile];
  uint8_t v[kPrefillStages][kValueTiles][kPrefillKTile];
  Ring<kPrefillStages> k_ring;
  Ring<kPrefillStages> v_ring;
};

// Queries come with the first keys, at the same barrier.
__device__ __forceinline__ void prefill_load_queries(const MlaPrefillParams& p,
                                                     const PrefillJob& job, MlaPrefillSmem& smem) {
  using namespace cuda::ptx;
  for (int half = 0; half < 2; ++half) {
    for (int tile = 0; tile < kKeyTiles; ++tile) {
      const int32_t at[3] = {tile * 64, job.row + half * kPrefillHalf, int(blockIdx.y)};
      cp_async_bulk_tensor(space_cluster, space_global, smem.q[half][tile], &p.q, at,
                           &smem.k_ring.full[0]);
    }
  }
}

__device__ __forceinline__ void prefill_load(const MlaPrefillParams& p, const PrefillJob& job,
                                             MlaPrefillSmem& smem) {
  using namespace cuda::ptx;
  const int head = blockIdx.y;
  RingPosition<kPrefillStages> stage;
  for (int block = 0; block < job.blocks; ++block) {
    const int key = job.key + block * kPrefillBlock;
    const uint32_t bytes = sizeof(smem.k[0]) + (block == 0 ? sizeof(smem.q) : 0);
    smem.k_ring.acquire(stage, bytes);
    if (block == 0) prefill_load_queries(p, job, smem);
    for (int tile = 0; tile < kKeyTiles; ++tile) {
      const int32_t at[3] = {tile * 64, key, head};
      cp_async_bulk_tensor(space_cluster, space_global, smem.k[stage.stage][tile], &p.k, at,
                           &smem.k_ring.full[stage.stage]);
    }
    smem.v_ring.acquire(stage, sizeof(smem.v[0]));
    for (int tile = 0; tile < kValueTiles; ++tile) {
      const int32_t at[3] = {tile * 64, key, head};
      cp_async_bulk_tensor(space_cluster, space_global, smem.v[stage.stage][tile], &p.v, at,
                           &smem.v_ring.full[stage.stage]);
    }
    stage.advance();
  }
}

// One math warpgroup's view of the job.
struct PrefillMath {
  const MlaPrefillParams& p;
  const PrefillJob& job;
  MlaPrefillSmem& smem;
  int half;  // which 64 of the rows

  // Row of the tile that accumulator half 0 belongs to; half 1 is 8 further.
  __device__ __forceinline__ int first_row() const {
    return half * kPrefillHalf + threadIdx.x % kPrefillWarpgroup / 32 * 16 + threadIdx.x % 32 / 4;
  }

  // s = Q K^T, left in flight as one group.
  __device__ __forceinline__ void issue_scores(float (&s)[kPrefillScores],
                                               const RingPosition<kPrefillStages>& at) const {
    smem.k_ring.await(at);
    ptx::fence_accumulators(s);
    ptx::wgmma_fence();
#pragma unroll
    for (int tile = 0; tile < kKeyTiles; ++tile) {
      const uint64_t q = k_major_descriptor(smem.q[half][tile]);
      const uint64_t k = k_major_descriptor(smem.k[at.stage][tile]);
#pragma unroll
      for (int byte = 0; byte < kSwizzleBytes; byte += 32) {
        ptx::WgmmaBf16<kPrefillBlock>::mma<ptx::Major::kK, ptx::Major::kK>(
            s, advance_k(q, byte), advance_k(k, byte), tile + byte != 0);
      }
    }
    ptx::wgmma_commit_group();
  }

  // o += P V, left in flight as one group.
  __device__ __forceinline__ void issue_values(float (&o)[kPrefillSums],
                                               const uint32_t (&weights)[kPrefillScores / 2],
                                               const RingPosition<kPrefillStages>& at) const {
    const uint64_t v = mn_major_descriptor(smem.v[at.stage], kPrefillKTile);
    ptx::fence_accumulators(o);
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < kPrefillBlock / 16; ++k) {
      ptx::WgmmaBf16<kPrefillValues>::mma_registers<ptx::Major::kMn>(o, weights + 4 * k,
                                                                     advance_k_rows(v, 16 * k), 1);
    }
    ptx::wgmma_commit_group();
  }

  // Hides the keys that a row does not attend.
  __device__ __forceinline__ void mask(float (&s)[kPrefillScores], int block) const {
    const int first = block * kPrefillBlock;
    if (first + kPrefillBlock <= job.shift) return;
    int end[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      // A row of the request never attends keys behind its end; one behind the request may.
      const int own = p.causal ? job.shift + first_row() + 8 * i : job.length;
      end[i] = own - first - int(threadIdx.x) % 4 * 2;
    }
#pragma unroll
    for (int i = 0; i < kPrefillScores; ++i) {
      if (i / 4 * 8 + i % 2 >= end[i / 2 % 2]) s[i] = -INFINITY;
    }
  }

  // Waits for a block's values, and sets those behind the request's end to zero.
  __device__ __forceinline__ void await_values(int block,
                                               const RingPosition<kPrefillStages>& at) const {
    smem.v_ring.await(at);
    const int filled = job.length - block * kPrefillBlock;
    if (filled >= kPrefillBlock) return;
    const int tile = threadIdx.x / 8 % kValueTiles, chunk = threadIdx.x % 8;
    constexpr int kStep = kPrefillMath / 8 / kValueTiles;
    for (int row = filled + int(threadIdx.x) / 8 / kValueTiles; row < kPrefillBlock; row += kStep) {
      uint8_t* to = smem.v[at.stage][tile] + row * kSwizzleBytes;
      *reinterpret_cast<uint4*>(to + chunk * 16) = uint4{0, 0, 0, 0};
    }
    cuda::ptx::fence_proxy_async(cuda::ptx::space_shared);
    ptx::named_barrier_sync(kPrefillBoth, kPrefillMath);
  }

  // All blocks of keys. Leaves sums that are not yet divided.
  __device__ __forceinline__ void run(PrefillRows& rows, float (&o)[kPrefillSums]) const {
    const bool speaks = threadIdx.x % 32 == 0;
    RingPosition<kPrefillStages> k_at, v_at;
    float s[kPrefillScores];
    uint32_t weights[kPrefillScores / 2];
    float factor[2];
    issue_scores(s, k_at);
    ptx::fence_accumulators(s);
    ptx::wgmma_wait_group<0>();
    ptx::fence_accumulators(s);
    for (int block = 0; block < job.blocks; ++block) {
      if (speaks) smem.k_ring.consume(k_at);
      k_at.advance();
      mask(s, block);
      rows.add(s, p.scale_log2, factor);
      pack_weights(s, weights);
      scale_rows(o, factor);
      const bool more = block + 1 < job.blocks;
      if (more) issue_scores(s, k_at);
      await_values(block, v_at);
      issue_values(o, weights, v_at);
      ptx::fence_accumulators(o);
      ptx::fence_accumulators(s);
      ptx::wgmma_wait_group<0>();
      ptx::fence_accumulators(o);
      ptx::fence_accumulators(s);
      if (speaks) smem.v_ring.consume(v_at);
      v_at.advance();
    }
  }

  // O, divided and rounded, through Q's place to memory; and lse. Nobody reads Q any more: a warp's
  // wait for its last scores was for those of the whole warpgroup.
  __device__ __forceinline__ void store(const PrefillRows& rows, float (&o)[kPrefillSums]) const {
    float inverse[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float total = rows.row_sum(i);
      inverse[i] = total == 0.f ? 0.f : 1.f / total;
      const int row = job.row + first_row() + 8 * i;
      if (threadIdx.x % 4 == 0 && row < job.row_end) {
        constexpr float kLn2 = 0.6931471805599453f;
        const float lse = (rows.peak[i] + ptx::log2_approx(total)) * kLn2;
        p.lse[int64_t(blockIdx.y) * p.t + row] = total == 0.f ? INFINITY : lse;
      }
    }
    scale_rows(o, inverse);
    stage_result(o);
    ptx::named_barrier_sync(kPrefillWarpgroupOnly + half, kPrefillWarpgroup);
    const int thread = threadIdx.x % kPrefillWarpgroup;
    const int chunk = thread % (kPrefillValues / 8);
    const int rows_left = min(job.row_end - job.row - half * kPrefillHalf, kPrefillHalf);
    for (int row = thread / (kPrefillValues / 8); row < rows_left;
         row += kPrefillWarpgroup / (kPrefillValues / 8)) {
      const int64_t token = job.row + half * kPrefillHalf + row;
      const uint8_t* from = smem.q[half][chunk / 8] + swizzle128(row, chunk % 8);
      static_cast<uint4*>(p.out)[(token * p.h + blockIdx.y) * (kPrefillValues / 8) + chunk] =
          *reinterpret_cast<const uint4*>(from);
    }
  }

  __device__ __forceinline__ void stage_result(const float (&o)[kPrefillSums]) const {
    const int lane = threadIdx.x % 32;
    const int row = threadIdx.x % kPrefillWarpgroup / 32 * 16 + lane % 16;
#pragma unroll
    for (int column = 0; column < kPrefillValues; column += 16) {
      uint32_t packed[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const __nv_bfloat162 pair =
            __floats2bfloat162_rn(o[column / 2 + 2 * i], o[column / 2 + 2 * i + 1]);
        packed[i] = *reinterpret_cast<const uint32_t*>(&pair);
      }
      const uint32_t tile = shared_address(smem.q[half][column / 64]);
      ptx::stmatrix_x4(tile + swizzle128(row, column % 64 / 8 + lane / 16), packed[0], packed[1],
                       packed[2], packed[3]);
    }
  }
};

__device__ __forceinline__ void prefill_attention(const MlaPrefillParams& p) {
  extern __shared__ __align__(1024) uint8_t shared_memory[];
  auto& smem = *reinterpret_cast<MlaPrefillSmem*>(shared_memory);
  static_assert(sizeof(smem) == mla_prefill_shared_bytes());
  PrefillJob job;
  if (!find_prefill_job(p, blockIdx.x, job)) return;  // the whole CTA
  if (threadIdx.x == 0) {
    smem.k_ring.init(kPrefillMath / 32);
    smem.v_ring.init(kPrefillMath / 32);
  }
  __syncthreads();

  if (threadIdx.x >= kPrefillMath) {
    ptx::setmaxnreg_dec<24>();
    if (threadIdx.x == kPrefillMath) prefill_load(p, job, smem);
    return;
  }
  ptx::setmaxnreg_inc<240>();
  const int half = __shfl_sync(0xffffffffu, threadIdx.x / kPrefillWarpgroup, 0);
  const PrefillMath math{p, job, smem, half};
  PrefillRows rows;
  float o[kPrefillSums];
#pragma unroll
  for (float& value : o) value = 0.f;
  if (job.blocks > 0) math.run(rows, o);
  math.store(rows, o);
}

}  // namespace dsk
