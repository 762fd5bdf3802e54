// Attention on a unit that multiplies pairs of bf16 (AMX tiles, vdpbf16ps): what both share. fp32
// sums. Per block of 128 keys and 32 query rows:
//
//   scores^T [128 keys][32 rows]  = keys (as they lie in the cache) times queries (packed once)
//   weights  [32 rows][128 keys]    softmax with a lane per row, no shuffle; then one transposition
//   out      [32 rows][dv]       += weights times values (neighbouring keys interleaved, once per
//                                   block for all rows)
//
// Packed operands are tiles of 16 pairs: queries and values [16 pairs][16 rows or columns][2], keys
// and weights [16 keys or rows][16 pairs][2]. Interleaving by unpack leaves columns of a group of
// 32 in the order 0-3, 8-11, 16-19, 24-27 (first tile) and 4-7, 12-15, ... (second): undone once,
// when the sums are finished.
#pragma once

#if defined(__AMX_BF16__) || defined(__AVX512BF16__)

#include "cpu/kernels/attention.hpp"
#include "cpu/packed.hpp"

namespace dsk::cpu::DSK_CPU_NS {

constexpr int64_t kPairTile = 16 * 32;    // bf16 values of a tile
constexpr int64_t kSteps = kTokens / 32;  // tiles of 32 keys in a block

// Keys of an FP8 cache: AMX gets them dequantised, rounded to bf16. vdpbf16ps gets the E4M3 numbers
// themselves, which are exact, and scales their partial sums. (Values are rounded on both.)
#if defined(__AMX_BF16__)
constexpr bool kScaleScores = false;
#else
constexpr bool kScaleScores = true;
#endif

DSK_INLINE bool suits_pairs(const AttentionTask& t) {
  // A pair must not straddle the end of the scaled latents.
  const bool even = !kScaleScores || t.kv.dv % 2 == 0;
  const bool narrow = t.kv.kind == CacheKind::kBF16 || (t.kv.kind == CacheKind::kFP8Rows && even);
  return narrow && t.type == Type::kBF16;
}

// 16 x 16 dwords, rows in, columns out.
DSK_INLINE void transpose16(__m512i* r) {
  __m512i a[16], b[16];
  for (int i = 0; i < 8; ++i) {
    a[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    a[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  // b[4 i + j]: rows 4 i .. 4 i + 3 of column 4 L + j in 128-bit lane L.
  for (int i = 0; i < 4; ++i) {
    b[4 * i] = _mm512_unpacklo_epi64(a[4 * i], a[4 * i + 2]);
    b[4 * i + 1] = _mm512_unpackhi_epi64(a[4 * i], a[4 * i + 2]);
    b[4 * i + 2] = _mm512_unpacklo_epi64(a[4 * i + 1], a[4 * i + 3]);
    b[4 * i + 3] = _mm512_unpackhi_epi64(a[4 * i + 1], a[4 * i + 3]);
  }
  for (int j = 0; j < 4; ++j) {
    const __m512i x0 = _mm512_shuffle_i32x4(b[j], b[4 + j], 0x88);
    const __m512i x1 = _mm512_shuffle_i32x4(b[j], b[4 + j], 0xdd);
    const __m512i y0 = _mm512_shuffle_i32x4(b[8 + j], b[12 + j], 0x88);
    const __m512i y1 = _mm512_shuffle_i32x4(b[8 + j], b[12 + j], 0xdd);
    r[j] = _mm512_shuffle_i32x4(x0, y0, 0x88);
    r[8 + j] = _mm512_shuffle_i32x4(x0, y0, 0xdd);
    r[4 + j] = _mm512_shuffle_i32x4(x1, y1, 0x88);
    r[12 + j] = _mm512_shuffle_i32x4(x1, y1, 0xdd);
  }
}

struct PairBuffers {
  int64_t depth, width;  // dk rounded up to 32, dv to 64
  uint16_t* queries;     // [rows / 16][depth / 32] tiles: pairs of d by rows
  uint16_t* gathered;    // [128][depth]: keys that cannot be read in place
  uint16_t* values;      // [width / 16][kSteps] tiles
  uint16_t* spare;       // [128][width]: values that cannot be read in place
  float* scales;         // [128][tiles] of the keys (kScaleScores)
  int64_t latents;       // width of the part of a key that has scales
  int64_t tiles;         // of 128 latents that share a scale; 0 for keys without scales
};

DSK_INLINE void pack_queries(const AttentionTask& t, const PairBuffers& b) {
  for (int64_t r0 = 0; r0 < round_up(t.rows, 32); r0 += 16) {
    for (int64_t d0 = 0; d0 < b.depth; d0 += 32) {
      const int64_t n = min_of<int64_t>(32, t.kv.dk - d0);
      __m512i tile[16];
      for (int i = 0; i < 16; ++i) {
        alignas(64) uint16_t row[32] = {};
        if (r0 + i < t.rows) std::memcpy(row, t.q + (r0 + i) * t.q_row + d0 * 2, n * 2);
        tile[i] = _mm512_load_si512(row);
      }
      transpose16(tile);
      uint16_t* to = b.queries + (r0 / 16 * (b.depth / 32) + d0 / 32) * kPairTile;
      for (int i = 0; i < 16; ++i) _mm512_store_si512(to + i * 32, tile[i]);
    }
  }
}

// One row of bf16, zeros up to `padded`.
DSK_INLINE void copy_row(const KeyValues& kv, const char* row, int64_t n, int64_t padded,
                         uint16_t* to) {
  if (kv.kind == CacheKind::kBF16) {
    std::memcpy(to, row, static_cast<size_t>(n) * 2);
  } else {
    alignas(64) float wide[1024];
    load_row(kv, row, n, wide);
    for (int64_t i = 0; i < n; i += kLanes) store_upto<Type::kBF16>(to + i, load(wide + i), n - i);
  }
  std::memset(to + n, 0, static_cast<size_t>(padded - n) * 2);
}

// The E4M3 numbers of an FP8 row as they are, its bf16 part, and its scales beside it.
DSK_INLINE void copy_unscaled(const KeyValues& kv, const char* row, int64_t padded, uint16_t* to,
                              float* scales) {
  const auto* latents = reinterpret_cast<const uint8_t*>(row);
  for (int64_t i = 0; i < kv.dv; i += kLanes) {
    store_upto<Type::kBF16>(to + i, load_upto<Type::kE4M3>(latents + i, kv.dv - i), kv.dv - i);
  }
  const size_t scale_bytes = static_cast<size_t>(ceil_div(kv.dv, kScaleBlock)) * sizeof(float);
  std::memcpy(scales, row + kv.dv, scale_bytes);
  std::memcpy(to + kv.dv, row + kv.dv + scale_bytes, static_cast<size_t>(kv.dk - kv.dv) * 2);
  std::memset(to + kv.dk, 0, static_cast<size_t>(padded - kv.dk) * 2);
}

// Where the 16 keys from t are, with their stride in bytes: in the cache, or gathered.
struct KeyTile {
  const void* data;
  int64_t stride;
};

DSK_INLINE KeyTile key_tile(const AttentionTask& t, const PairBuffers& b, int64_t k0, int64_t i) {
  const int64_t first = k0 + i;
  const bool together = t.pages == nullptr || t.kv.page % 16 == 0;
  if (t.kv.kind == CacheKind::kBF16 && together && t.kv.dk == b.depth && first + 16 <= t.end) {
    return {t.key(first), t.kv.key_row};
  }
  uint16_t* to = b.gathered + i * b.depth;
  for (int64_t j = 0; j < 16; ++j) {
    if (first + j >= t.end) {
      std::memset(to + j * b.depth, 0, static_cast<size_t>(b.depth) * 2);
      for (int64_t tile = 0; tile < b.tiles; ++tile) b.scales[(i + j) * b.tiles + tile] = 0;
    } else if (b.tiles > 0) {
      float* scales = b.scales + (i + j) * b.tiles;
      copy_unscaled(t.kv, t.key(first + j), b.depth, to + j * b.depth, scales);
    } else {
      copy_row(t.kv, t.key(first + j), t.kv.dk, b.depth, to + j * b.depth);
    }
  }
  return {to, b.depth * 2};
}

DSK_INLINE const uint16_t* value_row(const AttentionTask& t, const PairBuffers& b,
                                     const KeyTile* keys, int64_t k0, int64_t i) {
  if (t.kv.values == t.kv.keys && b.tiles == 0 &&
      (t.kv.kind != CacheKind::kBF16 || t.kv.dk >= b.width)) {
    const KeyTile& tile = keys[i / 16];
    return reinterpret_cast<const uint16_t*>(static_cast<const char*>(tile.data) +
                                             i % 16 * tile.stride);
  }
  if (k0 + i < t.end && t.kv.dv == b.width && t.kv.kind == CacheKind::kBF16) {
    return reinterpret_cast<const uint16_t*>(t.value(k0 + i));
  }
  uint16_t* to = b.spare + i * b.width;
  if (k0 + i < t.end) {
    copy_row(t.kv, t.value(k0 + i), t.kv.dv, b.width, to);
  } else {
    std::memset(to, 0, static_cast<size_t>(b.width) * 2);
  }
  return to;
}

DSK_INLINE void pack_values(const AttentionTask& t, const PairBuffers& b, const KeyTile* keys,
                            int64_t k0, int64_t n) {
  for (int64_t i = 0; i < n; i += 2) {
    const uint16_t* even = value_row(t, b, keys, k0, i);
    const uint16_t* odd = value_row(t, b, keys, k0, i + 1);
    uint16_t* to = b.values + i / 32 * kPairTile + i % 32 / 2 * 32;
    for (int64_t d = 0; d < b.width; d += 32) {
      const __m512i x = _mm512_loadu_si512(even + d), y = _mm512_loadu_si512(odd + d);
      _mm512_store_si512(to + d / 16 * kSteps * kPairTile, _mm512_unpacklo_epi16(x, y));
      _mm512_store_si512(to + (d / 16 + 1) * kSteps * kPairTile, _mm512_unpackhi_epi16(x, y));
    }
  }
}

// Softmax of 16 rows, a lane each, and their weights as tiles [kSteps][16 rows][32 keys]. Returns
// the rows whose maximum rose, with the factor for their sums so far.
DSK_INLINE __mmask16 soften_tile(const AttentionTask& t, const AttentionState& s, int64_t r0,
                                 int64_t k0, int64_t n, float* scores, int64_t stride,
                                 uint16_t* weights, float* correction) {
  const F32 scale = set1(t.scale);
  alignas(64) int32_t limits[16];
  int32_t lowest = INT32_MAX;
  for (int i = 0; i < 16; ++i) {
    const int64_t limit = min_of(t.end, t.first_limit + (r0 + i) / t.per_limit) - k0;
    limits[i] = static_cast<int32_t>(min_of<int64_t>(limit, kTokens));
    lowest = min_of(lowest, limits[i]);
  }
  const __m512i limit = _mm512_load_si512(limits);
  F32 top = set1(-INFINITY);
  for (int64_t i = 0; i < n; ++i) {
    F32 score = mul(_mm512_load_ps(scores + i * stride), scale);
    if (i >= lowest) {
      const __mmask16 hidden =
          _mm512_cmple_epi32_mask(limit, _mm512_set1_epi32(static_cast<int>(i)));
      score = _mm512_mask_mov_ps(score, hidden, set1(-INFINITY));
    }
    _mm512_store_ps(scores + i * stride, score);
    top = max(score, top);
  }
  const F32 before = load(s.peak + r0);
  const F32 peak = max(top, before);
  const __mmask16 nothing = _mm512_cmp_ps_mask(peak, set1(-INFINITY), _CMP_EQ_OQ);
  const F32 base = _mm512_mask_mov_ps(peak, nothing, zero());
  const F32 factor = exp(sub(before, base));
  F32 sum = zero();
  for (int64_t step = 0; step < n / 32; ++step) {
    __m512i pairs[16];
    for (int i = 0; i < 16; ++i) {
      const float* from = scores + (step * 32 + 2 * i) * stride;
      const F32 even = exp(sub(_mm512_load_ps(from), base));
      const F32 odd = exp(sub(_mm512_load_ps(from + stride), base));
      sum = add(sum, add(even, odd));
      // Round half up: weights are not negative, ties do not matter.
      const __m512i half = _mm512_set1_epi32(0x8000);
      const __m512i low = _mm512_srli_epi32(_mm512_add_epi32(_mm512_castps_si512(even), half), 16);
      const __m512i high = _mm512_add_epi32(_mm512_castps_si512(odd), half);
      pairs[i] = _mm512_mask_mov_epi16(high, 0x55555555, low);
    }
    transpose16(pairs);
    for (int i = 0; i < 16; ++i) _mm512_store_si512(weights + step * kPairTile + i * 32, pairs[i]);
  }
  store(s.total + r0, fma(load(s.total + r0), factor, sum));
  store(s.peak + r0, peak);
  store(correction, factor);
  return _mm512_cmp_ps_mask(factor, set1(1.0f), _CMP_NEQ_UQ);
}

DSK_INLINE void rescale(float* out, int64_t width, __mmask16 rows, const float* factor) {
  for (int i = 0; i < 16; ++i) {
    if (!(rows >> i & 1)) continue;
    for (int64_t d = 0; d < width; d += 16) {
      _mm512_store_ps(out + i * width + d,
                      mul(_mm512_load_ps(out + i * width + d), set1(factor[i])));
    }
  }
}

// Columns back into their order (see the top of this file).
DSK_INLINE void reorder(float* out, int64_t rows, int64_t width) {
  const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
  for (int64_t i = 0; i < rows * width; i += 32) {
    const F32 x = _mm512_load_ps(out + i), y = _mm512_load_ps(out + i + 16);
    _mm512_store_ps(out + i, _mm512_permutex2var_ps(x, first, y));
    _mm512_store_ps(out + i + 16, _mm512_permutex2var_ps(x, second, y));
  }
}

}  // namespace dsk::cpu::DSK_CPU_NS

#endif
