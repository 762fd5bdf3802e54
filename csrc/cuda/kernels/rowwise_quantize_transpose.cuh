// Transposing quantisation: x [rows, cols] -> x^T in groups of 1 x 128. It turns the 1x128 tiles of
// the forward pass into the 128x1 tiles that the weight gradient contracts over (V3 report, 3.5.2),
// and gives Hopper's FP8 tensor core the K-major operand it insists on.
//
// Bound by memory: 2 bytes read (bf16; 1 from FP8) and 1 written per value: 4096 x 7168 moves 88
// MB, 26 us at 3.35 TB/s; its divisions are 3 us of the CUDA cores. A CTA takes 128 rows x 64
// columns at a time. Warps read whole rows into shared memory and take whole columns out, so that
// both sides of memory see full 64- to 128-byte lines. Row r is kept at place r % 4 * 32 + r / 4:
// a lane then finds its 4 consecutive rows of a column without bank conflicts.
#pragma once

#include "cuda/tile/quantize.cuh"

namespace dsk {

constexpr int kTransposeRows = kQuantGroup;
constexpr int kTransposeCols = 64;
constexpr int kTransposePitch = kTransposeCols + 1;
constexpr int kTransposeWarps = 8;
constexpr int kTransposeInFlight = 8;

struct TransposeTile {
  float value[kTransposeRows * kTransposePitch];

  __device__ __forceinline__ float& at(int row, int column) {
    const int place = row % kValuesPerLane * kWarp + row / kValuesPerLane;
    return value[place * kTransposePitch + column];
  }
};

// The scale of x's element; 1 for what is not quantised.
template <typename T>
__device__ __forceinline__ float input_scale(const QuantizeTransposeParams&, int, int) {
  return 1.f;
}
template <>
__device__ __forceinline__ float input_scale<E4m3>(const QuantizeTransposeParams& p, int row,
                                                   int column) {
  const int block = p.x_block_rows == 1 ? row : row / p.x_block_rows;
  return __ldg(p.x_scale + block * p.x_scale_row + column / kQuantGroup * p.x_scale_col);
}

// kTransposeInFlight rows' loads of a warp are under way before the first value is looked at.
template <typename T>
__device__ __forceinline__ void load_rows(const QuantizeTransposeParams& p, TransposeTile& tile,
                                          int first_row, int first_column, int first) {
  using W = typename Word<2 * sizeof(T)>::Type;
  const int column = threadIdx.x % kWarp * 2;
  const int left = p.cols - (first_column + column);
  const bool whole =
      p.cols % 2 == 0 &&
      (reinterpret_cast<uintptr_t>(p.x) | uintptr_t(p.ld_x * int64_t(sizeof(T)))) % sizeof(W) == 0;
  alignas(8) T value[kTransposeInFlight][2] = {};
  float scale[kTransposeInFlight];
#pragma unroll
  for (int i = 0; i < kTransposeInFlight; ++i) {
    const int row = (first + i) * kTransposeWarps + threadIdx.x / kWarp;
    const bool inside = first_row + row < p.rows && left > 0;
    const T* x = static_cast<const T*>(p.x) + (first_row + row) * p.ld_x + first_column + column;
    if (whole) {
      if (inside) *reinterpret_cast<W*>(value[i]) = __ldg(reinterpret_cast<const W*>(x));
    } else {
      if (inside) value[i][0] = x[0];
      if (inside && left > 1) value[i][1] = x[1];
    }
    scale[i] = inside ? input_scale<T>(p, first_row + row, first_column + column) : 0.f;
  }
#pragma unroll
  for (int i = 0; i < kTransposeInFlight; ++i) {
    const int row = (first + i) * kTransposeWarps + threadIdx.x / kWarp;
    tile.at(row, column) = __fmul_rn(to_float(value[i][0]), scale[i]);
    tile.at(row, column + 1) = __fmul_rn(to_float(value[i][1]), scale[i]);
  }
}

template <typename T>
__device__ __forceinline__ void load_tile(const QuantizeTransposeParams& p, TransposeTile& tile,
                                          int first_row, int first_column) {
#pragma unroll
  for (int first = 0; first < kTransposeRows / kTransposeWarps; first += kTransposeInFlight) {
    load_rows<T>(p, tile, first_row, first_column, first);
  }
}

template <typename T>
__device__ __forceinline__ void quantize_transposed(const QuantizeTransposeParams& p) {
  __shared__ TransposeTile tile;
  const int row = threadIdx.x % kWarp * kValuesPerLane;
  const uint32_t row_tiles = (p.rows + kTransposeRows - 1) / kTransposeRows;
  const uint32_t col_tiles = (p.cols + kTransposeCols - 1) / kTransposeCols;

  for (uint32_t index = blockIdx.x; index < row_tiles * col_tiles; index += gridDim.x) {
    const uint32_t row_tile = index / col_tiles;
    const int first_row = int(row_tile) * kTransposeRows;
    const int first_column = int(index % col_tiles) * kTransposeCols;
    load_tile<T>(p, tile, first_row, first_column);
    __syncthreads();
    for (int column = threadIdx.x / kWarp; column < kTransposeCols; column += kTransposeWarps) {
      if (first_column + column >= p.cols) break;
      float value[kValuesPerLane];
#pragma unroll
      for (int i = 0; i < kValuesPerLane; ++i) value[i] = tile.at(row + i, column);
      const float scale = block_scale(warp_max(largest(value)), kE4m3Max, p.format);
      const int64_t out = int64_t(first_column + column);
      store_e4m3(p.data + out * p.rows + first_row + row, p.rows - (first_row + row), value, scale);
      if (row == 0) p.scale[row_tile * p.ld_scale + out] = scale;
    }
    __syncthreads();  // the next tile overwrites this one
  }
}

}  // namespace dsk
