// Shared memory of MLA decode and who may touch what when.
#pragma once

#include <cstdint>

#include "cuda/mla_shape.hpp"
#include "cuda/tile/ring.cuh"
#include "cuda/tile/smem_layout.cuh"

namespace dsk {

constexpr int kMlaWarpgroup = 128;
constexpr int kMlaMathThreads = 2 * kMlaWarpgroup;
constexpr int kMlaTiles = kMlaWidth / 64;  // a row is nine tiles of 64 columns, 128 bytes each
constexpr int kMlaRopeTile = 8;            // the RoPE columns; later P of the same block
constexpr int kMlaHalfTiles = 4;           // tiles of V in either half of a block
constexpr int kMlaTileBytes = kMlaRows * kSwizzleBytes;

// The half of O's (and V's) columns that a math warpgroup owns, and of a block's tiles that it
// releases.
enum MlaSide : int { kLeft = 0, kRight = 1 };

// Named barriers; 0 is __syncthreads.
enum MlaBarrier : uint32_t {
  kMlaFirstReady = 1,    // P of the first block: left arrives, right waits
  kMlaSecondReady = 2,   // P of the second block: right arrives, left waits
  kMlaBoth = 3,          // both math warpgroups
  kMlaWarpgroupOnly = 4  // one for each math warpgroup from here on
};

struct alignas(1024) MlaDecodeSmem {
  uint8_t q[kMlaTiles][kMlaTileBytes];      // 64 rows; at a piece's end tiles 0-7 take its result
  uint8_t kv[2][kMlaTiles][kMlaTileBytes];  // 64 tokens each
  uint4 fp8_stage[4][4][32];                // FP8 caches: for each warp, the latents on their way
  float row_max[2][kMlaRows];               // running maximum after the first, the second block
  float column[2][4][32];                   // few rows: statistics of a side's warps
  float row_sum[2][kMlaRows];               // by side
  Ring<2> kv_ring[2];                       // for each block; stages are its halves
  Ring<1> q_ring;
};

// Tiles of a block's half: four of V, and the fifth is the RoPE tile. That goes with the warpgroup
// that did not score the block: the last reader of the P that took its place.
__device__ __forceinline__ int mla_tiles_of(int buffer, int half) { return half == buffer ? 4 : 5; }

}  // namespace dsk
