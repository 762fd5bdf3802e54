// RMSNorm, with the residual add before it and 1x128 quantisation after it fused in.
//
// Bound by memory: bf16 with a residual reads 4 bytes and writes 2 (the sum) + 1 (e4m3) per value,
// so 4096 x 7168 moves 206 MB, 61 us at 3.35 TB/s; unfused it would be 411 MB. The arithmetic, some
// 10 operations a value, is 10 us of the CUDA cores. A CTA of 8 warps takes a row at a time. Every
// thread keeps its own values of the row in shared memory as fp32 until the mean square is known;
// a warp's pass over 128 columns is also one quantisation group.
//
// y = x / sqrt(mean(x^2) + eps) * weight in fp32; x + residual is rounded to x's type first, and
// what is quantised is not rounded before.
#pragma once

#include "cuda/tile/quantize.cuh"

namespace dsk {

constexpr int kNormWarps = 8;

// Sum over the CTA. Every thread gets the same bits: the order is that of the warps. Reads of the
// last call's partial sums are over before this call writes: `set` alternates.
__device__ __forceinline__ float block_sum(float value, float (&partial)[kNormWarps]) {
  value = warp_sum(value);
  if (threadIdx.x % kWarp == 0) partial[threadIdx.x / kWarp] = value;
  __syncthreads();
  float sum = 0.f;
#pragma unroll
  for (float p : partial) sum += p;
  return sum;
}

template <typename T>
__device__ __forceinline__ float load_row(const RmsNormParams& p, int64_t row, float4* kept) {
  float square = 0.f;
  for (int group = threadIdx.x / kWarp; group * kQuantGroup < p.cols;
       group += kNormWarps, kept += blockDim.x) {
    const int column = group * kQuantGroup + threadIdx.x % kWarp * kValuesPerLane;
    const int64_t at = row * p.cols + column;
    const int left = p.cols - column;
    float x[kValuesPerLane];
    load_run(static_cast<const T*>(p.x) + at, left, x);
    if (p.residual) {
      float residual[kValuesPerLane];
      load_run(static_cast<const T*>(p.residual) + at, left, residual);
#pragma unroll
      for (int i = 0; i < kValuesPerLane; ++i) {
        x[i] = to_float(from_float<T>(__fadd_rn(x[i], residual[i])));
      }
      store_run(static_cast<T*>(p.total) + at, left, x);
    }
#pragma unroll
    for (float v : x) square = __fmaf_rn(v, v, square);
    *kept = make_float4(x[0], x[1], x[2], x[3]);
  }
  return square;
}

template <typename T>
__device__ __forceinline__ void store_row(const RmsNormParams& p, int64_t row, float inverse,
                                          const float4* kept) {
  const int lane = threadIdx.x % kWarp;
  const uint32_t plane = uint32_t(row) / uint32_t(p.plane_rows);
  const uint32_t within = uint32_t(row) - plane * uint32_t(p.plane_rows);
  // Whole warps go on together: the quantisation group's amax needs them.
  for (int group = threadIdx.x / kWarp; group * kQuantGroup < p.cols;
       group += kNormWarps, kept += blockDim.x) {
    const int column = group * kQuantGroup + lane * kValuesPerLane;
    const int left = p.cols - column;
    const int64_t at = row * p.cols + column;
    float weight[kValuesPerLane];
    if (p.weight_type == WideType::kBfloat16) {
      load_run(static_cast<const __nv_bfloat16*>(p.weight) + column, left, weight);
    } else {
      load_run(static_cast<const float*>(p.weight) + column, left, weight);
    }
    const float4 x = *kept;
    float y[kValuesPerLane] = {x.x, x.y, x.z, x.w};
#pragma unroll
    for (int i = 0; i < kValuesPerLane; ++i) y[i] = __fmul_rn(__fmul_rn(y[i], inverse), weight[i]);
    if (p.scale) {
      const float scale = block_scale(warp_max(largest(y)), kE4m3Max, p.format);
      store_e4m3(static_cast<uint8_t*>(p.y) + at, left, y, scale);
      if (lane == 0) p.scale[plane * p.plane_scale + group * p.ld_scale + within] = scale;
    } else {
      store_run(static_cast<T*>(p.y) + at, left, y);
    }
  }
}

template <typename T>
__device__ __forceinline__ void rms_norm_rows(const RmsNormParams& p) {
  extern __shared__ float4 kept_values[];  // [ceil(cols / (kNormWarps * kQuantGroup))][threads]
  __shared__ float partial[2][kNormWarps];
  int set = 0;
  for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
    float4* kept = kept_values + threadIdx.x;
    const float square = block_sum(load_row<T>(p, row, kept), partial[set]);
    set ^= 1;
    const float mean = __fdiv_rn(square, float(p.cols));
    const float inverse = __fdiv_rn(1.f, __fsqrt_rn(__fadd_rn(mean, p.eps)));
    store_row<T>(p, row, inverse, kept);
  }
}

}  // namespace dsk
