// Latent attention of 64 query rows over a paged cache: S = Q K^T, P = softmax(S), O = P V, where V
// is the first 512 columns of K and rows are a request's (query token, head) pairs.
//
// The two floors, 128 heads, 1 query token, 4096 cached tokens, per request: 1.1 GFLOP at 989
// TFLOP/s = 1.15 us on one H800's tensor cores; 4.7 MB of cache at 3.35 TB/s = 1.41 us of memory.
// The kernel has to keep both busy at once.
//
// Schedule (the idea is FlashMLA's): O is 64 x 512 in fp32, too much for one warpgroup's registers,
// so each of two math warpgroups owns half of its columns. They take two blocks of 64 tokens at a
// time. The left warpgroup scores the first block, the right one the second, and each multiplies
// both P's with its half of V:
//
//   left   S0 = Q K0   softmax 0 ->P0       O += P0 V0[left]    P1->  O += P1 V1[left]
//   right  S1 = Q K1        ->P0  O += P0 V0[right]  softmax 1 ->P1   O += P1 V1[right]
//
// While one does its softmax on the CUDA cores, the other's wgmma keeps the tensor cores busy. P
// goes from one to the other through shared memory, in the place of the RoPE columns of its own
// block, which nobody needs once its scores are done; the running maximum goes along.
//
// Shared memory holds Q and two blocks, 216 KB, so a block is loaded again as early as possible:
// its left half when the left warpgroup is done with it, its right half likewise. Results leave
// through Q's place.
//
// Tokens behind a request's end are never read; where a block is partly filled, its scores are
// masked and its rows of V set to zero, since 0 * NaN would not be 0.
#pragma once

#include <cuda_bf16.h>

#include <cuda/ptx>

#include "cuda/mla_shape.hpp"
#include "cuda/params/mla.hpp"
#include "cuda/ptx/control.cuh"
#include "cuda/tile/cluster_sync.cuh"
#include "cuda/tile/mla_dequantize.cuh"
#include "cuda/tile/mla_load.cuh"
#include "cuda/tile/mla_pieces.cuh"
#include "cuda/tile/mla_products.cuh"
#include "cuda/tile/mla_result.cuh"
#include "cuda/tile/mla_smem.cuh"
#include "cuda/tile/mla_softmax.cuh"

namespace dsk {

// A pair of blocks, seen by the left warpgroup. `second` is whether there is a second block.
template <class Cache>
__device__ __forceinline__ void mla_left_pair(MlaDecodeSmem& smem, const MlaPiece& piece,
                                              const MlaMask& mask, int block, bool second,
                                              float scale, uint32_t (&phase)[2], MlaRows& rows,
                                              float (&o)[128]) {
  float factor[2];
  {
    float s[32];
    uint32_t p[16];
    issue_scores(s, smem, 0, phase[0]);
    finish(s);
    mask.apply(s, block);
    softmax(s, scale, piece.is_one_block(), rows, factor, p);
    publish(smem, kLeft, rows, p);
    cuda::ptx::fence_proxy_async(cuda::ptx::space_shared);
    ptx::named_barrier_arrive(kMlaFirstReady, kMlaMathThreads);
    mask.clear_tail<Cache>(smem.kv[0], block, kLeft);
    rescale(o, factor);
    multiply_registers(o, p, smem.kv[0]);
  }
  finish(o);
  release<Cache>(smem, 0, kLeft, phase);
  if (!second) return;

  ptx::named_barrier_sync(kMlaSecondReady, kMlaMathThreads);
  rows.follow(smem.row_max[1], factor);
  mask.clear_tail<Cache>(smem.kv[1], block + 1, kLeft);
  smem.kv_ring[1].await({kLeft, phase[1]});
  rescale(o, factor);
  multiply_shared(o, smem.kv[1][kMlaRopeTile], smem.kv[1]);
  finish(o);
  release<Cache>(smem, 1, kLeft, phase);
}

// The same, seen by the right one.
template <class Cache>
__device__ __forceinline__ void mla_right_pair(MlaDecodeSmem& smem, const MlaMask& mask, int block,
                                               bool second, float scale, uint32_t (&phase)[2],
                                               MlaRows& rows, float (&o)[128]) {
  float factor[2];
  float s[32];
  if (second) {
    issue_scores(s, smem, 1, phase[1]);
    finish(s);
  }
  ptx::named_barrier_sync(kMlaFirstReady, kMlaMathThreads);
  rows.follow(smem.row_max[0], factor);
  mask.clear_tail<Cache>(smem.kv[0] + 4, block, kRight);
  smem.kv_ring[0].await({kRight, phase[0]});
  rescale(o, factor);
  multiply_shared(o, smem.kv[0][kMlaRopeTile], smem.kv[0] + 4);
  if (!second) {
    finish(o);
    release<Cache>(smem, 0, kRight, phase);
    return;
  }

  uint32_t p[16];
  mask.apply(s, block + 1);  // while P0 V0 runs
  softmax(s, scale, false, rows, factor, p);
  finish(o);
  release<Cache>(smem, 0, kRight, phase);
  publish(smem, kRight, rows, p);
  cuda::ptx::fence_proxy_async(cuda::ptx::space_shared);
  ptx::named_barrier_arrive(kMlaSecondReady, kMlaMathThreads);
  mask.clear_tail<Cache>(smem.kv[1] + 4, block + 1, kRight);
  rescale(o, factor);
  multiply_registers(o, p, smem.kv[1] + 4);
  finish(o);
  release<Cache>(smem, 1, kRight, phase);
}

// One side's work on a piece whose queries are there: wgmma's rows are up to 64 query rows.
struct MlaManyRows {
  template <class Cache, MlaSide kSide>
  __device__ static __forceinline__ void run(const MlaDecodeParams& p, const MlaPiece& piece,
                                             MlaDecodeSmem& smem, uint32_t (&phase)[2]) {
    MlaRows rows;
    float o[128];
#pragma unroll
    for (float& value : o) value = 0.f;
    const MlaMask mask(p, piece);
    for (int block = piece.begin; block < piece.end; block += 2) {
      const bool second = block + 1 < piece.end;
      if constexpr (kSide == kLeft) {
        mla_left_pair<Cache>(smem, piece, mask, block, second, p.scale_log2, phase, rows, o);
      } else {
        mla_right_pair<Cache>(smem, mask, block, second, p.scale_log2, phase, rows, o);
      }
      phase[0] ^= 1;
      if (second) phase[1] ^= 1;
    }
    store_result<kSide>(p, piece, smem, rows, o);
  }
};

template <class Cache, class Tile, MlaSide kSide>
__device__ __forceinline__ void mla_math(const MlaDecodeParams& p, MlaDecodeSmem& smem) {
  MlaPieces pieces(p);
  MlaPiece piece;
  uint32_t phase[2] = {0, 0};
  RingPosition<1> q_at;
  while (pieces.next(piece)) {
    if constexpr (kSide == kLeft && !Cache::kWithQueries) {
      if (threadIdx.x == 0) load_queries(p, piece, smem, q_at);
      __syncwarp();
    }
    smem.q_ring.await(q_at);
    Tile::template run<Cache, kSide>(p, piece, smem, phase);
    __syncwarp();  // all lanes have read the sums that other warps write anew behind the next Q
    smem.q_ring.release(q_at);
    q_at.advance();
  }
}

template <class Cache, class Tile>
__device__ __forceinline__ void mla_decode(const MlaDecodeParams& p) {
  extern __shared__ __align__(1024) uint8_t shared_memory[];
  auto& smem = *reinterpret_cast<MlaDecodeSmem*>(shared_memory);
  static_assert(sizeof(smem) == mla_decode_shared_bytes());
  // 65536 registers, of which a launch of 384 threads gets 168 each.
  static_assert(2 * Cache::kMathRegisters + Cache::kProducerRegisters <= 3 * 168);
  if (threadIdx.x == 0) {
    smem.kv_ring[0].init(kMlaWarpgroup / 32, Cache::kProducers, Cache::kSharers);
    smem.kv_ring[1].init(kMlaWarpgroup / 32, Cache::kProducers, Cache::kSharers);
    smem.q_ring.init(kMlaMathThreads / 32);
  }
  Cache::kSharers == 1 ? __syncthreads() : sync_cluster();

  const int warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / kMlaWarpgroup, 0);
  if (warpgroup == 0) {
    ptx::setmaxnreg_inc<Cache::kMathRegisters>();
    mla_math<Cache, Tile, kLeft>(p, smem);
  } else if (warpgroup == 1) {
    ptx::setmaxnreg_inc<Cache::kMathRegisters>();
    mla_math<Cache, Tile, kRight>(p, smem);
  } else {
    ptx::setmaxnreg_dec<Cache::kProducerRegisters>();
    Cache::produce(p, smem);
  }
  // Until here the other CTA writes to this one's shared memory and arrives at its barriers.
  if constexpr (Cache::kSharers != 1) meet_cluster();
}

}  // namespace dsk
