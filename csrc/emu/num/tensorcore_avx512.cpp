// AVX-512 tensor-core kernels.
//
// The exact sum needs every product truncated TOWARD ZERO at one quantum q = 2^(e_max - F), e_max
// being known only per output element. One fused multiply-add does it: with an accumulator that
// starts at M = 2^p * q (p = fraction bits of the host type), ulp(accumulator) is q, so
// fma_rz(|a|, |b|, acc) adds floor(|a*b| / q) * q exactly. Positive and negative products go to two
// accumulators; B is therefore unpacked into a positive and a negative panel, and a negative A
// element swaps the two. The host type must hold the sum below the next binade: F = 13 fits float
// (33 terms < 4 * 2^e_max are < 2^21 q), F = 25 needs double. The accumulators' bit patterns then
// differ by the sum in quanta, an integer.
#include "emu/num/isa.hpp"

#if DSK_NUM_X86

#include <algorithm>
#include <cstring>

#include "emu/num/tensorcore_drive.hpp"
#include "emu/num/unpack_avx512.hpp"

namespace dsk::emu::num {
namespace {

DSK_AVX512 void unpack_rows(const MmaKind& kind, PanelForm form, const uint8_t* a, size_t pitch,
                            int m, ARows& rows) {
  const int bits = bits_of(kind.a);
  const bool negate = kind.negate_a;
  for (int i = 0; i < m; ++i) {
    const uint8_t* row = a + static_cast<size_t>(i) * pitch;
    __mmask16 special = 0;
    for (int k = 0; k < kind.k; k += 16) {
      const int count = std::min(16, kind.k - k);
      const auto live = static_cast<__mmask16>((1u << count) - 1);
      __m512i code;
      if (bits == 8) {
        code = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(live, row + k));
      } else if (bits == 16) {
        code = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(live, row + 2 * k));
      } else {
        code = _mm512_maskz_loadu_epi32(live, row + 4 * k);
      }
      const Unpacked u = unpack16(code, kind.a);
      special = static_cast<__mmask16>(special | (u.special & live));
      if (form == PanelForm::fp32) {
        const __m512 flip =
            _mm512_castsi512_ps(_mm512_set1_epi32(negate ? static_cast<int>(0x80000000u) : 0));
        _mm512_storeu_ps(rows.value[i] + k, _mm512_xor_ps(u.value, flip));
        continue;
      }
      auto negative = static_cast<__mmask16>(_mm512_movepi32_mask(_mm512_castps_si512(u.value)));
      if (negate) negative = static_cast<__mmask16>(~negative);
      _mm512_storeu_ps(rows.value[i] + k, _mm512_abs_ps(u.value));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(rows.negative[i] + k),
                       _mm_maskz_set1_epi8(negative, 1));
      const int zero_exp = form == PanelForm::exact_f32 ? kZeroExp8 : kZeroExp16;
      const __m512i e = _mm512_mask_mov_epi32(u.exp, u.zero, _mm512_set1_epi32(zero_exp));
      const __m512i splat = form == PanelForm::exact_f32
                                ? _mm512_mullo_epi32(_mm512_and_si512(e, _mm512_set1_epi32(0xff)),
                                                     _mm512_set1_epi32(0x01010101))
                                : _mm512_mullo_epi32(_mm512_and_si512(e, _mm512_set1_epi32(0xffff)),
                                                     _mm512_set1_epi32(0x00010001));
      _mm512_storeu_si512(rows.exp[i] + k, splat);
    }
    rows.special[i] = special != 0;
    if (is_widened_fp8(kind)) reorder_row(kind, rows, i);
  }
}

// --- fast mode -----------------------------------------------------------------------------------

template <int kRows>
DSK_AVX512 void fast_rows(const float* block, int k, const float (*a)[kMaxK],
                          __m512 (&acc)[kRows][4]) {
  for (int i = 0; i < k; ++i) {
    const __m512 b0 = _mm512_load_ps(block + i * 64);
    const __m512 b1 = _mm512_load_ps(block + i * 64 + 16);
    const __m512 b2 = _mm512_load_ps(block + i * 64 + 32);
    const __m512 b3 = _mm512_load_ps(block + i * 64 + 48);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const __m512 x = _mm512_set1_ps(a[r][i]);
      acc[r][0] = _mm512_fmadd_ps(x, b0, acc[r][0]);
      acc[r][1] = _mm512_fmadd_ps(x, b1, acc[r][1]);
      acc[r][2] = _mm512_fmadd_ps(x, b2, acc[r][2]);
      acc[r][3] = _mm512_fmadd_ps(x, b3, acc[r][3]);
    }
  }
}

template <int kRows>
DSK_AVX512 void fast_tile(const MmaKind& kind, const float* block, const float (*a)[kMaxK],
                          int columns, void* d, size_t index, size_t ldd, bool accumulate) {
  __m512 acc[kRows][4];
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < 4; ++v) {
      const size_t at = index + static_cast<size_t>(r) * ldd + static_cast<size_t>(16 * v);
      acc[r][v] =
          accumulate ? read_c(d, at, kind.d, live_lanes(columns - 16 * v)) : _mm512_setzero_ps();
    }
  }
  fast_rows<kRows>(block, kind.k, a, acc);
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < 4; ++v) {
      const size_t at = index + static_cast<size_t>(r) * ldd + static_cast<size_t>(16 * v);
      const __mmask16 live = live_lanes(columns - 16 * v);
      write_d(d, at, kind.d, live, acc[r][v]);
    }
  }
}

// --- exact mode, F = 13 in float -----------------------------------------------------------------

// Exponent of each C element as the adder sees it: subnormals count with the smallest normal one,
// zero with the model's zero_exp.
DSK_AVX512 inline __m512i c_exponent(__m512 c, AccType type, int zero_exp) {
  const __m512i e = _mm512_cvtps_epi32(_mm512_getexp_ps(c));
  const int smallest = type == AccType::f16 ? -14 : -126;
  const __m512i clamped = _mm512_max_epi32(e, _mm512_set1_epi32(smallest));
  const __mmask16 zero = _mm512_cmp_ps_mask(c, _mm512_setzero_ps(), _CMP_EQ_OQ);
  return _mm512_mask_mov_epi32(clamped, zero, _mm512_set1_epi32(zero_exp));
}

DSK_AVX512 inline __mmask16 not_finite(__m512 c) {
  const __m512i a = _mm512_and_si512(_mm512_castps_si512(c), _mm512_set1_epi32(0x7f800000));
  return _mm512_cmpeq_epi32_mask(a, _mm512_set1_epi32(0x7f800000));
}

// 2^e as float for -126 <= e <= 127.
DSK_AVX512 inline __m512 pow2_ps(__m512i e) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(e, _mm512_set1_epi32(127)), 23));
}

constexpr int kF13 = 13;

// kVecs vectors of 16 columns of one row. max_exp: the products' largest exponents (int8 lanes).
template <int kVecs>
DSK_AVX512 void f13_row(const MmaKind& kind, const SumModel& model, const float* block,
                        const Row& row, __m512i max_exp8, int columns, void* d, size_t index,
                        bool accumulate, uint64_t& redo) {
  __m512 plus[kVecs];
  __m512 minus[kVecs];
  __m512i max_exp[kVecs];
  __m512 c[kVecs];
  alignas(64) int8_t exps[64];
  _mm512_store_si512(exps, max_exp8);
#pragma GCC unroll 4
  for (int v = 0; v < kVecs; ++v) {
    __m512i e = _mm512_cvtepi8_epi32(_mm_load_si128(reinterpret_cast<__m128i*>(exps + 16 * v)));
    // Any sum with a zero operand is far below every real product: such products do not count.
    e = _mm512_mask_mov_epi32(e, _mm512_cmplt_epi32_mask(e, _mm512_set1_epi32(-40)),
                              _mm512_set1_epi32(-1000));
    c[v] = accumulate ? read_c(d, index + static_cast<size_t>(16 * v), kind.d,
                               live_lanes(columns - 16 * v))
                      : _mm512_setzero_ps();
    const __m512i ec = c_exponent(c[v], kind.d, model.zero_exp);
    max_exp[v] = _mm512_max_epi32(e, ec);
    // Products span 2^-28..2^32: outside [-60, 60] C decides, and every product truncates to zero.
    const __m512i bounded = _mm512_max_epi32(_mm512_min_epi32(max_exp[v], _mm512_set1_epi32(60)),
                                             _mm512_set1_epi32(-60));
    plus[v] = pow2_ps(_mm512_add_epi32(bounded, _mm512_set1_epi32(23 - kF13)));
    minus[v] = plus[v];
  }
  constexpr int kRz = _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC;
  for (int k = 0; k < kind.k; ++k) {
    const __m512 a = _mm512_set1_ps(row.value[k]);
    const float* same = block + k * 128 + (row.negative[k] ? 64 : 0);
    const float* other = block + k * 128 + (row.negative[k] ? 0 : 64);
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) {
      plus[v] = _mm512_fmadd_round_ps(a, _mm512_load_ps(same + 16 * v), plus[v], kRz);
      minus[v] = _mm512_fmadd_round_ps(a, _mm512_load_ps(other + 16 * v), minus[v], kRz);
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < kVecs; ++v) {
    const __mmask16 live = live_lanes(columns - 16 * v);
    const __m512 e = _mm512_cvtepi32_ps(max_exp[v]);
    const __m512 f = _mm512_set1_ps(kF13);
    const __m512i quanta =
        _mm512_sub_epi32(_mm512_castps_si512(plus[v]), _mm512_castps_si512(minus[v]));
    const __m512i c_quanta = _mm512_cvttps_epi32(_mm512_scalef_ps(c[v], _mm512_sub_ps(f, e)));
    __m512 sum = _mm512_cvtepi32_ps(_mm512_add_epi32(quanta, c_quanta));
    if (accumulate) {
      redo |= static_cast<uint64_t>(not_finite(c[v]) & live) << (16 * v);
    }
    const size_t at = index + static_cast<size_t>(16 * v);
    if (kind.d == AccType::f32) {
      sum = _mm512_castsi512_ps(
          _mm512_and_si512(_mm512_castps_si512(sum), _mm512_set1_epi32(~0x3ff)));
      const __m512 result = _mm512_scalef_ps(sum, _mm512_sub_ps(e, f));
      const auto keep = static_cast<__mmask16>(live & ~static_cast<uint16_t>(redo >> (16 * v)));
      _mm512_mask_storeu_ps(static_cast<float*>(d) + at, keep, result);
    } else {
      __m256i half =
          _mm512_cvtps_ph(_mm512_scalef_ps(sum, _mm512_sub_ps(e, f)), _MM_FROUND_TO_NEAREST_INT);
      const __mmask16 minus_zero = _mm256_cmpeq_epi16_mask(half, _mm256_set1_epi16(-0x8000));
      half = _mm256_mask_mov_epi16(half, minus_zero, _mm256_setzero_si256());
      const auto keep = static_cast<__mmask16>(live & ~static_cast<uint16_t>(redo >> (16 * v)));
      _mm256_mask_storeu_epi16(static_cast<uint16_t*>(d) + at, keep, half);
    }
  }
}

DSK_AVX512 inline __m512i max_exponent8(const uint8_t* exps, const int32_t* a, int k) {
  __m512i best0 = _mm512_set1_epi8(-128);
  __m512i best1 = best0;
  for (int i = 0; i < k; i += 2) {
    best0 = _mm512_max_epi8(
        best0, _mm512_adds_epi8(_mm512_set1_epi32(a[i]), _mm512_load_si512(exps + i * 64)));
    best1 = _mm512_max_epi8(best1, _mm512_adds_epi8(_mm512_set1_epi32(a[i + 1]),
                                                    _mm512_load_si512(exps + i * 64 + 64)));
  }
  return _mm512_max_epi8(best0, best1);
}

// --- exact mode, F = 25 in double ----------------------------------------------------------------

constexpr int kF25 = 25;

DSK_AVX512 inline __m512i max_exponent16(const uint8_t* exps, const int32_t* a, int first,
                                         int count) {
  __m512i best0 = _mm512_set1_epi16(-0x8000);
  __m512i best1 = best0;
  for (int i = first; i < first + count; i += 2) {
    best0 = _mm512_max_epi16(
        best0, _mm512_adds_epi16(_mm512_set1_epi32(a[i]), _mm512_load_si512(exps + i * 64)));
    best1 = _mm512_max_epi16(best1, _mm512_adds_epi16(_mm512_set1_epi32(a[i + 1]),
                                                      _mm512_load_si512(exps + i * 64 + 64)));
  }
  return _mm512_max_epi16(best0, best1);
}

DSK_AVX512 inline __m512d pow2_pd(__m512i e) {
  return _mm512_castsi512_pd(_mm512_slli_epi64(_mm512_add_epi64(e, _mm512_set1_epi64(1023)), 52));
}

// The rounded f32 result of an exact double sum: toward zero, infinity past the range, never -0.
DSK_AVX512 inline __m256 round_f32(__m512d value) {
  const __m256 rz = _mm512_cvt_roundpd_ps(value, _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC);
  const __mmask8 over =
      _mm512_cmp_pd_mask(_mm512_abs_pd(value), _mm512_set1_pd(0x1p128), _CMP_GE_OQ);
  const __m256 sign = _mm256_and_ps(rz, _mm256_set1_ps(-0.0f));
  const __m256 inf = _mm256_or_ps(sign, _mm256_set1_ps(__builtin_inff()));
  return _mm256_add_ps(_mm256_mask_mov_ps(rz, over, inf), _mm256_setzero_ps());
}

// Nearest-even f16 of a double in one rounding: to odd in float first (24 >= 2 * 11 + 2 bits).
DSK_AVX512 inline __m128i round_f16(__m512d value) {
  const __m256 rz = _mm512_cvt_roundpd_ps(value, _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC);
  const __mmask8 inexact = _mm512_cmp_pd_mask(_mm512_cvtps_pd(rz), value, _CMP_NEQ_OQ);
  const __m256i odd = _mm256_mask_or_epi32(_mm256_castps_si256(rz), inexact,
                                           _mm256_castps_si256(rz), _mm256_set1_epi32(1));
  const __m128i half = _mm256_cvtps_ph(_mm256_castsi256_ps(odd), _MM_FROUND_TO_NEAREST_INT);
  const __mmask8 minus_zero = _mm_cmpeq_epi16_mask(half, _mm_set1_epi16(-0x8000));
  return _mm_mask_mov_epi16(half, minus_zero, _mm_setzero_si128());
}

template <int kVecs>
DSK_AVX512 void f25_row(const MmaKind& kind, const SumModel& model, const double* block, int first,
                        const Row& row, __m512i max_exp16, int columns, void* d, size_t index,
                        bool accumulate, uint64_t& redo) {
  __m512d plus[kVecs];
  __m512d minus[kVecs];
  __m512d e_max[kVecs];
  __m512 c[kVecs];
  alignas(64) int16_t exps[32];
  _mm512_store_si512(exps, max_exp16);
  const auto live_of = [columns](int v) {
    return static_cast<__mmask16>(columns - 8 * v >= 8 ? 0xff
                                                       : (1u << std::max(0, columns - 8 * v)) - 1);
  };
#pragma GCC unroll 4
  for (int v = 0; v < kVecs; ++v) {
    __m512i e = _mm512_cvtepi16_epi64(_mm_load_si128(reinterpret_cast<__m128i*>(exps + 8 * v)));
    c[v] = accumulate ? read_c(d, index + static_cast<size_t>(8 * v), kind.d, live_of(v))
                      : _mm512_setzero_ps();
    const __m512i ec = c_exponent(c[v], kind.d, model.zero_exp);
    // A zero operand's sum is below -1000, hence below every C exponent.
    e = _mm512_max_epi64(e, _mm512_cvtepi32_epi64(_mm512_castsi512_si256(ec)));
    plus[v] = pow2_pd(_mm512_add_epi64(e, _mm512_set1_epi64(52 - kF25)));
    minus[v] = plus[v];
    e_max[v] = _mm512_cvtepi64_pd(e);
  }
  constexpr int kRz = _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC;
  for (int k = first; k < first + model.group; ++k) {
    const __m512d a = _mm512_set1_pd(static_cast<double>(row.value[k]));
    const double* same = block + k * 64 + (row.negative[k] ? 32 : 0);
    const double* other = block + k * 64 + (row.negative[k] ? 0 : 32);
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) {
      plus[v] = _mm512_fmadd_round_pd(a, _mm512_load_pd(same + 8 * v), plus[v], kRz);
      minus[v] = _mm512_fmadd_round_pd(a, _mm512_load_pd(other + 8 * v), minus[v], kRz);
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < kVecs; ++v) {
    const __mmask16 live = live_of(v);
    const __m512d f = _mm512_set1_pd(kF25);
    const __m512i quanta =
        _mm512_sub_epi64(_mm512_castpd_si512(plus[v]), _mm512_castpd_si512(minus[v]));
    const __m512d c_wide = _mm512_cvtps_pd(_mm512_castps512_ps256(c[v]));
    const __m512i c_quanta =
        _mm512_cvttpd_epi64(_mm512_scalef_pd(c_wide, _mm512_sub_pd(f, e_max[v])));
    const __m512d sum = _mm512_scalef_pd(_mm512_cvtepi64_pd(_mm512_add_epi64(quanta, c_quanta)),
                                         _mm512_sub_pd(e_max[v], f));
    if (accumulate) redo |= static_cast<uint64_t>(not_finite(c[v]) & live) << (8 * v);
    const auto keep = static_cast<__mmask8>(live & ~static_cast<uint8_t>(redo >> (8 * v)));
    const size_t at = index + static_cast<size_t>(8 * v);
    if (kind.d == AccType::f32) {
      _mm256_mask_storeu_ps(static_cast<float*>(d) + at, keep, round_f32(sum));
    } else {
      _mm_mask_storeu_epi16(static_cast<uint16_t*>(d) + at, keep, round_f16(sum));
    }
  }
}

// --- driving -------------------------------------------------------------------------------------

DSK_AVX512 void exact_f32_row(const Task& t, const std::byte* block, const Row& row, int columns,
                              size_t index, uint64_t& redo) {
  const auto* exps = reinterpret_cast<const uint8_t*>(block) + value_bytes(t.form, t.kind.k);
  const __m512i top = max_exponent8(exps, row.exp, t.kind.k);
  const auto* values = reinterpret_cast<const float*>(block);
  switch ((columns + 15) / 16) {
    case 1:
      return f13_row<1>(t.kind, t.model, values, row, top, columns, t.d, index, t.accumulate, redo);
    case 2:
      return f13_row<2>(t.kind, t.model, values, row, top, columns, t.d, index, t.accumulate, redo);
    case 3:
      return f13_row<3>(t.kind, t.model, values, row, top, columns, t.d, index, t.accumulate, redo);
    default:
      return f13_row<4>(t.kind, t.model, values, row, top, columns, t.d, index, t.accumulate, redo);
  }
}

DSK_AVX512 void exact_f64_row(const Task& t, const std::byte* block, const Row& row, int columns,
                              size_t index, uint64_t& redo) {
  const auto* exps = reinterpret_cast<const uint8_t*>(block) + value_bytes(t.form, t.kind.k);
  const auto* values = reinterpret_cast<const double*>(block);
  for (int first = 0; first < t.kind.k; first += t.model.group) {
    const bool acc = first != 0 || (t.accumulate && !is_widened_fp8(t.kind));
    const __m512i top = max_exponent16(exps, row.exp, first, t.model.group);
    switch ((columns + 7) / 8) {
      case 1:
        f25_row<1>(t.kind, t.model, values, first, row, top, columns, t.d, index, acc, redo);
        break;
      case 2:
        f25_row<2>(t.kind, t.model, values, first, row, top, columns, t.d, index, acc, redo);
        break;
      case 3:
        f25_row<3>(t.kind, t.model, values, first, row, top, columns, t.d, index, acc, redo);
        break;
      default:
        f25_row<4>(t.kind, t.model, values, first, row, top, columns, t.d, index, acc, redo);
        break;
    }
  }
}

DSK_AVX512 void exact_row(const Task& t, const std::byte* block, const Row& row, int columns,
                          size_t index, uint64_t& redo) {
  (t.form == PanelForm::exact_f32 ? exact_f32_row : exact_f64_row)(t, block, row, columns, index,
                                                                   redo);
}

DSK_AVX512 void fast_block(const Task& t, const std::byte* block, const ARows& rows, int first_row,
                           int m, int column, int columns) {
  const auto* values = reinterpret_cast<const float*>(block);
  int i = 0;
  for (; i + 4 <= m; i += 4) {
    const size_t index = static_cast<size_t>(first_row + i) * t.ldd + static_cast<size_t>(column);
    fast_tile<4>(t.kind, values, rows.value + i, columns, t.d, index, t.ldd, t.accumulate);
  }
  for (; i < m; ++i) {
    const size_t index = static_cast<size_t>(first_row + i) * t.ldd + static_cast<size_t>(column);
    fast_tile<1>(t.kind, values, rows.value + i, columns, t.d, index, t.ldd, t.accumulate);
  }
}

}  // namespace

void mma_avx512(const BPanel& b, const uint8_t* a, size_t pitch, int m, void* d, size_t ldd,
                bool accumulate) {
  drive_mma(b, a, pitch, m, d, ldd, accumulate, {unpack_rows, exact_row, fast_block});
}

}  // namespace dsk::emu::num

#endif  // DSK_NUM_X86
