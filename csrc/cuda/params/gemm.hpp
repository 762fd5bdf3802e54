// Parameters of the GEMM kernels.
#pragma once

#include <cstdint>

#include "cuda/params/tensor_map.hpp"

namespace dsk {

enum class ElementType : int32_t { kBfloat16, kFloat32, kE4m3 };  // kE4m3: with scales

// How rows, or k, are divided among the groups.
enum class GroupKind : int32_t {
  kDense,   // one group of all rows
  kRows,    // groups are runs of rows of A, of any length
  kMasked,  // groups have m rows each, of which the first few count
  kAlongK,  // groups are ranges of k, in multiples of BLOCK_K
};

// What the CTAs of a cluster have in common. A pair shares a double tile; its second half may lie
// behind the end of the group or of D, and is then computed for nothing.
enum class ClusterUse : int32_t {
  kNone,
  kSharedA,  // two CTAs, side by side: each loads half of A's tile for both
  kSharedB,  // two CTAs, one above the other: each loads half of B's tile for both
  kSplitK,   // one tile; each CTA sums its share of k
};

// What is multiplied, and in what order. G = num_groups (1 when dense).
struct GemmExtent {
  const int32_t* group_rows;  // [G] rows (or share of k) of each group, on the device; null: dense
  const int32_t* runs;        // groups given row by row: see GemmRunsParams; else null
  int32_t* arrived;           // kMasked, instead of group_rows: see tile/arrival.cuh; else null
  int32_t m;                  // rows of A (kMasked: of each group; kAlongK: of D)
  int32_t n;
  int32_t k;
  int32_t num_groups;
  GroupKind kind;
  ClusterUse cluster;
  int32_t raster;   // blocks of rows that are walked before the next block of columns
  int32_t k_share;  // kSplitK: blocks of k for each CTA of a cluster, the last one's may be fewer
  int32_t skip_empty;  // kAlongK: D already holds what an empty group leaves there

  // CTAs that load for each other.
#ifdef __CUDACC__
  __device__ __forceinline__
#endif
      int sharers() const {
    return cluster == ClusterUse::kSharedA || cluster == ClusterUse::kSharedB ? 2 : 1;
  }
};

// Finds the groups in a list of each row's group: runs[0] = number of runs of equal entries >= 0,
// then for each run its first row, the row behind its last, and its group.
struct GemmRunsParams {
  const int32_t* m_indices;  // [rows], -1 for rows of no group
  int32_t* runs;             // [1 + 3 * rows]
  int32_t rows;
};

// Where D = A * B^T (+ C) (+ bias) goes. Sums are fp32, rounded once when they are stored.
struct GemmResult {
  TensorMapBytes
      map;        // D as [rows, n] bf16, box [rows of a store, 64], 128B swizzle; unused for fp32
  void* d;        // [rows, n] contiguous
  const void* c;  // [rows, n] contiguous, or null
  const void* bias;  // [G, n] contiguous, or null
  float* scale;      // of a quantised D: [G or 1 * ceil(n / 128), rows] fp32, else null
  int64_t ld_scale;  // floats
  ElementType d_type;
  ElementType c_type;
  ElementType bias_type;

  // bf16, and nothing is added.
#ifdef __CUDACC__
  __device__ __forceinline__
#endif
      bool plain() const {
    return !c && !bias && d_type == ElementType::kBfloat16;
  }
};

// FP8 GEMM. Boxes are those of the tiles: BLOCK_M rows of A (and its scales), BLOCK_N of B.
struct GemmFp8Params {
  TensorMapBytes a;    // [rows of A, k] e4m3, box [BLOCK_M, 128], 128B swizzle
  TensorMapBytes b;    // [G * n, k] e4m3, box [BLOCK_N, 128], 128B swizzle
  TensorMapBytes sfa;  // [G or 1 * ceil(k / 128), rows] fp32, box [1, BLOCK_M]
  // 1x128 scales of B: [ceil(k / 128), n] fp32, box [1, BLOCK_N]. 128x128 scales of B: all of [G,
  // ceil(n / 128), ceil(k / 128)] fp32 in one row, box [1, 4], the first at sfb_offset.
  TensorMapBytes sfb;
  GemmResult result;
  GemmExtent extent;
  int32_t sfb_offset;
};

// BF16 GEMM. Boxes are those of the tiles, 64 values of BLOCK_M rows of A or BLOCK_N of B.
struct GemmBf16Params {
  TensorMapBytes a;  // [rows of A, k] bf16, 128B swizzle
  TensorMapBytes b;  // [G * n, k] bf16 (along k: [n, k]), 128B swizzle
  GemmResult result;
  GemmExtent extent;
};

}  // namespace dsk
