// The product of activations with panels of packed FP8 weights, shared by gemm and moe.
//
//   final[m, n] = sum over blocks of 128 k:  scale_a[m] * scale_b * (sum of the block's products)
//
// The inner sum runs on the fastest unit the target has, the outer one in fp32 ("promotion"):
//   tiles  AMX-BF16: E4M3 and BF16 are exact in bf16, products and sums are fp32
//   half   AVX512-FP16: chains of 32 products in fp16 (see kHalf below for the range argument)
//   dot    AVX512-BF16: pairs of bf16, products and sums are fp32
//   wide   fp32 FMA: every other target, and what the half path falls back on
#pragma once

#include "cpu/packed.hpp"
#include "cpu/parallel.hpp"

namespace dsk::cpu::DSK_CPU_NS {

// Rows of activations as they come: e4m3 with scales [m, blocks], or bf16, fp16 or fp32.
struct Activations {
  Matrix x;                       // [rows, k]
  Scales scale;                   // e4m3 only
  const int64_t* rows = nullptr;  // row i of the product reads x row rows[i]; null: i
  int64_t m = 0, k = 0;
  // The panels they will meet have a scale per column and block: what the dot and wide units do.
  bool column_scales = false;
};

enum class Format { kTiles, kHalf, kDot, kWide };

// The same rows in the order of one unit. Memory belongs to the caller (see bytes()).
//   kTiles  bf16 [blocks][m / 16][4 steps of 32 k][16][32], rows padded to 32 with zeros: what one
//           block of weights meets is one stream
//   kHalf   fp16 pairs {x, x} [group][depth][rows of the group]; groups of kGroup rows
//   kDot    bf16 [m][depth]
//   kWide   fp32 [m][depth]
// scale [blocks][padded m] holds scale_a, divided by the power of two that kHalf multiplied a
// block by; refused [blocks][padded m] (kHalf, kDot) marks blocks that the unit cannot hold.
struct PackedRows {
  Format format = Format::kWide;
  Activations source;
  int64_t m = 0, padded = 0, depth = 0, blocks = 0;
  void* data = nullptr;
  float* scale = nullptr;
  uint8_t* refused = nullptr;
};

PackedRows plan_rows(const Activations& source);
uint64_t packed_bytes(const PackedRows& rows);
// Places the arrays in memory of packed_bytes(); pack_rows then fills rows [m0, m1), m0 a multiple
// of kRowStep, so that threads can share the work.
void place_rows(PackedRows& rows, void* memory);
constexpr int64_t kRowStep = 48;  // a multiple of a tile's 16 rows and of a group's 12
void pack_rows(PackedRows& rows, int64_t m0, int64_t m1);

// One block of a source row as fp32, zeros behind its end; returns its scale.
float source_block(const Activations& a, int64_t row, int64_t block, float* values);

struct Panel {
  const uint8_t* data = nullptr;        // depth * 64 bytes
  const uint8_t* nan_blocks = nullptr;  // [blocks]
  const float* scale = nullptr;         // of the panel's rows; one per block, stride scale_k
  int64_t scale_k = 0;
  const float* column_scale = nullptr;  // or one per block and column: [blocks][64]
};

// c[i] [m1 - m0 rounded up to 32][64] fp32 = rows [m0, m1) times panels[i]; m0 a multiple of
// kRowStep. At most kMaxPanels at a time share one pass over the activations.
constexpr int kMaxPanels = 4;
void panel_product(const PackedRows& rows, int64_t m0, int64_t m1, const Panel* panels,
                   int num_panels, float* const* c);

}  // namespace dsk::cpu::DSK_CPU_NS
