// The skeleton of every GEMM kernel: math warpgroups first, then one producer warpgroup whose first
// thread issues TMA loads into the ring, while the others multiply what has landed.
#pragma once

#include <cuda/ptx>

#include <cstdint>

#include "cuda/ptx/control.cuh"
#include "cuda/tile/cluster_sync.cuh"
#include "cuda/tile/gemm_scheduler.cuh"
#include "cuda/tile/ring.cuh"
#include "cuda/tile/smem_layout.cuh"

namespace dsk {

constexpr int kWarpgroup = 128;  // threads
constexpr int kMmaM = 64;        // rows of one warpgroup's wgmma

// Named barriers; 0 is __syncthreads.
enum GemmBarrier : uint32_t {
  kMathBarrier = 1,      // all math warpgroups
  kEpilogueBarrier = 2,  // one for each math warpgroup from here on
};

// Tiles on their way from the producer, which walks the schedule, to the math warps, which look
// them up here whenever they need a coordinate: registers are for sums.
struct TileQueue {
  static constexpr int kSlots = 4;  // tiles that the producer may be ahead

  GemmTile tile[kSlots];
  Ring<kSlots> ring;
};

// The producer: queues each tile; for each of its k blocks, waits for a free stage, announces its
// `bytes` and calls load(tile, k_block, stage, barrier), which issues copies of exactly that many
// bytes. The scheduler walks an `extent`, whatever it takes for one.
template <class Stages, class Scheduler, class Load>
class TileProducer {
 public:
  template <class Extent>
  __device__ __forceinline__ TileProducer(Stages& ring, TileQueue& queue, const Extent& extent,
                                          uint32_t bytes, const Load& load)
      : ring_(ring), queue_(queue), scheduler_(extent), bytes_(bytes), load_(load) {}

  // Finds the first tile: what can be done before the barriers are there.
  __device__ __forceinline__ void prepare() { more_ = scheduler_.next(tile_); }

  __device__ __forceinline__ void run() {
    typename Stages::Position at;
    RingPosition<TileQueue::kSlots> slot;
    // What everyone waits for: before the queue, and without asking whether a stage is free.
    if (more_ && tile_.k_begin < tile_.k_end) {
      ring_.announce(at, bytes_);
      load_(tile_, tile_.k_begin, at.stage, &ring_.full[at.stage]);
      at.advance();
    }
    int k_block = tile_.k_begin + 1;
    while (more_) {
      push(slot);
      for (; k_block < tile_.k_end; ++k_block) {
        ring_.acquire(at, bytes_);
        load_(tile_, k_block, at.stage, &ring_.full[at.stage]);
        at.advance();
      }
      more_ = scheduler_.next(tile_);
      k_block = tile_.k_begin;
    }
    tile_.group = kNoMoreTiles;
    push(slot);
  }

 private:
  __device__ __forceinline__ void push(RingPosition<TileQueue::kSlots>& slot) {
    queue_.ring.await_free(slot);
    queue_.tile[slot.stage] = tile_;
    queue_.ring.fill(slot);
    slot.advance();
  }

  Stages& ring_;
  TileQueue& queue_;
  Scheduler scheduler_;
  const uint32_t bytes_;
  const Load& load_;
  GemmTile tile_;
  bool more_ = false;
};

template <class Scheduler, class Smem, class Extent, class Load>
__device__ __forceinline__ auto make_producer(Smem& smem, const Extent& extent, uint32_t bytes,
                                              const Load& load) {
  return TileProducer<decltype(Smem::ring), Scheduler, Load>(smem.ring, smem.queue, extent, bytes,
                                                             load);
}

// Math warps: body(tile) for each queued tile.
template <class Body>
__device__ __forceinline__ void for_each_tile(TileQueue& queue, Body body) {
  RingPosition<TileQueue::kSlots> slot;
  while (true) {
    queue.ring.await(slot);
    const GemmTile& tile = queue.tile[slot.stage];
    if (tile.group == kNoMoreTiles) return;
    body(tile);
    __syncwarp();
    queue.ring.release(slot);
    slot.advance();
    __syncwarp();  // or the lane that released walks the loop by itself
  }
}

// Producer: kRows swizzled rows of 128 bytes into a stage. A tile that both CTAs of a pair need
// (`shared`) comes in halves (boxes of kRows / 2): each loads one for both, and each sees kRows
// arrive.
template <int kRows>
__device__ __forceinline__ void load_tile(uint8_t* to, const TensorMapBytes& map, int column,
                                          int row, bool shared, uint64_t* full) {
  using namespace cuda::ptx;
  if (shared) {
    const int half = ::dsk::ptx::cluster_rank() * (kRows / 2);
    const int32_t at[2] = {column, row + half};
    cp_async_bulk_tensor(space_cluster, space_global, to + half * kSwizzleBytes, &map, at, full,
                         uint16_t(3));
  } else {
    const int32_t at[2] = {column, row};
    cp_async_bulk_tensor(space_cluster, space_global, to, &map, at, full);
  }
}

// Splits the CTA: the producer runs in one thread, compute(warpgroup) in each math thread. Every
// math warp releases a stage once. setmaxnreg moves registers from the producer to the math
// warpgroups.
//
// Two warps of the producer's warpgroup start at once: one finds the first tile, one sets the
// barriers up. A pair's CTAs meet before either loads into the other.
template <int kMathWarpgroups, class Smem, class Producer, class Compute>
__device__ __forceinline__ void run_roles(Smem& smem, int sharers, Producer producer,
                                          Compute compute) {
  constexpr int kMathThreads = kMathWarpgroups * kWarpgroup;
  constexpr int kProducerRegisters = 40;
  constexpr int kMathRegisters = kMathWarpgroups == 1 ? 248 : 232;
  if (threadIdx.x == kMathThreads) {
    producer.prepare();
  } else if (threadIdx.x / 32 == kMathThreads / 32 + 1) {
    smem.ring.init_by_warp(kMathThreads / 32, 1, sharers);
    smem.queue.ring.init_by_warp(kMathThreads / 32);
  }
  if (sharers == 1) {
    __syncthreads();
  } else {
    meet_cluster();  // init_by_warp's fence has made the barriers visible
  }

  if (threadIdx.x >= kMathThreads) {
    ptx::setmaxnreg_dec<kProducerRegisters>();
    if (threadIdx.x == kMathThreads) producer.run();
  } else {
    ptx::setmaxnreg_inc<kMathRegisters>();
    compute(__shfl_sync(0xffffffffu, threadIdx.x / kWarpgroup, 0));
  }
  // The peer may still write into this CTA's stages, or arrive on its barriers.
  if (sharers != 1) meet_cluster();
}

}  // namespace dsk
