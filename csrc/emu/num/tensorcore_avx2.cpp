// AVX2 tensor-core kernels: the arithmetic of tensorcore_avx512.cpp without embedded rounding.
//
// Truncating sums run under MXCSR's round-toward-zero, in functions of their own that are never
// inlined, so that no other arithmetic can move into them and none of theirs can move out.
#include "emu/num/isa.hpp"

#if DSK_NUM_X86

#include <immintrin.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

#include "emu/num/convert.hpp"
#include "emu/num/tensorcore_drive.hpp"

namespace dsk::emu::num {
namespace {

constexpr int kZeroExp = -64;  // int8 exponents (F = 13): below every product of e4m3 and e5m2
constexpr int kZeroExpWide = -4096;  // int16 exponents
constexpr int kNoProduct = -100000;

class RoundTowardZero {
 public:
  RoundTowardZero() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x6000u); }
  ~RoundTowardZero() { _mm_setcsr(saved_); }
  RoundTowardZero(const RoundTowardZero&) = delete;
  RoundTowardZero& operator=(const RoundTowardZero&) = delete;

 private:
  unsigned saved_;
};

double pow2(int e) { return std::bit_cast<double>(static_cast<uint64_t>(e + 1023) << 52); }

void unpack_rows(const MmaKind& kind, PanelForm form, const uint8_t* a, size_t pitch, int m,
                 ARows& rows) {
  const int zero_exp = form == PanelForm::exact_f32 ? kZeroExp : kZeroExpWide;
  for (int i = 0; i < m; ++i) {
    rows.special[i] = false;
    for (int k = 0; k < kind.k; ++k) {
      const ElementView e = view_element(kind.a, a + static_cast<size_t>(i) * pitch, k);
      const float value = kind.negate_a ? -e.value : e.value;
      rows.special[i] |= e.special;
      rows.value[i][k] = form == PanelForm::fp32 ? value : std::fabs(value);
      rows.negative[i][k] = std::signbit(value);
      rows.exp[i][k] = e.zero ? zero_exp : e.exp;
    }
    if (is_widened_fp8(kind)) reorder_row(kind, rows, i);
  }
}

// --- sums, 32 columns (float) or 16 (double) at a time ------------------------------------------

[[gnu::noinline]] DSK_AVX2 void sum_f32(const float* block, const Row& row, int count,
                                        const float* start, float* plus, float* minus) {
  __m256 p[4];
  __m256 q[4];
  for (int v = 0; v < 4; ++v) p[v] = q[v] = _mm256_loadu_ps(start + 8 * v);
  for (int k = 0; k < count; ++k) {
    const __m256 a = _mm256_set1_ps(row.value[k]);
    const float* same = block + k * 128 + (row.negative[k] ? 64 : 0);
    const float* other = block + k * 128 + (row.negative[k] ? 0 : 64);
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      p[v] = _mm256_fmadd_ps(a, _mm256_loadu_ps(same + 8 * v), p[v]);
      q[v] = _mm256_fmadd_ps(a, _mm256_loadu_ps(other + 8 * v), q[v]);
    }
  }
  for (int v = 0; v < 4; ++v) {
    _mm256_storeu_ps(plus + 8 * v, p[v]);
    _mm256_storeu_ps(minus + 8 * v, q[v]);
  }
}

[[gnu::noinline]] DSK_AVX2 void sum_f64(const double* block, const Row& row, int first, int count,
                                        const double* start, double* plus, double* minus) {
  __m256d p[4];
  __m256d q[4];
  for (int v = 0; v < 4; ++v) p[v] = q[v] = _mm256_loadu_pd(start + 4 * v);
  for (int k = first; k < first + count; ++k) {
    const __m256d a = _mm256_set1_pd(static_cast<double>(row.value[k]));
    const double* same = block + k * 64 + (row.negative[k] ? 32 : 0);
    const double* other = block + k * 64 + (row.negative[k] ? 0 : 32);
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      p[v] = _mm256_fmadd_pd(a, _mm256_loadu_pd(same + 4 * v), p[v]);
      q[v] = _mm256_fmadd_pd(a, _mm256_loadu_pd(other + 4 * v), q[v]);
    }
  }
  for (int v = 0; v < 4; ++v) {
    _mm256_storeu_pd(plus + 4 * v, p[v]);
    _mm256_storeu_pd(minus + 4 * v, q[v]);
  }
}

// Floats of exact doubles, toward zero; to odd instead where the result is rounded once more.
[[gnu::noinline]] DSK_AVX2 void narrow(const double* in, float* out, int n, bool to_odd) {
  for (int j = 0; j < n; ++j) {
    const auto f = static_cast<float>(in[j]);
    const bool inexact = static_cast<double>(f) != in[j];
    uint32_t bits = std::bit_cast<uint32_t>(f) | (to_odd && inexact ? 1u : 0u);
    if (std::fabs(in[j]) >= 0x1p128) bits = (bits & 0x80000000u) | 0x7f800000u;
    out[j] = std::bit_cast<float>(bits == 0x80000000u ? 0u : bits);
  }
}

// --- one row of one block
// -------------------------------------------------------------------------

// C, the exponents and the exact sums of up to 64 columns.
struct Columns {
  alignas(32) float c[64];
  alignas(32) int exp[64];
  alignas(32) double total[64];  // in units of 2^(exp - F)
};

template <class T>
DSK_AVX2 void product_exponents(const uint8_t* exps, const int32_t* a, int first, int count,
                                int lowest, int* out) {
  constexpr int kWidth = 64 / sizeof(T);
  alignas(32) T best[kWidth];
  std::fill_n(best, kWidth, static_cast<T>(sizeof(T) == 1 ? -128 : -32768));
  for (int k = first; k < first + count; ++k) {
    alignas(32) T column[kWidth];
    std::memcpy(column, exps + k * 64, 64);
    const auto x = static_cast<T>(a[k]);
    for (int j = 0; j < kWidth; ++j) {
      const auto sum = static_cast<T>(x + column[j]);
      best[j] = sum > best[j] ? sum : best[j];
    }
  }
  for (int j = 0; j < kWidth; ++j) out[j] = best[j] < lowest ? kNoProduct : best[j];
}

int c_exponent(float c, AccType type, int zero_exp) {
  const auto field = static_cast<int>((std::bit_cast<uint32_t>(c) >> 23) & 0xff);
  if (c == 0.0f) return zero_exp;
  return std::max({field - 127, type == AccType::f16 ? -14 : -126});
}

void read_c(const Task& t, size_t index, int columns, bool accumulate, Columns& x, uint64_t& redo) {
  if (!accumulate) {
    std::fill_n(x.c, 64, 0.0f);
  } else if (t.kind.d == AccType::f16) {
    f16_to_f32(static_cast<const uint16_t*>(t.d) + index, x.c, columns);
  } else {
    std::memcpy(x.c, static_cast<const float*>(t.d) + index, sizeof(float) * columns);
  }
  for (int j = 0; j < columns; ++j) {
    x.exp[j] = std::max(x.exp[j], c_exponent(x.c[j], t.kind.d, t.model.zero_exp));
    if (!std::isfinite(x.c[j])) redo |= uint64_t{1} << j;
  }
}

void add_c_quanta(int fraction_bits, int columns, Columns& x) {
  for (int j = 0; j < columns; ++j) {
    if (!std::isfinite(x.c[j])) continue;
    x.total[j] += std::trunc(static_cast<double>(x.c[j]) * pow2(fraction_bits - x.exp[j]));
  }
}

// Rounds and writes the columns that are not to be redone.
void write_row(const Task& t, size_t index, int columns, Columns& x, uint64_t redo) {
  const bool half = t.kind.d == AccType::f16;
  for (int j = 0; j < columns; ++j) {
    double total = x.total[j];
    if (!half && t.model.kept_bits < 23) {
      const uint64_t drop = (uint64_t{1} << (52 - t.model.kept_bits)) - 1;
      total = std::bit_cast<double>(std::bit_cast<uint64_t>(total) & ~drop);
    }
    x.total[j] = total * pow2(x.exp[j] - t.model.fraction_bits);
  }
  alignas(32) float out[64];
  {
    const RoundTowardZero rz;
    narrow(x.total, out, columns, half);
  }
  uint16_t halves[64];
  if (half) f32_to_f16(out, halves, columns);
  for (int j = 0; j < columns; ++j) {
    if ((redo >> j) & 1) continue;
    if (half) {
      static_cast<uint16_t*>(t.d)[index + static_cast<size_t>(j)] =
          halves[j] == 0x8000 ? uint16_t{0} : halves[j];
    } else {
      static_cast<float*>(t.d)[index + static_cast<size_t>(j)] = out[j];
    }
  }
}

void exact_row_f32(const Task& t, const std::byte* block, const Row& row, int columns, size_t index,
                   uint64_t& redo) {
  Columns x;
  const auto* exps = reinterpret_cast<const uint8_t*>(block) + value_bytes(t.form, t.kind.k);
  product_exponents<int8_t>(exps, row.exp, 0, t.kind.k, -40, x.exp);
  read_c(t, index, columns, t.accumulate, x, redo);
  alignas(32) float start[64];
  for (int j = 0; j < 64; ++j) {
    // Products span 2^-28..2^32: outside [-60, 60] C decides, and every product truncates to zero.
    const int e = j < columns ? std::clamp(x.exp[j], -60, 60) : 0;
    start[j] = std::bit_cast<float>(static_cast<uint32_t>(e + 10 + 127) << 23);
  }
  alignas(32) float plus[64];
  alignas(32) float minus[64];
  {
    const RoundTowardZero rz;
    const auto* values = reinterpret_cast<const float*>(block);
    for (int at = 0; at < columns; at += 32) {
      sum_f32(values + at, row, t.kind.k, start + at, plus + at, minus + at);
    }
  }
  for (int j = 0; j < columns; ++j) {
    // Sums that leave the format wrap here; those columns are done again exactly.
    x.total[j] =
        static_cast<int32_t>(std::bit_cast<uint32_t>(plus[j]) - std::bit_cast<uint32_t>(minus[j]));
  }
  add_c_quanta(13, columns, x);
  write_row(t, index, columns, x, redo);
}

void exact_row_f64(const Task& t, const std::byte* block, const Row& row, int columns, size_t index,
                   uint64_t& redo) {
  const auto* exps = reinterpret_cast<const uint8_t*>(block) + value_bytes(t.form, t.kind.k);
  for (int first = 0; first < t.kind.k; first += t.model.group) {
    Columns x;
    const bool accumulate = first != 0 || (t.accumulate && !is_widened_fp8(t.kind));
    product_exponents<int16_t>(exps, row.exp, first, t.model.group, -1000, x.exp);
    read_c(t, index, columns, accumulate, x, redo);
    alignas(32) double start[32];
    for (int j = 0; j < 32; ++j) start[j] = pow2((j < columns ? x.exp[j] : 0) + 27);
    alignas(32) double plus[32];
    alignas(32) double minus[32];
    {
      const RoundTowardZero rz;
      const auto* values = reinterpret_cast<const double*>(block);
      for (int at = 0; at < columns; at += 16) {
        sum_f64(values + at, row, first, t.model.group, start + at, plus + at, minus + at);
      }
    }
    for (int j = 0; j < columns; ++j) {
      x.total[j] =
          static_cast<double>(std::bit_cast<int64_t>(plus[j]) - std::bit_cast<int64_t>(minus[j]));
    }
    add_c_quanta(25, columns, x);
    write_row(t, index, columns, x, redo);
  }
}

void exact_row(const Task& t, const std::byte* block, const Row& row, int columns, size_t index,
               uint64_t& redo) {
  (t.form == PanelForm::exact_f32 ? exact_row_f32 : exact_row_f64)(t, block, row, columns, index,
                                                                   redo);
}

// --- fast mode
// ------------------------------------------------------------------------------------

DSK_AVX2 void fast_row(const float* block, const float* a, int count, float* acc) {
  __m256 s[4];
  for (int v = 0; v < 4; ++v) s[v] = _mm256_loadu_ps(acc + 8 * v);
  for (int k = 0; k < count; ++k) {
    const __m256 x = _mm256_set1_ps(a[k]);
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      s[v] = _mm256_fmadd_ps(x, _mm256_loadu_ps(block + k * 64 + 8 * v), s[v]);
    }
  }
  for (int v = 0; v < 4; ++v) _mm256_storeu_ps(acc + 8 * v, s[v]);
}

void fast_block(const Task& t, const std::byte* block, const ARows& rows, int first_row, int m,
                int column, int columns) {
  const auto* values = reinterpret_cast<const float*>(block);
  for (int i = 0; i < m; ++i) {
    const size_t index = static_cast<size_t>(first_row + i) * t.ldd + static_cast<size_t>(column);
    alignas(32) float acc[64] = {};
    auto* halves = static_cast<uint16_t*>(t.d) + index;
    auto* floats = static_cast<float*>(t.d) + index;
    const bool half = t.kind.d == AccType::f16;
    if (t.accumulate && half) f16_to_f32(halves, acc, columns);
    if (t.accumulate && !half) std::memcpy(acc, floats, sizeof(float) * columns);
    for (int at = 0; at < columns; at += 32) {
      fast_row(values + at, rows.value[i], t.kind.k, acc + at);
    }
    if (half) {
      f32_to_f16(acc, halves, columns);
    } else {
      std::memcpy(floats, acc, sizeof(float) * columns);
    }
  }
}

void store_element(PanelForm form, std::byte* block, int total_k, int k, int lane,
                   const ElementView& e, bool negate) {
  const float value = negate ? -e.value : e.value;
  if (form == PanelForm::fp32) {
    reinterpret_cast<float*>(block)[k * 64 + lane] = value;
    return;
  }
  const bool negative = std::signbit(value);
  const float plus = negative ? 0.0f : value;
  const float minus = negative ? -value : 0.0f;
  std::byte* exps = block + value_bytes(form, total_k) + k * 64;
  if (form == PanelForm::exact_f32) {
    reinterpret_cast<float*>(block)[k * 128 + lane] = plus;
    reinterpret_cast<float*>(block)[k * 128 + 64 + lane] = minus;
    reinterpret_cast<int8_t*>(exps)[lane] = static_cast<int8_t>(e.zero ? kZeroExp : e.exp);
  } else {
    reinterpret_cast<double*>(block)[k * 64 + lane] = plus;
    reinterpret_cast<double*>(block)[k * 64 + 32 + lane] = minus;
    reinterpret_cast<int16_t*>(exps)[lane] = static_cast<int16_t>(e.zero ? kZeroExpWide : e.exp);
  }
}

}  // namespace

void build_panel_avx2(const MmaKind& kind, const uint8_t* rows, size_t row_bytes, int n,
                      std::byte* base, uint8_t* special_columns) {
  const PanelForm form = panel_form(kind);
  const int width = block_columns(form);
  const ElementView nothing{0.0f, 0, true, false};
  for (int column = 0; column < n; column += width, base += block_bytes(form, kind.k)) {
    for (int lane = 0; lane < width; ++lane) {
      const int j = column + lane;
      for (int k = 0; k < kind.k; ++k) {
        ElementView e = nothing;
        if (j < n) e = view_element(kind.b, rows + static_cast<size_t>(j) * row_bytes, k);
        if (e.special) special_columns[j] = 1;
        store_element(form, base, kind.k, sum_position(kind, k), lane, e, kind.negate_b);
      }
    }
  }
}

void mma_avx2(const BPanel& b, const uint8_t* a, size_t pitch, int m, void* d, size_t ldd,
              bool accumulate) {
  drive_mma(b, a, pitch, m, d, ldd, accumulate, {unpack_rows, exact_row, fast_block});
}

}  // namespace dsk::emu::num

#endif  // DSK_NUM_X86
