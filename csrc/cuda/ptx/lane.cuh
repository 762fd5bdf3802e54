// Who this thread is, asked where it matters.
#pragma once

namespace dsk::ptx {

// mov.u32 d, %laneid;   volatile: what depends on it is computed where it is needed instead of
// ahead of a loop, where it would hold registers
__device__ __forceinline__ int lane_here() {
  int lane;
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
  return lane;
}

}  // namespace dsk::ptx
