// The loop over blocks of keys of attention_pairs.hpp, on the target's unit.
#pragma once

#include "cpu/kernels/attention_dot.hpp"
#include "cpu/kernels/attention_tiles.hpp"

#if defined(__AMX_BF16__) || defined(__AVX512BF16__)

namespace dsk::cpu::DSK_CPU_NS {

template <int kRowTiles>
DSK_INLINE void attend_rows(const AttentionTask& t, const AttentionState& s, const PairBuffers& b,
                            const KeyTile* keys, int64_t r0, int64_t k0, int64_t n) {
  alignas(64) float scores[kTokens * kRowTiles * 16];
  alignas(64) uint16_t weights[kRowTiles][kSteps * kPairTile];
  alignas(64) float correction[16];
  score_block<kRowTiles>(b, keys, b.queries + r0 / 16 * (b.depth / 32) * kPairTile, n, scores);
  for (int i = 0; i < kRowTiles; ++i) {
    const int64_t row = r0 + i * 16;
    const __mmask16 rose =
        soften_tile(t, s, row, k0, n, scores + i * 16, kRowTiles * 16, weights[i], correction);
    if (rose) rescale(s.out + row * b.width, b.width, rose, correction);
  }
  weigh_values<kRowTiles>(b, weights[0], n / 32, s.out + r0 * b.width);
}

static void attend_pairs(const AttentionTask& t, const AttentionState& s) {
  PairBuffers b;
  b.depth = round_up(t.kv.dk, 32);
  b.width = AttentionState::width(t.kv.dv);
  const int64_t rows = round_up(t.rows, 32);
  const bool scaled = kScaleScores && t.kv.kind == CacheKind::kFP8Rows;
  b.latents = scaled ? t.kv.dv : 0;
  b.tiles = scaled ? ceil_div(t.kv.dv, kScaleBlock) : 0;
  const int64_t words =
      rows * b.depth + kTokens * (b.depth + 64) + 2 * kTokens * b.width + 2 * kTokens * b.tiles;
  b.queries = static_cast<uint16_t*>(scratch(2, static_cast<uint64_t>(words) * 2));
  b.values = b.queries + rows * b.depth;
  b.spare = b.values + kTokens * b.width;
  b.gathered = b.spare + kTokens * b.width;
  b.scales = reinterpret_cast<float*>(b.gathered + kTokens * (b.depth + 64));
  pack_queries(t, b);
  [[maybe_unused]] const PairScope scope;
  for (int64_t k0 = t.begin; k0 < t.end; k0 += kTokens) {
    const int64_t n = min_of(kTokens, round_up(t.end - k0, 32));
    KeyTile keys[kTokens / 16];
    for (int64_t i = 0; i < n; i += 16) keys[i / 16] = key_tile(t, b, k0, i);
    pack_values(t, b, keys, k0, n);
    for (int64_t r0 = 0; r0 < t.rows; r0 += 32) {
      if (t.rows - r0 > 16) {
        attend_rows<2>(t, s, b, keys, r0, k0, n);
      } else {
        attend_rows<1>(t, s, b, keys, r0, k0, n);
      }
    }
  }
  reorder(s.out, t.rows, b.width);
}

}  // namespace dsk::cpu::DSK_CPU_NS

#endif
