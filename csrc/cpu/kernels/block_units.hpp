// What gradients need of a unit: blocks of 64 rows in three orders, and one product. Two units:
// fp32 FMA (any target), and pairs of bf16 (AMX tiles or vdpbf16ps).
//
//   rows    [64][width]               as they come, padded with zeros
//   turned  [depth / g][64][g]        g values of a row's depth side by side: depth runs along d
//   panels  [width / 64][64 / g][64][g]   depth runs along the rows
//
// multiply: c [rows][64] += a [rows][depth] times b [depth / g][64][g], fp32 sums.
#pragma once

#include "cpu/kernels/attention.hpp"
#include "cpu/kernels/attention_dot.hpp"
#include "cpu/kernels/attention_tiles.hpp"
#include "cpu/kernels/gemm_wide.hpp"

namespace dsk::cpu::DSK_CPU_NS {

constexpr int64_t kSide = 64;  // query rows, and keys, of a block

// Where rows of one head lie in memory.
struct SourceRows {
  const char* data = nullptr;
  int64_t stride = 0;  // bytes
  int64_t columns = 0;
  Type type = Type::kBF16;

  const char* row(int64_t i) const { return data + i * stride; }
};

struct Range {
  int64_t begin, end;
};

// sums [rows][width] times scale to these rows.
template <Type kType>
DSK_INLINE void write_rows(const SourceRows& to, Range rows, const float* sums, int64_t width,
                           float scale) {
  for (int64_t r = rows.begin; r < rows.end; ++r, sums += width) {
    auto* row = reinterpret_cast<typename Element<kType>::Storage*>(const_cast<char*>(to.row(r)));
    for (int64_t d = 0; d < to.columns; d += kLanes) {
      store_upto<kType>(row + d, mul(load(sums + d), set1(scale)), to.columns - d);
    }
  }
}

DSK_INLINE void write_rows(const SourceRows& to, Range rows, const float* sums, int64_t width,
                           float scale) {
  switch (to.type) {
    case Type::kBF16:
      return write_rows<Type::kBF16>(to, rows, sums, width, scale);
    case Type::kF16:
      return write_rows<Type::kF16>(to, rows, sums, width, scale);
    default:
      return write_rows<Type::kF32>(to, rows, sums, width, scale);
  }
}

// Calls body with the constant `rows`, for rows in 1 .. kMost.
template <int kMost, typename Body>
DSK_INLINE void with_rows(int64_t rows, Body&& body) {
  if constexpr (kMost > 1) {
    if (rows < kMost) return with_rows<kMost - 1>(rows, body);
  }
  body.template operator()<kMost>();
}

struct WideBlocks {
  using Value = float;
  struct Scope {};

  static bool suits(Type) { return true; }

  // n of 64 rows, fp32.
  static void load_rows(const SourceRows& from, int64_t first, int64_t n, int64_t width,
                        float* to) {
    const CacheKind kind = from.type == Type::kBF16  ? CacheKind::kBF16
                           : from.type == Type::kF16 ? CacheKind::kF16
                                                     : CacheKind::kF32;
    const KeyValues plain{.kind = kind};
    std::memset(to, 0, static_cast<size_t>(kSide * width) * sizeof(float));
    for (int64_t i = 0; i < n; ++i) {
      load_row(plain, from.row(first + i), from.columns, to + i * width);
    }
  }

  static void turn(const float* rows, int64_t width, int64_t depth, float* to) {
    for (int64_t d = 0; d < depth; ++d) {
      for (int64_t i = 0; i < kSide; ++i) to[d * kSide + i] = rows[i * width + d];
    }
  }

  static void panels(const float* rows, int64_t width, float* to) {
    for (int64_t d = 0; d < width; d += kSide) {
      for (int64_t i = 0; i < kSide; ++i, to += kSide) {
        std::memcpy(to, rows + i * width + d, kSide * sizeof(float));
      }
    }
  }

  // A block [64][64] of sums as an operand, and the same transposed.
  static const float* narrow(const float* x, float*) { return x; }
  static void narrow_turned(const float* x, float* to) { turn(x, kSide, kSide, to); }

  static void multiply(const float* a, int64_t stride, int64_t rows, const float* b, int64_t depth,
                       float* c, int64_t c_stride) {
    for (int64_t r = 0; r < rows; r += kWideRows) {
      with_rows<kWideRows>(rows - r, [&]<int kRows>() {
        kernel<kRows>(a + r * stride, stride, b, depth, c + r * c_stride, c_stride);
      });
    }
  }

 private:
  template <int kRows>
  DSK_INLINE void kernel(const float* a, int64_t stride, const float* b, int64_t depth, float* c,
                         int64_t c_stride) {
    for (int64_t n = 0; n < kSide; n += kWideVectors * kLanes) {
      F32 sum[kRows][kWideVectors];
      for (int i = 0; i < kRows; ++i) {
        for (int j = 0; j < kWideVectors; ++j) sum[i][j] = load(c + i * c_stride + n + j * kLanes);
      }
      for (int64_t k = 0; k < depth; ++k) {
        F32 column[kWideVectors];
        for (int j = 0; j < kWideVectors; ++j) column[j] = load(b + k * kSide + n + j * kLanes);
        for (int i = 0; i < kRows; ++i) {
          const F32 x = set1(a[i * stride + k]);
          for (int j = 0; j < kWideVectors; ++j) sum[i][j] = fma(x, column[j], sum[i][j]);
        }
      }
      for (int i = 0; i < kRows; ++i) {
        for (int j = 0; j < kWideVectors; ++j) store(c + i * c_stride + n + j * kLanes, sum[i][j]);
      }
    }
  }
};

#if defined(__AMX_BF16__) || defined(__AVX512BF16__)

struct PairBlocks {
  using Value = uint16_t;
  using Scope = PairScope;

  static bool suits(Type type) { return type == Type::kBF16; }

  static void load_rows(const SourceRows& from, int64_t first, int64_t n, int64_t width,
                        uint16_t* to) {
    std::memset(to, 0, static_cast<size_t>(kSide * width) * 2);
    for (int64_t i = 0; i < n; ++i) {
      std::memcpy(to + i * width, from.row(first + i), static_cast<size_t>(from.columns) * 2);
    }
  }

  static void turn(const uint16_t* rows, int64_t width, int64_t depth, uint16_t* to) {
    for (int64_t r = 0; r < kSide; r += 16) {
      for (int64_t d = 0; d < depth; d += 32) {
        __m512i tile[16];
        for (int i = 0; i < 16; ++i) tile[i] = _mm512_load_si512(rows + (r + i) * width + d);
        transpose16(tile);
        for (int i = 0; i < 16; ++i) {
          _mm512_store_si512(to + (d / 2 + i) * 2 * kSide + r * 2, tile[i]);
        }
      }
    }
  }

  static void panels(const uint16_t* rows, int64_t width, uint16_t* to) {
    // Word 2 i from x, word 2 i + 1 from y.
    __m512i first = _mm512_cvtepu8_epi16(_mm256_setr_epi8(0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37,
                                                          6, 38, 7, 39, 8, 40, 9, 41, 10, 42, 11,
                                                          43, 12, 44, 13, 45, 14, 46, 15, 47));
    const __m512i second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
    for (int64_t d = 0; d < width; d += kSide) {
      for (int64_t i = 0; i < kSide; i += 2) {
        for (int64_t half = 0; half < kSide; half += 32, to += 64) {
          const __m512i x = _mm512_load_si512(rows + i * width + d + half);
          const __m512i y = _mm512_load_si512(rows + (i + 1) * width + d + half);
          _mm512_store_si512(to, _mm512_permutex2var_epi16(x, first, y));
          _mm512_store_si512(to + 32, _mm512_permutex2var_epi16(x, second, y));
        }
      }
    }
  }

  static const uint16_t* narrow(const float* x, uint16_t* to) {
    for (int64_t i = 0; i < kSide * kSide; i += kLanes) store_bf16(to + i, load(x + i));
    return to;
  }

  static void narrow_turned(const float* x, uint16_t* to) {
    for (int64_t r = 0; r < kSide; r += 16) {
      for (int64_t k = 0; k < kSide; k += 32) {
        __m512i pairs[16];
        for (int i = 0; i < 16; ++i) {
          const float* from = x + (k + 2 * i) * kSide + r;
          const __m512i even = _mm512_cvtepu16_epi32(to_bf16(load(from)));
          const __m512i odd = _mm512_cvtepu16_epi32(to_bf16(load(from + kSide)));
          pairs[i] = _mm512_or_si512(even, _mm512_slli_epi32(odd, 16));
        }
        transpose16(pairs);
        for (int i = 0; i < 16; ++i) _mm512_store_si512(to + (r + i) * kSide + k, pairs[i]);
      }
    }
  }

#if defined(__AMX_BF16__)
  // Tiles of 16 rows: rows are rounded up to 32, which every block has room for.
  static void multiply(const uint16_t* a, int64_t stride, int64_t rows, const uint16_t* b,
                       int64_t depth, float* c, int64_t c_stride) {
    for (int64_t r = 0; r < rows; r += 32) {
      for (int64_t n = 0; n < kSide; n += 32) {
        float* top = c + r * c_stride + n;
        float* below = top + 16 * c_stride;
        _tile_loadd(0, top, c_stride * 4);
        _tile_loadd(1, top + 16, c_stride * 4);
        _tile_loadd(2, below, c_stride * 4);
        _tile_loadd(3, below + 16, c_stride * 4);
        for (int64_t k = 0; k < depth; k += 32) {
          const uint16_t* left = a + r * stride + k;
          const uint16_t* right = b + k * kSide + n * 2;
          _tile_loadd(4, left, stride * 2);
          _tile_loadd(6, right, kSide * 4);
          _tile_dpbf16ps(0, 4, 6);
          _tile_loadd(7, right + 32, kSide * 4);
          _tile_dpbf16ps(1, 4, 7);
          _tile_loadd(5, left + 16 * stride, stride * 2);
          _tile_dpbf16ps(2, 5, 6);
          _tile_dpbf16ps(3, 5, 7);
        }
        _tile_stored(0, top, c_stride * 4);
        _tile_stored(1, top + 16, c_stride * 4);
        _tile_stored(2, below, c_stride * 4);
        _tile_stored(3, below + 16, c_stride * 4);
      }
    }
  }
#else
  static void multiply(const uint16_t* a, int64_t stride, int64_t rows, const uint16_t* b,
                       int64_t depth, float* c, int64_t c_stride) {
    for (int64_t r = 0; r < rows; r += kDotRows) {
      with_rows<kDotRows>(rows - r, [&]<int kRows>() {
        kernel<kRows>(a + r * stride, stride, b, depth, c + r * c_stride, c_stride);
      });
    }
  }

 private:
  template <int kRows>
  DSK_INLINE void kernel(const uint16_t* a, int64_t stride, const uint16_t* b, int64_t depth,
                         float* c, int64_t c_stride) {
    __m512 sum[kRows][4];
    for (int i = 0; i < kRows; ++i) {
      for (int j = 0; j < 4; ++j) sum[i][j] = _mm512_loadu_ps(c + i * c_stride + j * 16);
    }
    for (int64_t k = 0; k < depth; k += 2) {
      __m512bh column[4];
      for (int j = 0; j < 4; ++j) column[j] = vector_of(b + k * kSide + j * 32);
      for (int i = 0; i < kRows; ++i) {
        const __m512bh x = pair_of(a + i * stride + k);
        for (int j = 0; j < 4; ++j) sum[i][j] = _mm512_dpbf16_ps(sum[i][j], x, column[j]);
      }
    }
    for (int i = 0; i < kRows; ++i) {
      for (int j = 0; j < 4; ++j) _mm512_storeu_ps(c + i * c_stride + j * 16, sum[i][j]);
    }
  }
#endif
};

#endif

}  // namespace dsk::cpu::DSK_CPU_NS
