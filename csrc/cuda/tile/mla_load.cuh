// Loads of MLA decode by TMA: queries, and blocks of a bf16 cache.
#pragma once

#include <cuda/ptx>

#include "cuda/params/mla.hpp"
#include "cuda/tile/mla_pieces.cuh"
#include "cuda/tile/mla_smem.cuh"

namespace dsk {

// By one thread: a piece's 64 query rows; those behind the request's last come as zeros.
__device__ __forceinline__ void load_queries(const MlaDecodeParams& p, const MlaPiece& piece,
                                             MlaDecodeSmem& smem, const RingPosition<1>& at) {
  using namespace cuda::ptx;
  smem.q_ring.acquire(at, sizeof(smem.q));
#pragma unroll
  for (int tile = 0; tile < kMlaTiles; ++tile) {
    const int32_t from[3] = {tile * 64, int(blockIdx.x) * kMlaRows, piece.request};
    cp_async_bulk_tensor(space_cluster, space_global, smem.q[tile], &p.q, from,
                         &smem.q_ring.full[0]);
  }
}

struct MlaBf16Cache {
  static constexpr int kMathRegisters = 232;
  static constexpr int kProducerRegisters = 40;
  static constexpr int kProducers = 1;
  static constexpr int kSharers = 1;        // CTAs that share blocks
  static constexpr bool kZeroTail = false;  // rows of V behind a request's end are left as they are
  static constexpr bool kWithQueries = true;  // the producer loads them as well

  // One warp: lane i loads the i-th page (or piece of a page) of a block. A piece's queries are
  // asked for behind its first block, since their place is free later than a block's, and ahead of
  // the second: behind that, the first one's scores would wait for both, and no place would become
  // free.
  __device__ static __forceinline__ void produce(const MlaDecodeParams& p, MlaDecodeSmem& smem) {
    if (threadIdx.x >= kMlaMathThreads + 32) return;
    const int lane = threadIdx.x % 32;
    const int box_tokens = min(p.page, kMlaBlock);
    const int offset = lane * box_tokens;  // of this lane's tokens within a block
    MlaPieces pieces(p);
    MlaPiece piece;
    uint32_t phases = 0;  // bit i: of buffer i
    RingPosition<1> q_at;
    while (pieces.more()) {
      // On its way together with the request's length, which says whether to follow it.
      int page = look_up(p, pieces.next_request(), pieces.next_block(), offset);
      pieces.next(piece);
      for (int block = piece.begin; block < piece.end; ++block) {
        const int buffer = (block - piece.begin) % 2;
        const int token = block * kMlaBlock + offset;
        const bool mine = offset < kMlaBlock && token < piece.length;
        const int filled = min(piece.length - block * kMlaBlock, kMlaBlock);
        const int boxes = (filled + box_tokens - 1) / box_tokens;
        for (int half = 0; half < 2; ++half) {
          const RingPosition<2> at{half, phases >> buffer & 1};
          const int tiles = mla_tiles_of(buffer, half);
          if (lane == 0) {
            smem.kv_ring[buffer].acquire(at, boxes * box_tokens * kSwizzleBytes * tiles);
          }
          __syncwarp();
          if (mine) load_half(p, smem, buffer, half, tiles, offset, token % p.page, page);
        }
        phases ^= 1u << buffer;
        page = look_up(p, piece.request, block + 1, offset);
        if (block == piece.begin && lane == 0) load_queries(p, piece, smem, q_at);
      }
      if (piece.begin == piece.end && lane == 0) load_queries(p, piece, smem, q_at);
      q_at.advance();
    }
  }

 private:
  // The table's entry for the tokens at that offset of a block, where it has one: the request need
  // not be so long.
  __device__ static __forceinline__ int look_up(const MlaDecodeParams& p, int request, int block,
                                                int offset) {
    const int entry = (block * kMlaBlock + offset) / p.page;
    return entry < p.ld_table ? __ldg(p.block_table + int64_t(request) * p.ld_table + entry) : 0;
  }

  __device__ static __forceinline__ void load_half(const MlaDecodeParams& p, MlaDecodeSmem& smem,
                                                   int buffer, int half, int tiles, int offset,
                                                   int row, int page) {
    using namespace cuda::ptx;
    for (int i = 0; i < tiles; ++i) {
      const int tile = i == 4 ? kMlaRopeTile : half * 4 + i;
      const int32_t from[3] = {tile * 64, row, page};
      cp_async_bulk_tensor(space_cluster, space_global,
                           smem.kv[buffer][tile] + offset * kSwizzleBytes, &p.kv, from,
                           &smem.kv_ring[buffer].full[half]);
    }
  }
};

}  // namespace dsk
