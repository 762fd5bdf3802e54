// Joins the splits of a request: out = sum of 2^(lse_i - lse) out_i, lse = log2 of sum of 2^lse_i.
//
// Bound by memory where many requests are split, 2 KB of fp32 a row and split; by latency where one
// request is split over all SMs: 132 times 2 KB for each of its few rows. So a warp has all four
// quarters of a row or, as long as all warps are resident at once, one of them, and keeps up to 16
// loads in flight. Splits are added in order: the sum depends neither on that nor on which CTA came
// first. Requests with one split are already written.
#pragma once

#include <cuda_bf16.h>

#include "cuda/mla_shape.hpp"
#include "cuda/params/mla.hpp"
#include "cuda/ptx/math.cuh"

namespace dsk {

constexpr float kLn2 = 0.6931471805599453f;

// A warp's 128 columns of a row, 4 a lane.
struct MlaMean {
  const float4* from;  // this lane's, of the first split
  int64_t stride;      // between splits
  float4 value{};
  float sum = 0.f;  // of weights

  // Adds splits i .. i + kCount - 1; lane j has split j's weight, 0 behind the last.
  template <int kCount>
  __device__ __forceinline__ void add(int i, int last, float weight) {
    float4 part[kCount];
#pragma unroll
    for (int j = 0; j < kCount; ++j) part[j] = from[min(i + j, last) * stride];
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      const float w = __shfl_sync(0xffffffffu, weight, i + j);
      sum += w;
      value.x = fmaf(w, part[j].x, value.x);
      value.y = fmaf(w, part[j].y, value.y);
      value.z = fmaf(w, part[j].z, value.z);
      value.w = fmaf(w, part[j].w, value.w);
    }
  }
};

// The largest of a row's log-sum-exps; 0 where nothing is attended: every weight is 0 then.
__device__ __forceinline__ float mla_peak(const MlaCombineParams& p, int row, int begin, int end) {
  const int rows = p.s * p.h;
  float peak = -INFINITY;
  for (int i = begin + int(threadIdx.x % 32); i < end; i += 32) {
    peak = fmaxf(peak, p.lse_partial[int64_t(i) * rows + row]);
  }
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    peak = fmaxf(peak, __shfl_xor_sync(0xffffffffu, peak, offset));
  }
  return peak == -INFINITY ? 0.f : peak;
}

__device__ __forceinline__ void mla_combine_splits(const MlaCombineParams& p) {
  constexpr int kColumns = 128;  // of a warp at a time
  const int lane = threadIdx.x % 32;
  const int rows = p.s * p.h;
  const int warp = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
  const int row = warp / p.slices, slice = warp % p.slices;
  const int request = blockIdx.y;
  const int begin = p.num_splits[request];
  const int end = p.num_splits[request + 1];
  if (row >= rows || end - begin < 2) return;

  const float peak = mla_peak(p, row, begin, end);
  for (int quarter = slice; quarter < kMlaLatent / kColumns; quarter += p.slices) {
    const int64_t column = quarter * kColumns + lane * 4;
    MlaMean mean{nullptr, int64_t(rows) * kMlaLatent / 4};
    for (int first = begin; first < end; first += 32) {
      const int64_t at = int64_t(first) * rows + row;
      const int count = min(end - first, 32);
      const float lse = lane < count ? p.lse_partial[at + int64_t(lane) * rows] : -INFINITY;
      const float weight = ptx::exp2_approx(lse - peak);
      mean.from = reinterpret_cast<const float4*>(p.out_partial + at * kMlaLatent + column);
      int i = 0;
      for (; i + 16 <= count; i += 16) mean.add<16>(i, count - 1, weight);
      for (; i < count; i += 4) mean.add<4>(i, count - 1, weight);
    }
    const float inverse = mean.sum == 0.f ? 0.f : __fdividef(1.f, mean.sum);
    __nv_bfloat162 pair[2] = {
        __floats2bfloat162_rn(mean.value.x * inverse, mean.value.y * inverse),
        __floats2bfloat162_rn(mean.value.z * inverse, mean.value.w * inverse)};
    auto* out = static_cast<__nv_bfloat16*>(p.out) + (int64_t(request) * rows + row) * kMlaLatent;
    *reinterpret_cast<uint2*>(out + column) = *reinterpret_cast<uint2*>(pair);
    if (quarter == 0 && lane == 0) {
      const int token = row / p.h, head = row % p.h;
      p.lse[(int64_t(request) * p.h + head) * p.s + token] =
          mean.sum == 0.f ? INFINITY : (peak + ptx::log2_approx(mean.sum)) * kLn2;
    }
  }
}

}  // namespace dsk
