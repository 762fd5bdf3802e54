// AVX-512: unpacking B into panels, and moving accumulators between registers and dense rows.
#include "emu/num/unpack_avx512.hpp"

#if DSK_NUM_X86

namespace dsk::emu::num {
namespace {

template <PanelForm kForm>
DSK_AVX512 inline void store_values(std::byte* block, int k, int lane, const Unpacked& u,
                                    __m512i sign_bit) {
  const __m512 value =
      _mm512_castsi512_ps(_mm512_xor_si512(_mm512_castps_si512(u.value), sign_bit));
  if constexpr (kForm == PanelForm::fp32) {
    _mm512_store_ps(reinterpret_cast<float*>(block) + k * 64 + lane, value);
    return;
  }
  const __m512 magnitude = _mm512_abs_ps(value);
  const auto negative = static_cast<__mmask16>(_mm512_movepi32_mask(_mm512_castps_si512(value)));
  const __m512 plus = _mm512_maskz_mov_ps(static_cast<__mmask16>(~negative), magnitude);
  const __m512 minus = _mm512_maskz_mov_ps(negative, magnitude);
  if constexpr (kForm == PanelForm::exact_f32) {
    auto* out = reinterpret_cast<float*>(block) + k * 128 + lane;
    _mm512_store_ps(out, plus);
    _mm512_store_ps(out + 64, minus);
    return;
  }
  auto* out = reinterpret_cast<double*>(block) + k * 64 + lane;
  _mm512_store_pd(out, _mm512_cvtps_pd(_mm512_castps512_ps256(plus)));
  _mm512_store_pd(out + 8, _mm512_cvtps_pd(_mm512_extractf32x8_ps(plus, 1)));
  _mm512_store_pd(out + 32, _mm512_cvtps_pd(_mm512_castps512_ps256(minus)));
  _mm512_store_pd(out + 40, _mm512_cvtps_pd(_mm512_extractf32x8_ps(minus, 1)));
}

template <PanelForm kForm>
DSK_AVX512 inline void store_exponents(std::byte* block, int total_k, int k, int lane,
                                       const Unpacked& u) {
  auto* exps = reinterpret_cast<uint8_t*>(block) + value_bytes(kForm, total_k) + k * 64;
  if constexpr (kForm == PanelForm::exact_f32) {
    const __m512i e = _mm512_mask_mov_epi32(u.exp, u.zero, _mm512_set1_epi32(kZeroExp8));
    _mm_store_si128(reinterpret_cast<__m128i*>(exps + lane), _mm512_cvtepi32_epi8(e));
  } else if constexpr (kForm == PanelForm::exact_f64) {
    const __m512i e = _mm512_mask_mov_epi32(u.exp, u.zero, _mm512_set1_epi32(kZeroExp16));
    _mm256_store_si256(reinterpret_cast<__m256i*>(exps + 2 * lane), _mm512_cvtepi32_epi16(e));
  }
}

DSK_AVX512 inline __m256i load8(const uint32_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}

template <PanelForm kForm>
DSK_AVX512 void build_panel(const MmaKind& kind, const uint8_t* rows, size_t row_bytes, int n,
                            std::byte* base, uint8_t* special_columns) {
  constexpr int kWidth = block_columns(kForm);
  const int bits = bits_of(kind.b);
  const int per_word = 32 / bits;
  const __m512i sign_bit = _mm512_set1_epi32(kind.negate_b ? static_cast<int>(0x80000000u) : 0);
  const __m512i offsets =
      _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                         _mm512_set1_epi32(static_cast<int>(row_bytes)));
  for (int column = 0; column < n; column += kWidth, base += block_bytes(kForm, kind.k)) {
    for (int lane = 0; lane < kWidth; lane += 16) {
      const __mmask16 live = live_lanes(n - column - lane);
      __mmask16 special = 0;
      const uint8_t* first = rows + static_cast<size_t>(column + lane) * row_bytes;
      for (int word = 0; word * per_word < kind.k; ++word) {
        const __m512i words = live == 0 ? _mm512_setzero_si512()
                                        : _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), live,
                                                                      offsets, first + 4 * word, 1);
        for (int j = 0; j < per_word; ++j) {
          const int k = sum_position(kind, word * per_word + j);
          const Unpacked u = unpack16(word_element(words, j, bits), kind.b);
          special = static_cast<__mmask16>(special | (u.special & live));
          store_values<kForm>(base, k, lane, u, sign_bit);
          store_exponents<kForm>(base, kind.k, k, lane, u);
        }
      }
      _mm_storeu_si128(reinterpret_cast<__m128i*>(special_columns + column + lane),
                       _mm_maskz_set1_epi8(special, 1));
    }
  }
}

}  // namespace

DSK_AVX512 void build_panel_avx512(const MmaKind& kind, const uint8_t* rows, size_t row_bytes,
                                   int n, std::byte* base, uint8_t* special_columns) {
  const PanelForm form = panel_form(kind);
  const auto build = form == PanelForm::fp32        ? build_panel<PanelForm::fp32>
                     : form == PanelForm::exact_f32 ? build_panel<PanelForm::exact_f32>
                                                    : build_panel<PanelForm::exact_f64>;
  build(kind, rows, row_bytes, n, base, special_columns);
}

// Registers 4j..4j+3 hold columns 8j..8j+7: even registers the even columns, the upper pair rows
// 8-15. Interleaving two registers' 16 lanes (4 rows each) gives 4 rows of 8 columns.
DSK_AVX512 void load_accumulator_avx512(const uint32_t* const* regs, int n, void* dense,
                                        size_t ldd) {
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i high =
      _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  auto* out = static_cast<uint32_t*>(dense);
  for (int pair = 0; pair < n / 4; ++pair) {
    uint32_t* tile = out + static_cast<size_t>((pair & 1) * 8) * ldd + (pair >> 1) * 8;
    for (int half = 0; half < 2; ++half) {
      const __m512i even = _mm512_loadu_si512(regs[2 * pair] + 16 * half);
      const __m512i odd = _mm512_loadu_si512(regs[2 * pair + 1] + 16 * half);
      const __m512i first = _mm512_permutex2var_epi32(even, low, odd);
      const __m512i second = _mm512_permutex2var_epi32(even, high, odd);
      uint32_t* row = tile + static_cast<size_t>(4 * half) * ldd;
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(row), _mm512_castsi512_si256(first));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(row + ldd),
                          _mm512_extracti32x8_epi32(first, 1));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(row + 2 * ldd),
                          _mm512_castsi512_si256(second));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(row + 3 * ldd),
                          _mm512_extracti32x8_epi32(second, 1));
    }
  }
}

DSK_AVX512 void store_accumulator_avx512(uint32_t* const* regs, int n, const void* dense,
                                         size_t ldd) {
  const __m512i even_lanes =
      _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd_lanes =
      _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
  const auto* in = static_cast<const uint32_t*>(dense);
  for (int pair = 0; pair < n / 4; ++pair) {
    const uint32_t* tile = in + static_cast<size_t>((pair & 1) * 8) * ldd + (pair >> 1) * 8;
    for (int half = 0; half < 2; ++half) {
      const uint32_t* row = tile + static_cast<size_t>(4 * half) * ldd;
      const __m512i first =
          _mm512_inserti32x8(_mm512_castsi256_si512(load8(row)), load8(row + ldd), 1);
      const __m512i second =
          _mm512_inserti32x8(_mm512_castsi256_si512(load8(row + 2 * ldd)), load8(row + 3 * ldd), 1);
      _mm512_storeu_si512(regs[2 * pair] + 16 * half,
                          _mm512_permutex2var_epi32(first, even_lanes, second));
      _mm512_storeu_si512(regs[2 * pair + 1] + 16 * half,
                          _mm512_permutex2var_epi32(first, odd_lanes, second));
    }
  }
}

}  // namespace dsk::emu::num

#endif  // DSK_NUM_X86
