// The bf16 unit of processors without AMX (AVX512-BF16's vdpbf16ps): two products per lane into an
// fp32 sum, one after the other, each rounded as an fma would. Zen 4 issues it as often as an fp32
// fma, so it does twice the work; Intel's cores issue it at half that rate and have better units.
//
// E4M3 and bf16 activations and E4M3 weights are exact in bf16. The instruction takes subnormal
// operands and results for zeros whatever the caller's mode: a block of activations so small that
// this could show is refused and computed in fp32 instead.
#pragma once

#if defined(__AVX512BF16__)

#include "cpu/kernels/bf16_pairs.hpp"
#include "cpu/kernels/gemm_core.hpp"

namespace dsk::cpu::DSK_CPU_NS {

constexpr int64_t kDotRows = 6;     // rows whose 24 accumulators fill the register file
constexpr int64_t kStreamRows = 4;  // at a time where weights are converted in registers
constexpr int64_t kMostStream = 8;  // rows up to which converting again for each four is cheaper

// Activations from here on never meet a subnormal number: their products with E4M3 weights (at
// least 2^-9) are multiples of 2^-100 * 2^-7 * 2^-9 = 2^-116, and so is every sum before rounding.
constexpr float kDotSmallest = 0x1p-100f;

// Whether values hold a number other than 0 that is too small for the unit.
DSK_INLINE bool too_small_for_dot(const float* values, int64_t n) {
  __mmask16 small = 0;
  for (int64_t i = 0; i < n; i += kLanes) {
    const F32 magnitude = abs(load(values + i));
    // Compared as integers, because a comparison of floats may take subnormals for zeros, too.
    const __m512i bits = _mm512_castps_si512(magnitude);
    small |= _mm512_cmplt_epi32_mask(bits, _mm512_castps_si512(set1(kDotSmallest))) &
             _mm512_test_epi32_mask(bits, bits);
  }
  return small != 0;
}

// depth x 64 packed weights -> bf16 [depth / 2][64 columns][2].
DSK_INLINE void pair_weights(const uint8_t* packed, int64_t depth, uint16_t* out) {
  const Bf16Lookup lookup;
  for (int64_t k = 0; k < depth; k += 2) {
    for (int half = 0; half < 2; ++half) {
      const uint8_t* from = packed + k * kPanel + half * 64;
      // To L2 only: what is converted fills half of a 32 KiB L1.
      _mm_prefetch(reinterpret_cast<const char*>(from + kScaleBlock * kPanel), _MM_HINT_T1);
      __m512i left, right;
      lookup.pairs(_mm512_loadu_si512(from), left, right);
      _mm512_store_si512(out + k * kPanel + half * 64, left);
      _mm512_store_si512(out + k * kPanel + half * 64 + 32, right);
    }
  }
}

DSK_INLINE __m512bh pair_of(const uint16_t* a) {
  int32_t pair;
  std::memcpy(&pair, a, 4);
  return reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
}

// c [kRows][64] += scales * (a [kRows][depth] times weights), weights as they are packed (kStream)
// or as pair_weights leaves them. Zen 4's own prefetcher follows the stream better than
// instructions do (20 against 16 GB/s from memory on one core). a is bf16 with a row stride;
// scale_b has one value per column.
template <int kRows, bool kStream>
DSK_INLINE void dot_kernel(const uint16_t* a, int64_t stride, const void* weights, int64_t depth,
                           const float* scale_a, const float* scale_b, float* c) {
  // Few rows leave room for two sums of each value: shorter dependency chains.
  constexpr int kSums = kRows <= 2 ? 2 : 1;
  __m512 sum[kRows][kSums][4];
  for (auto& row : sum) {
    for (auto& part : row) part[0] = part[1] = part[2] = part[3] = _mm512_setzero_ps();
  }
  const Bf16Lookup lookup;
  for (int64_t k = 0; k < depth; k += 2 * kSums) {
#pragma GCC unroll 2
    for (int s = 0; s < kSums; ++s) {
      const int64_t at = k + 2 * s;
      __m512i b[4];
      if constexpr (kStream) {
        const uint8_t* from = static_cast<const uint8_t*>(weights) + at * kPanel;
        lookup.pairs(_mm512_loadu_si512(from), b[0], b[1]);
        lookup.pairs(_mm512_loadu_si512(from + 64), b[2], b[3]);
      } else {
        const uint16_t* from = static_cast<const uint16_t*>(weights) + at * kPanel;
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) b[j] = _mm512_load_si512(from + 32 * j);
      }
#pragma GCC unroll 6
      for (int i = 0; i < kRows; ++i) {
        const __m512bh x = pair_of(a + i * stride + at);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
          sum[i][s][j] = _mm512_dpbf16_ps(sum[i][s][j], x, reinterpret_cast<__m512bh>(b[j]));
        }
      }
    }
  }
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < 4; ++j) {
      const F32 total = kSums == 2 ? add(sum[i][0][j], sum[i][kSums - 1][j]) : sum[i][0][j];
      float* to = c + i * kPanel + j * kLanes;
      const F32 scale = mul(set1(scale_a[i]), load(scale_b + j * kLanes));
      store(to, fma(scale, total, load(to)));
    }
  }
}

// The same for rows <= kDotRows, or kStreamRows with kStream.
template <bool kStream>
DSK_INLINE void dot_rows(const uint16_t* a, int64_t stride, int64_t rows, const void* weights,
                         int64_t depth, const float* scale_a, const float* scale_b, float* c) {
#define DSK_ROWS(n) \
  case n:           \
    return dot_kernel<n, kStream>(a, stride, weights, depth, scale_a, scale_b, c);
  switch (rows) {
    DSK_ROWS(1)
    DSK_ROWS(2)
    DSK_ROWS(3)
    DSK_ROWS(4)
    default:
      if constexpr (!kStream) {
        switch (rows) {
          DSK_ROWS(5)
          DSK_ROWS(6)
        }
      }
  }
#undef DSK_ROWS
}

}  // namespace dsk::cpu::DSK_CPU_NS

#endif
