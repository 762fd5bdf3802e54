// Where a CTA stands in its cluster, and its neighbours' shared memory. CUDA's own intrinsics; the
// cluster's barriers are in <cuda/ptx>.
#pragma once

#include <cstdint>

namespace dsk::ptx {

// mov.u32 d, %cluster_nctarank;   sm_90; 1 without a cluster
__device__ __forceinline__ int cluster_size() { return int(__clusterSizeInBlocks()); }

// mov.u32 d, %cluster_ctarank;
__device__ __forceinline__ int cluster_rank() { return int(__clusterRelativeBlockRank()); }

// mov.u32 d, %clusterid.x;   which cluster this CTA belongs to; its own number without a cluster
__device__ __forceinline__ int cluster_id() { return int(__clusterIdx().x); }

// mov.u32 d, %nclusterid.x;
__device__ __forceinline__ int num_clusters() { return int(__clusterGridDimInClusters().x); }

// mapa.u64 d, a, rank;   a generic address of the same variable in another CTA of the cluster
template <typename T>
__device__ __forceinline__ T* map_to_rank(T* own, int rank) {
  return static_cast<T*>(__cluster_map_shared_rank(own, uint32_t(rank)));
}

// mapa.shared::cluster.u32 d, a, rank;   the same of an address in shared memory's own window
__device__ __forceinline__ uint32_t map_shared_to_rank(uint32_t own, int rank) {
  uint32_t address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(own), "r"(rank));
  return address;
}

}  // namespace dsk::ptx
