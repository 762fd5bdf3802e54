// What prefill's gradients need to know of a query: its lse in base 2 and the mean of dP over its
// row, sum(grad out) - grad lse, in blocks of 64 queries that begin with the request, so that one
// aligned bulk copy takes a block.
//
// Bound by memory: 512 bytes read and 8 written a row and head. 4096 tokens, 128 heads: 273 MB, 81
// us at 3.35 TB/s. A half-warp takes a row, 16 bytes a lane.
#pragma once

#include <cuda_bf16.h>

#include "cuda/params/mla_prefill_backward.hpp"

namespace dsk {

constexpr int kStatisticsLanes = kPrefillValues / 8;  // of a row

// Finds the block'th block of queries: its first row and the request's end.
__device__ __forceinline__ bool find_query_block(const PrefillStatisticsParams& p, int block,
                                                 int& row, int& end) {
  int begin = 0;
  for (int request = 0; request < p.b; ++request) {
    end = __ldg(p.cu_seqlens_q + request + 1);
    const int blocks = (end - begin + kBackwardBlock - 1) / kBackwardBlock;
    row = begin + block * kBackwardBlock;
    if (block < blocks) return true;
    block -= blocks;
    begin = end;
  }
  return false;
}

__device__ __forceinline__ float dot_pairs(const uint4& a, const uint4& b) {
  const auto* x = reinterpret_cast<const __nv_bfloat162*>(&a);
  const auto* y = reinterpret_cast<const __nv_bfloat162*>(&b);
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 u = __bfloat1622float2(x[i]), w = __bfloat1622float2(y[i]);
    sum = fmaf(u.x, w.x, sum);
    sum = fmaf(u.y, w.y, sum);
  }
  return sum;
}

__device__ __forceinline__ void prefill_statistics(const PrefillStatisticsParams& p) {
  constexpr float kLog2E = 1.4426950408889634f;
  int first, end;
  if (!find_query_block(p, blockIdx.x, first, end)) return;
  const int head = blockIdx.y, lane = threadIdx.x % kStatisticsLanes;
  const int step = blockDim.x / kStatisticsLanes;
  PrefillStatistics* to = p.statistics + head * prefill_statistics_rows(p.t, p.b) +
                          int64_t(blockIdx.x) * kBackwardBlock;
#pragma unroll 4
  for (int i = threadIdx.x / kStatisticsLanes; i < kBackwardBlock; i += step) {
    const int row = first + i;
    PrefillStatistics found{INFINITY, 0.f};  // behind the request's end
    float sum = 0.f;
    if (row < end) {
      const int64_t at = (int64_t(row) * p.h + head) * kStatisticsLanes + lane;
      sum = dot_pairs(__ldg(static_cast<const uint4*>(p.out) + at),
                      __ldg(static_cast<const uint4*>(p.grad) + at));
    }
#pragma unroll
    for (int other = kStatisticsLanes / 2; other > 0; other /= 2) {
      sum += __shfl_xor_sync(0xffffffffu, sum, other);
    }
    if (lane != 0) continue;
    const int64_t at = int64_t(head) * p.t + row;
    if (row < end && __ldg(p.lse + at) != INFINITY) {
      found = {__ldg(p.lse + at) * kLog2E, sum - __ldg(p.grad_lse + at)};
    }
    to[i] = found;
  }
}

}  // namespace dsk
