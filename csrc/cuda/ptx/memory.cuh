// Cache control.
#pragma once

namespace dsk::ptx {

// prefetch.global.L2 [a];   PTX ISA 2.0: the line of a comes to L2, nobody waits for it
__device__ __forceinline__ void prefetch_l2(const void* address) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(address)));
}

}  // namespace dsk::ptx
