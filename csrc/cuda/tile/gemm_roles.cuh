// The skeleton of every GEMM kernel: math warpgroups first, then one producer warpgroup whose first
// thread issues TMA loads into the ring, while the others multiply what has landed.
#pragma once

#include <cuda/ptx>

#include <cstdint>

#include "cuda/ptx/control.cuh"
#include "cuda/tile/gemm_scheduler.cuh"
#include "cuda/tile/ring.cuh"
#include "cuda/tile/smem_layout.cuh"

namespace dsk {

constexpr int kWarpgroup = 128;  // threads
constexpr int kMmaM = 64;        // rows of one warpgroup's wgmma

// Producer: for each tile and each of its k blocks, wait for a free stage, announce its `bytes` and
// call load(tile, k_block, stage, barrier), which issues copies of exactly that many bytes.
template <class Stages, class Scheduler, class Load>
__device__ __forceinline__ void produce_tiles(Stages& ring, Scheduler scheduler, uint32_t bytes,
                                              Load load) {
  typename Stages::Position at;
  GemmTile tile;
  while (scheduler.next(tile)) {
    for (int k_block = tile.k_begin; k_block < tile.k_end; ++k_block) {
      ring.acquire(at, bytes);
      load(tile, k_block, at.stage, &ring.full[at.stage]);
      at.advance();
    }
  }
}

// Producer: kRows swizzled rows of 128 bytes into a stage. A tile that both CTAs of a pair need
// comes in halves (boxes of kRows / 2): each loads one for both, and each sees kRows arrive.
template <bool kShared, int kRows>
__device__ __forceinline__ void load_tile(uint8_t* to, const TensorMapBytes& map, int column,
                                          int row, uint64_t* full) {
  using namespace cuda::ptx;
  if constexpr (kShared) {
    const int half = ::dsk::ptx::cluster_rank() * (kRows / 2);
    const int32_t at[2] = {column, row + half};
    cp_async_bulk_tensor(space_cluster, space_global, to + half * kSwizzleBytes, &map, at, full,
                         uint16_t(3));
  } else {
    const int32_t at[2] = {column, row};
    cp_async_bulk_tensor(space_cluster, space_global, to, &map, at, full);
  }
}

__device__ __forceinline__ void sync_cluster() {
  cuda::ptx::barrier_cluster_arrive(cuda::ptx::sem_release);
  cuda::ptx::barrier_cluster_wait(cuda::ptx::sem_acquire);
}

// Splits the CTA: produce() runs in one thread, compute(warpgroup) in each math thread. Every math
// warp releases a stage once. setmaxnreg moves registers from the producer to the math warpgroups.
template <int kMathWarpgroups, int kNumStages, int kCluster, class Produce, class Compute>
__device__ __forceinline__ void run_roles(Ring<kNumStages, kCluster>& ring, Produce produce,
                                          Compute compute) {
  constexpr int kMathThreads = kMathWarpgroups * kWarpgroup;
  constexpr int kProducerRegisters = 40;
  constexpr int kMathRegisters = kMathWarpgroups == 1 ? 248 : 232;
  if (threadIdx.x == 0) ring.init(kMathThreads / 32);
  if constexpr (kCluster == 1) {
    __syncthreads();
  } else {
    sync_cluster();
  }

  if (threadIdx.x >= kMathThreads) {
    ptx::setmaxnreg_dec<kProducerRegisters>();
    if (threadIdx.x == kMathThreads) produce();
  } else {
    ptx::setmaxnreg_inc<kMathRegisters>();
    compute(__shfl_sync(0xffffffffu, threadIdx.x / kWarpgroup, 0));
  }
  // The peer may still write into this CTA's stages, or arrive on its barriers.
  if constexpr (kCluster > 1) sync_cluster();
}

}  // namespace dsk
