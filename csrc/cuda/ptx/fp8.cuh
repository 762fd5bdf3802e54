// FP8 conversion instructions. One wrapper is one instruction; its PTX line stands above it.
#pragma once

#include <cstdint>

namespace dsk::ptx {

// cvt.rn.satfinite.e4m3x2.f32 d, hi, lo;   PTX ISA 7.8, sm_89. NaN becomes 0x7f.
__device__ __forceinline__ uint16_t cvt_e4m3x2(float lo, float hi) {
  uint16_t packed;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(packed) : "f"(hi), "f"(lo));
  return packed;
}

// cvt.rn.f16x2.e4m3x2 d, a;   PTX ISA 7.8, sm_89. Exact.
__device__ __forceinline__ uint32_t cvt_f16x2(uint16_t e4m3x2) {
  uint32_t halves;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(e4m3x2));
  return halves;
}

}  // namespace dsk::ptx
