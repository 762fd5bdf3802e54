// Rotary position embedding of [tokens, heads, 2 * half]: each pair turns by its token's angle.
//
// Bound by memory: 2 bytes read and written per bf16 value, the angles are shared by the heads:
// 4096 tokens x 128 heads x 64 move 134 MB, 40 us at 3.35 TB/s; 3 operations a value are 2 us. A
// warp takes a head of a token, a lane a pair.
//
// (a, b) -> (a cos - b sin, b cos + a sin), products and sum each rounded to fp32, so the bits are
// those of the reference.
#pragma once

#include "cuda/tile/quantize.cuh"

namespace dsk {

template <typename T>
__device__ __forceinline__ void turn_row(const RopeParams& p, uint32_t row) {
  const float* cosines = p.cos + int64_t(row / p.heads) * p.half;
  const float* sines = p.sin + int64_t(row / p.heads) * p.half;
  const T* x = static_cast<const T*>(p.x) + int64_t(row) * 2 * p.half;
  T* y = static_cast<T*>(p.y) + int64_t(row) * 2 * p.half;
  for (int pair = threadIdx.x % kWarp; pair < p.half; pair += kWarp) {
    const float cosine = __ldg(cosines + pair);
    const float sine = p.inverse ? -__ldg(sines + pair) : __ldg(sines + pair);
    float in[2];
    if (p.interleaved) {
      load_run(x + 2 * pair, 2, in);
    } else {
      in[0] = to_float(x[pair]);
      in[1] = to_float(x[pair + p.half]);
    }
    const float out[2] = {__fsub_rn(__fmul_rn(in[0], cosine), __fmul_rn(in[1], sine)),
                          __fadd_rn(__fmul_rn(in[1], cosine), __fmul_rn(in[0], sine))};
    if (p.interleaved) {
      store_run(y + 2 * pair, 2, out);
    } else {
      y[pair] = from_float<T>(out[0]);
      y[pair + p.half] = from_float<T>(out[1]);
    }
  }
}

__device__ __forceinline__ void rope_rows(const RopeParams& p) {
  const uint32_t warps = gridDim.x * (blockDim.x / kWarp);
  for (uint32_t row = blockIdx.x * (blockDim.x / kWarp) + threadIdx.x / kWarp;
       row < uint32_t(p.rows); row += warps) {
    if (p.type == WideType::kBfloat16) {
      turn_row<__nv_bfloat16>(p, row);
    } else {
      turn_row<float>(p, row);
    }
  }
}

}  // namespace dsk
