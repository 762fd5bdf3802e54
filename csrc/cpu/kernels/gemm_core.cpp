// Rows times panels: one loop over blocks of 128 k, and in it the unit's own kernel.
#include "cpu/kernels/gemm_core.hpp"

#include "cpu/kernels/gemm_dot.hpp"
#include "cpu/kernels/gemm_half.hpp"
#include "cpu/kernels/gemm_tiles.hpp"
#include "cpu/kernels/gemm_wide.hpp"

namespace dsk::cpu::DSK_CPU_NS {
namespace {

// Everything a unit needs to know of one block of 128 k.
struct Block {
  int64_t index, k0, depth;
  const float* scale_a;  // [padded]
};

Block block_at(const PackedRows& rows, int64_t index) {
  const int64_t k0 = index * kScaleBlock;
  return {index, k0, min_of(kScaleBlock, rows.depth - k0), rows.scale + index * rows.padded};
}

// The scales of a block's 64 columns: as they are, or one value spread out.
const float* column_scales(const Panel& panel, int64_t block, float* spread) {
  if (panel.column_scale != nullptr) return panel.column_scale + block * kPanel;
  const F32 scale = set1(panel.scale[block * panel.scale_k]);
  for (int64_t n = 0; n < kPanel; n += kLanes) store(spread + n, scale);
  return spread;
}

void wide_product(const PackedRows& rows, int64_t m0, int64_t m1, const Panel& panel, float* c) {
  alignas(64) float weights[kScaleBlock * kPanel], spread[kPanel];
  for (int64_t index = 0; index < rows.blocks; ++index) {
    const Block block = block_at(rows, index);
    widen_weights(panel.data + block.k0 * kPanel, block.depth, weights);
    const float* scale_b = column_scales(panel, index, spread);
    const float* a = static_cast<const float*>(rows.data) + block.k0;
    for (int64_t m = m0; m < m1; m += kWideRows) {
      const int64_t count = min_of<int64_t>(kWideRows, m1 - m);
      wide_rows(a + m * rows.depth, rows.depth, count, weights, block.depth, block.scale_a + m,
                scale_b, c + (m - m0) * kPanel);
    }
  }
}

#if defined(__AVX512FP16__) || defined(__AVX512BF16__)

// A block that the unit refuses, for at most kMostRefused rows: from the source, in fp32.
constexpr int64_t kMostRefused = 12;

[[gnu::noinline]] void refused_block(const PackedRows& rows, int64_t m, int64_t count,
                                     const Panel& panel, const Block& block, float* c) {
  alignas(64) float weights[kScaleBlock * kPanel], spread[kPanel];
  alignas(64) float values[kMostRefused * kScaleBlock];
  alignas(64) float scale[kMostRefused];
  widen_weights(panel.data + block.k0 * kPanel, block.depth, weights);
  Activations source = rows.source;
  for (int64_t i = 0; i < count; ++i) {
    scale[i] = source_block(source, m + i, block.index, values + i * kScaleBlock);
  }
  const float* scale_b = column_scales(panel, block.index, spread);
  for (int64_t i = 0; i < count; i += kWideRows) {
    wide_rows(values + i * kScaleBlock, kScaleBlock, min_of<int64_t>(kWideRows, count - i), weights,
              block.depth, scale + i, scale_b, c + i * kPanel);
  }
}

bool rows_refused(const PackedRows& rows, int64_t m, int64_t count, int64_t block) {
  bool refused = false;
  for (int64_t i = 0; i < count; ++i) refused |= rows.refused[block * rows.padded + m + i] != 0;
  return refused;
}

#endif

#if defined(__AVX512BF16__)

void dot_product(const PackedRows& rows, int64_t m0, int64_t m1, const Panel& panel, float* c) {
  alignas(64) uint16_t converted[kScaleBlock * kPanel];
  alignas(64) float spread[kPanel];
  const bool stream = m1 - m0 <= kMostStream;
  const int64_t step = stream ? kStreamRows : kDotRows;
  for (int64_t index = 0; index < rows.blocks; ++index) {
    const Block block = block_at(rows, index);
    const uint8_t* packed = panel.data + block.k0 * kPanel;
    if (!stream) pair_weights(packed, block.depth, converted);
    const float* scale_b = column_scales(panel, index, spread);
    for (int64_t m = m0; m < m1; m += step) {
      const int64_t count = min_of(step, m1 - m);
      float* to = c + (m - m0) * kPanel;
      if (rows_refused(rows, m, count, index)) [[unlikely]] {
        refused_block(rows, m, count, panel, block, to);
        continue;
      }
      const uint16_t* a = static_cast<const uint16_t*>(rows.data) + m * rows.depth + block.k0;
      const float* scale_a = block.scale_a + m;
      if (stream) {
        dot_rows<true>(a, rows.depth, count, packed, block.depth, scale_a, scale_b, to);
      } else {
        dot_rows<false>(a, rows.depth, count, converted, block.depth, scale_a, scale_b, to);
      }
    }
  }
}

#endif

#if defined(__AVX512FP16__)

static_assert(kGroup <= kMostRefused);

bool is_refused(const PackedRows& rows, int64_t m, int64_t count, const Panel& panel,
                int64_t block) {
  return panel.nan_blocks[block] != 0 || rows_refused(rows, m, count, block);
}

void half_product(const PackedRows& rows, int64_t m0, int64_t m1, const Panel& panel, float* c) {
  // With more than one group the conversion of the weights is shared by all of them.
  alignas(64) uint16_t converted[kScaleBlock * kPanel];
  const bool share = m1 - m0 > kGroup;
  for (int64_t index = 0; index < rows.blocks; ++index) {
    const Block block = block_at(rows, index);
    const uint8_t* weights = panel.data + block.k0 * kPanel;
    if (share) halve_weights(weights, block.depth, converted);
    const float scale_b = panel.scale[index * panel.scale_k];
    for (int64_t m = m0; m < m1; m += kGroup) {
      const int64_t count = min_of(kGroup, m1 - m), width = group_width(min_of(kGroup, rows.m - m));
      float* to = c + (m - m0) * kPanel;
      if (is_refused(rows, m, count, panel, index)) [[unlikely]] {
        refused_block(rows, m, count, panel, block, to);
        continue;
      }
      const uint32_t* a =
          static_cast<const uint32_t*>(rows.data) + m * rows.depth + block.k0 * width;
      half_rows(width, share ? nullptr : weights, converted, a, block.depth, block.scale_a + m,
                scale_b, to);
    }
  }
}

#endif

}  // namespace

void panel_product(const PackedRows& rows, int64_t m0, int64_t m1, const Panel* panels,
                   int num_panels, float* const* c) {
  const uint64_t bytes = static_cast<uint64_t>(round_up(m1 - m0, 32)) * kPanel * sizeof(float);
  for (int i = 0; i < num_panels; ++i) std::memset(c[i], 0, bytes);
#if defined(__AMX_BF16__)
  if (rows.format == Format::kTiles) return tile_product(rows, m0, m1, panels, num_panels, c);
#endif
  for (int i = 0; i < num_panels; ++i) {
#if defined(__AVX512FP16__)
    if (rows.format == Format::kHalf) {
      half_product(rows, m0, m1, panels[i], c[i]);
      continue;
    }
#endif
#if defined(__AVX512BF16__)
    if (rows.format == Format::kDot) {
      dot_product(rows, m0, m1, panels[i], c[i]);
      continue;
    }
#endif
    wide_product(rows, m0, m1, panels[i], c[i]);
  }
}

}  // namespace dsk::cpu::DSK_CPU_NS
