// B's scales of one per 128x128, on their way from memory to the promotion: with the stage whose
// products they scale. A load of the math warps' own would queue behind the TMA loads of the ring.
#pragma once

#include <cuda/ptx>

#include "cuda/gemm_shape.hpp"
#include "cuda/params/gemm.hpp"
#include "cuda/tile/gemm_scheduler.cuh"

namespace dsk {

// A stage's scales, one from each of up to kRows rows of B's blocks. TMA brings no less than four
// floats, to a multiple of 128 bytes: the first is the one.
template <int kRows>
struct alignas(128) StageScales {
  float row[kRows][32];
  static constexpr int kBytes = kRows * 16;  // that arrive
};

// Producer: the scales at k_block of B's rows `row` (in blocks of 128, of the tile's group). A row
// behind the group's last scales columns that D does not have: whatever is there will do.
template <int kRows>
__device__ __forceinline__ void load_scales(StageScales<kRows>& to, const GemmFp8Params& p,
                                            const GemmTile& tile, const int (&row)[kRows],
                                            int k_block, uint64_t* full) {
  using namespace cuda::ptx;
  const int k_blocks = (p.extent.k + 127) / 128;
  const int block_rows = (p.extent.n + 127) / 128;
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const int block_row = tile.group * block_rows + row[i];
    const int32_t at[2] = {p.sfb_offset + block_row * k_blocks + k_block, 0};
    cp_async_bulk_tensor(space_cluster, space_global, to.row[i], &p.sfb, at, full);
  }
}

}  // namespace dsk
