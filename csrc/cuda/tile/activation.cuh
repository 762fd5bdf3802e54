// Activation functions with every rounding spelled out.
#pragma once

namespace dsk {

__device__ __forceinline__ float sigmoid(float x) {
  return __fdiv_rn(1.f, __fadd_rn(1.f, expf(-x)));
}

}  // namespace dsk
