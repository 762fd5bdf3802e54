// Activation quantisation: each row's groups of 128 values share one scale (V3 report, 3.3.2).
//
// Bound by memory: 2 bytes read (bf16) and 1 + 4/128 written per value, so 4096 x 7168 moves 88 MB,
// 26 us at 3.35 TB/s. There is nothing to overlap by hand: one warp owns one group of 128 (4 values
// a lane: an 8- or 16-byte load, a 4-byte store), and occupancy hides the latency.
//
// Semantics are those of dskernels.ref.rowwise.quantize: amax clamped to 1e-4, scale = amax / 448
// (or the next power of two for UE8M0), value = e4m3(x / scale), round to nearest even, saturating.
// A NaN does not enter its group's amax and stays NaN; an infinity makes the whole group NaN.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "cuda/params/rowwise.hpp"
#include "cuda/ptx/fp8.cuh"

namespace dsk {

constexpr int kQuantGroup = 128;                  // values that share one scale
constexpr int kValuesPerLane = kQuantGroup / 32;  // a warp covers one group
constexpr float kE4m3Max = 448.f;
constexpr float kAmaxFloor = 1e-4f;

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }

// The smallest power of two >= s, for positive normal s: carry any mantissa bit into the exponent.
__device__ __forceinline__ float ceil_power_of_two(float s) {
  const uint32_t bits = __float_as_uint(s);
  return __uint_as_float((bits + 0x7fffffu) & 0xff800000u);
}

template <ScaleFormat kFormat>
__device__ __forceinline__ float group_scale(float amax) {
  const float scale = __fdiv_rn(fmaxf(amax, kAmaxFloor), kE4m3Max);
  return kFormat == ScaleFormat::kUe8m0 ? ceil_power_of_two(scale) : scale;
}

template <typename T, ScaleFormat kFormat>
__device__ __forceinline__ void quantize_rows(const QuantizeParams& p) {
  const int lane = threadIdx.x % 32;
  const int64_t groups_per_row = (p.cols + kQuantGroup - 1) / kQuantGroup;
  const int64_t num_groups = groups_per_row * p.rows;
  const int64_t num_warps = int64_t(gridDim.x) * (blockDim.x / 32);

  for (int64_t group = int64_t(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
       group < num_groups; group += num_warps) {
    const int64_t row = group / groups_per_row;
    const int64_t k_group = group % groups_per_row;
    const int first_col = int(k_group) * kQuantGroup + lane * kValuesPerLane;
    const T* x = static_cast<const T*>(p.x) + row * p.ld_x + first_col;

    float value[kValuesPerLane];
    float amax = 0.f;
#pragma unroll
    for (int i = 0; i < kValuesPerLane; ++i) {
      value[i] = first_col + i < p.cols ? to_float(x[i]) : 0.f;
      amax = fmaxf(amax, fabsf(value[i]));  // fmaxf drops NaN, as the spec does
    }
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
      amax = fmaxf(amax, __shfl_xor_sync(0xffffffffu, amax, offset));
    }

    const float scale = group_scale<kFormat>(amax);
    uint8_t* out = p.data + row * p.ld_data + first_col;
#pragma unroll
    for (int i = 0; i < kValuesPerLane; i += 2) {
      const uint16_t pair =
          ptx::cvt_e4m3x2(__fdiv_rn(value[i], scale), __fdiv_rn(value[i + 1], scale));
      if (first_col + i < p.cols) out[i] = uint8_t(pair);
      if (first_col + i + 1 < p.cols) out[i + 1] = uint8_t(pair >> 8);
    }
    if (lane == 0) p.scale[k_group * p.ld_scale + row] = scale;
  }
}

}  // namespace dsk
