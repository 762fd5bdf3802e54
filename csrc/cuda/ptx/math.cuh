// Approximate functions of the special function unit.
#pragma once

namespace dsk::ptx {

// ex2.approx.ftz.f32 d, a;   2^a, 2 ulp; -inf gives 0
__device__ __forceinline__ float exp2_approx(float a) {
  float d;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(d) : "f"(a));
  return d;
}

// lg2.approx.ftz.f32 d, a;   log2(a); 0 gives -inf
__device__ __forceinline__ float log2_approx(float a) {
  float d;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(d) : "f"(a));
  return d;
}

}  // namespace dsk::ptx
