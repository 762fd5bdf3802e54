// Where every slot's row goes when tokens are sorted by expert: the counting half of the sort.
//
// 32768 slots (4096 tokens x 8) are 256 KB of indices and 128 x 256 counters: under a microsecond
// of memory, so this is launch latency and two trips to L2. A CTA counts its chunk of 256 slots;
// the last one to finish turns all counts into first rows, chunk by chunk within expert by expert,
// which is what makes the sort stable and its result independent of the CTAs' order.
#pragma once

#include "cuda/params/moe.hpp"
#include "cuda/tile/quantize.cuh"

namespace dsk {

struct MoeLayoutSmem {
  int32_t total[kMoeMaxGroups];  // of each expert; then its first row
  int32_t is_last;
};

// Exclusive sums of `value` rounded up to multiples of `alignment`, by one warp.
__device__ __forceinline__ void scan_group_sizes(const MoeLayoutParams& p, int32_t* value) {
  const int lane = threadIdx.x % kWarp;
  const int per_lane = (p.experts + kWarp - 1) / kWarp;
  const int begin = min(lane * per_lane, p.experts);
  const int end = min(begin + per_lane, p.experts);
  int32_t own = 0;
  for (int e = begin; e < end; ++e) {
    const int32_t size = (value[e] + p.alignment - 1) / p.alignment * p.alignment;
    p.group_sizes[e] = size;
    if (p.group_sizes_i32) p.group_sizes_i32[e] = size;
    value[e] = own;
    own += size;
  }
  int32_t before = own;
#pragma unroll
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const int32_t other = __shfl_up_sync(0xffffffffu, before, offset);
    if (lane >= offset) before += other;
  }
  before -= own;
  for (int e = begin; e < end; ++e) value[e] += before;
}

// The last CTA: counts of all chunks to first rows.
__device__ __forceinline__ void place_chunks(const MoeLayoutParams& p, MoeLayoutSmem& smem) {
  const int chunks = gridDim.x;
  for (int e = threadIdx.x; e < p.experts; e += kMoeChunk) {
    int32_t total = 0;
    for (int chunk = 0; chunk < chunks; ++chunk) {
      total += __ldcg(p.first_row + int64_t(chunk) * p.experts + e);
    }
    smem.total[e] = total;
  }
  __syncthreads();
  if (threadIdx.x < kWarp) scan_group_sizes(p, smem.total);
  __syncthreads();
  for (int e = threadIdx.x; e < p.experts; e += kMoeChunk) {
    int32_t row = smem.total[e];
    for (int chunk = 0; chunk < chunks; ++chunk) {
      int32_t* at = p.first_row + int64_t(chunk) * p.experts + e;
      const int32_t count = __ldcg(at);
      *at = row;
      row += count;
    }
  }
}

__device__ __forceinline__ void layout_slots(const MoeLayoutParams& p) {
  __shared__ MoeLayoutSmem smem;
  for (int e = threadIdx.x; e < p.experts; e += kMoeChunk) smem.total[e] = 0;
  __syncthreads();
  const int slot = int(blockIdx.x) * kMoeChunk + int(threadIdx.x);
  const int expert = slot < p.slots ? int(__ldg(p.topk_idx + slot)) : -1;
  if (expert >= 0) atomicAdd(&smem.total[expert], 1);
  __syncthreads();
  for (int e = threadIdx.x; e < p.experts; e += kMoeChunk) {
    p.first_row[int64_t(blockIdx.x) * p.experts + e] = smem.total[e];
  }
  __threadfence();  // the counts are out before this CTA says so
  __syncthreads();
  if (threadIdx.x == 0) {
    smem.is_last = atomicAdd(p.finished, 1) == int(gridDim.x) - 1;
    __threadfence();  // and are read after the last one has heard from all
  }
  __syncthreads();
  if (smem.is_last) place_chunks(p, smem);
}

}  // namespace dsk
