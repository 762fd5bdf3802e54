// Who goes where: the routing rules of the exchange. Standard library only: kernels, CPU code and
// transports share it.
#pragma once

#include <cstdint>

#include "proto/ep_layout.hpp"

namespace dsk::proto {

// Experts are numbered rank by rank: rank r hosts [begin[r], begin[r + 1]). Equal shares need no
// table.
struct Experts {
  int32_t ranks;
  int32_t total;
  int32_t begin[kMaxRanks + 1];

  DSK_HD int rank_of(int64_t expert) const {
    // At most 64 ranks: a binary search of 6 steps.
    int low = 0, high = ranks;
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (expert >= begin[middle] ? low : high) = middle;
    }
    return low;
  }
  DSK_HD int count(int rank) const { return begin[rank + 1] - begin[rank]; }
};

// The ranks that a token with `topk` experts goes to, as a mask; a slot of -1 names no expert.
DSK_HD inline uint64_t destinations(const Experts& experts, const int64_t* topk_idx, int topk,
                                    uint64_t alive) {
  uint64_t mask = 0;
  for (int k = 0; k < topk; ++k) {
    if (topk_idx[k] >= 0) mask |= uint64_t{1} << experts.rank_of(topk_idx[k]);
  }
  return mask & alive;
}

// First row, at `destination`, of what `source` sends there: rows lie in order of source rank.
template <typename RowsTo>
DSK_HD int64_t first_row(RowsTo&& rows_to, int source, int destination, uint64_t alive) {
  int64_t row = 0;
  for (int r = 0; r < source; ++r) {
    if (is_alive(alive, r)) row += rows_to(r, destination);
  }
  return row;
}

}  // namespace dsk::proto
