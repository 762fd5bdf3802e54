// Rotary position embedding of pairs.
#pragma once

#include "cuda/tile/quantize.cuh"

namespace dsk {

// (a, b) -> (a cos - b sin, b cos + a sin), products and sum each rounded to fp32, so the bits are
// those of the reference.
__device__ __forceinline__ float2 turn(float2 v, float cosine, float sine) {
  return make_float2(__fsub_rn(__fmul_rn(v.x, cosine), __fmul_rn(v.y, sine)),
                     __fadd_rn(__fmul_rn(v.y, cosine), __fmul_rn(v.x, sine)));
}

// Turns pair `pair` of the 2 * half values at x: (2p, 2p + 1) where interleaved, else
// (p, p + half).
template <typename T>
__device__ __forceinline__ void turn_pair(const T* x, T* y, int pair, int half, bool interleaved,
                                          float cosine, float sine) {
  if (interleaved) {
    float value[2];
    load_run(x + 2 * pair, 2, value);
    const float2 turned = turn(make_float2(value[0], value[1]), cosine, sine);
    value[0] = turned.x;
    value[1] = turned.y;
    store_run(y + 2 * pair, 2, value);
  } else {
    const float2 turned =
        turn(make_float2(to_float(x[pair]), to_float(x[pair + half])), cosine, sine);
    y[pair] = from_float<T>(turned.x);
    y[pair + half] = from_float<T>(turned.y);
  }
}

}  // namespace dsk
