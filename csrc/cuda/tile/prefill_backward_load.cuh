// Shared memory of prefill's backward, and the thread that fills it.
#pragma once

#include <cuda/ptx>

#include "cuda/params/mla_prefill_backward.hpp"
#include "cuda/tile/prefill_backward_job.cuh"
#include "cuda/tile/ring.cuh"
#include "cuda/tile/smem_layout.cuh"

namespace dsk {

constexpr int kBackwardTile = kBackwardBlock * kSwizzleBytes;  // bytes; 64 columns
constexpr int kBackwardWide = kPrefillWidth / 64;              // tiles of q or k
constexpr int kBackwardNarrow = kPrefillValues / 64;           // tiles of grad or v

// "Wide" is q on the queries' side and k on the keys'; "narrow" is grad there and v here.
struct alignas(1024) PrefillBackwardSmem {
  uint8_t kept_wide[2][kBackwardWide][kBackwardTile];  // by warpgroup; takes the result at the end
  uint8_t kept_narrow[2][kBackwardNarrow][kBackwardTile];
  uint8_t wide[kBackwardStages][kBackwardWide][kBackwardTile];
  uint8_t narrow[kBackwardStages][kBackwardNarrow][kBackwardTile];
  PrefillStatistics statistics[kBackwardStages][kBackwardBlock];  // of queries that pass
  Ring<kBackwardStages> ring;
};

template <int kTiles>
__device__ __forceinline__ void load_block(uint8_t (&to)[kTiles][kBackwardTile],
                                           const TensorMapBytes& map, int row, uint64_t* full) {
  using namespace cuda::ptx;
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    const int32_t at[3] = {tile * 64, row, int(blockIdx.y)};
    cp_async_bulk_tensor(space_cluster, space_global, to[tile], &map, at, full);
  }
}

// The kept rows come with the first block, at its barrier.
template <PrefillSide kSide>
__device__ __forceinline__ void load_kept(const PrefillBackwardParams& p,
                                          const PrefillBackwardJob& job, PrefillBackwardSmem& smem,
                                          uint64_t* full) {
  constexpr bool kKeys = kSide == PrefillSide::kKeys;
  for (int half = 0; half < 2; ++half) {
    const int row = job.kept_begin + job.kept + half * kBackwardBlock;
    load_block(smem.kept_wide[half], kKeys ? p.k : p.q, row, full);
    load_block(smem.kept_narrow[half], kKeys ? p.v : p.grad, row, full);
  }
}

// By one thread: the kept rows, and every block of the other side.
template <PrefillSide kSide>
__device__ __forceinline__ void backward_load(const PrefillBackwardParams& p,
                                              const PrefillBackwardJob& job,
                                              PrefillBackwardSmem& smem) {
  constexpr bool kKeys = kSide == PrefillSide::kKeys;
  constexpr uint32_t kKept = sizeof(smem.kept_wide) + sizeof(smem.kept_narrow);
  constexpr uint32_t kBlock =
      sizeof(smem.wide[0]) + sizeof(smem.narrow[0]) + (kKeys ? sizeof(smem.statistics[0]) : 0);
  const PrefillStatistics* statistics =
      p.statistics + blockIdx.y * prefill_statistics_rows(p.t, p.b) + job.statistics;
  RingPosition<kBackwardStages> at;
  for (int block = job.first; block < job.last; ++block, at.advance()) {
    const int row = job.passing_begin + block * kBackwardBlock;
    uint64_t* full = &smem.ring.full[at.stage];
    const bool first = block == job.first;
    const uint32_t bytes = first ? kBlock + kKept : kBlock;
    smem.ring.acquire(at, bytes);
    if (first) load_kept<kSide>(p, job, smem, full);
    load_block(smem.wide[at.stage], kKeys ? p.q : p.k, row, full);
    load_block(smem.narrow[at.stage], kKeys ? p.grad : p.v, row, full);
    if constexpr (kKeys) {
      using namespace cuda::ptx;
      cp_async_bulk(space_cluster, space_global, smem.statistics[at.stage],
                    statistics + block * kBackwardBlock, sizeof(smem.statistics[0]), full);
    }
  }
}

}  // namespace dsk
