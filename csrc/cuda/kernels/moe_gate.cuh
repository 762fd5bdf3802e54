// The router: hidden states to chosen experts, their weights, and all scores, in one launch.
//
// The two floors, 4096 tokens x 7168 x 256 experts: 15 GFLOP in fp32 at 60 TFLOP/s = 250 us of FMA
// (fp32 throughout: a rounded score would choose other experts than the reference); 59 MB of bf16
// hidden states at 3.35 TB/s = 18 us. 128 tokens: 8 us and 2 us.
//
// A cluster takes 32 tokens and shares out the depth: each of its CTAs multiplies a slice of it for
// all experts, 4 tokens x 8 experts a thread, with the next slab on its way while one is used. Then
// each CTA adds up the slices of some of the tokens, in the order of the ranks, through distributed
// shared memory, and a warp chooses for each token. Every sum has one order, whatever the batch.
#pragma once

#include <cuda/ptx>

#include "cuda/params/moe.hpp"
#include "cuda/ptx/cluster.cuh"
#include "cuda/tile/activation.cuh"
#include "cuda/tile/gate_choice.cuh"
#include "cuda/tile/quantize.cuh"

namespace dsk {

constexpr int kGateExperts = 256;  // of one pass over the depth
constexpr int kGateSlab = 32;      // of the depth, in shared memory at a time
constexpr int kGateTokensPerCta = kGateTokens / kGateCluster;  // that it chooses for
constexpr int kTokensPerThread = 4;
constexpr int kExpertsPerThread = 8;  // lane * 4 + 0..3 and 128 + lane * 4 + 0..3

struct GateSmem {
  struct Slab {
    alignas(16) float x[kGateSlab][kGateTokens];
    alignas(16) float weight[kGateSlab][kGateExperts];
  };
  union {  // the choice begins when all products are done
    Slab slab;
    GateChoiceSmem choice[kGateTokensPerCta];
  };
  float sums[kGateTokens][kMoeMaxExperts];  // this CTA's slice of the depth
};
static_assert(sizeof(GateSmem) == kGateSharedBytes);

// One slab of x and of the weights on its way from memory to shared memory, in registers.
template <typename T>
class GateSlab {
 public:
  __device__ __forceinline__ void load(const MoeGateParams& p, int first_token, int first_expert,
                                       int k, int k_end) {
    const int token = first_token + int(threadIdx.x) / 8;
    const int column = k + int(threadIdx.x) % 8 * 4;
    const int left_x = token < p.tokens ? k_end - column : 0;
    load_run(static_cast<const T*>(p.x) + token * p.ld_x + column, left_x, x_);
    const int expert = first_expert + int(threadIdx.x);
    const int left = expert < p.experts ? k_end - k : 0;
    const int64_t at = int64_t(expert) * p.depth + k;
    if (p.weight_type == WideType::kBfloat16) {
      load_row(static_cast<const __nv_bfloat16*>(p.weight) + at, left);
    } else {
      load_row(static_cast<const float*>(p.weight) + at, left);
    }
  }

  __device__ __forceinline__ void store(GateSmem& smem) const {
    const int token = threadIdx.x / 8;
#pragma unroll
    for (int i = 0; i < 4; ++i) smem.slab.x[threadIdx.x % 8 * 4 + i][token] = x_[i];
#pragma unroll
    for (int i = 0; i < kGateSlab; ++i) smem.slab.weight[i][threadIdx.x] = weight_[i / 4][i % 4];
  }

 private:
  template <typename W>
  __device__ __forceinline__ void load_row(const W* at, int left) {
#pragma unroll
    for (int i = 0; i < kGateSlab / 4; ++i) load_run(at + 4 * i, left - 4 * i, weight_[i]);
  }

  float x_[4];
  float weight_[kGateSlab / 4][4];
};

using GateSums = float[kTokensPerThread][kExpertsPerThread];

__device__ __forceinline__ void gate_multiply_slab(const GateSmem& smem, GateSums& sum) {
  const int token = threadIdx.x / kWarp * kTokensPerThread;
  const int expert = threadIdx.x % kWarp * 4;
#pragma unroll 8
  for (int k = 0; k < kGateSlab; ++k) {
    const float4 x = *reinterpret_cast<const float4*>(&smem.slab.x[k][token]);
    const float4 low = *reinterpret_cast<const float4*>(&smem.slab.weight[k][expert]);
    const float4 high = *reinterpret_cast<const float4*>(&smem.slab.weight[k][expert + 128]);
    const float a[4] = {x.x, x.y, x.z, x.w};
    const float b[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
    for (int t = 0; t < kTokensPerThread; ++t) {
#pragma unroll
      for (int e = 0; e < kExpertsPerThread; ++e) sum[t][e] = __fmaf_rn(a[t], b[e], sum[t][e]);
    }
  }
}

// This CTA's slice of the depth, for 32 tokens and 256 experts, into smem.sums.
template <typename T>
__device__ __forceinline__ void gate_multiply(const MoeGateParams& p, GateSmem& smem,
                                              int first_token, int first_expert) {
  const int slabs = (p.depth + kGateSlab - 1) / kGateSlab;
  const int per_rank = (slabs + kGateCluster - 1) / kGateCluster;
  const int first = ptx::cluster_rank() * per_rank;
  const int last = min(first + per_rank, slabs);
  GateSums sum = {};
  GateSlab<T> slab;
  if (first < last) slab.load(p, first_token, first_expert, first * kGateSlab, p.depth);
  for (int i = first; i < last; ++i) {
    __syncthreads();  // everyone is done with the slab before
    slab.store(smem);
    __syncthreads();
    if (i + 1 < last) slab.load(p, first_token, first_expert, (i + 1) * kGateSlab, p.depth);
    gate_multiply_slab(smem, sum);
  }
  const int token = threadIdx.x / kWarp * kTokensPerThread;
#pragma unroll
  for (int t = 0; t < kTokensPerThread; ++t) {
#pragma unroll
    for (int e = 0; e < kExpertsPerThread; ++e) {
      const int expert = first_expert + e / 4 * 128 + int(threadIdx.x % kWarp) * 4 + e % 4;
      if (expert < p.experts) smem.sums[token + t][expert] = sum[t][e];
    }
  }
}

// The slices' sum for one token, by one warp: its logits.
__device__ __forceinline__ void gate_add_slices(const MoeGateParams& p, GateSmem& smem, int token,
                                                float* logits) {
  for (int e = threadIdx.x % kWarp; e < p.experts; e += kWarp) {
    float sum = 0.f;
#pragma unroll
    for (int rank = 0; rank < kGateCluster; ++rank) {
      sum = __fadd_rn(sum, *ptx::map_to_rank(&smem.sums[token][e], rank));
    }
    logits[e] = sum;
  }
  __syncwarp();
}

template <typename T>
__device__ __forceinline__ void gate_tokens(const MoeGateParams& p) {
  using namespace cuda::ptx;
  extern __shared__ __align__(16) uint8_t shared_memory[];
  auto& smem = *reinterpret_cast<GateSmem*>(shared_memory);
  const int first_token = int(blockIdx.x) / kGateCluster * kGateTokens;
  for (int expert = 0; expert < p.experts; expert += kGateExperts) {
    gate_multiply<T>(p, smem, first_token, expert);
  }
  barrier_cluster_arrive(sem_release);
  barrier_cluster_wait(sem_acquire);

  const int warp = threadIdx.x / kWarp;
  const int within = ptx::cluster_rank() * kGateTokensPerCta + warp;
  const bool mine = warp < kGateTokensPerCta && first_token + within < p.tokens;
  if (mine) gate_add_slices(p, smem, within, smem.choice[warp].score);
  // Nobody leaves, and takes its slice along, before all have read it.
  barrier_cluster_arrive(sem_release);
  barrier_cluster_wait(sem_acquire);
  if (mine) choose_experts(p, smem.choice[warp], first_token + within);
}

__device__ __forceinline__ void gate_any_tokens(const MoeGateParams& p) {
  if (p.x_type == WideType::kBfloat16) {
    gate_tokens<__nv_bfloat16>(p);
  } else {
    gate_tokens<float>(p);
  }
}

}  // namespace dsk
