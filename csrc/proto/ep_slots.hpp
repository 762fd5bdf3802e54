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

// Nodes of ranks_per_node ranks in a row (0: all ranks are one node). A token goes once to each
// other node, to the rank there with the sender's place in its node, which passes it on; if that
// rank is dead, straight to the receivers.
DSK_HD constexpr int node_of(int rank, int ranks_per_node) {
  return ranks_per_node == 0 ? 0 : rank / ranks_per_node;
}
DSK_HD constexpr int rail_of(int sender, int node, int ranks_per_node) {
  return node * ranks_per_node + sender % ranks_per_node;
}
// Whether two ranks of different nodes pass on each other's tokens.
DSK_HD constexpr bool share_rail(int a, int b, int ranks_per_node) {
  return node_of(a, ranks_per_node) != node_of(b, ranks_per_node) &&
         rail_of(a, node_of(b, ranks_per_node), ranks_per_node) == b;
}
// The living ranks of other nodes whose tokens `rank` passes on, and which pass on its own.
DSK_HD inline uint64_t rails_of(int rank, int ranks_per_node, uint64_t alive) {
  uint64_t rails = 0;
  each_rank(alive, [&](int peer) {
    if (share_rail(rank, peer, ranks_per_node)) rails |= uint64_t{1} << peer;
  });
  return rails;
}
DSK_HD constexpr bool goes_direct(int sender, int receiver, int ranks_per_node, uint64_t alive) {
  const int node = node_of(receiver, ranks_per_node);
  return node == node_of(sender, ranks_per_node) ||
         !is_alive(alive, rail_of(sender, node, ranks_per_node));
}

// First row, at `destination`, of what `source` sends there: rows lie in order of source rank.
template <typename RowsTo>
DSK_HD int64_t first_row(RowsTo&& rows_to, int source, int destination, uint64_t alive) {
  int64_t row = 0;
  each_rank(alive & ((uint64_t{1} << source) - 1), [&](int r) { row += rows_to(r, destination); });
  return row;
}

}  // namespace dsk::proto
