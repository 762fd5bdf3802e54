// Which output tile comes next: the only thing in which dense, grouped contiguous and masked GEMM
// differ. A persistent CTA takes tiles blockIdx.x, blockIdx.x + gridDim.x, ... in an order that
// keeps the tiles under way at one time close together, so that they share operands in L2.
#pragma once

#include <cstdint>

#include "cuda/params/gemm.hpp"

namespace dsk {

enum class GroupKind { kDense, kContiguous, kMasked };

struct GemmTile {
  int a_row;      // first row of A and D
  int row_end;    // one past the last row of D that this tile may write
  int n_start;    // first column of D
  int group;      // expert: B and its scales start at group * n
  int sfa_row;    // row of the scale tensor [k blocks, rows] at k block 0
  int sfa_start;  // first row index within it
};

template <GroupKind kKind, int kBlockM, int kBlockN>
class GemmScheduler {
 public:
  __device__ explicit GemmScheduler(const GemmFp8Params& p)
      : p_(p), num_n_blocks_(ceil_div(p.n, kBlockN)), next_(blockIdx.x) {}

  // The next tile of this CTA; false when there is none. Every role of the CTA sees the same tiles.
  __device__ bool next(GemmTile& tile) {
    if constexpr (kKind == GroupKind::kDense) {
      if (next_ >= ceil_div(p_.m, kBlockM) * num_n_blocks_) return false;
      place(tile, next_, 0, 0, p_.m);
    } else {
      while (true) {
        if (group_ >= p_.num_groups) return false;
        const int rows = group_rows();
        const int tiles = ceil_div(rows, kBlockM) * num_n_blocks_;
        if (next_ < first_tile_ + tiles) {
          const int start = kKind == GroupKind::kMasked ? group_ * p_.m : row_start_;
          place(tile, next_ - first_tile_, group_, start, rows);
          break;
        }
        first_tile_ += tiles;
        row_start_ += rows;
        ++group_;
      }
    }
    next_ += gridDim.x;
    return true;
  }

 private:
  // How many m blocks are walked before the next n block: enough to reuse B, few enough that A
  // stays in L2 beside it.
  static constexpr int kRasterBlocks = 16;

  __device__ static int ceil_div(int a, int b) { return (a + b - 1) / b; }

  __device__ int group_rows() const { return __ldg(p_.group_rows + group_); }

  __device__ void place(GemmTile& tile, int index, int group, int start, int rows) {
    const int num_m_blocks = ceil_div(rows, kBlockM);
    const int band = index / (kRasterBlocks * num_n_blocks_);
    const int band_blocks = min(kRasterBlocks, num_m_blocks - band * kRasterBlocks);
    const int within = index - band * kRasterBlocks * num_n_blocks_;
    const int m_block = band * kRasterBlocks + within % band_blocks;
    const int n_block = within / band_blocks;
    tile.a_row = start + m_block * kBlockM;
    tile.row_end = start + rows;
    tile.n_start = n_block * kBlockN;
    tile.group = group;
    // Masked groups have their own scale planes; contiguous rows share one.
    tile.sfa_row = kKind == GroupKind::kMasked ? group * ceil_div(p_.k, 128) : 0;
    tile.sfa_start = kKind == GroupKind::kMasked ? m_block * kBlockM : tile.a_row;
  }

  const GemmFp8Params& p_;
  int num_n_blocks_;
  int next_;
  int group_ = 0;
  int first_tile_ = 0;
  int row_start_ = 0;
};

}  // namespace dsk
