// What one CTA of prefill works on: 128 query rows of one request, one head. The number of
// requests' blocks is known on the device only, so the grid is an upper bound and CTAs behind the
// end leave.
#pragma once

#include <cstdint>

#include "cuda/params/mla_prefill.hpp"

namespace dsk {

struct PrefillJob {
  int row;      // first row of q
  int row_end;  // one past the request's last row of q
  int key;      // the request's first key
  int length;   // its number of keys
  int shift;    // row r of the request attends keys below r - row + shift, at most all of them
  int blocks;   // of keys that any of the rows attends
};

// Finds job `index`: requests in order, and behind the last one the rows that belong to none, which
// attend nothing. Returns false when there are fewer jobs.
__device__ __forceinline__ bool find_prefill_job(const MlaPrefillParams& p, int index,
                                                 PrefillJob& job) {
  for (int request = 0; request <= p.b; ++request) {
    const int begin = __ldg(p.cu_seqlens_q + request);
    const int end = request < p.b ? __ldg(p.cu_seqlens_q + request + 1) : p.t;
    const int jobs = (end - begin + kPrefillRows - 1) / kPrefillRows;
    if (index >= jobs) {
      index -= jobs;
      continue;
    }
    // The last rows attend most keys, so they go first: CTAs that start late have little to do.
    job.row = begin + (jobs - 1 - index) * kPrefillRows;
    job.row_end = end;
    job.key = __ldg(p.cu_seqlens_k + request);
    job.length = request < p.b ? __ldg(p.cu_seqlens_k + request + 1) - job.key : 0;
    job.shift = p.causal ? job.row - begin + job.length - (end - begin) + 1 : job.length;
    const int last = p.causal ? job.shift + kPrefillRows - 1 : job.length;
    job.blocks = (max(0, min(last, job.length)) + kPrefillBlock - 1) / kPrefillBlock;
    return true;
  }
  return false;
}

}  // namespace dsk
