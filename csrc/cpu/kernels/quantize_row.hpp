// One row, or a block of it, to E4M3 with its scale; and rows of a type known at run time.
#pragma once

#include "cpu/simd.hpp"

namespace dsk::cpu::DSK_CPU_NS {

constexpr float kFormatMax = 448.0f;
constexpr float kAmaxFloor = 1e-4f;  // keeps the scale of an all-zero block invertible

template <Type kType>
using StorageOf = typename Element<kType>::Storage;

template <typename Function>
DSK_INLINE void with_type(Type type, Function&& function) {
  switch (type) {
    case Type::kBF16:
      return function.template operator()<Type::kBF16>();
    case Type::kF16:
      return function.template operator()<Type::kF16>();
    default:
      return function.template operator()<Type::kF32>();
  }
}

template <Type kType>
DSK_INLINE const StorageOf<kType>* row_of(const Matrix& matrix, int64_t row) {
  return static_cast<const StorageOf<kType>*>(matrix.data) + row * matrix.stride;
}
template <Type kType>
DSK_INLINE StorageOf<kType>* row_of(const MutableMatrix& matrix, int64_t row) {
  return static_cast<StorageOf<kType>*>(matrix.data) + row * matrix.stride;
}

DSK_INLINE float block_scale(float amax, bool pow2) {
  const float scale = max_of(amax, kAmaxFloor) / kFormatMax;
  return pow2 ? ceil_pow2(scale) : scale;
}

// NaN does not enter the amax.
template <Type kType>
DSK_INLINE float row_amax(const StorageOf<kType>* x, int64_t n) {
  F32 amax = zero();
  for (int64_t i = 0; i < n; i += kLanes) amax = max(abs(load_upto<kType>(x + i, n - i)), amax);
  return reduce_max(amax);
}

template <Type kType>
DSK_INLINE void row_cast(const StorageOf<kType>* x, float scale, uint8_t* data, int64_t n) {
  const F32 divisor = set1(scale);
  for (int64_t i = 0; i < n; i += kLanes) {
    store_upto<Type::kE4M3>(data + i, div(load_upto<kType>(x + i, n - i), divisor), n - i);
  }
}

}  // namespace dsk::cpu::DSK_CPU_NS
