// The fp32 unit: weights widened to fp32 once per block and panel, then plain FMA.
#pragma once

#include "cpu/packed.hpp"
#include "cpu/simd.hpp"

namespace dsk::cpu::DSK_CPU_NS {

// Accumulators of one kernel: kWideRows x kWideVectors, as the register file allows.
#if defined(__AVX512F__)
constexpr int kWideVectors = 4;
#elif defined(__AVX2__)
constexpr int kWideVectors = 2;
#else
constexpr int kWideVectors = 1;
#endif
constexpr int64_t kWideRows = 6;

// depth x 64 packed weights -> fp32 [depth][64].
DSK_INLINE void widen_weights(const uint8_t* packed, int64_t depth, float* out) {
  for (int64_t k = 0; k < depth; k += 2) {
    for (int half = 0; half < 2; ++half) {
      const uint8_t* line = packed + k * kPanel + half * 64;
      float* even = out + k * kPanel + half * 32;
      float* odd = even + kPanel;
#if defined(__AVX512F__)
      // A 128-bit lane holds 8 words: 4 columns of the left 16 and 4 of the right 16.
      F32 lane[4];
      for (int i = 0; i < 4; ++i) lane[i] = load_e4m3(line + 16 * i);
      const __m512i left_even =
          _mm512_setr_epi32(0, 2, 4, 6, 16, 18, 20, 22, 0, 0, 0, 0, 0, 0, 0, 0);
      const __m512i step_odd = _mm512_set1_epi32(1), step_right = _mm512_set1_epi32(8);
      for (int side = 0; side < 2; ++side) {
        for (int parity = 0; parity < 2; ++parity) {
          __m512i index = left_even;
          if (side) index = _mm512_add_epi32(index, step_right);
          if (parity) index = _mm512_add_epi32(index, step_odd);
          const F32 low = _mm512_permutex2var_ps(lane[0], index, lane[1]);
          const F32 high = _mm512_permutex2var_ps(lane[2], index, lane[3]);
          store((parity ? odd : even) + side * 16,
                _mm512_insertf32x8(low, _mm512_castps512_ps256(high), 1));
        }
      }
#else
      float values[64];
      for (int i = 0; i < 64; i += kLanes) store(values + i, load_e4m3(line + i));
      for (int word = 0; word < 32; ++word) {
        even[word_column(word)] = values[2 * word];
        odd[word_column(word)] = values[2 * word + 1];
      }
#endif
    }
  }
}

template <int kRows>
DSK_INLINE void wide_kernel(const float* a, int64_t stride, const float* weights, int64_t depth,
                            const float* scale_a, const float* scale_b, float* c) {
  for (int64_t n = 0; n < kPanel; n += kWideVectors * kLanes) {
    F32 sum[kRows][kWideVectors];
    for (auto& row : sum) {
      for (F32& value : row) value = zero();
    }
    for (int64_t k = 0; k < depth; ++k) {
      F32 b[kWideVectors];
      for (int j = 0; j < kWideVectors; ++j) b[j] = load(weights + k * kPanel + n + j * kLanes);
      for (int i = 0; i < kRows; ++i) {
        const F32 x = set1(a[i * stride + k]);
        for (int j = 0; j < kWideVectors; ++j) sum[i][j] = fma(x, b[j], sum[i][j]);
      }
    }
    for (int i = 0; i < kRows; ++i) {
      for (int j = 0; j < kWideVectors; ++j) {
        const F32 scale = mul(set1(scale_a[i]), load(scale_b + n + j * kLanes));
        float* to = c + i * kPanel + n + j * kLanes;
        store(to, fma(scale, sum[i][j], load(to)));
      }
    }
  }
}

// c [rows][64] += scales * (a [rows][depth] times weights [depth][64]), rows <= kWideRows. scale_b
// has one value per column.
DSK_INLINE void wide_rows(const float* a, int64_t stride, int64_t rows, const float* weights,
                          int64_t depth, const float* scale_a, const float* scale_b, float* c) {
  switch (rows) {
    case 6:
      return wide_kernel<6>(a, stride, weights, depth, scale_a, scale_b, c);
    case 5:
      return wide_kernel<5>(a, stride, weights, depth, scale_a, scale_b, c);
    case 4:
      return wide_kernel<4>(a, stride, weights, depth, scale_a, scale_b, c);
    case 3:
      return wide_kernel<3>(a, stride, weights, depth, scale_a, scale_b, c);
    case 2:
      return wide_kernel<2>(a, stride, weights, depth, scale_a, scale_b, c);
    default:
      return wide_kernel<1>(a, stride, weights, depth, scale_a, scale_b, c);
  }
}

}  // namespace dsk::cpu::DSK_CPU_NS
