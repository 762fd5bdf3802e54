// Who works on what in MLA decode: requests of any length, cut so that every SM gets the same load.
//
// One CTA, a few microseconds, on the device: lengths never visit the host, so that a CUDA graph
// can be replayed with new ones, and a model's layers share one schedule. Cost is counted in blocks
// of 64 tokens; a piece of a request costs piece_cost blocks more (loading Q, writing results).
//
// Freely balanced, a part takes blocks until its share is full, so where a request is cut depends
// on its neighbours. With split_blocks it is cut at multiples of that only: its sums, and so its
// bits, are then the same in any batch.
//
// Put end to end, costs are an axis: a part that starts at x ends at x + share, or a little before
// where it could not take anything for the rest. What it ends in is the last request that begins
// at or before there, for which a warp's lanes hold a request's beginning each: one reduction and
// five instructions from a part to the next. Each warp deals for a share of its own, one block more
// than its neighbour's; the smallest for which the parts suffice is written, by all threads.
#pragma once

#include <climits>

#include "cuda/mla_shape.hpp"
#include "cuda/tile/mla_pieces.cuh"

namespace dsk {

// Sums over the requests before each one, and over all.
struct MlaSums {
  int32_t* costs;   // [b + 1]
  int32_t* pieces;  // [b + 1]: one for each request, or as split_blocks cuts it

  __device__ __forceinline__ void make(const MlaScheduleParams& p) const {
    for (int i = threadIdx.x; i < p.b; i += blockDim.x) {
      costs[i + 1] = mla_num_blocks(max(p.seq_lens[i], 0));
    }
    __syncthreads();
    if (threadIdx.x < 32) add_up(p);
    __syncthreads();
  }

 private:
  // By one warp; a lane has a run of requests. Finds their blocks in `costs`.
  __device__ __forceinline__ void add_up(const MlaScheduleParams& p) const {
    const int lane = threadIdx.x;
    const int run = (p.b + 31) / 32;
    const int begin = lane * run, end = min(begin + run, p.b);
    int cost = 0, count = 0;
    for (int i = begin; i < end; ++i) {
      const int blocks = costs[i + 1];
      const int cut = p.split_blocks ? max(1, (blocks + p.split_blocks - 1) / p.split_blocks) : 1;
      costs[i + 1] = cost += blocks + cut * p.piece_cost;
      pieces[i + 1] = count += cut;
    }
    const int own_cost = cost, own_count = count;
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
      const int cost_before = __shfl_up_sync(0xffffffffu, cost, offset);
      const int count_before = __shfl_up_sync(0xffffffffu, count, offset);
      if (lane >= offset) {
        cost += cost_before;
        count += count_before;
      }
    }
    for (int i = begin; i < end; ++i) {
      costs[i + 1] += cost - own_cost;
      pieces[i + 1] += count - own_count;
    }
    if (lane == 0) costs[0] = pieces[0] = 0;
  }
};

// Where the parts of a share start, and, at last, where the last one ends.
struct MlaStarts {
  int32_t* x;     // [num_parts + 1], on the axis of costs
  int32_t* cuts;  // [num_parts + 1]: freely balanced, starts amid a request up to this one

  // By one warp.
  __device__ __forceinline__ void deal(const MlaScheduleParams& p, const int32_t* costs,
                                       int share) const {
    const int lane = threadIdx.x % 32;
    const int total = costs[p.b];
    const int piece = p.split_blocks + p.piece_cost;
    int request = lane;  // of this lane, which knows where it begins
    int begins = request <= p.b ? costs[request] : INT_MAX;
    int last = __shfl_sync(0xffffffffu, begins, 31);
    int at = 0, cut = 0;
    for (int part = 0; part <= p.num_parts; part += 32) {
      int mine = at, my_cuts = cut;
      const int steps = at < total ? min(p.num_parts + 1 - part, 32) : 0;
#pragma unroll 4
      for (int i = 0; i < steps; ++i) {
        if (lane == i) {
          mine = at;
          my_cuts = cut;
        }
        const int limit = min(at + share, total);
        int over;  // how far the limit is in its request
        while (true) {
          over = int(__reduce_min_sync(0xffffffffu, uint32_t(limit - begins)));  // < 0: large
          if (__builtin_expect(limit <= last, true)) break;
          request += 31;
          begins = request <= p.b ? costs[request] : INT_MAX;
          last = __shfl_sync(0xffffffffu, begins, 31);
        }
        if (p.split_blocks) {
          at = limit - over % piece;
        } else {
          at = limit - min(over, p.piece_cost);
          cut += over > p.piece_cost;
        }
      }
      if (part + lane <= p.num_parts) {
        x[part + lane] = mine;
        cuts[part + lane] = my_cuts;
      }
    }
  }
};

// The last of n ascending values that is at most v; the first one where none is.
__device__ __forceinline__ int mla_last_up_to(const int32_t* values, int n, int v) {
  int found = 0, above = n;
  while (above - found > 1) {
    const int middle = (found + above) / 2;
    (values[middle] <= v ? found : above) = middle;
  }
  return found;
}

// By all threads.
__device__ __forceinline__ void mla_write(const MlaScheduleParams& p, const MlaSums& sums,
                                          const MlaStarts& starts) {
  for (int i = threadIdx.x; i <= p.b; i += blockDim.x) {
    sums.pieces[i] += starts.cuts[mla_last_up_to(starts.x, p.num_parts + 1, sums.costs[i] - 1)];
    p.num_splits[i] = sums.pieces[i];
  }
  __syncthreads();
  for (int i = threadIdx.x; i <= p.num_parts; i += blockDim.x) {
    const int request = mla_last_up_to(sums.costs, p.b + 1, starts.x[i]);
    int block = starts.x[i] - sums.costs[request];
    int split = starts.cuts[i] + request - sums.pieces[request];
    if (p.split_blocks) {
      split = block / (p.split_blocks + p.piece_cost);
      block = split * p.split_blocks;
    }
    if (i > 0) {
      p.parts[i - 1].end_request = request;
      p.parts[i - 1].end_block = block;
    }
    if (i == p.num_parts) continue;
    MlaPart& part = p.parts[i];
    part.begin_request = request;
    part.begin_block = block;
    part.begin_split = split;
    for (int32_t& value : part.unused) value = 0;
  }
}

__device__ __forceinline__ void mla_schedule_requests(const MlaScheduleParams& p) {
  extern __shared__ int32_t shared_memory[];
  const MlaSums sums{shared_memory, shared_memory + p.b + 1};
  const int starts = p.num_parts + 1;
  int32_t* dealt = sums.pieces + p.b + 1;  // of each share
  sums.make(p);
  const int total = sums.costs[p.b];

  // Splits have to be joined, which takes the longer the more there are: pieces of two blocks at
  // least, and of a fifth of the root of a request's blocks, are where both take about as long.
  int least = 2;
  while (least * least * 20 * p.b < total) ++least;

  // Less than an equal share cannot do. A part leaves at most piece_cost unused, or what is short
  // of the next piece: with that on top, which the last warp that deals has, the parts suffice.
  const int equal = max((total + p.num_parts - 1) / p.num_parts, p.piece_cost + least);
  const int warp = threadIdx.x / 32;
  if (warp < mla_num_shares(p.split_blocks, p.piece_cost)) {
    int32_t* mine = dealt + 2 * starts * warp;
    MlaStarts{mine, mine + starts}.deal(p, sums.costs, equal + warp);
  }
  __syncthreads();
  while (dealt[p.num_parts] < total) dealt += 2 * starts;
  mla_write(p, sums, MlaStarts{dealt, dealt + starts});
}

}  // namespace dsk
