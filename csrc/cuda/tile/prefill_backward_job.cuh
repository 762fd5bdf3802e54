// What one CTA of prefill's backward works on: 128 rows of one request's queries, or of its keys,
// and the blocks of the other side that they meet. As in the forward the grid is an upper bound,
// and CTAs behind the end leave.
#pragma once

#include <cstdint>

#include "cuda/params/mla_prefill_backward.hpp"

namespace dsk {

struct PrefillBackwardJob {
  int kept;           // first row of the CTA, counted within the request
  int kept_begin;     // the request's first row on the kept side
  int kept_length;    // its number of rows there
  int passing_begin;  // likewise on the other side
  int passing_length;
  int statistics;  // row of the request's first query in the statistics
  int shift;       // query i attends keys up to i + shift
  int first;       // block of the other side
  int last;        // one past the last block
};

__device__ __forceinline__ int prefill_blocks(int rows) {
  return (rows + kBackwardBlock - 1) / kBackwardBlock;
}

// The blocks that any of the kept rows meets: under the diagonal when `causal`.
template <PrefillSide kSide>
__device__ __forceinline__ void limit_blocks(bool causal, PrefillBackwardJob& job) {
  job.first = 0;
  job.last = prefill_blocks(job.passing_length);
  if (!causal) return;
  if constexpr (kSide == PrefillSide::kKeys) {
    job.first = max(0, job.kept - job.shift) / kBackwardBlock;
  } else {
    job.last = min(job.last, prefill_blocks(job.kept + kBackwardKept + job.shift));
  }
}

// Finds job `index`: requests in order, and behind the last one the rows that belong to none, which
// meet nothing. Returns false when there are fewer jobs.
template <PrefillSide kSide>
__device__ __forceinline__ bool find_backward_job(const PrefillBackwardParams& p, int index,
                                                  PrefillBackwardJob& job) {
  constexpr bool kKeys = kSide == PrefillSide::kKeys;
  job.statistics = 0;
  int query = 0, key = 0;
  for (int request = 0; request <= p.b; ++request) {
    const int query_end = request < p.b ? __ldg(p.cu_seqlens_q + request + 1) : p.t;
    const int key_end = request < p.b ? __ldg(p.cu_seqlens_k + request + 1) : p.keys;
    const int queries = query_end - query, keys = key_end - key;
    const int jobs = ((kKeys ? keys : queries) + kBackwardKept - 1) / kBackwardKept;
    if (index < jobs) {
      // Long jobs go first: the first keys meet most queries, the last queries most keys.
      job.kept = (kKeys ? index : jobs - 1 - index) * kBackwardKept;
      job.kept_begin = kKeys ? key : query;
      job.kept_length = kKeys ? keys : queries;
      job.passing_begin = kKeys ? query : key;
      job.passing_length = request == p.b ? 0 : kKeys ? queries : keys;
      job.shift = keys - queries;
      limit_blocks<kSide>(p.causal, job);
      return true;
    }
    index -= jobs;
    job.statistics += prefill_blocks(queries) * kBackwardBlock;
    query = query_end;
    key = key_end;
  }
  return false;
}

}  // namespace dsk
