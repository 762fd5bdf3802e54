// The two products of attention_pairs.hpp on vdpbf16ps. Operands that are one number for all lanes
// (a pair of a key or of a weight) are broadcast straight from where they lie.
#pragma once

#if defined(__AVX512BF16__)

#include "cpu/kernels/attention_pairs.hpp"
#include "cpu/kernels/gemm_dot.hpp"

namespace dsk::cpu::DSK_CPU_NS {

struct PairScope {};  // nothing to set up

DSK_INLINE __m512bh vector_of(const uint16_t* pairs) {
  return reinterpret_cast<__m512bh>(_mm512_load_si512(pairs));
}

// kKeys keys times kRowTiles * 16 rows over [d0, d1) -> sum.
template <int kRowTiles, int kKeys>
DSK_INLINE void score_keys(const char* key, int64_t key_stride, const uint16_t* q, int64_t depth,
                           int64_t d0, int64_t d1, __m512 (&sum)[kKeys][kRowTiles]) {
  for (auto& row : sum) {
    for (auto& part : row) part = _mm512_setzero_ps();
  }
  for (int64_t d = d0; d < d1; d += 2) {
    __m512bh rows[kRowTiles];
    for (int i = 0; i < kRowTiles; ++i) rows[i] = vector_of(q + i * 16 * depth + d * 16);
#pragma GCC unroll 16
    for (int j = 0; j < kKeys; ++j) {
      const __m512bh x = pair_of(reinterpret_cast<const uint16_t*>(key + j * key_stride) + d);
      for (int i = 0; i < kRowTiles; ++i) sum[j][i] = _mm512_dpbf16_ps(sum[j][i], x, rows[i]);
    }
  }
}

// scores^T [n keys][kRowTiles * 16] for n a multiple of 32.
template <int kRowTiles>
DSK_INLINE void score_block(const PairBuffers& b, const KeyTile* keys, const uint16_t* q, int64_t n,
                            float* scores) {
  constexpr int kKeys = kRowTiles == 2 ? 8 : 16;
  for (int64_t i = 0; i < n; i += kKeys) {
    const KeyTile& tile = keys[i / 16];
    const char* key = static_cast<const char*>(tile.data) + i % 16 * tile.stride;
    __m512 sum[kKeys][kRowTiles];
    // Behind the scaled latents comes one stretch with a scale of 1: for plain keys, all of it.
    score_keys<kRowTiles, kKeys>(key, tile.stride, q, b.depth, b.latents, b.depth, sum);
    float* to = scores + i * kRowTiles * 16;
#pragma GCC unroll 16
    for (int j = 0; j < kKeys; ++j) {
      for (int r = 0; r < kRowTiles; ++r) _mm512_store_ps(to + (j * kRowTiles + r) * 16, sum[j][r]);
    }
    for (int64_t part = 0; part < b.tiles; ++part) {
      const int64_t d0 = part * kScaleBlock, d1 = min_of(b.latents, d0 + kScaleBlock);
      score_keys<kRowTiles, kKeys>(key, tile.stride, q, b.depth, d0, d1, sum);
#pragma GCC unroll 16
      for (int j = 0; j < kKeys; ++j) {
        const F32 scale = set1(b.scales[(i + j) * b.tiles + part]);
        for (int r = 0; r < kRowTiles; ++r) {
          float* at = to + (j * kRowTiles + r) * 16;
          _mm512_store_ps(at, fma(scale, sum[j][r], _mm512_load_ps(at)));
        }
      }
    }
  }
}

// out [kRowTiles * 16][width] += weights times values.
template <int kRowTiles>
DSK_INLINE void weigh_values(const PairBuffers& b, const uint16_t* weights, int64_t steps,
                             float* out) {
  constexpr int kRows = 8, kColumns = 2;
  for (int64_t d = 0; d < b.width; d += kColumns * 16) {
    const uint16_t* v = b.values + d / 16 * kSteps * kPairTile;
    for (int64_t r = 0; r < kRowTiles * 16; r += kRows) {
      const uint16_t* w = weights + r / 16 * kSteps * kPairTile + r % 16 * 32;
      __m512 sum[kRows][kColumns];
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) {
        for (int j = 0; j < kColumns; ++j) {
          sum[i][j] = _mm512_load_ps(out + (r + i) * b.width + d + j * 16);
        }
      }
      for (int64_t pair = 0; pair < steps * 16; ++pair) {
        const uint16_t* row = w + pair / 16 * kPairTile + pair % 16 * 2;
        __m512bh values[kColumns];
        for (int j = 0; j < kColumns; ++j) values[j] = vector_of(v + (j * kSteps * 16 + pair) * 32);
#pragma GCC unroll 8
        for (int i = 0; i < kRows; ++i) {
          const __m512bh x = pair_of(row + i * 32);
          for (int j = 0; j < kColumns; ++j) sum[i][j] = _mm512_dpbf16_ps(sum[i][j], x, values[j]);
        }
      }
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) {
        for (int j = 0; j < kColumns; ++j) {
          _mm512_store_ps(out + (r + i) * b.width + d + j * 16, sum[i][j]);
        }
      }
    }
  }
}

}  // namespace dsk::cpu::DSK_CPU_NS

#endif
