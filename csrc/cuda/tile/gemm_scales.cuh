// B's scales of one per 128x128, on their way from memory to the promotion.
#pragma once

#include "cuda/params/gemm.hpp"

namespace dsk {

// Where each of a tile's rows of blocks starts in p.sfb.
template <int kRows>
struct BlockRows {
  int first[kRows];
};

// The scales of one tile's kRows rows of blocks, k block after k block. Each lane keeps one of 32,
// so a load serves 32 k blocks and is under way 32 k blocks before anyone needs it: a load that
// misses L1 queues behind the TMA loads of the whole ring.
template <int kRows>
class BlockScales {
 public:
  // By whole warps, as is take().
  __device__ __forceinline__ BlockScales(const GemmFp8Params& p, const BlockRows<kRows>& rows,
                                         int k_begin)
      : p_(p), rows_(rows) {
    const int window = k_begin / kWindow * kWindow;
#pragma unroll
    for (int row = 0; row < kRows; ++row) now_[row] = fetch(row, window);
#pragma unroll
    for (int row = 0; row < kRows; ++row) ahead_[row] = fetch(row, window + kWindow);
  }

  // scale = those of k_block; k blocks are taken in order.
  __device__ __forceinline__ void take(int k_block, float (&scale)[kRows]) {
    const int lane = unsigned(k_block) % kWindow;
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      scale[row] = __shfl_sync(0xffffffffu, now_[row], lane);
    }
    if (lane != kWindow - 1) return;
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      now_[row] = ahead_[row];
      ahead_[row] = fetch(row, k_block + 1 + kWindow);
    }
  }

 private:
  static constexpr int kWindow = 32;

  __device__ __forceinline__ float fetch(int row, int window) const {
    const int k_blocks = (p_.extent.k + 127) / 128;
    const int k_block = window + threadIdx.x % 32;
    return k_block < k_blocks ? __ldg(p_.sfb + rows_.first[row] + k_block) : 0.f;
  }

  const GemmFp8Params& p_;
  BlockRows<kRows> rows_;
  float now_[kRows];
  float ahead_[kRows];
};

}  // namespace dsk
