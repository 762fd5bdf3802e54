// Who works on what in MLA decode: requests of any length, cut so that every SM gets the same load.
//
// One warp, a few microseconds, on the device: lengths never visit the host, so that a CUDA graph
// can be replayed with new ones, and a model's layers share one schedule. Cost is counted in blocks
// of 64 tokens; a piece of a request costs piece_cost blocks more (loading Q, writing results).
//
// Freely balanced, a part takes blocks until its share is full, so where a request is cut depends
// on its neighbours. With split_blocks it is cut at multiples of that only: its sums, and so its
// bits, are then the same in any batch. Each lane deals for a share of its own; the smallest one
// for which the parts suffice is taken.
#pragma once

#include "cuda/tile/mla_pieces.cuh"

namespace dsk {

// Blocks the next piece takes of a request with `left` blocks to go, in a part with `room` for that
// many after the piece's own cost; -1: none fits.
__device__ __forceinline__ int mla_take(int left, int room, int split_blocks) {
  const int take = split_blocks ? min(split_blocks, left) : min(left, room);
  const bool fits = room >= take && room >= 0 && (take > 0 || left == 0);
  return fits ? take : -1;
}

// Deals all blocks to parts of that share, and says whether the parts suffice.
template <bool kWrite>
__device__ __forceinline__ bool mla_deal(const MlaScheduleParams& p, const int32_t* blocks,
                                         int share) {
  int request = 0, split = 0, splits_before = 0;
  int whole = blocks[0], left = whole;
  int following = blocks[1];  // loaded a request ahead: nobody waits for it
  if (kWrite) p.num_splits[0] = 0;
  for (int i = 0; i < p.num_parts; ++i) {
    MlaPart part{request, whole - left, 0, 0, split, {}};
    int room = share - p.piece_cost;
    while (request < p.b) {
      const int take = mla_take(left, room, p.split_blocks);
      if (take < 0) break;
      room -= take + p.piece_cost;
      left -= take;
      ++split;
      if (left == 0) {
        ++request;
        splits_before += split;
        if (kWrite) p.num_splits[request] = splits_before;
        split = 0;
        whole = left = following;
        following = blocks[request + 1];
      }
    }
    if (!kWrite && request == p.b) break;
    part.end_request = request;
    part.end_block = whole - left;
    if (kWrite) p.parts[i] = part;
  }
  return request == p.b;
}

__device__ __forceinline__ void mla_schedule_requests(const MlaScheduleParams& p) {
  extern __shared__ int32_t blocks[];  // [b + 2], the last two 0
  const int lane = threadIdx.x;
  int total = 0;
  if (lane < 2) blocks[p.b + lane] = 0;
  for (int i = lane; i < p.b; i += 32) {
    blocks[i] = mla_num_blocks(p.seq_lens[i]);
    const int pieces =
        p.split_blocks ? max(1, (blocks[i] + p.split_blocks - 1) / p.split_blocks) : 1;
    total += blocks[i] + pieces * p.piece_cost;
  }
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    total += __shfl_xor_sync(0xffffffffu, total, offset);
  }
  __syncwarp();

  // Splits have to be joined, which takes the longer the more there are: pieces of two blocks at
  // least, and of a fifth of the root of a request's blocks, are where both take about as long.
  int least = 2;
  while (least * least * 20 * p.b < total) ++least;

  // Less than an equal share cannot do. A part may leave less than one piece's cost (or one split)
  // unused: with that on top, which is less than the last lanes have, the parts always suffice.
  const int equal = max((total + p.num_parts - 1) / p.num_parts, p.piece_cost + least);
  const uint32_t suffices = __ballot_sync(0xffffffffu, mla_deal<false>(p, blocks, equal + lane));
  if (lane == __ffs(suffices) - 1) mla_deal<true>(p, blocks, equal + lane);
}

}  // namespace dsk
