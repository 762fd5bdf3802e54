// The element-wise middle of the experts' backward, one pass over the hidden layer: SwiGLU computed
// again from the gate-up products, its gradient, the routing weight, and that weight's gradient.
//
// Bound by memory: a row of width i is 3 i values read and 3 i written. 4096 tokens x 8 copies x
// 2048 bf16: 806 MB, 240 us at 3.35 TB/s; apart, the weighting, SwiGLU, its backward and the dot
// product would move 1.9 GB. Some 60 instructions a value: 35 us. A warp takes a slot.
//
// With y = W2 act and back = W2^T grad, <grad, y> = <back, act>: the gradient of the weight does
// not need the expert's output.
#pragma once

#include "cuda/params/moe.hpp"
#include "cuda/tile/activation.cuh"
#include "cuda/tile/each.cuh"
#include "cuda/tile/quantize.cuh"

namespace dsk {

// Writes dh and the weighted act of one row; returns this slot's <back, act>.
__device__ __forceinline__ float hidden_backward(const MoeHiddenBackwardParams& p, int64_t row,
                                                 float weight) {
  using T = __nv_bfloat16;
  const T* h = static_cast<const T*>(p.h) + row * 2 * p.width;
  const T* back = static_cast<const T*>(p.back) + row * p.width;
  T* dh = static_cast<T*>(p.dh) + row * 2 * p.width;
  T* act = static_cast<T*>(p.act) + row * p.width;
  float dot = 0.f;
  each_run_in_warp(p.width, [&](int column, int left) {
    float gate[4], up[4], grad[4], dgate[4], dup[4];
    load_run(h + column, left, gate);
    load_run(h + p.width + column, left, up);
    load_run(back + column, left, grad);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float s = sigmoid(gate[i]);
      const float value = __fmul_rn(__fmul_rn(gate[i], s), up[i]);
      dot = __fmaf_rn(grad[i], value, dot);
      swiglu_gradient(gate[i], up[i], s, __fmul_rn(grad[i], weight), dgate[i], dup[i]);
      grad[i] = __fmul_rn(value, weight);
    }
    store_run(dh + column, left, dgate);
    store_run(dh + p.width + column, left, dup);
    store_run(act + column, left, grad);
  });
  return warp_sum(dot);
}

__device__ __forceinline__ void hidden_rows_backward(const MoeHiddenBackwardParams& p) {
  const int warps = blockDim.x / kWarp;
  for (int64_t slot = int64_t(blockIdx.x) * warps + threadIdx.x / kWarp; slot < p.slots;
       slot += int64_t(gridDim.x) * warps) {
    const int64_t row = __ldg(p.row_map + slot);
    if (row < 0) continue;
    const float dot = hidden_backward(p, row, __ldg(p.weights + slot));
    if (threadIdx.x % kWarp == 0) p.dweights[slot] = dot;
  }
}

}  // namespace dsk
