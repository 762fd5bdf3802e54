// The AMX unit: tiles of 16 rows x 32 k (activations) times 32 k x 16 columns (weights) into
// 16 x 16 fp32 sums, 16 cycles each.
//
// Per block of 128 k: weights become bf16 tiles in L1 once for all rows, then 2 x 2 tiles (or
// 1 x 4 for a last odd tile of rows) are multiplied. Promotion, sum = fma(scale, tile, sum), runs
// on the vector units one step behind, a few rows between every two tile products, so that both
// units work at once. AMX treats bf16 subnormals (below 1.2e-38) as zeros.
#pragma once

#if defined(__AMX_BF16__)

#include "cpu/kernels/bf16_pairs.hpp"
#include "cpu/kernels/gemm_core.hpp"
#include "cpu/kernels/tile_scope.hpp"

namespace dsk::cpu::DSK_CPU_NS {

// depth x 64 packed weights -> bf16 tiles [4 tiles of 16 columns][depth / 32][16 pairs of k][32].
DSK_INLINE void tile_weights(const uint8_t* packed, int64_t depth, uint16_t* tiles) {
  const Bf16Lookup lookup;
  const int64_t column = depth / 32 * kTile;
  for (int64_t k = 0; k < depth; k += 2) {
    uint16_t* to = tiles + k / 32 * kTile + k % 32 / 2 * 32;
    for (int half = 0; half < 2; ++half) {
      const uint8_t* from = packed + k * kPanel + half * 64;
      const __m512i line = _mm512_loadu_si512(from);
      _mm_prefetch(reinterpret_cast<const char*>(from + 2 * kScaleBlock * kPanel), _MM_HINT_T0);
      __m512i left, right;
      lookup.pairs(line, left, right);
      _mm512_store_si512(to + (2 * half) * column, left);
      _mm512_store_si512(to + (2 * half + 1) * column, right);
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
