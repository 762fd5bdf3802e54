// The fp16 unit (AVX512-FP16): 32 products per instruction, summed in fp16 over 32 k at most.
//
// Range. A weight w becomes w * 2^-8 <= 1.75, an activation block is multiplied by the power of
// two that brings its largest value into [256, 512): 32 * 512 * 1.75 = 28672 < 65504, so no
// finite input overflows. What is lost at the low end: each product errs by at most 2^-25, that is
// 2^-17 in units of E4M3 times E4M3, half the product of their two smallest steps. Activations
// wider than E4M3 may hold values so far below their block's largest that this would show; such
// blocks, NaN and infinities are refused and computed in fp32 instead.
#pragma once

#if defined(__AVX512FP16__)

#include "cpu/packed.hpp"
#include "cpu/simd.hpp"

namespace dsk::cpu::DSK_CPU_NS {

constexpr int64_t kGroup = 12;       // rows whose 24 accumulators fill the register file
constexpr int64_t kChain = 32;       // products summed in fp16
constexpr int64_t kMaxHalfRows = 8;  // with AMX present: up to here converting costs more

// Registers come in these sizes: a last group of fewer rows is padded to the next one.
DSK_INLINE int64_t group_width(int64_t rows) {
  return rows >= 9 ? 12 : rows >= 7 ? 8 : rows >= 5 ? 6 : rows;
}

struct HalfBlock {
  alignas(64) uint32_t pairs[kScaleBlock];  // {x, x}
  float unscale = 1.0f;
  bool refused = false;
};

DSK_INLINE HalfBlock to_half(const float* values, int64_t n, bool e4m3) {
  HalfBlock block;
  F32 amax = zero();
  __mmask16 odd = 0;  // NaN or infinite
  for (int64_t i = 0; i < n; i += kLanes) {
    const F32 magnitude = abs(load(values + i));
    odd |= _mm512_cmp_ps_mask(magnitude, set1(INFINITY), _CMP_NLT_UQ);
    amax = max(magnitude, amax);
  }
  const float largest = reduce_max(amax);
  // The exponents of 2^8 and of the largest value, kept where both factors are normal numbers.
  const int exponent = static_cast<int>(float_to_bits(largest) >> 23);
  const int shift = min_of(max_of(135 - exponent, -118), 118);
  const float factor = bits_to_float(static_cast<uint32_t>(127 + shift) << 23);
  // 2^8 more for the weights, which even_k and odd_k leave divided by it.
  block.unscale = bits_to_float(static_cast<uint32_t>(135 - shift) << 23);
  const float smallest = e4m3 ? 0.0f : 0.00390625f;  // 2^-8
  __mmask16 lost = 0;
  for (int64_t i = 0; i < n; i += kLanes) {
    const F32 scaled = mul(load(values + i), set1(factor));
    const F32 magnitude = abs(scaled);
    lost |= _mm512_cmp_ps_mask(magnitude, zero(), _CMP_GT_OQ) &
            _mm512_cmp_ps_mask(magnitude, set1(smallest), _CMP_LT_OQ);
    const __m512i half = _mm512_cvtepu16_epi32(_mm512_cvtps_ph(scaled, 0));
    _mm512_store_si512(block.pairs + i, _mm512_or_si512(half, _mm512_slli_epi32(half, 16)));
  }
  block.refused = odd != 0 || lost != 0;
  return block;
}

// E4M3 * 2^-8 in fp16: one shift puts sign, exponent and mantissa in place, the mask clears what
// came along. Exact for all but NaN, whose blocks are marked at packing.
DSK_INLINE __m512h odd_k(__m512i line) {
  const __m512i mask = _mm512_set1_epi16(static_cast<short>(0xbf80));
  return _mm512_castsi512_ph(_mm512_and_si512(_mm512_srai_epi16(line, 1), mask));
}
DSK_INLINE __m512h even_k(__m512i line) { return odd_k(_mm512_slli_epi16(line, 8)); }

// The 32 sums of a line, in the order of its words, as two vectors of 16 neighbouring columns.
DSK_INLINE void in_order(__m512h sums, F32& left, F32& right) {
  const __m512i bits = _mm512_castph_si512(sums);
  const F32 low = _mm512_cvtph_ps(_mm512_castsi512_si256(bits));
  const F32 high = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(bits, 1));
  left = _mm512_shuffle_f32x4(low, high, 0x88);
  right = _mm512_shuffle_f32x4(low, high, 0xdd);
}

// depth x 64 packed weights -> fp16 [depth][2 halves][32 words], still in the order of the words.
DSK_INLINE void halve_weights(const uint8_t* packed, int64_t depth, uint16_t* out) {
  for (int64_t k = 0; k < depth; k += 2) {
    for (int half = 0; half < 2; ++half) {
      const __m512i line = _mm512_loadu_si512(packed + k * kPanel + half * 64);
      uint16_t* to = out + k * kPanel + half * 32;
      _mm512_store_si512(to, _mm512_castph_si512(even_k(line)));
      _mm512_store_si512(to + kPanel, _mm512_castph_si512(odd_k(line)));
    }
    _mm_prefetch(reinterpret_cast<const char*>(packed + (k + kScaleBlock) * kPanel), _MM_HINT_T0);
    _mm_prefetch(reinterpret_cast<const char*>(packed + (k + kScaleBlock + 1) * kPanel),
                 _MM_HINT_T0);
  }
}

// c [kRows][64] += scales * (a times weights). `packed` streams weights converted in registers,
// or is null and `converted` holds them. a [depth][kRows] pairs.
template <int kRows, bool kConverted>
DSK_INLINE void half_kernel(const uint8_t* packed, const uint16_t* converted, const uint32_t* a,
                            int64_t depth, const float* scale_a, float scale_b, float* c) {
  // Few rows leave room for separate sums of even and odd k: shorter dependency chains.
  constexpr int kSums = kRows <= 4 ? 2 : 1;
  constexpr int64_t kAhead = 4096;  // bytes: about 350 cycles of the stream
  for (int64_t start = 0; start < depth; start += kChain) {
    __m512h sum[kRows][kSums][2];
    for (auto& row : sum) {
      for (auto& pair : row) pair[0] = pair[1] = _mm512_setzero_ph();
    }
    const int64_t end = min_of(depth, start + kChain);
    for (int64_t k = start; k < end; k += 2) {
      __m512h b[2][2];  // [k parity][half]
      for (int half = 0; half < 2; ++half) {
        if constexpr (kConverted) {
          b[0][half] = _mm512_load_ph(converted + k * kPanel + half * 32);
          b[1][half] = _mm512_load_ph(converted + (k + 1) * kPanel + half * 32);
        } else {
          const uint8_t* from = packed + k * kPanel + half * 64;
          const __m512i line = _mm512_loadu_si512(from);
          _mm_prefetch(reinterpret_cast<const char*>(from + kAhead), _MM_HINT_T0);
          b[0][half] = even_k(line);
          b[1][half] = odd_k(line);
        }
      }
#pragma GCC unroll 12
      for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
        for (int parity = 0; parity < 2; ++parity) {
          const __m512h x =
              _mm512_castsi512_ph(_mm512_set1_epi32(static_cast<int>(a[(k + parity) * kRows + i])));
          __m512h* to = sum[i][kSums == 2 ? parity : 0];
          to[0] = _mm512_fmadd_ph(x, b[parity][0], to[0]);
          to[1] = _mm512_fmadd_ph(x, b[parity][1], to[1]);
        }
      }
    }
    for (int i = 0; i < kRows; ++i) {
      const F32 scale = set1(scale_a[i] * scale_b);
      for (int half = 0; half < 2; ++half) {
        float* to = c + i * kPanel + half * 32;
        for (int s = 0; s < kSums; ++s) {
          F32 left, right;
          in_order(sum[i][s][half], left, right);
          store(to, fma(scale, left, load(to)));
          store(to + 16, fma(scale, right, load(to + 16)));
        }
      }
    }
  }
}

template <bool kConverted>
DSK_INLINE void half_rows_of(int64_t rows, const uint8_t* packed, const uint16_t* converted,
                             const uint32_t* a, int64_t depth, const float* scale_a, float scale_b,
                             float* c) {
#define DSK_ROWS(n) \
  case n:           \
    return half_kernel<n, kConverted>(packed, converted, a, depth, scale_a, scale_b, c);
  switch (rows) {
    DSK_ROWS(1)
    DSK_ROWS(2)
    DSK_ROWS(3)
    DSK_ROWS(4)
    DSK_ROWS(6)
    DSK_ROWS(8)
    DSK_ROWS(12)
  }
#undef DSK_ROWS
}

// rows is a group_width.
static void half_rows(int64_t rows, const uint8_t* packed, const uint16_t* converted,
                      const uint32_t* a, int64_t depth, const float* scale_a, float scale_b,
                      float* c) {
  if (packed != nullptr) {
    half_rows_of<false>(rows, packed, converted, a, depth, scale_a, scale_b, c);
  } else {
    half_rows_of<true>(rows, packed, converted, a, depth, scale_a, scale_b, c);
  }
}

}  // namespace dsk::cpu::DSK_CPU_NS

#endif
