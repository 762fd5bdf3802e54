// E4M3 to bf16, exactly, for the units that multiply pairs of bf16 (AMX tiles and vdpbf16ps): a
// byte is looked up in two tables of 128 bytes, and pairs of k end up side by side in a word of 32
// bits.
#pragma once

#if defined(__AMX_BF16__) || defined(__AVX512BF16__)

#include "cpu/packed.hpp"
#include "cpu/simd.hpp"

namespace dsk::cpu::DSK_CPU_NS {

// bf16 of every E4M3 code without its sign, as two tables of bytes.
struct Bf16Tables {
  alignas(64) uint8_t high[128];
  alignas(64) uint8_t low[128];
};
constexpr Bf16Tables make_bf16_tables() {
  Bf16Tables tables{};
  for (int code = 0; code < 128; ++code) {
    int exponent = code >> 3, mantissa = code & 7, bits = 0;
    if (code == 127) {
      bits = 0x7fc0;
    } else if (exponent > 0) {
      bits = (exponent + 120) << 7 | mantissa << 4;
    } else if (mantissa > 0) {
      int shift = 0;
      while (!(mantissa << shift & 8)) ++shift;
      bits = (121 - shift) << 7 | ((mantissa << shift & 7) << 4);
    }
    tables.high[code] = static_cast<uint8_t>(bits >> 8);
    tables.low[code] = static_cast<uint8_t>(bits & 255);
  }
  return tables;
}
static constexpr Bf16Tables kBf16Tables = make_bf16_tables();

// The tables in registers.
struct Bf16Lookup {
  __m512i high0 = _mm512_load_si512(kBf16Tables.high);
  __m512i high1 = _mm512_load_si512(kBf16Tables.high + 64);
  __m512i low0 = _mm512_load_si512(kBf16Tables.low);
  __m512i low1 = _mm512_load_si512(kBf16Tables.low + 64);
  __m512i sign = _mm512_set1_epi8(static_cast<char>(0x80));

  // A line of packed weights (see packed.hpp) as pairs of k: columns 0 .. 15 and 16 .. 31 of it.
  inline __attribute__((always_inline)) void pairs(__m512i line, __m512i& left,
                                                   __m512i& right) const {
    __m512i high = _mm512_permutex2var_epi8(high0, line, high1);
    const __m512i low = _mm512_permutex2var_epi8(low0, line, low1);
    high = _mm512_ternarylogic_epi32(high, line, sign, 0xf8);  // high | (line & sign)
    left = _mm512_unpacklo_epi8(low, high);
    right = _mm512_unpackhi_epi8(low, high);
  }
};

}  // namespace dsk::cpu::DSK_CPU_NS

#endif
