// Tokens sorted by expert: each slot's row copied, or quantised, to its place.
//
// Bound by memory. Copies: every one is read (mostly from L2) and written once; 4096 tokens x 8
// copies x 7168 e4m3 bytes are 235 MB written, 70 us at 3.35 TB/s. Quantising on the way reads the
// bf16 tokens instead (59 MB) and saves a launch, and the e4m3 tokens' way to memory and back; a
// token is quantised once, however many rows it has.
//
// Sorting costs nothing beside that: a slot's place within its chunk of 256 is the number of equal
// experts before it, from match.any within a warp and counters between warps. So several CTAs
// (gridDim.y) sort the same chunk and share out its rows: with few chunks the latency of a row
// after the other would be the time.
#pragma once

#include "cuda/params/moe.hpp"
#include "cuda/tile/each.cuh"
#include "cuda/tile/quantize.cuh"

namespace dsk {

constexpr int kPermuteWarps = kMoeChunk / kWarp;

struct MoePermuteSmem {
  uint16_t count[kPermuteWarps][kMoeMaxGroups];
  int32_t row[kMoeChunk];
};

// The row of this thread's slot, -1 without one. All threads of the CTA take part.
__device__ __forceinline__ int place_slot(const MoePlaceParams& p, MoePermuteSmem& smem, int slot) {
  const int warp = threadIdx.x / kWarp;
  const int expert = slot < p.slots ? int(__ldg(p.chosen + slot)) : -1;
  each_in_cta<kMoeChunk>(kPermuteWarps * p.experts,
                         [&](int i) { smem.count[i / p.experts][i % p.experts] = 0; });
  __syncthreads();
  const uint32_t same = __match_any_sync(0xffffffffu, expert);
  const uint32_t earlier = same & ((1u << threadIdx.x % kWarp) - 1);
  if (expert >= 0 && earlier == 0) smem.count[warp][expert] = uint16_t(__popc(same));
  __syncthreads();
  if (expert < 0) return -1;
  int row = __ldg(p.first_row + int64_t(blockIdx.x) * p.experts + expert) + __popc(earlier);
  for (int w = 0; w < warp; ++w) row += smem.count[w][expert];
  return row;
}

// The rows of this CTA's chunk to shared memory, and to global memory by one of those that share
// it.
__device__ __forceinline__ void place_chunk(const MoePlaceParams& p, MoePermuteSmem& smem) {
  const int slot = int(blockIdx.x) * kMoeChunk + int(threadIdx.x);
  const int place = place_slot(p, smem, slot);
  smem.row[threadIdx.x] = place;
  if (blockIdx.y == 0 && slot < p.slots) {
    p.row_map[slot] = place;
    if (p.slot_of_row && place >= 0) p.slot_of_row[place] = slot;
  }
  __syncthreads();
}

template <typename Word>
__device__ __forceinline__ void copy_words(const uint8_t* from, uint8_t* to, int64_t bytes) {
  const int lane = threadIdx.x % kWarp;
  for (int64_t i = lane; i < bytes / int64_t(sizeof(Word)); i += kWarp) {
    reinterpret_cast<Word*>(to)[i] = __ldg(reinterpret_cast<const Word*>(from) + i);
  }
}

__device__ __forceinline__ void permute_rows(const MoePermuteParams& p) {
  __shared__ MoePermuteSmem smem;
  place_chunk(p.place, smem);
  const bool wide = ((reinterpret_cast<uintptr_t>(p.x) | reinterpret_cast<uintptr_t>(p.x_perm) |
                      uintptr_t(p.ld_x) | uintptr_t(p.row_bytes)) %
                     16) == 0;
  const int first = int(blockIdx.x) * kMoeChunk;
  const int first_copy = int(blockIdx.y) * kPermuteWarps + int(threadIdx.x) / kWarp;
  for (int i = first_copy; i < kMoeChunk; i += int(gridDim.y) * kPermuteWarps) {
    const int row = smem.row[i];
    if (row < 0) continue;
    const int token = (first + i) / p.place.topk;
    const uint8_t* from = static_cast<const uint8_t*>(p.x) + token * p.ld_x;
    uint8_t* to = static_cast<uint8_t*>(p.x_perm) + row * p.row_bytes;
    if (wide) {
      copy_words<uint4>(from, to, p.row_bytes);
    } else {
      copy_words<uint8_t>(from, to, p.row_bytes);
    }
  }
}

// One group of 128 values of a token, by a warp, to the rows of slots [begin, end) of the chunk.
template <typename T>
__device__ __forceinline__ void quantize_group(const MoePermuteQuantizeParams& p,
                                               const int32_t* rows, int begin, int end, int token,
                                               int group) {
  const int lane = threadIdx.x % kWarp;
  const int column = group * kQuantGroup + lane * kValuesPerLane;
  const int left = p.depth - column;
  float value[kValuesPerLane];
  load_run(static_cast<const T*>(p.x) + token * p.ld_x + column, left, value);
  const float scale = block_scale(warp_max(largest(value)), kE4m3Max, p.format);
  const uint32_t word = scaled_e4m3x4(value, scale);
  const int groups = (p.depth + kQuantGroup - 1) / kQuantGroup;
  for (int i = begin; i < end; ++i) {
    const int row = rows[i];
    if (row < 0) continue;
    store_bytes(p.data + int64_t(row) * p.depth + column, left, word);
    if (lane != 0) continue;
    const int plane = row < p.plane_rows ? 0 : row / p.plane_rows;
    const int64_t line = int64_t(plane) * groups + group;
    p.scale[line * p.ld_scale + row - plane * p.plane_rows] = scale;
  }
}

__device__ __forceinline__ void permute_quantized(const MoePermuteQuantizeParams& p) {
  __shared__ MoePermuteSmem smem;
  place_chunk(p.place, smem);
  const int topk = p.place.topk;
  const int first = int(blockIdx.x) * kMoeChunk;
  const int last = min(first + kMoeChunk, p.place.slots);
  // A token whose slots lie in two chunks is quantised for each of them.
  const int first_token = first / topk;
  const int tokens = (last - 1) / topk - first_token + 1;
  const int groups = (p.depth + kQuantGroup - 1) / kQuantGroup;
  const int first_piece = int(blockIdx.y) * kPermuteWarps + int(threadIdx.x) / kWarp;
  for (int i = first_piece; i < tokens * groups; i += int(gridDim.y) * kPermuteWarps) {
    const int within = i / groups, group = i - within * groups;
    const int token = first_token + within;
    const int begin = max(token * topk, first) - first;
    const int end = min((token + 1) * topk, last) - first;
    if (p.type == WideType::kBfloat16) {
      quantize_group<__nv_bfloat16>(p, smem.row, begin, end, token, group);
    } else {
      quantize_group<float>(p, smem.row, begin, end, token, group);
    }
  }
}

}  // namespace dsk
