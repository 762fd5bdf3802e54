// Activation functions with every rounding spelled out.
#pragma once

namespace dsk {

__device__ __forceinline__ float sigmoid(float x) {
  return __fdiv_rn(1.f, __fadd_rn(1.f, expf(-x)));
}

// d gate = grad up s (1 + gate (1 - s)), d up = grad gate s, with s = sigmoid(gate).
__device__ __forceinline__ void swiglu_gradient(float gate, float up, float s, float grad,
                                                float& dgate, float& dup) {
  const float slope = __fmul_rn(s, __fadd_rn(1.f, __fmul_rn(gate, __fsub_rn(1.f, s))));
  dgate = __fmul_rn(__fmul_rn(grad, up), slope);
  dup = __fmul_rn(__fmul_rn(grad, gate), s);
}

}  // namespace dsk
