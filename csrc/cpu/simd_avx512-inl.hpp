// F32 on AVX-512 F/BW/DQ/VL. Included by simd.hpp inside the target's namespace.

using F32 = __m512;
constexpr int kLanes = 16;

DSK_INLINE F32 zero() { return _mm512_setzero_ps(); }
DSK_INLINE F32 set1(float v) { return _mm512_set1_ps(v); }
DSK_INLINE F32 load(const float* p) { return _mm512_loadu_ps(p); }
DSK_INLINE void store(float* p, F32 v) { _mm512_storeu_ps(p, v); }
DSK_INLINE F32 add(F32 a, F32 b) { return _mm512_add_ps(a, b); }
DSK_INLINE F32 sub(F32 a, F32 b) { return _mm512_sub_ps(a, b); }
DSK_INLINE F32 mul(F32 a, F32 b) { return _mm512_mul_ps(a, b); }
DSK_INLINE F32 div(F32 a, F32 b) { return _mm512_div_ps(a, b); }
DSK_INLINE F32 fma(F32 a, F32 b, F32 c) { return _mm512_fmadd_ps(a, b, c); }
DSK_INLINE F32 sqrt(F32 a) { return _mm512_sqrt_ps(a); }
DSK_INLINE F32 neg(F32 a) { return _mm512_xor_ps(a, _mm512_set1_ps(-0.0f)); }
DSK_INLINE F32 abs(F32 a) { return _mm512_andnot_ps(_mm512_set1_ps(-0.0f), a); }
// max(a, b) and min(a, b) return b when either is NaN: put the accumulator second to skip NaNs.
DSK_INLINE F32 max(F32 a, F32 b) { return _mm512_max_ps(a, b); }
DSK_INLINE F32 min(F32 a, F32 b) { return _mm512_min_ps(a, b); }
DSK_INLINE F32 round_even(F32 a) {
  return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
DSK_INLINE float reduce_add(F32 a) { return _mm512_reduce_add_ps(a); }
DSK_INLINE float reduce_max(F32 a) { return _mm512_reduce_max_ps(a); }

// p * 2^n, where n rounds x / ln 2: out of range by x, not by n, which may itself be infinite.
DSK_INLINE F32 ldexp_clamped(F32 p, F32 n, F32 x) {
  F32 y = _mm512_scalef_ps(p, n);
  y = _mm512_mask_mov_ps(y, _mm512_cmp_ps_mask(x, set1(-87.3f), _CMP_LT_OQ), zero());
  return _mm512_mask_mov_ps(y, _mm512_cmp_ps_mask(x, set1(88.73f), _CMP_GT_OQ), set1(INFINITY));
}

DSK_INLINE F32 load_bf16(const uint16_t* p) {
  const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
}

// By integers: vcvtneps2bf16 flushes subnormals.
DSK_INLINE __m256i to_bf16(F32 v) {
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  rounded = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
}
DSK_INLINE void store_bf16(uint16_t* p, F32 v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_bf16(v));
}

DSK_INLINE F32 load_f16(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
DSK_INLINE void store_f16(uint16_t* p, F32 v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, 0));
}

// Through fp16 * 2^-8, which holds every E4M3 value exactly and, unlike fp32 subnormals, does not
// depend on the caller's flush-to-zero mode. 0x7f and 0xff are NaN.
DSK_INLINE F32 load_e4m3(const uint8_t* p) {
  const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  const __m256i wide = _mm256_slli_epi16(_mm256_cvtepi8_epi16(raw), 7);
  const __m256i half = _mm256_and_si256(wide, _mm256_set1_epi16(static_cast<short>(0xbfff)));
  const __m128i magnitude = _mm_and_si128(raw, _mm_set1_epi8(0x7f));
  const __mmask16 nan = _mm_cmpeq_epi8_mask(magnitude, _mm_set1_epi8(0x7f));
  const F32 value = _mm512_mul_ps(_mm512_cvtph_ps(half), set1(256.0f));
  return _mm512_mask_mov_ps(value, nan, set1(NAN));
}

// Round to nearest even, saturating at 448; NaN -> 0x7f.
DSK_INLINE void store_e4m3(uint8_t* p, F32 v) {
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i magnitude = _mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff));
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(magnitude, 20), _mm512_set1_epi32(1));
  __m512i code = _mm512_add_epi32(magnitude, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7ffff)));
  code = _mm512_sub_epi32(_mm512_srli_epi32(code, 20), _mm512_set1_epi32(120 << 3));
  // Below 2^-6: 2^14 has an ulp of 2^-9, so this addition is the rounding to a multiple of 2^-9.
  const F32 shifted = _mm512_add_ps(_mm512_castsi512_ps(magnitude), set1(16384.0f));
  const __m512i subnormal = _mm512_and_si512(_mm512_castps_si512(shifted), _mm512_set1_epi32(15));
  const __mmask16 small = _mm512_cmplt_epi32_mask(magnitude, _mm512_set1_epi32(121 << 23));
  code = _mm512_min_epi32(_mm512_mask_mov_epi32(code, small, subnormal), _mm512_set1_epi32(0x7e));
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  code = _mm512_mask_mov_epi32(code, nan, _mm512_set1_epi32(0x7f));
  const __m512i sign = _mm512_and_si512(_mm512_srli_epi32(bits, 24), _mm512_set1_epi32(0x80));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm512_cvtepi32_epi8(_mm512_or_si512(code, sign)));
}
