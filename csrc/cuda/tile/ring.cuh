// The stage ring between a TMA producer and its consumers: the one synchronisation scheme of every
// pipelined kernel. full[s] completes when the stage's bytes have landed; empty[s] when every
// consumer has let go of it.
#pragma once

#include <cuda/ptx>

#include <cstdint>

#include "cuda/ptx/cluster.cuh"

namespace dsk {

// Where one role stands in the ring. Consumers and the producer each keep their own.
template <int kNumStages>
struct RingPosition {
  int stage = 0;
  uint32_t phase = 0;

  __device__ __forceinline__ void advance() {
    if (++stage == kNumStages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

// With kCluster > 1 the producers of a cluster also write into each other's stages (multicast): a
// stage is free when the consumers of every CTA have let go of it.
template <int kNumStages, int kCluster = 1>
struct Ring {
  using Position = RingPosition<kNumStages>;

  uint64_t full[kNumStages];
  uint64_t empty[kNumStages];

  // By one thread, before anyone uses the ring; a CTA (or cluster) barrier must follow.
  // `consumers` is the number of consume() (or release()) calls of one CTA that free a stage.
  __device__ __forceinline__ void init(uint32_t consumers) {
#pragma unroll
    for (int s = 0; s < kNumStages; ++s) {
      cuda::ptx::mbarrier_init(&full[s], 1);
      cuda::ptx::mbarrier_init(&empty[s], consumers * kCluster);
    }
    cuda::ptx::fence_mbarrier_init(cuda::ptx::sem_release, cuda::ptx::scope_cluster);
  }

  // Producer: wait until the stage is free (the first round finds every stage free), then announce
  // the bytes that will land in it.
  __device__ __forceinline__ void acquire(const Position& at, uint32_t bytes) {
    if constexpr (kCluster == 1) {
      wait(&empty[at.stage], at.phase ^ 1);
    } else {
      while (!cuda::ptx::mbarrier_try_wait_parity(cuda::ptx::sem_acquire, cuda::ptx::scope_cluster,
                                                  &empty[at.stage], at.phase ^ 1)) {
      }
    }
    cuda::ptx::mbarrier_arrive_expect_tx(cuda::ptx::sem_release, cuda::ptx::scope_cta,
                                         cuda::ptx::space_shared, &full[at.stage], bytes);
  }

  // Consumer: wait for the stage's bytes.
  __device__ __forceinline__ void await(const Position& at) { wait(&full[at.stage], at.phase); }

  // Consumer: one of the `consumers` arrivals that free the stage of this CTA.
  __device__ __forceinline__ void consume(const Position& at) {
    cuda::ptx::mbarrier_arrive(cuda::ptx::sem_release, cuda::ptx::scope_cta,
                               cuda::ptx::space_shared, &empty[at.stage]);
  }

  // Consumer, by a whole warp: its arrival in every CTA of the cluster.
  __device__ __forceinline__ void release(const Position& at) {
    const int lane = threadIdx.x % 32;
    if constexpr (kCluster == 1) {
      if (lane == 0) consume(at);
    } else if (lane < kCluster) {
      cuda::ptx::mbarrier_arrive(cuda::ptx::sem_release, cuda::ptx::scope_cluster,
                                 cuda::ptx::space_cluster,
                                 ptx::map_to_rank(&empty[at.stage], lane));
    }
  }

 private:
  __device__ static __forceinline__ void wait(uint64_t* barrier, uint32_t parity) {
    while (!cuda::ptx::mbarrier_try_wait_parity(barrier, parity)) {
    }
  }
};

}  // namespace dsk
