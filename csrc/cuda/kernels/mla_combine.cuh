// Joins the splits of a request: out = sum of 2^(lse_i - lse) out_i, lse = log2 of sum of 2^lse_i.
//
// Bound by memory: 2 KB of fp32 a row and split. One warp a row, 16 columns a lane; splits in
// order, so the sum does not depend on which CTA came first. Requests with one split are already
// written.
#pragma once

#include <cuda_bf16.h>

#include "cuda/params/mla.hpp"
#include "cuda/ptx/math.cuh"

namespace dsk {

constexpr float kLn2 = 0.6931471805599453f;

__device__ __forceinline__ void mla_combine_splits(const MlaCombineParams& p) {
  constexpr int kColumns = 512;
  const int lane = threadIdx.x % 32;
  const int rows = p.s * p.h;
  const int row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
  const int request = blockIdx.y;
  const int begin = p.num_splits[request];
  const int end = p.num_splits[request + 1];
  if (row >= rows || end - begin < 2) return;

  float peak = -INFINITY;
  for (int i = begin + lane; i < end; i += 32) {
    peak = fmaxf(peak, p.lse_partial[int64_t(i) * rows + row]);
  }
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    peak = fmaxf(peak, __shfl_xor_sync(0xffffffffu, peak, offset));
  }
  if (peak == -INFINITY) peak = 0.f;  // nothing attended: every weight below is 0

  float sum = 0.f;
  float4 mean[kColumns / 128] = {};
  for (int i = begin; i < end; ++i) {
    const float weight = ptx::exp2_approx(p.lse_partial[int64_t(i) * rows + row] - peak);
    const auto* from =
        reinterpret_cast<const float4*>(p.out_partial + (int64_t(i) * rows + row) * kColumns);
    sum += weight;
#pragma unroll
    for (int c = 0; c < kColumns / 128; ++c) {
      const float4 value = from[c * 32 + lane];
      mean[c].x = fmaf(weight, value.x, mean[c].x);
      mean[c].y = fmaf(weight, value.y, mean[c].y);
      mean[c].z = fmaf(weight, value.z, mean[c].z);
      mean[c].w = fmaf(weight, value.w, mean[c].w);
    }
  }

  const float inverse = sum == 0.f ? 0.f : __fdividef(1.f, sum);
  auto* out = static_cast<__nv_bfloat16*>(p.out) + (int64_t(request) * rows + row) * kColumns;
#pragma unroll
  for (int c = 0; c < kColumns / 128; ++c) {
    __nv_bfloat162 pair[2] = {__floats2bfloat162_rn(mean[c].x * inverse, mean[c].y * inverse),
                              __floats2bfloat162_rn(mean[c].z * inverse, mean[c].w * inverse)};
    *reinterpret_cast<uint2*>(out + (c * 32 + lane) * 4) = *reinterpret_cast<uint2*>(pair);
  }
  if (lane == 0) {
    const int token = row / p.h, head = row % p.h;
    p.lse[(int64_t(request) * p.h + head) * p.s + token] =
        sum == 0.f ? INFINITY : (peak + ptx::log2_approx(sum)) * kLn2;
  }
}

}  // namespace dsk
