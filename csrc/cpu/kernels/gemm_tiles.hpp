// The AMX unit: tiles of 16 rows x 32 k (activations) times 32 k x 16 columns (weights) into
// 16 x 16 fp32 sums, 16 cycles each.
//
// Per block of 128 k: weights become bf16 tiles in L1 once for all rows, then 2 x 2 tiles (or
// 1 x 4 for a last odd tile of rows) are multiplied. Promotion, sum = fma(scale, tile, sum), runs
// on the vector units one step behind, a few rows between every two tile products, so that both
// units work at once. AMX treats bf16 subnormals (below 1.2e-38) as zeros.
#pragma once

#if defined(__AMX_BF16__)

#include "cpu/kernels/gemm_core.hpp"

namespace dsk::cpu::DSK_CPU_NS {

// Tile registers belong to the thread; another library (oneDNN) may have configured them and rely
// on it, so what was there comes back.
class TileScope {
 public:
  DSK_INLINE void configure() {
    struct alignas(64) Config {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int i = 0; i < 8; ++i) {
      config.row_bytes[i] = 64;
      config.rows[i] = 16;
    }
    _tile_loadconfig(&config);
  }
  inline __attribute__((always_inline)) TileScope() {
    _tile_storeconfig(before_);
    configure();
  }
  inline __attribute__((always_inline)) ~TileScope() {
    if (before_[0] == 0) {
      _tile_release();
    } else {
      _tile_loadconfig(before_);
    }
  }
  TileScope(const TileScope&) = delete;
  TileScope& operator=(const TileScope&) = delete;

 private:
  alignas(64) uint8_t before_[64];
};

constexpr int64_t kTile = 16 * 32;  // bf16 values of a tile

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

// depth x 64 packed weights -> bf16 tiles [4 tiles of 16 columns][depth / 32][16 pairs of k][32].
DSK_INLINE void tile_weights(const uint8_t* packed, int64_t depth, uint16_t* tiles) {
  const __m512i high0 = _mm512_load_si512(kBf16Tables.high);
  const __m512i high1 = _mm512_load_si512(kBf16Tables.high + 64);
  const __m512i low0 = _mm512_load_si512(kBf16Tables.low);
  const __m512i low1 = _mm512_load_si512(kBf16Tables.low + 64);
  const __m512i sign = _mm512_set1_epi8(static_cast<char>(0x80));
  const int64_t column = depth / 32 * kTile;
  for (int64_t k = 0; k < depth; k += 2) {
    uint16_t* to = tiles + k / 32 * kTile + k % 32 / 2 * 32;
    for (int half = 0; half < 2; ++half) {
      const uint8_t* from = packed + k * kPanel + half * 64;
      const __m512i line = _mm512_loadu_si512(from);
      _mm_prefetch(reinterpret_cast<const char*>(from + 2 * kScaleBlock * kPanel), _MM_HINT_T0);
      __m512i high = _mm512_permutex2var_epi8(high0, line, high1);
      const __m512i low = _mm512_permutex2var_epi8(low0, line, low1);
      high = _mm512_ternarylogic_epi32(high, line, sign, 0xf8);  // high | (line & sign)
      _mm512_store_si512(to + (2 * half) * column, _mm512_unpacklo_epi8(low, high));
      _mm512_store_si512(to + (2 * half + 1) * column, _mm512_unpackhi_epi8(low, high));
    }
  }
}

// Four finished tiles on their way into the fp32 sums.
struct Promotion {
  alignas(64) float tile[4][16][16];
  float* to[4];             // [16] rows of 64
  const float* scale_a[4];  // [16]
  float scale_b = 0;
  bool pending = false;

  // Row `row` of all four tiles.
  DSK_INLINE void row_of(const Promotion& p, int row) {
    for (int i = 0; i < 4; ++i) {
      float* c = p.to[i] + row * kPanel;
      const F32 scale = set1(p.scale_a[i][row] * p.scale_b);
      _mm512_store_ps(c, fma(scale, _mm512_load_ps(p.tile[i][row]), _mm512_load_ps(c)));
    }
  }
  DSK_INLINE void quarter(const Promotion& p, int64_t step) {
    for (int row = 0; row < 4; ++row) row_of(p, static_cast<int>(step) * 4 + row);
  }
};

// 32 rows x 32 columns; a0, a1 and b0, b1 advance by a tile per step.
DSK_INLINE void tiles_2x2(const uint16_t* a0, const uint16_t* a1, const uint16_t* b0,
                          const uint16_t* b1, int64_t steps, const Promotion& behind,
                          Promotion& out) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t step = 0; step < steps; ++step) {
    _tile_loadd(4, a0 + step * kTile, 64);
    _tile_loadd(6, b0 + step * kTile, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, b1 + step * kTile, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, a1 + step * kTile, 64);
    _tile_dpbf16ps(2, 5, 6);
    if (behind.pending) Promotion::quarter(behind, step);
    _tile_dpbf16ps(3, 5, 7);
  }
  for (int64_t step = steps; behind.pending && step < 4; ++step) Promotion::quarter(behind, step);
  _tile_stored(0, out.tile[0], 64);
  _tile_stored(1, out.tile[1], 64);
  _tile_stored(2, out.tile[2], 64);
  _tile_stored(3, out.tile[3], 64);
}

// 16 rows x 64 columns.
DSK_INLINE void tiles_1x4(const uint16_t* a, const uint16_t* b, int64_t column, int64_t steps,
                          const Promotion& behind, Promotion& out) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t step = 0; step < steps; ++step) {
    _tile_loadd(4, a + step * kTile, 64);
    _tile_loadd(5, b + step * kTile, 64);
    _tile_dpbf16ps(0, 4, 5);
    _tile_loadd(6, b + column + step * kTile, 64);
    _tile_dpbf16ps(1, 4, 6);
    _tile_loadd(7, b + 2 * column + step * kTile, 64);
    _tile_dpbf16ps(2, 4, 7);
    if (behind.pending) Promotion::quarter(behind, step);
    _tile_loadd(5, b + 3 * column + step * kTile, 64);
    _tile_dpbf16ps(3, 4, 5);
  }
  for (int64_t step = steps; behind.pending && step < 4; ++step) Promotion::quarter(behind, step);
  _tile_stored(0, out.tile[0], 64);
  _tile_stored(1, out.tile[1], 64);
  _tile_stored(2, out.tile[2], 64);
  _tile_stored(3, out.tile[3], 64);
}

static void tile_product(const PackedRows& rows, int64_t m0, int64_t m1, const Panel* panels,
                         int num_panels, float* const* c) {
  alignas(64) uint16_t weights[kMaxPanels][kScaleBlock * kPanel];
  const TileScope scope;
  Promotion ring[2];
  int current = 0;
  const uint16_t* a = static_cast<const uint16_t*>(rows.data);
  for (int64_t block = 0; block < rows.blocks; ++block) {
    const int64_t k0 = block * kScaleBlock, depth = min_of(kScaleBlock, rows.depth - k0);
    const int64_t steps = depth / 32, column = steps * kTile;
    for (int i = 0; i < num_panels; ++i) {
      tile_weights(panels[i].data + k0 * kPanel, depth, weights[i]);
    }
    const float* scale_a = rows.scale + block * rows.padded;
    for (int64_t m = m0; m < m1; m += 32) {
      const uint16_t* a0 = a + k0 * rows.padded + m / 16 * column;
      const uint16_t* a1 = a0 + column;
      const bool both = m + 16 < m1;
      for (int i = 0; i < num_panels; ++i) {
        float* to = c[i] + (m - m0) * kPanel;
        for (int pair = 0; pair < (both ? 2 : 1); ++pair) {
          Promotion& out = ring[current];
          const Promotion& behind = ring[current ^ 1];
          for (int t = 0; t < 4; ++t) {
            const int row = both ? t / 2 * 16 : 0, tile = both ? pair * 2 + t % 2 : t;
            out.to[t] = to + row * kPanel + tile * 16;
            out.scale_a[t] = scale_a + m + row;
          }
          out.scale_b = panels[i].scale[block * panels[i].scale_k];
          if (both) {
            const uint16_t* b = weights[i] + 2 * pair * column;
            tiles_2x2(a0, a1, b, b + column, steps, behind, out);
          } else {
            tiles_1x4(a0, weights[i], column, steps, behind, out);
          }
          out.pending = true;
          current ^= 1;
        }
      }
    }
  }
  const Promotion& last = ring[current ^ 1];
  for (int64_t step = 0; last.pending && step < 4; ++step) Promotion::quarter(last, step);
}

}  // namespace dsk::cpu::DSK_CPU_NS

#endif
