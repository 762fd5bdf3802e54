// Joins the splits of a request: out = sum of 2^(lse_i - lse) out_i, lse = log2 of sum of 2^lse_i.
//
// Bound by L2 where many rows are split, 2 KB of fp32 a row and split; by latency where they are
// few: one request over all SMs has up to 128 splits. So a warp has a whole row or a quarter of it,
// an instance each, since they need different numbers of registers, and 16 loads in flight either
// way. Splits are added in order: the sum depends neither on that nor on which CTA came first.
// Requests with one split are already written.
#pragma once

#include <cuda_bf16.h>

#include "cuda/mla_shape.hpp"
#include "cuda/params/mla.hpp"
#include "cuda/ptx/math.cuh"

namespace dsk {

constexpr float kLn2 = 0.6931471805599453f;

// Some quarters of a row, each 128 columns: 4 a lane.
template <int kQuarters>
struct MlaMean {
  static constexpr int kDepth = 16 / kQuarters;  // splits whose loads are in flight together
  float4 value[kQuarters] = {};
  float sum = 0.f;  // of weights

  // Adds splits i .. i + kDepth - 1, behind `last` nothing: lane j has split j's weight, 0 there.
  __device__ __forceinline__ void add(const float4* from, int stride, int i, int last,
                                      float weight) {
    float4 part[kDepth][kQuarters];
#pragma unroll
    for (int j = 0; j < kDepth; ++j) {
#pragma unroll
      for (int c = 0; c < kQuarters; ++c) part[j][c] = from[min(i + j, last) * stride + c * 32];
    }
#pragma unroll
    for (int j = 0; j < kDepth; ++j) {
      const float w = __shfl_sync(0xffffffffu, weight, i + j);
      sum += w;
#pragma unroll
      for (int c = 0; c < kQuarters; ++c) {
        value[c].x = fmaf(w, part[j][c].x, value[c].x);
        value[c].y = fmaf(w, part[j][c].y, value[c].y);
        value[c].z = fmaf(w, part[j][c].z, value[c].z);
        value[c].w = fmaf(w, part[j][c].w, value[c].w);
      }
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

// By a warp: kQuarters of a row from `quarter` on.
template <int kQuarters>
__device__ __forceinline__ void mla_combine_row(const MlaCombineParams& p, int request, int row,
                                                int quarter, int begin, int end) {
  const int lane = threadIdx.x % 32;
  const int rows = p.s * p.h;
  const int64_t column = quarter * 128 + lane * 4;
  const float peak = mla_peak(p, row, begin, end);
  MlaMean<kQuarters> mean;
  for (int first = begin, count; first != end; first += count) {
    count = min(end - first, 32);
    const int64_t at = int64_t(first) * rows + row;
    const float lse = lane < count ? p.lse_partial[at + int64_t(lane) * rows] : -INFINITY;
    const float weight = ptx::exp2_approx(lse - peak);
    const auto* from = reinterpret_cast<const float4*>(p.out_partial + at * kMlaLatent + column);
    for (int i = 0; i < count; i += mean.kDepth) {
      mean.add(from, rows * kMlaLatent / 4, i, count - 1, weight);
    }
  }

  const float inverse = mean.sum == 0.f ? 0.f : __fdividef(1.f, mean.sum);
  auto* out = static_cast<__nv_bfloat16*>(p.out) + (int64_t(request) * rows + row) * kMlaLatent;
#pragma unroll
  for (int c = 0; c < kQuarters; ++c) {
    const float4 v = mean.value[c];
    __nv_bfloat162 pair[2] = {__floats2bfloat162_rn(v.x * inverse, v.y * inverse),
                              __floats2bfloat162_rn(v.z * inverse, v.w * inverse)};
    *reinterpret_cast<uint2*>(out + column + c * 128) = *reinterpret_cast<uint2*>(pair);
  }
  if (quarter == 0 && lane == 0) {
    const int token = row / p.h, head = row % p.h;
    p.lse[(int64_t(request) * p.h + head) * p.s + token] =
        mean.sum == 0.f ? INFINITY : (peak + ptx::log2_approx(mean.sum)) * kLn2;
  }
}

template <int kQuarters>
__device__ __forceinline__ void mla_combine_splits(const MlaCombineParams& p) {
  constexpr int kWarps = 4 / kQuarters;  // of a row
  const int warp = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
  const int row = warp / kWarps;
  const int request = blockIdx.y;
  const int begin = p.num_splits[request];
  const int end = p.num_splits[request + 1];
  if (row >= p.s * p.h || end - begin < 2) return;
  mla_combine_row<kQuarters>(p, request, row, warp % kWarps, begin, end);
}

}  // namespace dsk
