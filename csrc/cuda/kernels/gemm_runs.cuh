// Which rows belong together: turns a list of each row's expert (m_indices, the padded layout of
// other libraries) into runs of equal entries, which the contiguous scheduler walks like groups. So
// no alignment and no order is asked of the list, and no count travels to the host.
//
// One CTA: 4 bytes read a row, a few written a run; 8192 rows are 8 steps of 1024 threads, about
// 5 us of latency and nothing else.
#pragma once

#include <cstdint>

#include "cuda/params/gemm.hpp"

namespace dsk {

// The number of set flags among the threads before this one, and, in `total`, among all of them.
template <int kThreads>
__device__ __forceinline__ int count_before(bool flag, int (&warp_counts)[kThreads / 32],
                                            int& total) {
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const uint32_t votes = __ballot_sync(0xffffffffu, flag);
  __syncthreads();  // the previous call's counts have been read
  if (lane == 0) warp_counts[warp] = __popc(votes);
  __syncthreads();
  int before = __popc(votes & ((1u << lane) - 1));
  total = 0;
  for (int w = 0; w < kThreads / 32; ++w) {
    if (w < warp) before += warp_counts[w];
    total += warp_counts[w];
  }
  return before;
}

template <int kThreads>
__device__ __forceinline__ void find_gemm_runs(const GemmRunsParams& p) {
  __shared__ int warp_counts[kThreads / 32];
  int num_starts = 0, num_ends = 0;
  for (int base = 0; base < p.rows; base += kThreads) {
    const int row = base + threadIdx.x;
    const bool exists = row < p.rows;
    const int group = exists ? p.m_indices[row] : -1;
    const bool starts = group >= 0 && (row == 0 || p.m_indices[row - 1] != group);
    const bool ends = group >= 0 && (row + 1 == p.rows || p.m_indices[row + 1] != group);
    int total;
    const int start = num_starts + count_before<kThreads>(starts, warp_counts, total);
    num_starts += total;
    const int end = num_ends + count_before<kThreads>(ends, warp_counts, total);
    num_ends += total;
    if (starts) {
      p.runs[1 + 3 * start] = row;
      p.runs[1 + 3 * start + 2] = group;
    }
    if (ends) p.runs[1 + 3 * end + 1] = row + 1;
  }
  if (threadIdx.x == 0) p.runs[0] = num_starts;
}

}  // namespace dsk
