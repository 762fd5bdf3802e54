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
      : extent_(extent), next_(ptx::cluster_id()) {
    num_n_blocks_ = halved(ceil_div(extent.n, kBlockN), ClusterUse::kSharedA);
  }

  // The next tile of this CTA; false when there is none. Every role of the CTA sees the same tiles.
  __device__ bool next(GemmTile& tile) {
    const int num_groups = extent_.runs ? __ldg(extent_.runs) : extent_.num_groups;
    while (group_ < num_groups) {
      const int size = group_size();
      const int tiles = num_tiles(size);
      if (next_ < first_tile_ + tiles) {
        place(tile, next_ - first_tile_, size);
        next_ += ptx::num_clusters();
        return true;
      }
      first_tile_ += tiles;
      start_ += size;
      ++group_;
    }
    return false;
  }

 private:
  __device__ static int ceil_div(int a, int b) { return (a + b - 1) / b; }

  // Blocks, or pairs of blocks where the cluster is a pair of this kind.
  __device__ int halved(int blocks, ClusterUse pair) const {
    return extent_.cluster == pair ? (blocks + 1) / 2 : blocks;
  }

  __device__ int blocks_of_rows(int rows) const {
    return halved(ceil_div(rows, kBlockM), ClusterUse::kSharedB);
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
    if (extent_.kind != GroupKind::kAlongK) return blocks_of_rows(size) * num_n_blocks_;
    if (size == 0 && extent_.skip_empty) return 0;
    // The group's first block would hold its neighbour's values: a caller's error.
    if (extent_.group_rows && size % kBlockK != 0) __trap();
    return blocks_of_rows(extent_.m) * num_n_blocks_;
  }

  // Tile `index` of the group: bands of m blocks, walked before the next n block.
  __device__ void place(GemmTile& tile, int index, int size) const {
    const bool along_k = extent_.kind == GroupKind::kAlongK;
    const bool masked = extent_.kind == GroupKind::kMasked;
    const int rows = along_k ? extent_.m : size;
    const int num_m_blocks = blocks_of_rows(rows);
    int m_block = 0, n_block = index;
    if (num_m_blocks > 1) {  // else no divisions: the first load waits for this
      const int band = index / (extent_.raster * num_n_blocks_);
      const int band_blocks = min(extent_.raster, num_m_blocks - band * extent_.raster);
      const int within = index - band * extent_.raster * num_n_blocks_;
      m_block = band * extent_.raster + within % band_blocks;
      n_block = within / band_blocks;
    }
    if (extent_.cluster == ClusterUse::kSharedB) m_block = m_block * 2 + ptx::cluster_rank();
    if (extent_.cluster == ClusterUse::kSharedA) n_block = n_block * 2 + ptx::cluster_rank();

    const int start = along_k        ? 0
                      : masked       ? group_ * extent_.m
                      : extent_.runs ? __ldg(run())
                                     : start_;
    tile.a_row = start + m_block * kBlockM;
    tile.row_end = start + rows;
    tile.n_start = n_block * kBlockN;
    tile.group = extent_.runs ? __ldg(run() + 2) : group_;
    tile.plane = masked ? group_ : 0;
    tile.row = masked ? m_block * kBlockM : tile.a_row;
    slice_k(tile, along_k ? start_ / kBlockK : 0, along_k ? size : extent_.k);
  }

  __device__ void slice_k(GemmTile& tile, int first_block, int size) const {
    const int k_blocks = ceil_div(size, kBlockK);
    const bool split = extent_.cluster == ClusterUse::kSplitK;
    const int share = split ? extent_.k_share : k_blocks;
    const int begin = split ? min(ptx::cluster_rank() * share, k_blocks) : 0;
    tile.k_begin = first_block + begin;
    tile.k_end = first_block + min(begin + share, k_blocks);
  }

  const GemmExtent& extent_;
  int num_n_blocks_;
  int next_;
  int group_ = 0;
  int first_tile_ = 0;
  int start_ = 0;
};

// Whether D's tensor map ends where the tile's rows do: then TMA itself drops the rows behind.
__device__ __forceinline__ bool ends_with_map(const GemmExtent& extent, const GemmTile& tile) {
  return extent.kind == GroupKind::kRows && tile.row_end == extent.m;
}

}  // namespace dsk
