// The element-wise middle of the experts' FP8 backward: SwiGLU computed again from the gate-up
// products, its gradient, the routing weight and that weight's gradient; and everything quantised
// at once for the product that takes it: the gradient along its row for the gradient of x, gradient
// and activation along the rows, transposed, for those of the weights (V3 report, 3.5.2).
//
// The two floors, 4096 tokens x 8 copies x width 2048: 6 bytes read and 5 written a value are 738
// MB, 220 us at 3.35 TB/s (with its results in bf16, and a kernel for each quantisation, 1.8 GB);
// some 100 instructions a value, a third of them exact divisions, are 227 us of the CUDA cores.
//
// A CTA takes 128 rows x 128 columns of the hidden layer. A warp computes whole rows, 4 columns a
// lane, quantises dh from registers and leaves dgate, dup and act in shared memory as fp32; then a
// warp takes 4 columns out at a time, 4 rows a lane. Row r lies at place r % 4 * 32 + r / 4, its
// words of 16 bytes XORed with the place: both sides are free of bank conflicts. The last CTA of a
// block of rows adds up the parts of the weights' gradients, in the order of the columns.
#pragma once

#include "cuda/params/moe.hpp"
#include "cuda/tile/activation.cuh"
#include "cuda/tile/quantize.cuh"

namespace dsk {

constexpr int kHiddenWarps = kHiddenThreads / kWarp;

struct HiddenTile {
  float4 word[kQuantGroup][kQuantGroup / 4];

  // Columns 4 i .. 4 i + 3 of a row.
  __device__ __forceinline__ float4& at(int row, int i) {
    const int place = row % kValuesPerLane * kWarp + row / kValuesPerLane;
    return word[place][i ^ place % kWarp];
  }
};

struct HiddenSmem {
  HiddenTile dgate, dup, act;
  int32_t is_last;
};
static_assert(sizeof(HiddenSmem) == kHiddenSharedBytes);

__device__ __forceinline__ float4 as_word(const float (&v)[4]) {
  return make_float4(v[0], v[1], v[2], v[3]);
}

// 128 values of one row, 4 a lane, to dh at that column.
__device__ __forceinline__ void quantize_hidden_row(const MoeHiddenQuantizeParams& p, int row,
                                                    int column, const float (&value)[4]) {
  const float scale = block_scale(warp_max(largest(value)), kE4m3Max, ScaleFormat::kFp32);
  const int lane = threadIdx.x % kWarp;
  store_e4m3(p.dh + int64_t(row) * 2 * p.width + column + lane * 4, 4, value, scale);
  if (lane == 0) p.dh_scale[int64_t(column / kQuantGroup) * p.rows + row] = scale;
}

// One row of the tile, by one warp; a row without a slot is 0.
__device__ __forceinline__ void hidden_row(const MoeHiddenQuantizeParams& p, HiddenSmem& smem,
                                           int first_row, int within, int first_column) {
  const int row = first_row + within, lane = threadIdx.x % kWarp;
  const int slot = __ldg(p.slot_of_row + row);
  const int left = slot < 0 ? 0 : 4;
  const int column = first_column + lane * 4;
  const auto* h = static_cast<const __nv_bfloat16*>(p.h) + int64_t(row) * 2 * p.width + column;
  const auto* back = static_cast<const __nv_bfloat16*>(p.back) + int64_t(row) * p.width + column;
  float gate[4], up[4], grad[4], dgate[4], dup[4], act[4];
  load_run(h, left, gate);
  load_run(h + p.width, left, up);
  load_run(back, left, grad);
  const float weight = slot < 0 ? 0.f : __ldg(p.weights + slot);
  float dot = 0.f;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float s = sigmoid(gate[i]);
    const float value = __fmul_rn(__fmul_rn(gate[i], s), up[i]);
    dot = __fmaf_rn(grad[i], value, dot);
    swiglu_gradient(gate[i], up[i], s, __fmul_rn(grad[i], weight), dgate[i], dup[i]);
    act[i] = __fmul_rn(value, weight);
  }
  dot = warp_sum(dot);
  if (lane == 0) p.dot[int64_t(first_column / kQuantGroup) * p.rows + row] = dot;
  quantize_hidden_row(p, row, first_column, dgate);
  quantize_hidden_row(p, row, p.width + first_column, dup);
  smem.dgate.at(within, lane) = as_word(dgate);
  smem.dup.at(within, lane) = as_word(dup);
  smem.act.at(within, lane) = as_word(act);
}

// Columns 4 i .. 4 i + 3 of a tile, by one warp: each becomes 128 values of a row of out.
__device__ __forceinline__ void quantize_hidden_columns(const MoeHiddenQuantizeParams& p,
                                                        HiddenTile& tile, int i, int first_row,
                                                        uint8_t* out, float* scales) {
  const int lane = threadIdx.x % kWarp;
  float value[4][4];  // [column][row]
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    const float4 word = tile.at(lane * 4 + r, i);
    value[0][r] = word.x;
    value[1][r] = word.y;
    value[2][r] = word.z;
    value[3][r] = word.w;
  }
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    const float amax = warp_max(largest(value[c]));
    const float scale = block_scale(amax, kE4m3Max, ScaleFormat::kFp32);
    const int64_t at = int64_t(i * 4 + c) * p.rows + first_row + lane * 4;
    store_e4m3(out + at, 4, value[c], scale);
    if (lane == 0) scales[i * 4 + c] = scale;
  }
}

__device__ __forceinline__ void quantize_hidden_tiles(const MoeHiddenQuantizeParams& p,
                                                      HiddenSmem& smem, int row_block,
                                                      int first_column) {
  const int first_row = row_block * kQuantGroup;
  uint8_t* dgate = p.dh_t + int64_t(first_column) * p.rows;
  uint8_t* dup = p.dh_t + int64_t(p.width + first_column) * p.rows;
  uint8_t* act = p.act_t + int64_t(first_column) * p.rows;
  float* dh_scale = p.dh_t_scale + int64_t(row_block) * 2 * p.width + first_column;
  float* act_scale = p.act_t_scale + int64_t(row_block) * p.width + first_column;
  for (int i = threadIdx.x / kWarp; i < kQuantGroup / 4; i += kHiddenWarps) {
    quantize_hidden_columns(p, smem.dgate, i, first_row, dgate, dh_scale);
    quantize_hidden_columns(p, smem.dup, i, first_row, dup, dh_scale + p.width);
    quantize_hidden_columns(p, smem.act, i, first_row, act, act_scale);
  }
}

// The routing weights' gradients of a block of rows, by the last CTA that had a part in them. All
// of the CTA's parts are behind a barrier already.
__device__ __forceinline__ void add_hidden_dots(const MoeHiddenQuantizeParams& p, HiddenSmem& smem,
                                                int row_block) {
  __threadfence();  // the parts are out before this CTA says so
  if (threadIdx.x == 0) {
    smem.is_last = atomicAdd(p.finished + row_block, 1) == int(gridDim.x) - 1;
    __threadfence();  // and are read after the last one has heard from all
  }
  __syncthreads();
  if (!smem.is_last || threadIdx.x >= kQuantGroup) return;
  const int row = row_block * kQuantGroup + int(threadIdx.x);
  const int slot = __ldg(p.slot_of_row + row);
  if (slot < 0) return;
  float sum = 0.f;
  for (int part = 0; part < int(gridDim.x); ++part) {
    sum = __fadd_rn(sum, __ldcg(p.dot + int64_t(part) * p.rows + row));
  }
  p.dweights[slot] = sum;
}

__device__ __forceinline__ void hidden_rows_quantized(const MoeHiddenQuantizeParams& p) {
  extern __shared__ __align__(16) uint8_t shared_memory[];
  auto& smem = *reinterpret_cast<HiddenSmem*>(shared_memory);
  const int row_block = blockIdx.y, first_row = row_block * kQuantGroup;
  const int first_column = int(blockIdx.x) * kQuantGroup;
  if (__ldg(p.slot_of_row + first_row) < 0) return;  // behind the last group
#pragma unroll 2
  for (int row = threadIdx.x / kWarp; row < kQuantGroup; row += kHiddenWarps) {
    hidden_row(p, smem, first_row, row, first_column);
  }
  __syncthreads();
  if (p.transposed) quantize_hidden_tiles(p, smem, row_block, first_column);
  add_hidden_dots(p, smem, row_block);
}

}  // namespace dsk
