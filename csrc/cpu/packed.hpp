// Packed FP8 weights: the order in which every target streams them. One byte per weight; the file
// format of dskernels.cpu.pack, so it depends on no target.
//
// A matrix [n, k] is cut into panels of 64 rows (columns of the product), n and k padded with
// zeros to multiples of 64 and 32. A panel is one stream: for each pair of k, two lines of 64
// bytes, each holding 32 n as 16-bit words (k in the low byte, k + 1 in the high byte):
//
//   * AVX512-FP16 splits a line into two vectors of 32 n with five shifts and masks;
//   * AMX looks both bytes of a bf16 up per weight and interleaves them: because word w of a line
//     holds n = word_column(w), the two interleaved halves are rows of two B tiles, in order.
#pragma once

#include <cstdint>

namespace dsk::cpu {

constexpr int64_t kPanel = 64;        // n of a panel
constexpr int64_t kScaleBlock = 128;  // k and n that share a weight scale
constexpr int64_t kDepthStep = 32;    // k is padded to this: the depth of an AMX tile

constexpr int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

constexpr int word_column(int word) { return word % 8 / 4 * 16 + word / 8 * 4 + word % 4; }

struct PackedShape {
  int64_t n, k;

  constexpr int64_t depth() const { return round_up(k, kDepthStep); }
  constexpr int64_t panels() const { return round_up(n, kPanel) / kPanel; }
  constexpr int64_t blocks() const { return (k + kScaleBlock - 1) / kScaleBlock; }
  constexpr int64_t panel_bytes() const { return depth() * kPanel; }
  constexpr int64_t bytes() const { return panels() * panel_bytes(); }
};

// b [n, k] e4m3 with row stride -> packed. nan_blocks [panels, blocks]: 1 where a NaN is inside.
// unpack is its inverse.
void pack(const uint8_t* b, int64_t stride, PackedShape shape, uint8_t* packed, uint8_t* nan_blocks,
          int threads);
void unpack(const uint8_t* packed, PackedShape shape, uint8_t* b, int64_t stride, int threads);

}  // namespace dsk::cpu
