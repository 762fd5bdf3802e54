// One vector of floats, F32, and what the kernels need of it: three implementations of one
// interface, chosen by the compiler flags of the target being built. Everything is in a namespace
// of the target and always inlined, so no code compiled for one instruction set can be merged by
// the linker into another's.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "params.hpp"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#ifndef DSK_CPU_NS
#error "compile this through csrc/cpu/CMakeLists.txt, which defines DSK_CPU_NS per target"
#endif

#define DSK_INLINE static inline __attribute__((always_inline))

namespace dsk::cpu::DSK_CPU_NS {

#if defined(__AVX512F__)
#include "cpu/simd_avx512-inl.hpp"
#elif defined(__AVX2__)
#include "cpu/simd_avx2-inl.hpp"
#else
#include "cpu/simd_portable-inl.hpp"
#endif

// ---- what follows is written once, on the primitives above ----

template <typename T>
DSK_INLINE T min_of(T a, T b) {
  return a < b ? a : b;
}
template <typename T>
DSK_INLINE T max_of(T a, T b) {
  return a < b ? b : a;
}
DSK_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

DSK_INLINE float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
DSK_INLINE uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

DSK_INLINE float bf16_to_float(uint16_t value) {
  return bits_to_float(static_cast<uint32_t>(value) << 16);
}
DSK_INLINE uint16_t float_to_bf16(float value) {
  const uint32_t bits = float_to_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// The largest power of two scale steps: 2^ceil(log2(x)) of a positive finite x, by its bits.
DSK_INLINE float ceil_pow2(float x) {
  const uint32_t bits = float_to_bits(x);
  if (bits >= 0x7f800000u) return x;
  return bits_to_float((bits + 0x7fffff) & 0x7f800000u);
}

// e^x to about 2 ulp; 0 below -87.3, +inf above 88.7, NaN for NaN.
DSK_INLINE F32 exp(F32 x) {
  const F32 n = round_even(mul(x, set1(1.44269504f)));
  // ln 2 in two parts keeps the reduced argument exact.
  F32 r = fma(n, set1(-0.693359375f), x);
  r = fma(n, set1(2.12194440e-4f), r);
  F32 p = set1(1.9875691500e-4f);
  p = fma(p, r, set1(1.3981999507e-3f));
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  p = fma(p, mul(r, r), add(r, set1(1.0f)));
  return ldexp_clamped(p, n, x);
}

DSK_INLINE F32 sigmoid(F32 x) { return div(set1(1.0f), add(set1(1.0f), exp(neg(x)))); }
DSK_INLINE F32 silu(F32 x) { return div(x, add(set1(1.0f), exp(neg(x)))); }

// Reads and writes of a row whose element type is a template parameter.
using dsk::Type;

template <Type kType>
struct Element;
template <>
struct Element<Type::kF32> {
  using Storage = float;
  DSK_INLINE F32 load(const float* p) { return cpu::DSK_CPU_NS::load(p); }
  DSK_INLINE void store(float* p, F32 v) { cpu::DSK_CPU_NS::store(p, v); }
};
template <>
struct Element<Type::kBF16> {
  using Storage = uint16_t;
  DSK_INLINE F32 load(const uint16_t* p) { return load_bf16(p); }
  DSK_INLINE void store(uint16_t* p, F32 v) { store_bf16(p, v); }
};
template <>
struct Element<Type::kF16> {
  using Storage = uint16_t;
  DSK_INLINE F32 load(const uint16_t* p) { return load_f16(p); }
  DSK_INLINE void store(uint16_t* p, F32 v) { store_f16(p, v); }
};
template <>
struct Element<Type::kE4M3> {
  using Storage = uint8_t;
  DSK_INLINE F32 load(const uint8_t* p) { return load_e4m3(p); }
  DSK_INLINE void store(uint8_t* p, F32 v) { store_e4m3(p, v); }
};

// The last, partial vector of a row goes through a stack buffer: nothing past the end is touched.
template <Type kType>
DSK_INLINE F32 load_n(const typename Element<kType>::Storage* p, int64_t n) {
  typename Element<kType>::Storage buffer[kLanes] = {};
  std::memcpy(buffer, p, static_cast<size_t>(n) * sizeof(buffer[0]));
  return Element<kType>::load(buffer);
}
template <Type kType>
DSK_INLINE void store_n(typename Element<kType>::Storage* p, F32 v, int64_t n) {
  typename Element<kType>::Storage buffer[kLanes];
  Element<kType>::store(buffer, v);
  std::memcpy(p, buffer, static_cast<size_t>(n) * sizeof(buffer[0]));
}
template <Type kType>
DSK_INLINE F32 load_upto(const typename Element<kType>::Storage* p, int64_t n) {
  return n >= kLanes ? Element<kType>::load(p) : load_n<kType>(p, n);
}
template <Type kType>
DSK_INLINE void store_upto(typename Element<kType>::Storage* p, F32 v, int64_t n) {
  if (n >= kLanes) {
    Element<kType>::store(p, v);
  } else {
    store_n<kType>(p, v, n);
  }
}

}  // namespace dsk::cpu::DSK_CPU_NS
