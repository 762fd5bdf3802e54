// The kernels' own tile scheduler, compiled for the host: walks every CTA of a launch and checks
// that each element of D belongs to exactly one tile (or, where k is split, to one share of each
// piece of k). Built and called by tests/test_gemm_config.py.
#define __device__
#define __forceinline__ inline
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

namespace {
struct Dim {
  unsigned x;
};
Dim g_cluster, g_clusters;
int g_cluster_size, g_cluster_rank;

int __clusterSizeInBlocks() { return g_cluster_size; }
int __clusterRelativeBlockRank() { return g_cluster_rank; }
Dim __clusterIdx() { return g_cluster; }
Dim __clusterGridDimInClusters() { return g_clusters; }
void* __cluster_map_shared_rank(void* p, uint32_t) { return p; }
int32_t __ldg(const int32_t* p) { return *p; }
void __trap() { std::abort(); }
using std::min;
}  // namespace

#include "cuda/tile/gemm_scheduler.cuh"

namespace {

constexpr int kBlockK = 128;

// What should be computed: for each row of D, how many k blocks; 0 for rows of no group.
struct Expectation {
  std::vector<int> k_blocks;
};

Expectation expect(const dsk::GemmExtent& extent) {
  Expectation want;
  const auto k_blocks = [](int k) { return (k + kBlockK - 1) / kBlockK; };
  const auto size = [&](int group, int whole) {
    return extent.group_rows ? extent.group_rows[group] : whole;
  };
  if (extent.kind == dsk::GroupKind::kAlongK) {
    for (int g = 0; g < extent.num_groups; ++g)
      want.k_blocks.insert(want.k_blocks.end(), extent.m, k_blocks(size(g, extent.k)));
    return want;
  }
  const bool masked = extent.kind == dsk::GroupKind::kMasked;
  want.k_blocks.assign(masked ? size_t(extent.m) * extent.num_groups : extent.m, 0);
  int start = 0;
  for (int g = 0; g < extent.num_groups; ++g) {
    const int rows = size(g, extent.m);
    const int first = masked ? g * extent.m : start;
    std::fill_n(want.k_blocks.begin() + first, rows, k_blocks(extent.k));
    start += rows;
  }
  return want;
}

template <int kBlockM, int kBlockN>
std::string walk(const dsk::GemmExtent& extent, int num_ctas, int cluster) {
  const Expectation want = expect(extent);
  const size_t rows = want.k_blocks.size();
  const int n_blocks = (extent.n + kBlockN - 1) / kBlockN;
  // Differences along the rows of what the tiles cover: k blocks, and visits.
  std::vector<int> depth((rows + 1) * n_blocks), visits((rows + 1) * n_blocks);
  g_clusters.x = num_ctas / cluster;
  g_cluster_size = cluster;
  for (int cta = 0; cta < num_ctas; ++cta) {
    g_cluster.x = cta / cluster;
    g_cluster_rank = cta % cluster;
    dsk::GemmScheduler<kBlockM, kBlockN, kBlockK> scheduler(extent);
    for (dsk::GemmTile tile; scheduler.next(tile);) {
      const int n_block = tile.n_start / kBlockN;
      if (tile.n_start % kBlockN || n_block < 0) return "a tile starts between blocks";
      if (n_block >= n_blocks || tile.a_row >= tile.row_end) continue;  // a pair's second half
      const bool along_k = extent.kind == dsk::GroupKind::kAlongK;
      const size_t offset = along_k ? size_t(tile.group) * extent.m : 0;
      const size_t first = offset + tile.a_row;
      const size_t last = offset + std::min(tile.a_row + kBlockM, tile.row_end);
      if (last > rows) return "a tile ends behind D";
      depth[n_block * (rows + 1) + first] += tile.k_end - tile.k_begin;
      depth[n_block * (rows + 1) + last] -= tile.k_end - tile.k_begin;
      visits[n_block * (rows + 1) + first] += 1;
      visits[n_block * (rows + 1) + last] -= 1;
    }
  }
  const int shares = extent.cluster == dsk::ClusterUse::kSplitK ? cluster : 1;
  for (int n_block = 0; n_block < n_blocks; ++n_block) {
    int k_blocks = 0, seen = 0;
    for (size_t row = 0; row < rows; ++row) {
      k_blocks += depth[n_block * (rows + 1) + row];
      seen += visits[n_block * (rows + 1) + row];
      const bool empty = extent.kind != dsk::GroupKind::kAlongK && want.k_blocks[row] == 0;
      if (k_blocks != want.k_blocks[row] || seen != (empty ? 0 : shares)) {
        char text[160];
        std::snprintf(text, sizeof(text),
                      "row %zu, column block %d: %d k blocks in %d visits, expected %d in %d", row,
                      n_block, k_blocks, seen, want.k_blocks[row], empty ? 0 : shares);
        return text;
      }
    }
  }
  return "";
}

}  // namespace

// "" if every element is computed once; else what is wrong. kind and use are the enums' values.
extern "C" const char* walk_scheduler(int block_m, int block_n, int kind, int use, int m, int n,
                                      int k, int num_groups, const int32_t* group_rows, int raster,
                                      int num_ctas, int cluster) {
  static std::string answer;
  dsk::GemmExtent extent{};
  extent.group_rows = group_rows;
  extent.m = m;
  extent.n = n;
  extent.k = k;
  extent.num_groups = num_groups;
  extent.kind = dsk::GroupKind(kind);
  extent.cluster = dsk::ClusterUse(use);
  extent.raster = raster;
  extent.k_share = ((k + kBlockK - 1) / kBlockK + cluster - 1) / cluster;
  answer = "no such tile";
  if (block_m == 16 && block_n == 128) answer = walk<16, 128>(extent, num_ctas, cluster);
  if (block_m == 32 && block_n == 128) answer = walk<32, 128>(extent, num_ctas, cluster);
  if (block_m == 64 && block_n == 64) answer = walk<64, 64>(extent, num_ctas, cluster);
  if (block_m == 64 && block_n == 128) answer = walk<64, 128>(extent, num_ctas, cluster);
  if (block_m == 64 && block_n == 256) answer = walk<64, 256>(extent, num_ctas, cluster);
  if (block_m == 128 && block_n == 64) answer = walk<128, 64>(extent, num_ctas, cluster);
  if (block_m == 128 && block_n == 128) answer = walk<128, 128>(extent, num_ctas, cluster);
  if (block_m == 128 && block_n == 160) answer = walk<128, 160>(extent, num_ctas, cluster);
  if (block_m == 128 && block_n == 192) answer = walk<128, 192>(extent, num_ctas, cluster);
  return answer.c_str();
}
