// The tile registers of a thread, set up for 16 x 64 bytes each.
#pragma once

#if defined(__AMX_BF16__)

#include "cpu/simd.hpp"

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

}  // namespace dsk::cpu::DSK_CPU_NS

#endif
