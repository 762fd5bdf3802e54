// The skeleton of every GEMM kernel: math warpgroups first, then one producer warpgroup whose first
// thread issues TMA loads into the ring, while the others multiply what has landed.
#pragma once

#include <cuda/ptx>

#include <cstdint>

#include "cuda/ptx/control.cuh"
#include "cuda/tile/gemm_scheduler.cuh"
#include "cuda/tile/ring.cuh"

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

// Splits the CTA: produce() runs in one thread, compute(warpgroup) in each math thread. Every math
// warp frees a stage once. setmaxnreg moves registers from the producer to the math warpgroups.
template <int kMathWarpgroups, class Stages, class Produce, class Compute>
__device__ __forceinline__ void run_roles(Stages& ring, Produce produce, Compute compute) {
  constexpr int kMathThreads = kMathWarpgroups * kWarpgroup;
  constexpr int kProducerRegisters = 40;
  constexpr int kMathRegisters = kMathWarpgroups == 1 ? 248 : 232;
  if (threadIdx.x == 0) ring.init(kMathThreads / 32);
  __syncthreads();

  if (threadIdx.x >= kMathThreads) {
    ptx::setmaxnreg_dec<kProducerRegisters>();
    if (threadIdx.x == kMathThreads) produce();
  } else {
    ptx::setmaxnreg_inc<kMathRegisters>();
    compute(__shfl_sync(0xffffffffu, threadIdx.x / kWarpgroup, 0));
  }
}

}  // namespace dsk
