// Dequantisation (DeepSeek's fp8_cast_bf16): value = data * scale in fp32, rounded once; and E5M6
// between float16 and its storage of 12 bits an element.
//
// Bound by memory: 1 byte read and 2 written per value (e4m3 to bf16): a 7168 x 16384 weight moves
// 352 MB, 105 us at 3.35 TB/s; one multiplication a value is nothing. A thread takes 4 values of a
// row. The scales of any block shape are read where they lie; neighbours share them in L1.
#pragma once

#include "cuda/tile/quantize.cuh"

namespace dsk {

__device__ __forceinline__ void dequantize_rows(const DequantizeParams& p) {
  constexpr int kRun = 4;
  const uint32_t runs_per_row = (p.cols + kRun - 1) / kRun;
  const int64_t num_runs = int64_t(runs_per_row) * p.planes * p.rows;
  const int64_t stride = int64_t(gridDim.x) * blockDim.x;
  for (int64_t run = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; run < num_runs;
       run += stride) {
    const int64_t row = run / runs_per_row;
    const int column = int(run - row * runs_per_row) * kRun;
    const int left = p.cols - column;
    const int64_t at = row * p.cols + column;
    float value[kRun];
    if (p.type == NarrowType::kE4m3) {
      load_run(static_cast<const E4m3*>(p.data) + at, left, value);
    } else {
      load_run(static_cast<const __half*>(p.data) + at, left, value);
    }
    const uint32_t plane = uint32_t(row) / uint32_t(p.rows);
    const uint32_t within = uint32_t(row) - plane * uint32_t(p.rows);
    const float* scales =
        p.scale + plane * p.scale_plane + within / uint32_t(p.block_rows) * p.scale_row;
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      if (i < left) {
        value[i] = __fmul_rn(value[i], __ldg(scales + (column + i) / p.block_cols * p.scale_col));
      }
    }
    if (p.out == WideType::kBfloat16) {
      store_run(static_cast<__nv_bfloat16*>(p.y) + at, left, value);
    } else {
      store_run(static_cast<float*>(p.y) + at, left, value);
    }
  }
}

// A thread takes 2 elements: bits 0-11 and 12-23 of a little-endian word of 3 bytes. An odd row's
// last word is filled up with a zero.
__device__ __forceinline__ void pack_e5m6_rows(const PackE5m6Params& p) {
  const uint32_t words_per_row = (p.cols + 1) / 2;
  const int64_t num_words = int64_t(words_per_row) * p.rows;
  const int64_t stride = int64_t(gridDim.x) * blockDim.x;
  for (int64_t index = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; index < num_words;
       index += stride) {
    const int64_t row = index / words_per_row;
    const int column = int(index - row * words_per_row) * 2;
    const bool two = column + 1 < p.cols;
    uint16_t* wide = p.wide + row * p.cols + column;
    uint8_t* packed = p.packed + index * 3;
    if (p.unpack) {
      const uint32_t word = packed[0] | packed[1] << 8 | packed[2] << 16;
      wide[0] = uint16_t(word << 4);
      if (two) wide[1] = uint16_t(word >> 12 << 4);
    } else {
      const uint32_t word = wide[0] >> 4 | (two ? wide[1] >> 4 : 0) << 12;
      packed[0] = uint8_t(word);
      packed[1] = uint8_t(word >> 8);
      packed[2] = uint8_t(word >> 16);
    }
  }
}

}  // namespace dsk
