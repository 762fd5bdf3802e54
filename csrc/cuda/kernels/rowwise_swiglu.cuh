// SwiGLU of x = [gate; up], silu(gate) * up, with 1x128 quantisation fused in; and its backward.
//
// Bound by memory: forward 4 bytes read and 1 written (e4m3) per bf16 result, so 4096 x 2048 moves
// 42 MB, 13 us at 3.35 TB/s; the backward moves 10 bytes a result. The exponential and the two
// divisions are about 40 instructions a result: 3 us. A warp takes 128 columns of a row, which is
// one quantisation group; a lane 4 of them.
//
// Everything in fp32, rounded once; what is quantised is not rounded before.
#pragma once

#include "cuda/tile/activation.cuh"
#include "cuda/tile/quantize.cuh"

namespace dsk {

// What a warp does next: 128 columns of one row.
struct SwigluGroup {
  int64_t row;
  int k_group;
  int column;  // the lane's first
  int left;    // columns from there to the end

  __device__ SwigluGroup(const SwigluParams& p, int64_t group, uint32_t groups_per_row)
      : row(group / groups_per_row),
        k_group(int(group - row * groups_per_row)),
        column(k_group * kQuantGroup + int(threadIdx.x % kWarp) * kValuesPerLane),
        left(p.cols - column) {}
};

template <typename T>
__device__ __forceinline__ void swiglu_group(const SwigluParams& p, const SwigluGroup& g) {
  const T* x = static_cast<const T*>(p.x) + g.row * p.ld_x + g.column;
  float gate[kValuesPerLane], up[kValuesPerLane], y[kValuesPerLane];
  load_run(x, g.left, gate);
  load_run(x + p.cols, g.left, up);
#pragma unroll
  for (int i = 0; i < kValuesPerLane; ++i) {
    y[i] = __fmul_rn(__fdiv_rn(gate[i], __fadd_rn(1.f, expf(-gate[i]))), up[i]);
  }
  const int64_t at = g.row * p.cols + g.column;
  if (!p.scale) {
    store_run(static_cast<T*>(p.y) + at, g.left, y);
    return;
  }
  const float scale = block_scale(warp_max(largest(y)), kE4m3Max, p.format);
  store_e4m3(static_cast<uint8_t*>(p.y) + at, g.left, y, scale);
  if (threadIdx.x % kWarp == 0) {
    const uint32_t plane = uint32_t(g.row) / uint32_t(p.rows);
    const uint32_t within = uint32_t(g.row) - plane * uint32_t(p.rows);
    p.scale[plane * p.plane_scale + g.k_group * p.ld_scale + within] = scale;
  }
}

template <typename T>
__device__ __forceinline__ void swiglu_backward_group(const SwigluParams& p, const SwigluGroup& g) {
  const T* x = static_cast<const T*>(p.x) + g.row * p.ld_x + g.column;
  float gate[kValuesPerLane], up[kValuesPerLane], grad[kValuesPerLane];
  load_run(x, g.left, gate);
  load_run(x + p.cols, g.left, up);
  load_run(static_cast<const T*>(p.grad) + g.row * p.cols + g.column, g.left, grad);
  float dgate[kValuesPerLane], dup[kValuesPerLane];
#pragma unroll
  for (int i = 0; i < kValuesPerLane; ++i) {
    swiglu_gradient(gate[i], up[i], sigmoid(gate[i]), grad[i], dgate[i], dup[i]);
  }
  T* dx = static_cast<T*>(p.y) + g.row * 2 * p.cols + g.column;
  store_run(dx, g.left, dgate);
  store_run(dx + p.cols, g.left, dup);
}

template <class Do>
__device__ __forceinline__ void for_each_swiglu_group(const SwigluParams& p, Do&& work) {
  const uint32_t groups_per_row = (p.cols + kQuantGroup - 1) / kQuantGroup;
  const int64_t num_groups = int64_t(groups_per_row) * p.planes * p.rows;
  const int64_t num_warps = int64_t(gridDim.x) * (blockDim.x / kWarp);
  for (int64_t group = int64_t(blockIdx.x) * (blockDim.x / kWarp) + threadIdx.x / kWarp;
       group < num_groups; group += num_warps) {
    work(SwigluGroup(p, group, groups_per_row));
  }
}

__device__ __forceinline__ void swiglu_rows(const SwigluParams& p) {
  for_each_swiglu_group(p, [&](const SwigluGroup& g) {
    if (p.type == WideType::kBfloat16) {
      swiglu_group<__nv_bfloat16>(p, g);
    } else {
      swiglu_group<float>(p, g);
    }
  });
}

__device__ __forceinline__ void swiglu_backward_rows(const SwigluParams& p) {
  for_each_swiglu_group(p, [&](const SwigluGroup& g) {
    if (p.type == WideType::kBfloat16) {
      swiglu_backward_group<__nv_bfloat16>(p, g);
    } else {
      swiglu_backward_group<float>(p, g);
    }
  });
}

}  // namespace dsk
