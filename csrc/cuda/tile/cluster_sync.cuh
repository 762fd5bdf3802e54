// Where all CTAs of a cluster meet.
#pragma once

#include <cuda/ptx>

namespace dsk {

// Every CTA of the cluster has come here, and what one of them wrote the others see.
__device__ __forceinline__ void sync_cluster() {
  cuda::ptx::barrier_cluster_arrive(cuda::ptx::sem_release);
  cuda::ptx::barrier_cluster_wait(cuda::ptx::sem_acquire);
}

// Every CTA of the cluster has come here, and no more: without the fences of a release.
__device__ __forceinline__ void meet_cluster() {
  cuda::ptx::barrier_cluster_arrive(cuda::ptx::sem_relaxed);
  cuda::ptx::barrier_cluster_wait();
}

}  // namespace dsk
