// Register budgets, barriers, register pairs: instructions without a libcu++ wrapper.
#pragma once

#include <cstdint>

namespace dsk::ptx {

// setmaxnreg.inc.sync.aligned.u32 n;   PTX ISA 8.0, sm_90a; n a multiple of 8 in 24..256
template <int kRegisters>
__device__ __forceinline__ void setmaxnreg_inc() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// setmaxnreg.dec.sync.aligned.u32 n;
template <int kRegisters>
__device__ __forceinline__ void setmaxnreg_dec() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// barrier.sync id, threads;   sm_30. Ids are an enum of the kernel; 0 is __syncthreads.
__device__ __forceinline__ void named_barrier_sync(uint32_t id, uint32_t threads) {
  asm volatile("barrier.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// barrier.arrive id, threads;   counts this warp in and goes on; others wait by barrier.sync
__device__ __forceinline__ void named_barrier_arrive(uint32_t id, uint32_t threads) {
  asm volatile("barrier.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// mbarrier.arrive.shared::cluster.b64 _, [a];   PTX ISA 8.0; a barrier of any CTA of the cluster,
// as map_shared_to_rank gives it. Release at the default scope, the CTA's own: .release.cluster,
// which libcu++ wraps, compiles to MEMBAR.ALL.GPU. Enough where the arrival only says that reads
// are over.
__device__ __forceinline__ void mbarrier_arrive_remote(uint32_t address) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(address) : "memory");
}

// mbarrier.arrive.shared.b64 _, [a];   libcu++'s wrapper takes a pointer, which costs its
// conversion
__device__ __forceinline__ void mbarrier_arrive_at(uint32_t address) {
  asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(address) : "memory");
}

// No instruction: the value stays in its register, and is not computed anew where it is used.
__device__ __forceinline__ uint32_t keep(uint32_t value) {
  asm volatile("" : "+r"(value));
  return value;
}

// mov.b64 d, {low, high};
__device__ __forceinline__ uint64_t join_words(uint32_t low, uint32_t high) {
  uint64_t both;
  asm("mov.b64 %0, {%1, %2};" : "=l"(both) : "r"(low), "r"(high));
  return both;
}

}  // namespace dsk::ptx
