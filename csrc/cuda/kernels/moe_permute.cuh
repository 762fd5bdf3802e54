// Tokens sorted by expert: each slot's row copied to its place, FP8 scales along with the data.
//
// Bound by memory: every copy is read (mostly from L2) and written once. 4096 tokens x 8 copies x
// 7168 e4m3 bytes are 235 MB written, 70 us at 3.35 TB/s. Sorting costs nothing beside that: a
// slot's place within its chunk of 256 is the number of equal experts before it, from match.any
// within a warp and counters between warps. So with few chunks several CTAs (gridDim.y) sort the
// same one and share out its rows: at decode the latency of a row after the other would be the
// time.
#pragma once

#include "cuda/params/moe.hpp"
#include "cuda/tile/quantize.cuh"

namespace dsk {

constexpr int kPermuteWarps = kMoeChunk / kWarp;

struct MoePermuteSmem {
  uint16_t count[kPermuteWarps][kMoeMaxGroups];
  int32_t row[kMoeChunk];
};

// The row of this thread's slot, -1 without one. All threads of the CTA take part.
__device__ __forceinline__ int place_slot(const MoePermuteParams& p, MoePermuteSmem& smem,
                                          int slot) {
  const int warp = threadIdx.x / kWarp;
  const int expert = slot < p.slots ? int(__ldg(p.topk_idx + slot)) : -1;
  for (int i = threadIdx.x; i < kPermuteWarps * p.experts; i += kMoeChunk) {
    smem.count[i / p.experts][i % p.experts] = 0;
  }
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

template <typename Word>
__device__ __forceinline__ void copy_words(const uint8_t* from, uint8_t* to, int64_t bytes) {
  const int lane = threadIdx.x % kWarp;
  for (int64_t i = lane; i < bytes / int64_t(sizeof(Word)); i += kWarp) {
    reinterpret_cast<Word*>(to)[i] = __ldg(reinterpret_cast<const Word*>(from) + i);
  }
}

__device__ __forceinline__ void permute_rows(const MoePermuteParams& p) {
  __shared__ MoePermuteSmem smem;
  const int first = int(blockIdx.x) * kMoeChunk;
  const int slot = first + int(threadIdx.x);
  const int place = place_slot(p, smem, slot);
  smem.row[threadIdx.x] = place;
  if (blockIdx.y == 0 && slot < p.slots) {
    p.row_map[slot] = place;
    if (p.slot_of_row && place >= 0) p.slot_of_row[place] = slot;
  }
  __syncthreads();

  const bool wide = ((reinterpret_cast<uintptr_t>(p.x) | reinterpret_cast<uintptr_t>(p.x_perm) |
                      uintptr_t(p.ld_x) | uintptr_t(p.row_bytes)) %
                     16) == 0;
  const int first_copy = int(blockIdx.y) * kPermuteWarps + int(threadIdx.x) / kWarp;
  for (int i = first_copy; i < kMoeChunk; i += int(gridDim.y) * kPermuteWarps) {
    const int row = smem.row[i];
    if (row < 0) continue;
    const int token = (first + i) / p.topk;
    const uint8_t* from = static_cast<const uint8_t*>(p.x) + token * p.ld_x;
    uint8_t* to = static_cast<uint8_t*>(p.x_perm) + row * p.row_bytes;
    if (wide) {
      copy_words<uint4>(from, to, p.row_bytes);
    } else {
      copy_words<uint8_t>(from, to, p.row_bytes);
    }
    for (int g = threadIdx.x % kWarp; p.scale && g < p.scale_groups; g += kWarp) {
      p.scale_perm[g * p.ld_scale_perm + row] = __ldg(p.scale + g * p.ld_scale + token);
    }
  }
}

}  // namespace dsk
