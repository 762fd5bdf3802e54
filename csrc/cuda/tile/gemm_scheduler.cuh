// Which output tile comes next: the only thing in which dense, grouped, masked and k-grouped GEMM
// differ. A persistent CTA (or cluster) takes tiles i, i + count, i + 2 count, ... in an order that
// keeps the tiles under way at one time close together, so that they share operands in L2.
//
// Groups and clusters are run-time values: they cost a few instructions a tile, and one instance of
// a kernel serves every kind of grouping.
#pragma once

#include <cstdint>

#include "cuda/params/gemm.hpp"
#include "cuda/ptx/cluster.cuh"
#include "cuda/tile/arrival.cuh"

namespace dsk {

struct GemmTile {
  int a_row;    // first row of A (and of D, unless groups lie along k)
  int row_end;  // one past the last row that this tile may write
  int n_start;  // first column of D
  int group;    // expert: B and its scales start at group * n
  int plane;    // kMasked: the group whose plane of A's scales is read; else 0
  int row;      // first row within that plane
  int k_begin;  // blocks along k
  int k_end;
};

constexpr int kNoMoreTiles = -1;  // as a tile's group

template <int kBlockM, int kBlockN, int kBlockK>
class GemmScheduler {
 public:
  __device__ explicit GemmScheduler(const GemmExtent& extent)
      : extent_(extent), next_(ptx::cluster_id()) {}

  // The next tile of this CTA; false when there is none. Every role of the CTA sees the same tiles.
  __device__ bool next(GemmTile& tile) {
    if (extent_.kind == GroupKind::kDense) {  // nothing to look up: the first load waits for this
      if (next_ >= blocks_of_rows(extent_.m) * blocks_of_columns()) return false;
      locate(tile, next_, extent_.m);
      tile.a_row = tile.row;
      tile.row_end = extent_.m;
      tile.group = tile.plane = 0;
      slice_k(tile, 0, extent_.k);
    } else if (!next_in_groups(tile)) {
      return false;
    }
    next_ += ptx::num_clusters();
    return true;
  }

 private:
  // Of sizes: unsigned, which spares a correction of the sign before each shift.
  __device__ static int ceil_div(unsigned a, unsigned b) { return int((a + b - 1) / b); }

  // Blocks, or pairs of blocks where the cluster is a pair of this kind.
  __device__ int halved(int blocks, ClusterUse pair) const {
    return extent_.cluster == pair ? ceil_div(blocks, 2) : blocks;
  }
  __device__ int blocks_of_rows(int rows) const {
    return halved(ceil_div(rows, kBlockM), ClusterUse::kSharedB);
  }
  __device__ int blocks_of_columns() const {
    return halved(ceil_div(extent_.n, kBlockN), ClusterUse::kSharedA);
  }

  __device__ bool next_in_groups(GemmTile& tile) {
    const int num_groups = extent_.runs ? __ldg(extent_.runs) : extent_.num_groups;
    while (group_ < num_groups) {
      const int size = group_size();
      const int tiles = num_tiles(size);
      if (next_ < first_tile_ + tiles) {
        place(tile, next_ - first_tile_, size);
        return true;
      }
      first_tile_ += tiles;
      start_ += size;
      ++group_;
    }
    return false;
  }

  // Rows of the group, or its share of k.
  __device__ int group_size() const {
    if (extent_.runs) return __ldg(run() + 1) - __ldg(run());
    if (extent_.arrived) return await_rows(extent_.arrived + group_);
    if (extent_.group_rows) return __ldg(extent_.group_rows + group_);
    return extent_.kind == GroupKind::kAlongK ? extent_.k : extent_.m;
  }

  __device__ const int32_t* run() const { return extent_.runs + 1 + 3 * group_; }

  __device__ int num_tiles(int size) const {
    if (extent_.kind != GroupKind::kAlongK) return blocks_of_rows(size) * blocks_of_columns();
    if (size == 0 && extent_.skip_empty) return 0;
    // The group's first block would hold its neighbour's values: a caller's error.
    if (extent_.group_rows && size % kBlockK != 0) __trap();
    return blocks_of_rows(extent_.m) * blocks_of_columns();
  }

  // Tile `index` of the group: bands of m blocks, walked before the next n block. Sets n_start, and
  // row, within the group.
  __device__ void locate(GemmTile& tile, unsigned index, int rows) const {
    const int num_m_blocks = blocks_of_rows(rows);
    int m_block = 0, n_block = index;
    if (num_m_blocks != 1) {  // else no divisions
      const unsigned band_tiles = extent_.raster * blocks_of_columns();
      const unsigned band = index / band_tiles;
      const unsigned first = band * extent_.raster;
      const unsigned band_blocks = min(extent_.raster, int(num_m_blocks - first));
      const unsigned within = index - band * band_tiles;
      m_block = first + within % band_blocks;
      n_block = within / band_blocks;
    }
    if (extent_.cluster == ClusterUse::kSharedB) m_block = m_block * 2 + ptx::cluster_rank();
    if (extent_.cluster == ClusterUse::kSharedA) n_block = n_block * 2 + ptx::cluster_rank();
    tile.row = m_block * kBlockM;
    tile.n_start = n_block * kBlockN;
  }

  __device__ void place(GemmTile& tile, int index, int size) const {
    const bool along_k = extent_.kind == GroupKind::kAlongK;
    const bool masked = extent_.kind == GroupKind::kMasked;
    const int rows = along_k ? extent_.m : size;
    const int start = along_k        ? 0
                      : masked       ? group_ * extent_.m
                      : extent_.runs ? __ldg(run())
                                     : start_;
    locate(tile, index, rows);
    tile.a_row = start + tile.row;
    tile.row_end = start + rows;
    tile.group = extent_.runs ? __ldg(run() + 2) : group_;
    tile.plane = masked ? group_ : 0;
    if (!masked) tile.row = tile.a_row;
    slice_k(tile, along_k ? start_ / kBlockK : 0, along_k ? size : extent_.k);
  }

  __device__ void slice_k(GemmTile& tile, int first_block, int size) const {
    const int k_blocks = ceil_div(size, kBlockK);
    tile.k_begin = first_block;
    tile.k_end = first_block + k_blocks;
    if (extent_.cluster == ClusterUse::kSplitK) {
      const int begin = min(ptx::cluster_rank() * extent_.k_share, k_blocks);
      tile.k_begin += begin;
      tile.k_end = first_block + min(begin + extent_.k_share, k_blocks);
    }
  }

  const GemmExtent& extent_;
  int next_;
  int group_ = 0;
  int first_tile_ = 0;
  int start_ = 0;
};

// Whether D's tensor map ends where the tile's rows do: then TMA itself drops the rows behind.
__device__ __forceinline__ bool ends_with_map(const GemmExtent& extent, const GemmTile& tile) {
  const bool rows = extent.kind == GroupKind::kDense || extent.kind == GroupKind::kRows;
  return rows && tile.row_end == extent.m;
}

}  // namespace dsk
