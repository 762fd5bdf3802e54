// Fast mode of FP8 wgmma on CPUs with AVX512-BF16.
//
// Every e4m3 and e5m2 value is a BF16 value, none of them subnormal there, so VDPBF16PS multiplies
// them exactly: two products an instruction and lane, each added to the fp32 accumulator with one
// rounding, subnormal sums flushed to zero. Twice the rate of fp32 FMA, and operands half as wide.
//
// A pair is (k, k + 2) of four consecutive elements: the even and the odd bytes of a 32-bit word
// are two pairs without any shuffle. Pair p < 8 holds the even bytes of word p, p >= 8 the odd
// bytes of word p - 8. Codes become BF16 through a table of the 128 magnitudes.
#include "emu/num/isa.hpp"

#if DSK_NUM_X86

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>

#include "emu/num/unpack_avx512.hpp"

namespace dsk::emu::num {
namespace {

constexpr int kPairs = 16;    // of one instruction: k = 32
constexpr int kColumns = 64;  // of one block: uint32 pair[kPairs][kColumns]
constexpr int kRowBytes = 32;
constexpr int kMaxRows = 64;

using Table = std::array<uint16_t, 128>;

Table make_table(MmaType type) {
  Table table;
  for (int code = 0; code < 128; ++code) {
    const auto byte = static_cast<uint8_t>(code);
    const float value = view_element(type, &byte, 0).value;
    table[static_cast<size_t>(code)] =
        value != value ? 0x7fc0 : static_cast<uint16_t>(std::bit_cast<uint32_t>(value) >> 16);
  }
  return table;
}

const Table& table_of(MmaType type) {
  static const Table e4m3 = make_table(MmaType::e4m3);
  static const Table e5m2 = make_table(MmaType::e5m2);
  return type == MmaType::e4m3 ? e4m3 : e5m2;
}

// Codes (one in 16 bits) to BF16, `flip` being the sign bit where operands are negated.
class Converter {
 public:
  DSK_AVX512_BF16 Converter(MmaType type, bool negate)
      : flip_(_mm512_set1_epi16(negate ? static_cast<short>(0x8000) : 0)) {
    const Table& table = table_of(type);
    for (int k = 0; k < 4; ++k) part_[k] = _mm512_loadu_si512(table.data() + 32 * k);
  }
  // The even bytes of 32-bit words, and the odd ones.
  DSK_AVX512_BF16 __m512i even(__m512i words) const {
    return convert(_mm512_and_si512(words, _mm512_set1_epi16(0xff)));
  }
  DSK_AVX512_BF16 __m512i odd(__m512i words) const { return convert(_mm512_srli_epi16(words, 8)); }

 private:
  DSK_AVX512_BF16 __m512i convert(__m512i codes) const {
    const __m512i small = _mm512_permutex2var_epi16(part_[0], codes, part_[1]);
    const __m512i large = _mm512_permutex2var_epi16(part_[2], codes, part_[3]);
    const __mmask32 is_large = _mm512_test_epi16_mask(codes, _mm512_set1_epi16(0x40));
    const __m512i sign = _mm512_slli_epi16(_mm512_and_si512(codes, _mm512_set1_epi16(0x80)), 8);
    const __m512i magnitude = _mm512_mask_blend_epi16(is_large, small, large);
    return _mm512_xor_si512(_mm512_or_si512(magnitude, sign), flip_);
  }

  __m512i part_[4];
  __m512i flip_;
};

// Sixteen rows of eight words become eight registers of sixteen rows in three steps; each doubles
// the rows that lie side by side in a register and halves its words. kSelect[step][half][lane]:
// which of the 32 lanes of two registers.
struct alignas(64) Selectors {
  int32_t lane[3][2][16];
};
constexpr Selectors make_selectors() {
  Selectors s{};
  for (int step = 0; step < 3; ++step) {
    const int deep = 2 << step, words = 16 / deep;  // of one register before the step
    for (int half = 0; half < 2; ++half) {
      for (int p = 0; p < 16; ++p) {
        const int row = p % (2 * deep), word = half * words / 2 + p / (2 * deep);
        const int within = row % deep;
        // Rows are in memory's order at first.
        const int place = step == 0 ? within * words + word : word * deep + within;
        s.lane[step][half][p] = (row < deep ? 0 : 16) + place;
      }
    }
  }
  return s;
}
constexpr Selectors kSelect = make_selectors();

DSK_AVX512_BF16 inline void transpose(const uint8_t* rows, __m512i (&words)[8]) {
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) words[i] = _mm512_loadu_si512(rows + 64 * i);
#pragma GCC unroll 3
  for (int step = 0; step < 3; ++step) {
    const __m512i low = _mm512_load_si512(kSelect.lane[step][0]);
    const __m512i high = _mm512_load_si512(kSelect.lane[step][1]);
    __m512i next[8];
    const int apart = 1 << step;  // of registers with the same words of the next rows
#pragma GCC unroll 4
    for (int pair = 0; pair < 4; ++pair) {
      const int first = pair / apart * 2 * apart + pair % apart;
      next[2 * pair] = _mm512_permutex2var_epi32(words[first], low, words[first + apart]);
      next[2 * pair + 1] = _mm512_permutex2var_epi32(words[first], high, words[first + apart]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) words[i] = next[i];
  }
}

template <int kRows>
DSK_AVX512_BF16 void tile(const MmaKind& kind, const uint32_t* block, const uint32_t* a,
                          int columns, void* d, size_t index, size_t ldd, bool accumulate) {
  __m512 acc[kRows][4];
  const auto at = [&](int r, int v) {
    return index + static_cast<size_t>(r) * ldd + static_cast<size_t>(16 * v);
  };
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < 4; ++v) {
      acc[r][v] = accumulate ? read_c(d, at(r, v), kind.d, live_lanes(columns - 16 * v))
                             : _mm512_setzero_ps();
    }
  }
  for (int p = 0; p < kPairs; ++p) {
    __m512bh b[4];
    for (int v = 0; v < 4; ++v) b[v] = (__m512bh)_mm512_load_si512(block + p * kColumns + 16 * v);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const auto x = (__m512bh)_mm512_set1_epi32(static_cast<int>(a[r * kPairs + p]));
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) acc[r][v] = _mm512_dpbf16_ps(acc[r][v], x, b[v]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < 4; ++v) {
      write_d(d, at(r, v), kind.d, live_lanes(columns - 16 * v), acc[r][v]);
    }
  }
}

}  // namespace

bool takes_bf16(const MmaKind& kind) {
  return kind.mode == MmaMode::fast && kind.unit == MmaUnit::wgmma && is_fp8(kind.a) &&
         is_fp8(kind.b);
}

DSK_AVX512_BF16 void build_panel_bf16(const MmaKind& kind, const uint8_t* rows, int n,
                                      std::byte* base) {
  const Converter convert(kind.b, kind.negate_b);
  auto* pairs = reinterpret_cast<uint32_t*>(base);
  for (int column = 0; column < n; column += 16) {
    alignas(64) uint8_t last[16 * kRowBytes];
    const uint8_t* from = rows + static_cast<size_t>(column) * kRowBytes;
    if (n - column < 16) {
      std::memset(last, 0, sizeof last);
      std::memcpy(last, from, static_cast<size_t>(n - column) * kRowBytes);
      from = last;
    }
    __m512i words[8];
    transpose(from, words);
    uint32_t* to =
        pairs + static_cast<size_t>(column / kColumns) * kPairs * kColumns + column % kColumns;
    for (int w = 0; w < 8; ++w) {
      _mm512_store_si512(to + w * kColumns, convert.even(words[w]));
      _mm512_store_si512(to + (w + 8) * kColumns, convert.odd(words[w]));
    }
  }
}

DSK_AVX512_BF16 void mma_bf16(const BPanel& b, const uint8_t* a, size_t pitch, int m, void* d,
                              size_t ldd, bool accumulate) {
  const MmaKind& kind = b.kind();
  const Converter convert(kind.a, kind.negate_a);
  alignas(64) uint32_t rows[kMaxRows * kPairs];
  for (int first = 0; first < m; first += kMaxRows) {
    const int count = std::min(kMaxRows, m - first);
    for (int i = 0; i < count; ++i) {
      const uint8_t* row = a + static_cast<size_t>(first + i) * pitch;
      const __m512i words =
          _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(row)));
      _mm256_store_si256(reinterpret_cast<__m256i*>(rows + i * kPairs),
                         _mm512_castsi512_si256(convert.even(words)));
      _mm256_store_si256(reinterpret_cast<__m256i*>(rows + i * kPairs + 8),
                         _mm512_castsi512_si256(convert.odd(words)));
    }
    const auto* block = reinterpret_cast<const uint32_t*>(PanelAccess::base(b));
    for (int column = 0; column < b.n(); column += kColumns, block += kPairs * kColumns) {
      const int columns = std::min(kColumns, b.n() - column);
      const size_t index = static_cast<size_t>(first) * ldd + static_cast<size_t>(column);
      int i = 0;
      for (; i + 4 <= count; i += 4) {
        tile<4>(kind, block, rows + i * kPairs, columns, d, index + static_cast<size_t>(i) * ldd,
                ldd, accumulate);
      }
      for (; i < count; ++i) {
        tile<1>(kind, block, rows + i * kPairs, columns, d, index + static_cast<size_t>(i) * ldd,
                ldd, accumulate);
      }
    }
  }
}

}  // namespace dsk::emu::num

#endif  // DSK_NUM_X86
