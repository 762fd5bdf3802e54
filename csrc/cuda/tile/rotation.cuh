// Rotary position embedding of one pair.
//
// (a, b) -> (a cos - b sin, b cos + a sin), products and sum each rounded to fp32, so the bits are
// those of the reference.
#pragma once

#include "cuda/tile/quantize.cuh"

namespace dsk {

// Turns pair `pair` of the 2 * half values at x: (2p, 2p + 1) where interleaved, else
// (p, p + half).
template <typename T>
__device__ __forceinline__ void turn_pair(const T* x, T* y, int pair, int half, bool interleaved,
                                          float cosine, float sine) {
  float in[2];
  if (interleaved) {
    load_run(x + 2 * pair, 2, in);
  } else {
    in[0] = to_float(x[pair]);
    in[1] = to_float(x[pair + half]);
  }
  const float out[2] = {__fsub_rn(__fmul_rn(in[0], cosine), __fmul_rn(in[1], sine)),
                        __fadd_rn(__fmul_rn(in[1], cosine), __fmul_rn(in[0], sine))};
  if (interleaved) {
    store_run(y + 2 * pair, 2, out);
  } else {
    y[pair] = from_float<T>(out[0]);
    y[pair + half] = from_float<T>(out[1]);
  }
}

}  // namespace dsk
