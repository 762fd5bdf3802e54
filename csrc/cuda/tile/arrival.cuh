// Rows that another kernel brings while this one runs: their producer stores 1 + how many of them
// there are, with release, when they are complete; before, the word is zero or negative.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#include <cuda/atomic>
#include <cuda/ptx>
#endif

namespace dsk {

#ifdef __CUDACC__
// How many rows have arrived; waits for them. They may be loaded by TMA then.
__device__ __forceinline__ int await_rows(int32_t* word) {
  cuda::atomic_ref<int32_t, cuda::thread_scope_device> arrived(*word);
  int rows;
  while ((rows = arrived.load(cuda::memory_order_acquire)) <= 0) __nanosleep(64);
  // They were stored through the generic proxy.
  cuda::ptx::fence_proxy_async(cuda::ptx::space_global);
  return rows - 1;
}
#else
inline int await_rows(const int32_t* word) { return *word - 1; }  // the scheduler on the host
#endif

}  // namespace dsk
