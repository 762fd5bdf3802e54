// Where every slot's row goes when tokens are sorted by expert: the counting half of the sort.
//
// 32768 slots (4096 tokens x 8) are 256 KB of indices and 128 x 256 counters: under a microsecond
// of memory, so this is launch latency and two trips to L2. A CTA counts its chunk of 256 slots;
// the last one to finish turns all counts into first rows, chunk by chunk within expert by expert,
// which is what makes the sort stable and its result independent of the CTAs' order.
//
// What is sorted by need not be the router's choice itself: an expert map puts one of the expert's
// replicas in its place, and shared experts have every token without being chosen. The masked
// layout starts groups at multiples of `capacity` instead of one behind the other.
#pragma once

#include "cuda/params/moe.hpp"
#include "cuda/tile/each.cuh"
#include "cuda/tile/quantize.cuh"

namespace dsk {

struct MoeLayoutSmem {
  int32_t total[kMoeMaxGroups];  // of each expert; then its first row
  int32_t is_last;
};

// Multiples of the golden ratio's fraction in units of 2^-32: consecutive tokens, or every n-th
// one, spread evenly over any number of replicas.
constexpr uint32_t kGoldenTurn = 2654435769u;

// The replica that stands for an expert at this token, -1 if the map has none.
__device__ __forceinline__ int replica_of(const MoeLayoutParams& p, int64_t expert, int token) {
  const int64_t* replica = p.expert_map + expert * p.replicas;
  int count = 0;
  for (int r = 0; r < p.replicas; ++r) count += __ldg(replica + r) >= 0;
  int left = int(__umulhi(uint32_t(token) * kGoldenTurn, uint32_t(count)));
  for (int r = 0; r < p.replicas; ++r) {
    const int physical = int(__ldg(replica + r));
    if (physical >= 0 && left-- == 0) return physical;
  }
  return -1;
}

// The expert that a slot is sorted to, -1 without one.
__device__ __forceinline__ int expert_of(const MoeLayoutParams& p, int slot) {
  const int each = p.topk + p.shared;
  const int token = slot / each;
  const int choice = slot - token * each;
  if (choice >= p.topk) return p.experts - each + choice;
  const int64_t named = __ldg(p.topk_idx + int64_t(token) * p.topk + choice);
  return named < 0 || !p.expert_map ? int(named) : replica_of(p, named, token);
}

// Exclusive sums of `value` rounded up to multiples of `alignment`, by one warp; with a
// capacity, multiples of that.
__device__ __forceinline__ void scan_group_sizes(const MoeLayoutParams& p, int32_t* value) {
  const int lane = threadIdx.x % kWarp;
  const int per_lane = (p.experts + kWarp - 1) / kWarp;
  const int begin = lane * per_lane;  // behind the last expert, so is the end
  const int end = min(begin + per_lane, p.experts);
  int32_t own = 0;
  for (int e = begin; e < end; ++e) {
    const int32_t size = (value[e] + p.alignment - 1) / p.alignment * p.alignment;
    // Masked: somebody's rows would be the next group's. A token named an expert twice.
    if (p.capacity && size > p.capacity) __trap();
    p.group_sizes[e] = size;
    if (p.group_sizes_i32) p.group_sizes_i32[e] = size;
    value[e] = own;
    own += p.capacity ? p.capacity : size;
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
  each_in_cta<kMoeChunk>(p.experts, [&](int e) {
    int32_t total = 0;
    for (int chunk = 0; chunk < chunks; ++chunk) {
      total += __ldcg(p.first_row + int64_t(chunk) * p.experts + e);
    }
    smem.total[e] = total;
  });
  __syncthreads();
  if (threadIdx.x < kWarp) scan_group_sizes(p, smem.total);
  __syncthreads();
  each_in_cta<kMoeChunk>(p.experts, [&](int e) {
    int32_t row = smem.total[e];
    for (int chunk = 0; chunk < chunks; ++chunk) {
      int32_t* at = p.first_row + int64_t(chunk) * p.experts + e;
      const int32_t count = __ldcg(at);
      *at = row;
      row += count;
    }
  });
}

__device__ __forceinline__ void layout_slots(const MoeLayoutParams& p) {
  __shared__ MoeLayoutSmem smem;
  each_in_cta<kMoeChunk>(p.experts, [&](int e) { smem.total[e] = 0; });
  __syncthreads();
  const int slot = int(blockIdx.x) * kMoeChunk + int(threadIdx.x);
  const int expert = slot < p.slots ? expert_of(p, slot) : -1;
  if (p.chosen && slot < p.slots) p.chosen[slot] = expert;
  if (expert >= 0) atomicAdd(&smem.total[expert], 1);
  __syncthreads();
  each_in_cta<kMoeChunk>(
      p.experts, [&](int e) { p.first_row[int64_t(blockIdx.x) * p.experts + e] = smem.total[e]; });
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
