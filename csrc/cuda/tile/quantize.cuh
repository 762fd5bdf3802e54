// Block quantisation inside a kernel: the scale of a block, the casts, and runs of 2 or 4 elements
// in and out of memory. The semantics are those of dskernels.ref.rowwise.quantize.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "cuda/params/rowwise.hpp"
#include "cuda/ptx/fp8.cuh"

namespace dsk {

constexpr int kWarp = 32;
constexpr int kQuantGroup = 128;                     // values along a row that share one scale
constexpr int kValuesPerLane = kQuantGroup / kWarp;  // a warp covers one group
constexpr float kAmaxFloor = 1e-4f;                  // an all-zero block keeps an invertible scale
constexpr float kE4m3Max = 448.f;
constexpr float kE5m6Max = 65024.f;
constexpr float kE5m6Normal = 6.103515625e-05f;  // the smallest: 2^-14

struct E4m3 {  // tag of an input type; its elements are bytes
  uint8_t bits;
};

// ---- scales ------------------------------------------------------------------------------------

// The smallest power of two >= s, for positive normal s: carry any mantissa bit into the exponent.
__device__ __forceinline__ float ceil_power_of_two(float s) {
  const uint32_t bits = __float_as_uint(s);
  return __uint_as_float((bits + 0x7fffffu) & 0xff800000u);
}

__device__ __forceinline__ float block_scale(float amax, float format_max, ScaleFormat format) {
  const float scale = __fdiv_rn(fmaxf(amax, kAmaxFloor), format_max);
  return format == ScaleFormat::kUe8m0 ? ceil_power_of_two(scale) : scale;
}

// The largest magnitude, without the NaNs: fmaxf drops them, as the specification does.
template <int kCount>
__device__ __forceinline__ float largest(const float (&value)[kCount]) {
  float amax = 0.f;
#pragma unroll
  for (float v : value) amax = fmaxf(amax, fabsf(v));
  return amax;
}

__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, offset));
  }
  return value;
}

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(0xffffffffu, value, offset);
  }
  return value;
}

// ---- casts -------------------------------------------------------------------------------------

// fp32 -> E5M6 as float16 bits: round to nearest even, saturate at 65024, NaN to the quiet NaN.
__device__ __forceinline__ uint16_t cast_e5m6(float x) {
  const uint32_t sign = __float_as_uint(x) >> 31 << 15;
  const float magnitude = fminf(fabsf(x), kE5m6Max);
  // Codes count steps: up to the smallest normal number of 2^-20 each; adding 1.5 * 2^23 rounds to
  // an integer.
  const float low = fminf(magnitude, kE5m6Normal);
  const uint32_t subnormal =
      __float_as_uint(__fadd_rn(__fmul_rn(low, 1048576.f), 12582912.f)) & 0x7f;
  // And behind it, of the mantissa: round away 17 of its 23 bits, a carry belonging in the
  // exponent, which is counted from that number's (113) on.
  const uint32_t bits = __float_as_uint(fmaxf(magnitude, kE5m6Normal));
  const uint32_t normal = ((bits + 0xffffu + (bits >> 17 & 1)) >> 17) - (113u << 6);
  return uint16_t(x != x ? 0x7e00u : sign | (subnormal + normal) << 4);
}

__device__ __forceinline__ uint32_t cast_e4m3x4(const float (&v)[4]) {
  return ptx::cvt_e4m3x2(v[0], v[1]) | uint32_t(ptx::cvt_e4m3x2(v[2], v[3])) << 16;
}

__device__ __forceinline__ float2 decode_e4m3x2(uint16_t pair) {
  const uint32_t halves = ptx::cvt_f16x2(pair);
  return __half22float2(*reinterpret_cast<const __half2*>(&halves));
}

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }
__device__ __forceinline__ float to_float(E4m3 v) { return decode_e4m3x2(v.bits).x; }

template <typename T>
__device__ __forceinline__ T from_float(float v);
template <>
__device__ __forceinline__ float from_float<float>(float v) {
  return v;
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}

// ---- runs of elements --------------------------------------------------------------------------

template <int kBytes>
struct Word;
template <>
struct Word<2> {
  using Type = uint16_t;
};
template <>
struct Word<4> {
  using Type = uint32_t;
};
template <>
struct Word<8> {
  using Type = uint2;
};
template <>
struct Word<16> {
  using Type = uint4;
};

// A run goes as one access where it is whole and aligned, else element by element.
template <typename T, int kCount>
__device__ __forceinline__ bool is_word(const T* at, int left) {
  return left >= kCount && reinterpret_cast<uintptr_t>(at) % (kCount * sizeof(T)) == 0;
}

// kCount elements from `at`, zeros after the first `left`.
template <int kCount, typename T>
__device__ __forceinline__ void load_run(const T* at, int left, float (&value)[kCount]) {
  using W = typename Word<kCount * sizeof(T)>::Type;
  if (is_word<T, kCount>(at, left)) {
    alignas(sizeof(W)) T element[kCount];
    *reinterpret_cast<W*>(element) = __ldg(reinterpret_cast<const W*>(at));
#pragma unroll
    for (int i = 0; i < kCount; ++i) value[i] = to_float(element[i]);
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) value[i] = i < left ? to_float(at[i]) : 0.f;
  }
}

template <int kCount, typename T>
__device__ __forceinline__ void store_raw(T* at, int left, const T (&element)[kCount]) {
  using W = typename Word<kCount * sizeof(T)>::Type;
  if (is_word<T, kCount>(at, left)) {
    *reinterpret_cast<W*>(at) = *reinterpret_cast<const W*>(element);
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (i < left) at[i] = element[i];
    }
  }
}

template <int kCount, typename T>
__device__ __forceinline__ void store_run(T* at, int left, const float (&value)[kCount]) {
  alignas(16) T element[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) element[i] = from_float<T>(value[i]);
  store_raw(at, left, element);
}

// A lane's run divided by its block's scale, and cast.
__device__ __forceinline__ uint32_t scaled_e4m3x4(const float (&value)[4], float scale) {
  float quotient[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) quotient[i] = __fdiv_rn(value[i], scale);
  return cast_e4m3x4(quotient);
}

__device__ __forceinline__ void store_bytes(uint8_t* at, int left, uint32_t word) {
  alignas(4) const uint8_t element[4] = {uint8_t(word), uint8_t(word >> 8), uint8_t(word >> 16),
                                         uint8_t(word >> 24)};
  store_raw(at, left, element);
}

__device__ __forceinline__ void store_e4m3(uint8_t* at, int left, const float (&value)[4],
                                           float scale) {
  store_bytes(at, left, scaled_e4m3x4(value, scale));
}

__device__ __forceinline__ void store_e5m6(uint16_t* at, int left, const float (&value)[4],
                                           float scale) {
  alignas(8) uint16_t element[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) element[i] = cast_e5m6(__fdiv_rn(value[i], scale));
  store_raw(at, left, element);
}

}  // namespace dsk
