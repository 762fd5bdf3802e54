// Which output tile comes next: the only thing in which dense, grouped contiguous, masked and
// k-grouped GEMM differ. A persistent CTA (or cluster) takes tiles i, i + count, i + 2 count, ...
// in an order that keeps the tiles under way at one time close together, so that they share
// operands in L2.
#pragma once

#include <cstdint>

#include "cuda/params/gemm.hpp"
#include "cuda/ptx/cluster.cuh"

namespace dsk {

enum class GroupKind {
  kDense,
  kContiguous,  // groups are runs of rows of A, of any length
  kMasked,      // groups have extent.m rows each, of which the first few count
  kAlongK,      // groups are ranges of k, in multiples of BLOCK_K
};

// What the CTAs of a cluster have in common. A pair shares a double tile; its second half may lie
// behind the end of the group or of D, and is then computed for nothing.
enum class ClusterUse {
  kNone,
  kSharedA,  // two CTAs, side by side: each loads half of A's tile for both
  kSharedB,  // two CTAs, one above the other: each loads half of B's tile for both
  kSplitK,   // one tile; each CTA sums its share of k
};

struct GemmTile {
  int a_row;    // first row of A (and of D, unless groups lie along k)
  int row_end;  // one past the last row that this tile may write
  int n_start;  // first column of D
  int group;    // expert: B and its scales start at group * n
  int plane;    // masked: the group whose plane of A's scales is read; else 0
  int row;      // first row within that plane
  int k_begin;  // blocks along k
  int k_end;
};

template <GroupKind kKind, int kBlockM, int kBlockN, int kBlockK,
          ClusterUse kCluster = ClusterUse::kNone>
class GemmScheduler {
 public:
  __device__ explicit GemmScheduler(const GemmExtent& extent)
      : extent_(extent), num_n_blocks_(ceil_div(extent.n, kColumns)), next_(first_index()) {}

  // The next tile of this CTA; false when there is none. Every role of the CTA sees the same tiles.
  __device__ bool next(GemmTile& tile) {
    if constexpr (kKind == GroupKind::kDense) {
      if (next_ >= ceil_div(extent_.m, kRows) * num_n_blocks_) return false;
      place(tile, next_, 0, extent_.m);
      slice_k(tile);
    } else {
      while (true) {
        if (group_ >= num_groups()) return false;
        const int size = group_size();
        const int tiles = num_tiles(size);
        if (next_ < first_tile_ + tiles) {
          place_in_group(tile, next_ - first_tile_, size);
          break;
        }
        first_tile_ += tiles;
        start_ += size;
        ++group_;
      }
    }
    next_ += gridDim.x / cluster_size();
    return true;
  }

 private:
  // Rows and columns that the CTAs of a cluster cover together.
  static constexpr int kRows = kCluster == ClusterUse::kSharedB ? 2 * kBlockM : kBlockM;
  static constexpr int kColumns = kCluster == ClusterUse::kSharedA ? 2 * kBlockN : kBlockN;

  __device__ static int ceil_div(int a, int b) { return (a + b - 1) / b; }

  __device__ static int cluster_size() {
    if constexpr (kCluster == ClusterUse::kNone) return 1;
    return kCluster == ClusterUse::kSplitK ? ptx::cluster_size() : 2;
  }

  __device__ static int first_index() { return blockIdx.x / cluster_size(); }

  __device__ bool by_runs() const { return kKind == GroupKind::kContiguous && extent_.runs; }

  __device__ int num_groups() const { return by_runs() ? __ldg(extent_.runs) : extent_.num_groups; }

  // Rows of the group, or its share of k.
  __device__ int group_size() const {
    if (by_runs()) return __ldg(run() + 1) - __ldg(run());
    // One group without sizes has all of k, or all rows: the dense product.
    if (!extent_.group_rows) return kKind == GroupKind::kAlongK ? extent_.k : extent_.m;
    return __ldg(extent_.group_rows + group_);
  }

  __device__ const int32_t* run() const { return extent_.runs + 1 + 3 * group_; }

  __device__ int num_tiles(int size) const {
    if constexpr (kKind != GroupKind::kAlongK) return ceil_div(size, kRows) * num_n_blocks_;
    if (size == 0 && extent_.skip_empty) return 0;
    // The group's first block would hold its neighbour's values: a caller's error.
    if (extent_.group_rows && size % kBlockK != 0) __trap();
    return ceil_div(extent_.m, kRows) * num_n_blocks_;
  }

  __device__ void place_in_group(GemmTile& tile, int index, int size) const {
    if constexpr (kKind == GroupKind::kAlongK) {
      place(tile, index, 0, extent_.m);
      tile.k_begin = start_ / kBlockK;
      tile.k_end = tile.k_begin + ceil_div(size, kBlockK);
    } else {
      const int start = kKind == GroupKind::kMasked ? group_ * extent_.m
                        : by_runs()                 ? __ldg(run())
                                                    : start_;
      place(tile, index, start, size);
      tile.k_begin = 0;
      tile.k_end = ceil_div(extent_.k, kBlockK);
    }
    tile.group = by_runs() ? __ldg(run() + 2) : group_;
    tile.plane = kKind == GroupKind::kMasked ? group_ : 0;
    if (kKind == GroupKind::kMasked) tile.row = tile.a_row - group_ * extent_.m;
  }

  // Tile `index` of `rows` rows from `start` on: bands of m blocks, walked before the next n block.
  __device__ void place(GemmTile& tile, int index, int start, int rows) const {
    const int num_m_blocks = ceil_div(rows, kRows);
    const int band = index / (extent_.raster * num_n_blocks_);
    const int band_blocks = min(extent_.raster, num_m_blocks - band * extent_.raster);
    const int within = index - band * extent_.raster * num_n_blocks_;
    const int m_block = band * extent_.raster + within % band_blocks;
    tile.a_row = start + m_block * kRows;
    if constexpr (kCluster == ClusterUse::kSharedB) tile.a_row += ptx::cluster_rank() * kBlockM;
    tile.row_end = start + rows;
    tile.n_start = within / band_blocks * kColumns;
    if constexpr (kCluster == ClusterUse::kSharedA) tile.n_start += ptx::cluster_rank() * kBlockN;
    tile.group = 0;
    tile.plane = 0;
    tile.row = tile.a_row;
  }

  __device__ void slice_k(GemmTile& tile) const {
    const int k_blocks = ceil_div(extent_.k, kBlockK);
    tile.k_begin = 0;
    tile.k_end = k_blocks;
    if constexpr (kCluster == ClusterUse::kSplitK) {
      const int share = ceil_div(k_blocks, ptx::cluster_size());
      tile.k_begin = min(ptx::cluster_rank() * share, k_blocks);
      tile.k_end = min(tile.k_begin + share, k_blocks);
    }
  }

  const GemmExtent& extent_;
  int num_n_blocks_;
  int next_;
  int group_ = 0;
  int first_tile_ = 0;
  int start_ = 0;
};

}  // namespace dsk
