// The matrix products of MLA decode, one warpgroup each: Q K^T, and P V on half of V's columns.
#pragma once

#include "cuda/ptx/cluster.cuh"
#include "cuda/ptx/control.cuh"
#include "cuda/ptx/wgmma_bf16.cuh"
#include "cuda/tile/mla_smem.cuh"

namespace dsk {

// s = Q K^T of the block in `buffer`, left in flight as one group.
__device__ __forceinline__ void issue_scores(float (&s)[32], MlaDecodeSmem& smem, int buffer,
                                             uint32_t phase) {
  using Mma = ptx::WgmmaBf16<64>;
  smem.kv_ring[buffer].await({0, phase});
  ptx::fence_accumulators(s);
  ptx::wgmma_fence();
#pragma unroll
  for (int tile = 0; tile < kMlaTiles; ++tile) {
    if (tile == 4) {
      smem.kv_ring[buffer].await({1, phase});
      ptx::wgmma_fence();
    }
    const uint64_t q = k_major_descriptor(smem.q[tile]);
    const uint64_t k = k_major_descriptor(smem.kv[buffer][tile]);
#pragma unroll
    for (int byte = 0; byte < kSwizzleBytes; byte += 32) {
      Mma::mma<ptx::Major::kK, ptx::Major::kK>(s, advance_k(q, byte), advance_k(k, byte),
                                               tile + byte != 0);
    }
  }
  ptx::wgmma_commit_group();
}

// o += P V, P in registers: four for every 16 tokens. v: four tiles of 64 columns.
__device__ __forceinline__ void multiply_registers(float (&o)[128], const uint32_t (&p)[16],
                                                   const uint8_t (*v)[kMlaTileBytes]) {
  const uint64_t values = mn_major_descriptor(v, kMlaTileBytes);
  ptx::fence_accumulators(o);
  ptx::wgmma_fence();
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    ptx::WgmmaBf16<256>::mma_registers<ptx::Major::kMn>(o, p + 4 * k,
                                                        advance_k_rows(values, 16 * k), 1);
  }
  ptx::wgmma_commit_group();
}

// o += P V, P in shared memory.
__device__ __forceinline__ void multiply_shared(float (&o)[128], const uint8_t* p,
                                                const uint8_t (*v)[kMlaTileBytes]) {
  const uint64_t weights = k_major_descriptor(p);
  const uint64_t values = mn_major_descriptor(v, kMlaTileBytes);
  ptx::fence_accumulators(o);
  ptx::wgmma_fence();
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    ptx::WgmmaBf16<256>::mma<ptx::Major::kK, ptx::Major::kMn>(o, advance_k(weights, 32 * k),
                                                              advance_k_rows(values, 16 * k), 1);
  }
  ptx::wgmma_commit_group();
}

// Waits for everything this warpgroup has in flight; the accumulators are then its own again.
template <int kCount>
__device__ __forceinline__ void finish(float (&accumulators)[kCount]) {
  ptx::fence_accumulators(accumulators);
  ptx::wgmma_wait_group<0>();
  ptx::fence_accumulators(accumulators);
}

// Lets the producers of all CTAs that share blocks write this side's half of a block again.
template <class Cache>
__device__ __forceinline__ void release(MlaDecodeSmem& smem, int buffer, MlaSide side,
                                        const uint32_t (&phase)[2]) {
  Ring<2>& ring = smem.kv_ring[buffer];
  const int lane = threadIdx.x % 32;
  if constexpr (Cache::kSharers == 1) {
    ring.release({side, phase[buffer]});
  } else if (lane < Cache::kSharers) {  // as StageRelease, for which no registers are left
    const uint32_t empty = shared_address(&ring.empty[side]);
    ptx::mbarrier_arrive_remote(ptx::map_shared_to_rank(empty, lane));
  }
}

}  // namespace dsk
