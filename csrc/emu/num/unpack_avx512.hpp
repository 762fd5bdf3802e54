// Tensor-core operands under AVX-512: unpacking, for the panels (B) and the rows (A), and C and D.
#pragma once

#include "emu/num/isa.hpp"

#if DSK_NUM_X86

// GCC 12 reports the intrinsics' own "undefined" sources.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#include "emu/num/tensorcore_impl.hpp"

namespace dsk::emu::num {

// Exponents of zero operands: a sum with one is far below every real product's.
constexpr int kZeroExp8 = -64;
constexpr int kZeroExp16 = -4096;

DSK_AVX512 inline __mmask16 live_lanes(int columns) {
  return columns >= 16 ? __mmask16{0xffff}
                       : static_cast<__mmask16>(columns <= 0 ? 0 : (1u << columns) - 1);
}

// Reads or writes up to 16 elements of C/D as floats.
DSK_AVX512 inline __m512 read_c(const void* d, size_t index, AccType type, __mmask16 live) {
  if (type == AccType::f32) {
    return _mm512_maskz_loadu_ps(live, static_cast<const float*>(d) + index);
  }
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(live, static_cast<const uint16_t*>(d) + index));
}

DSK_AVX512 inline void write_d(void* d, size_t index, AccType type, __mmask16 live, __m512 value) {
  if (type == AccType::f32) {
    return _mm512_mask_storeu_ps(static_cast<float*>(d) + index, live, value);
  }
  const __m256i half = _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT);
  _mm256_mask_storeu_epi16(static_cast<uint16_t*>(d) + index, live, half);
}

// Sixteen elements unpacked: value (sign included), unnormalised exponent, zero and NaN/Inf masks.
struct Unpacked {
  __m512 value;
  __m512i exp;
  __mmask16 zero;
  __mmask16 special;
};

DSK_AVX512 inline __m512 half_to_float(__m512i half_in_32) {
  return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(half_in_32));
}

DSK_AVX512 inline __m512i field_to_exp(__m512i field, int bias) {
  return _mm512_sub_epi32(_mm512_max_epi32(field, _mm512_set1_epi32(1)), _mm512_set1_epi32(bias));
}

// `code` holds one element per 32-bit lane.
DSK_AVX512 inline Unpacked unpack16(__m512i code, MmaType type) {
  Unpacked u;
  switch (type) {
    case MmaType::e4m3: {
      const __m512i a = _mm512_and_si512(code, _mm512_set1_epi32(0x7f));
      const __m512i sign = _mm512_slli_epi32(_mm512_and_si512(code, _mm512_set1_epi32(0x80)), 8);
      const __m512i half = _mm512_or_si512(_mm512_slli_epi32(a, 7), sign);
      u.value = _mm512_mul_ps(half_to_float(half), _mm512_set1_ps(256.0f));
      u.exp = field_to_exp(_mm512_srli_epi32(a, 3), 7);
      u.zero = _mm512_testn_epi32_mask(a, a);
      u.special = _mm512_cmpeq_epi32_mask(a, _mm512_set1_epi32(0x7f));
      u.value = _mm512_mask_mov_ps(u.value, u.special, _mm512_set1_ps(__builtin_nanf("")));
      return u;
    }
    case MmaType::e5m2:
      code = _mm512_slli_epi32(_mm512_and_si512(code, _mm512_set1_epi32(0xff)), 8);
      [[fallthrough]];
    case MmaType::f16: {
      const __m512i a = _mm512_and_si512(code, _mm512_set1_epi32(0x7fff));
      u.value = half_to_float(code);
      u.exp = field_to_exp(_mm512_srli_epi32(a, 10), 15);
      u.zero = _mm512_testn_epi32_mask(a, a);
      u.special = _mm512_cmpge_epi32_mask(a, _mm512_set1_epi32(0x7c00));
      return u;
    }
    case MmaType::bf16:
      code = _mm512_slli_epi32(code, 16);
      break;
    default:  // tf32: the low 13 bits are not read
      code = _mm512_and_si512(code, _mm512_set1_epi32(~0x1fff));
      break;
  }
  const __m512i a = _mm512_and_si512(code, _mm512_set1_epi32(0x7fffffff));
  u.value = _mm512_castsi512_ps(code);
  u.exp = field_to_exp(_mm512_srli_epi32(a, 23), 127);
  u.zero = _mm512_testn_epi32_mask(a, a);
  u.special = _mm512_cmpge_epi32_mask(a, _mm512_set1_epi32(0x7f800000));
  return u;
}

// Extracts element `index` of every 32-bit word (words hold 32 / bits elements).
DSK_AVX512 inline __m512i word_element(__m512i words, int index, int bits) {
  if (bits == 32) return words;
  const __m512i shifted = _mm512_srl_epi32(words, _mm_cvtsi32_si128(index * bits));
  return _mm512_and_si512(shifted, _mm512_set1_epi32((1 << bits) - 1));
}

}  // namespace dsk::emu::num

#endif  // DSK_NUM_X86
