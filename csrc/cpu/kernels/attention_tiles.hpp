// The two products of attention_pairs.hpp on AMX tiles.
#pragma once

#if defined(__AMX_BF16__)

#include "cpu/kernels/attention_pairs.hpp"
#include "cpu/kernels/tile_scope.hpp"

namespace dsk::cpu::DSK_CPU_NS {

using PairScope = TileScope;

// scores^T [n keys][kRowTiles * 16] for n a multiple of 32.
template <int kRowTiles>
DSK_INLINE void score_block(const PairBuffers& b, const KeyTile* keys, const uint16_t* q, int64_t n,
                            float* scores) {
  const int64_t steps = b.depth / 32;
  constexpr int kStride = kRowTiles * 64;
  for (int64_t i = 0; i < n; i += 32) {
    const KeyTile k0 = keys[i / 16], k1 = keys[i / 16 + 1];
    const char* a0 = static_cast<const char*>(k0.data);
    const char* a1 = static_cast<const char*>(k1.data);
    _tile_zero(0);
    _tile_zero(2);
    if constexpr (kRowTiles == 2) {
      _tile_zero(1);
      _tile_zero(3);
    }
    for (int64_t step = 0; step < steps; ++step) {
      _tile_loadd(4, a0 + step * 64, k0.stride);
      _tile_loadd(6, q + step * kTile, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(5, a1 + step * 64, k1.stride);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (kRowTiles == 2) {
        _tile_loadd(7, q + (steps + step) * kTile, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
    float* to = scores + i * kRowTiles * 16;
    _tile_stored(0, to, kStride);
    _tile_stored(2, to + 16 * kRowTiles * 16, kStride);
    if constexpr (kRowTiles == 2) {
      _tile_stored(1, to + 16, kStride);
      _tile_stored(3, to + 16 * kRowTiles * 16 + 16, kStride);
    }
  }
}

// out [kRowTiles * 16][width] += weights times values.
template <int kRowTiles>
DSK_INLINE void weigh_values(const PairBuffers& b, const uint16_t* weights, int64_t steps,
                             float* out) {
  const int64_t stride = b.width * 4, column = kSteps * kTile;
  if constexpr (kRowTiles == 2) {
    for (int64_t d = 0; d < b.width; d += 32) {
      float* c = out + d;
      float* below = c + 16 * b.width;
      _tile_loadd(0, c, stride);
      _tile_loadd(1, c + 16, stride);
      _tile_loadd(2, below, stride);
      _tile_loadd(3, below + 16, stride);
      const uint16_t* v = b.values + d / 16 * column;
      for (int64_t step = 0; step < steps; ++step) {
        _tile_loadd(4, weights + step * kTile, 64);
        _tile_loadd(6, v + step * kTile, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, v + column + step * kTile, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, weights + (kSteps + step) * kTile, 64);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
      _tile_stored(0, c, stride);
      _tile_stored(1, c + 16, stride);
      _tile_stored(2, below, stride);
      _tile_stored(3, below + 16, stride);
    }
  } else {
    for (int64_t d = 0; d < b.width; d += 64) {
      float* c = out + d;
      _tile_loadd(0, c, stride);
      _tile_loadd(1, c + 16, stride);
      _tile_loadd(2, c + 32, stride);
      _tile_loadd(3, c + 48, stride);
      const uint16_t* v = b.values + d / 16 * column;
      for (int64_t step = 0; step < steps; ++step) {
        _tile_loadd(4, weights + step * kTile, 64);
        _tile_loadd(5, v + step * kTile, 64);
        _tile_dpbf16ps(0, 4, 5);
        _tile_loadd(6, v + column + step * kTile, 64);
        _tile_dpbf16ps(1, 4, 6);
        _tile_loadd(7, v + 2 * column + step * kTile, 64);
        _tile_dpbf16ps(2, 4, 7);
        _tile_loadd(5, v + 3 * column + step * kTile, 64);
        _tile_dpbf16ps(3, 4, 5);
      }
      _tile_stored(0, c, stride);
      _tile_stored(1, c + 16, stride);
      _tile_stored(2, c + 32, stride);
      _tile_stored(3, c + 48, stride);
    }
  }
}

}  // namespace dsk::cpu::DSK_CPU_NS

#endif
