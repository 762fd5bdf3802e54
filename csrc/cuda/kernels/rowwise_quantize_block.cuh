// Weight quantisation: one scale for each 128 x 128 block (V3 report, 3.3.2).
//
// Bound by memory: 2 bytes read and 1 written per bf16 value, so 7168 x 16384 moves 352 MB, 105 us
// at 3.35 TB/s; its divisions are 12 us of the CUDA cores. One CTA of 8 warps owns a block; it is
// read once and waits for its amax in registers, 64 values a thread.
#pragma once

#include "cuda/tile/quantize.cuh"

namespace dsk {

template <typename T>
__device__ __forceinline__ void quantize_blocks(const QuantizeBlockParams& p) {
  constexpr int kBlock = 128;
  constexpr int kWarps = 8;
  constexpr int kRows = kBlock / kWarps;  // of each warp
  __shared__ float warp_amax[2][kWarps];  // two sets: the next block's must not meet this one's
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  const uint32_t row_blocks = (p.rows + kBlock - 1) / kBlock;
  const uint32_t col_blocks = (p.cols + kBlock - 1) / kBlock;
  const uint32_t num_blocks = p.planes * row_blocks * col_blocks;

  int set = 0;
  for (uint32_t block = blockIdx.x; block < num_blocks; block += gridDim.x) {
    const uint32_t row_block = block / col_blocks;  // counted through all planes
    const int column = int(block % col_blocks) * kBlock + lane * kValuesPerLane;
    const int first_row = int(row_block % row_blocks) * kBlock + warp * kRows;
    const int64_t plane_row = int64_t(row_block / row_blocks) * p.rows;
    const int left = p.cols - column;

    float value[kRows][kValuesPerLane];
    float amax = 0.f;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const bool inside = first_row + i < p.rows;
      const int64_t at = (plane_row + first_row + i) * p.cols + column;
      load_run(static_cast<const T*>(p.x) + at, inside ? left : 0, value[i]);
      amax = fmaxf(amax, largest(value[i]));
    }
    amax = warp_max(amax);
    if (lane == 0) warp_amax[set][warp] = amax;
    __syncthreads();
    amax = largest(warp_amax[set]);
    set ^= 1;

    const float scale = block_scale(amax, kE4m3Max, p.format);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const bool inside = first_row + i < p.rows;
      const int64_t at = (plane_row + first_row + i) * p.cols + column;
      store_e4m3(p.data + at, inside ? left : 0, value[i], scale);
    }
    if (threadIdx.x == 0) p.scale[block] = scale;
  }
}

}  // namespace dsk
