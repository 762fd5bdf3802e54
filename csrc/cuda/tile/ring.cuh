// The stage ring between a TMA producer and its consumers: the one synchronisation scheme of every
// pipelined kernel. full[s] completes when the stage's bytes have landed; empty[s] when every
// consumer has let go of it.
#pragma once

#include <cuda/ptx>

#include <cstdint>

#include "cuda/ptx/cluster.cuh"
#include "cuda/ptx/control.cuh"

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

// In a pair of CTAs (`sharers` = 2) the producers also write into each other's stages (multicast):
// a stage is free when the consumers of both have let go of it.
template <int kNumStages>
struct Ring {
  using Position = RingPosition<kNumStages>;
  static constexpr int kStages = kNumStages;

  uint64_t full[kNumStages];
  uint64_t empty[kNumStages];

  // By one thread, before anyone uses the ring; a CTA (or cluster) barrier must follow.
  // `consumers` is the number of consume() (or release()) calls of one CTA that free a stage,
  // `producers` that of acquire() or fill() calls that announce one.
  __device__ __forceinline__ void init(uint32_t consumers, uint32_t producers = 1,
                                       uint32_t sharers = 1) {
    init_every<1>(0, consumers, producers, sharers);
  }

  // The same by a whole warp: a lane for each stage.
  __device__ __forceinline__ void init_by_warp(uint32_t consumers, uint32_t producers = 1,
                                               uint32_t sharers = 1) {
    init_every<32>(threadIdx.x % 32, consumers, producers, sharers);
  }

  // Producer: wait until the stage is free (the first round finds every stage free), then announce
  // the bytes that will land in it.
  __device__ __forceinline__ void acquire(const Position& at, uint32_t bytes) {
    wait(&empty[at.stage], at.phase ^ 1);
    announce(at, bytes);
  }

  // The second half alone: for a stage that is known to be free. Also one of the `producers`
  // arrivals of those that bring some of its bytes by copies and the others by their own stores.
  __device__ __forceinline__ void announce(const Position& at, uint32_t bytes) {
    cuda::ptx::mbarrier_arrive_expect_tx(cuda::ptx::sem_release, cuda::ptx::scope_cta,
                                         cuda::ptx::space_shared, &full[at.stage], bytes);
  }

  // Producers that write a stage with their own stores: wait until it is free; afterwards, one of
  // the `producers` arrivals that fill it.
  __device__ __forceinline__ void await_free(const Position& at) {
    wait(&empty[at.stage], at.phase ^ 1);
  }
  __device__ __forceinline__ void fill(const Position& at) {
    cuda::ptx::mbarrier_arrive(cuda::ptx::sem_release, cuda::ptx::scope_cta,
                               cuda::ptx::space_shared, &full[at.stage]);
  }

  // Consumer: wait for the stage's bytes.
  __device__ __forceinline__ void await(const Position& at) { wait(&full[at.stage], at.phase); }

  // Consumer: one of the `consumers` arrivals that free the stage of this CTA.
  __device__ __forceinline__ void consume(const Position& at) {
    cuda::ptx::mbarrier_arrive(cuda::ptx::sem_release, cuda::ptx::scope_cta,
                               cuda::ptx::space_shared, &empty[at.stage]);
  }

  // Consumer, by a whole warp: its one arrival.
  __device__ __forceinline__ void release(const Position& at) {
    if (threadIdx.x % 32 == 0) consume(at);
  }

 private:
  // Stages first, first + kStep, ... The fence is for those who come by a cluster's barrier that
  // orders no memory.
  template <int kStep>
  __device__ __forceinline__ void init_every(int first, uint32_t consumers, uint32_t producers,
                                             uint32_t sharers) {
#pragma unroll
    for (int s = first; s < kNumStages; s += kStep) {
      cuda::ptx::mbarrier_init(&full[s], producers);
      cuda::ptx::mbarrier_init(&empty[s], consumers * sharers);
    }
    cuda::ptx::fence_mbarrier_init(cuda::ptx::sem_release, cuda::ptx::scope_cluster);
  }

  __device__ static __forceinline__ void wait(uint64_t* barrier, uint32_t parity) {
    while (!cuda::ptx::mbarrier_try_wait_parity(barrier, parity)) {
    }
  }
};

// How a consumer's warp lets go of stages of a ring, of its own CTA or of both in a pair: the
// addresses are looked up once. The stage has only been read, and is only written by TMA, so
// nothing has to become visible to the other CTA.
class StageRelease {
 public:
  template <int kNumStages>
  __device__ __forceinline__ StageRelease(Ring<kNumStages>& ring, int sharers) {
    const int lane = threadIdx.x % 32;
    alone_ = ptx::keep(sharers == 1 && lane == 0);
    paired_ = ptx::keep(sharers > 1 && lane < sharers);
    own_ = static_cast<uint32_t>(__cvta_generic_to_shared(ring.empty));
    remote_ = paired_ ? ptx::map_shared_to_rank(own_, lane) : own_;
  }

  __device__ __forceinline__ void operator()(int stage) const {
    if (alone_) ptx::mbarrier_arrive_at(own_ + stage * sizeof(uint64_t));
    if (paired_) ptx::mbarrier_arrive_remote(remote_ + stage * sizeof(uint64_t));
  }

 private:
  uint32_t alone_, paired_;  // this lane arrives here; or in the CTA of its rank
  uint32_t own_, remote_;
};

}  // namespace dsk
