// Joins the splits of a request: out = sum of 2^(lse_i - lse) out_i, lse = log2 of sum of 2^lse_i.
//
// Bound by L2 where many rows are split, 2 KB of fp32 a row and split; by latency where they are
// few: one request over all SMs has up to 128 splits. So a warp has whole rows, or a quarter of one
// and more loads in flight, an instance each. Splits are added in order: the sum depends neither on
// that nor on which CTA came first.
//
// Requests with one split are already written. In a batch of many that is often all of them, and
// then the launch must cost next to nothing: no more CTAs than run at once, each of which looks at
// 128 requests in one go and shares the rows of those that are split with the others.
#pragma once

#include <cuda_bf16.h>

#include "cuda/mla_shape.hpp"
#include "cuda/params/mla.hpp"
#include "cuda/ptx/math.cuh"

namespace dsk {

constexpr float kLn2 = 0.6931471805599453f;

// A row that a warp joins, and its splits.
struct MlaSplitRow {
  int request;
  int row;  // of the request
  int begin;
  int end;
  float lse;  // of split begin + lane; -inf behind the end

  __device__ __forceinline__ MlaSplitRow(const MlaCombineParams& p, int request, int row)
      : request(request),
        row(row),
        begin(__ldg(p.num_splits + request)),
        end(__ldg(p.num_splits + request + 1)),
        lse(lse_of(p, begin + threadIdx.x % 32)) {}

  __device__ __forceinline__ float stored_lse(const MlaCombineParams& p, int split) const {
    return p.lse_partial[int64_t(split) * p.s * p.h + row];
  }
  __device__ __forceinline__ float lse_of(const MlaCombineParams& p, int split) const {
    return split < end ? stored_lse(p, split) : -INFINITY;
  }

  // The largest; 0 where nothing is attended: every weight is 0 then.
  __device__ __forceinline__ float peak(const MlaCombineParams& p) const {
    float peak = lse;
    for (int split = begin + 32 + int(threadIdx.x % 32); split < end; split += 32) {
      peak = fmaxf(peak, stored_lse(p, split));
    }
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
      peak = fmaxf(peak, __shfl_xor_sync(0xffffffffu, peak, offset));
    }
    return peak == -INFINITY ? 0.f : peak;
  }
};

// Some quarters of a row, each 128 columns: 4 a lane. kDepth splits are on their way together, the
// first ones, with kAhead, before anything else.
template <int kQuarters, int kDepth, bool kAhead>
class MlaJoin {
 public:
  __device__ __forceinline__ MlaJoin(const MlaCombineParams& p, const MlaSplitRow& row, int quarter)
      : p_(p), row_(row), column_(quarter * 128 + threadIdx.x % 32 * 4) {
    if constexpr (kAhead) load(row.begin, 0);
  }

  __device__ __forceinline__ void run() {
    const float peak = row_.peak(p_);
    for (int first = row_.begin, count; first != row_.end; first += count) {
      count = min(row_.end - first, 32);
      const bool ahead = kAhead && first == row_.begin;
      const float lse = ahead ? row_.lse : row_.lse_of(p_, first + threadIdx.x % 32);
      const float weight = ptx::exp2_approx(lse - peak);
#pragma unroll 1
      for (int i = 0; i < count; i += kDepth) {
        if (!kAhead || first + i != row_.begin) load(first, i);
        add(weight, i);
      }
    }
    store(peak);
  }

 private:
  // Splits first + i .. first + i + kDepth - 1; for those behind the end, the last once more.
  __device__ __forceinline__ void load(int first, int i) {
    const int rows = p_.s * p_.h;
    const int64_t at = (int64_t(first) * rows + row_.row) * kMlaLatent + column_;
    const auto* from = reinterpret_cast<const float4*>(p_.out_partial + at);
#pragma unroll
    for (int j = 0; j < kDepth; ++j) {
      const int split = min(i + j, row_.end - first - 1);
#pragma unroll
      for (int c = 0; c < kQuarters; ++c) {
        part_[j][c] = from[split * (rows * kMlaLatent / 4) + c * 32];
      }
    }
  }

  // Those: lane i + j has split j's weight, 0 behind the end.
  __device__ __forceinline__ void add(float weight, int i) {
#pragma unroll
    for (int j = 0; j < kDepth; ++j) {
      const float w = __shfl_sync(0xffffffffu, weight, i + j);
      sum_ += w;
#pragma unroll
      for (int c = 0; c < kQuarters; ++c) {
        value_[c].x = fmaf(w, part_[j][c].x, value_[c].x);
        value_[c].y = fmaf(w, part_[j][c].y, value_[c].y);
        value_[c].z = fmaf(w, part_[j][c].z, value_[c].z);
        value_[c].w = fmaf(w, part_[j][c].w, value_[c].w);
      }
    }
  }

  __device__ __forceinline__ void store(float peak) const {
    const float inverse = sum_ == 0.f ? 0.f : __fdividef(1.f, sum_);
    const int64_t to = int64_t(row_.request) * p_.s * p_.h + row_.row;
    auto* out = static_cast<__nv_bfloat16*>(p_.out) + to * kMlaLatent + column_;
#pragma unroll
    for (int c = 0; c < kQuarters; ++c) {
      const float4 v = value_[c];
      __nv_bfloat162 pair[2] = {__floats2bfloat162_rn(v.x * inverse, v.y * inverse),
                                __floats2bfloat162_rn(v.z * inverse, v.w * inverse)};
      *reinterpret_cast<uint2*>(out + c * 128) = *reinterpret_cast<uint2*>(pair);
    }
    if (column_ == 0) {
      const int token = row_.row / p_.h, head = row_.row % p_.h;
      p_.lse[(int64_t(row_.request) * p_.h + head) * p_.s + token] =
          sum_ == 0.f ? INFINITY : (peak + ptx::log2_approx(sum_)) * kLn2;
    }
  }

  const MlaCombineParams& p_;
  MlaSplitRow row_;
  int column_;
  float4 part_[kDepth][kQuarters];
  float4 value_[kQuarters] = {};
  float sum_ = 0.f;  // of weights
};

// Which of 128 requests are split.
class MlaSplitRequests {
 public:
  __device__ __forceinline__ MlaSplitRequests(const MlaCombineParams& p, int first)
      : first_(first) {
    int count[kWords];
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const int request = first + i * 32 + threadIdx.x % 32;  // behind the last: no splits
      count[i] =
          __ldg(p.num_splits + min(request + 1, p.b)) - __ldg(p.num_splits + min(request, p.b));
    }
#pragma unroll
    for (int i = 0; i < kWords; ++i) split_[i] = __ballot_sync(0xffffffffu, count[i] > 1);
  }

  __device__ __forceinline__ int count() const {
    int result = 0;
#pragma unroll
    for (int i = 0; i < kWords; ++i) result += __popc(split_[i]);
    return result;
  }

  // By a warp: the one that `before` others precede.
  __device__ __forceinline__ int find(int before) const {
    const uint32_t lower = (1u << threadIdx.x % 32) - 1;  // lanes
    int result = -1;
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const bool is_split = split_[i] >> threadIdx.x % 32 & 1;
      const int own = __popc(split_[i] & lower);
      const uint32_t here = __ballot_sync(0xffffffffu, is_split && own == before);
      if (here != 0) result = first_ + i * 32 + __ffs(here) - 1;
      before -= __popc(split_[i]);
    }
    return result;
  }

 private:
  static constexpr int kWords = kMlaCombineRequests / 32;
  int first_;
  uint32_t split_[kWords];  // a bit for each
};

// A warp for whole rows: CTA (x, y) has its share of those that are split in requests 128 y and on.
// While a row's splits are on their way, the next row is looked up.
__device__ __forceinline__ void mla_combine_rows(const MlaCombineParams& p) {
  if (__ldg(p.num_splits + p.b) == p.b) return;  // nothing is split
  const int rows = p.s * p.h;
  const int warps = gridDim.x * (blockDim.x / 32);
  const MlaSplitRequests requests(p, blockIdx.y * kMlaCombineRequests);
  const int count = requests.count() * rows;
  int i = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
  if (i >= count) return;
  MlaSplitRow row(p, requests.find(i / rows), i % rows);
  bool more;
  do {
    MlaJoin<4, 2, true> join(p, row, 0);
    i += warps;
    more = i < count;
    if (more) row = MlaSplitRow(p, requests.find(i / rows), i % rows);
    join.run();
  } while (more);
}

// A warp for a quarter of a row: CTA (x, y) has row x of request y.
__device__ __forceinline__ void mla_combine_row_quarters(const MlaCombineParams& p) {
  const int request = blockIdx.y;
  if (__ldg(p.num_splits + request + 1) - __ldg(p.num_splits + request) < 2) return;
  const MlaSplitRow row(p, request, blockIdx.x);
  MlaJoin<1, 16, false>(p, row, threadIdx.x / 32).run();
}

}  // namespace dsk
