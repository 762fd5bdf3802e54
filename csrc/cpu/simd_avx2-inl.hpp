// F32 on AVX2 + FMA + F16C. Included by simd.hpp inside the target's namespace.

using F32 = __m256;
constexpr int kLanes = 8;

DSK_INLINE F32 zero() { return _mm256_setzero_ps(); }
DSK_INLINE F32 set1(float v) { return _mm256_set1_ps(v); }
DSK_INLINE F32 load(const float* p) { return _mm256_loadu_ps(p); }
DSK_INLINE void store(float* p, F32 v) { _mm256_storeu_ps(p, v); }
DSK_INLINE F32 add(F32 a, F32 b) { return _mm256_add_ps(a, b); }
DSK_INLINE F32 sub(F32 a, F32 b) { return _mm256_sub_ps(a, b); }
DSK_INLINE F32 mul(F32 a, F32 b) { return _mm256_mul_ps(a, b); }
DSK_INLINE F32 div(F32 a, F32 b) { return _mm256_div_ps(a, b); }
DSK_INLINE F32 fma(F32 a, F32 b, F32 c) { return _mm256_fmadd_ps(a, b, c); }
DSK_INLINE F32 sqrt(F32 a) { return _mm256_sqrt_ps(a); }
DSK_INLINE F32 neg(F32 a) { return _mm256_xor_ps(a, _mm256_set1_ps(-0.0f)); }
DSK_INLINE F32 abs(F32 a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
// max(a, b) and min(a, b) return b when either is NaN: put the accumulator second to skip NaNs.
DSK_INLINE F32 max(F32 a, F32 b) { return _mm256_max_ps(a, b); }
DSK_INLINE F32 min(F32 a, F32 b) { return _mm256_min_ps(a, b); }
DSK_INLINE F32 round_even(F32 a) {
  return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
DSK_INLINE float reduce_add(F32 a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
DSK_INLINE float reduce_max(F32 a) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}

// p * 2^n, where n rounds x / ln 2: out of range by x, not by n, which may itself be infinite.
// n reaches 128, one past the largest exponent of a float: the power is split in two halves.
DSK_INLINE F32 ldexp_clamped(F32 p, F32 n, F32 x) {
  const __m256i e = _mm256_cvtps_epi32(n);
  const __m256i half = _mm256_srai_epi32(e, 1), bias = _mm256_set1_epi32(127);
  const __m256i a = _mm256_slli_epi32(_mm256_add_epi32(half, bias), 23);
  const __m256i b = _mm256_slli_epi32(_mm256_add_epi32(_mm256_sub_epi32(e, half), bias), 23);
  F32 y = mul(mul(p, _mm256_castsi256_ps(a)), _mm256_castsi256_ps(b));
  y = _mm256_blendv_ps(y, zero(), _mm256_cmp_ps(x, set1(-87.3f), _CMP_LT_OQ));
  y = _mm256_blendv_ps(y, set1(INFINITY), _mm256_cmp_ps(x, set1(88.73f), _CMP_GT_OQ));
  return _mm256_blendv_ps(y, x, _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
}

DSK_INLINE F32 load_bf16(const uint16_t* p) {
  const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
}

// The low 16 bits of each of 8 integers below 2^16.
DSK_INLINE __m128i narrow16(__m256i v) {
  const __m256i packed = _mm256_packus_epi32(v, v);
  return _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0xd8));
}

DSK_INLINE void store_bf16(uint16_t* p, F32 v) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  const __m256i chosen = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow16(chosen));
}

DSK_INLINE F32 load_f16(const uint16_t* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
DSK_INLINE void store_f16(uint16_t* p, F32 v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, 0));
}

// Through fp16 * 2^-8, which holds every E4M3 value exactly and, unlike fp32 subnormals, does not
// depend on the caller's flush-to-zero mode. 0x7f and 0xff are NaN.
DSK_INLINE F32 load_e4m3(const uint8_t* p) {
  const __m128i raw = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  const __m128i wide = _mm_slli_epi16(_mm_cvtepi8_epi16(raw), 7);
  const __m128i half = _mm_and_si128(wide, _mm_set1_epi16(static_cast<short>(0xbfff)));
  const F32 value = mul(_mm256_cvtph_ps(half), set1(256.0f));
  const __m256i magnitude = _mm256_and_si256(_mm256_cvtepu8_epi32(raw), _mm256_set1_epi32(0x7f));
  const __m256i nan = _mm256_cmpeq_epi32(magnitude, _mm256_set1_epi32(0x7f));
  return _mm256_blendv_ps(value, set1(NAN), _mm256_castsi256_ps(nan));
}

// Round to nearest even, saturating at 448; NaN -> 0x7f.
DSK_INLINE void store_e4m3(uint8_t* p, F32 v) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i magnitude = _mm256_and_si256(bits, _mm256_set1_epi32(0x7fffffff));
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(magnitude, 20), _mm256_set1_epi32(1));
  __m256i code = _mm256_add_epi32(magnitude, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7ffff)));
  code = _mm256_sub_epi32(_mm256_srli_epi32(code, 20), _mm256_set1_epi32(120 << 3));
  // Below 2^-6: 2^14 has an ulp of 2^-9, so this addition is the rounding to a multiple of 2^-9.
  const F32 shifted = add(_mm256_castsi256_ps(magnitude), set1(16384.0f));
  const __m256i subnormal = _mm256_and_si256(_mm256_castps_si256(shifted), _mm256_set1_epi32(15));
  const __m256i small = _mm256_cmpgt_epi32(_mm256_set1_epi32(121 << 23), magnitude);
  code = _mm256_min_epi32(_mm256_blendv_epi8(code, subnormal, small), _mm256_set1_epi32(0x7e));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  code = _mm256_blendv_epi8(code, _mm256_set1_epi32(0x7f), nan);
  const __m256i sign = _mm256_and_si256(_mm256_srli_epi32(bits, 24), _mm256_set1_epi32(0x80));
  const __m128i words = narrow16(_mm256_or_si256(code, sign));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(words, words));
}
