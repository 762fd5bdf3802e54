// The router: hidden states to chosen experts, their weights, all scores, and on request what the
// balancing of the experts counts, in one launch.
//
// The two floors, 4096 tokens x 7168 x 256 experts: 15 GFLOP in fp32 at 60 TFLOP/s = 250 us of FMA
// (fp32 throughout: a rounded score would choose other experts than the reference); 59 MB of bf16
// hidden states at 3.35 TB/s = 18 us. 128 tokens: 8 us and 2 us.
//
// A cluster takes 32 tokens x 64 experts, so that 128 tokens already fill the machine, and shares
// out the depth. Within a CTA the warps share out each slab of it: every warp multiplies the whole
// tile, 8 x 8 a thread, which reads 16 bytes of shared memory for 16 products. Warps, then CTAs in
// the order of their ranks (through distributed shared memory), add up to logits, which wait in
// the scores' place for those of the other experts. The last cluster that has some chooses, a warp
// a token. Every sum has one order, whatever the batch.
#pragma once

#include <cuda/ptx>

#include "cuda/params/moe.hpp"
#include "cuda/ptx/cluster.cuh"
#include "cuda/tile/activation.cuh"
#include "cuda/tile/each.cuh"
#include "cuda/tile/gate_choice.cuh"
#include "cuda/tile/quantize.cuh"

namespace dsk {

constexpr int kGateThreads = 256;
constexpr int kGateWarps = kGateThreads / kWarp;
constexpr int kGateSlab = 64;                                  // of the depth, a stage
constexpr int kGateWarpDepth = kGateSlab / kGateWarps;         // of a slab, a warp
constexpr int kGateTokensPerCta = kGateTokens / kGateCluster;  // that it chooses for
constexpr int kGateRows = kGateTokens + kGateExperts;          // of a stage: tokens, then experts
constexpr int kGatePitch = kGateSlab + 4;  // an odd number of words: 8 rows meet 32 banks
constexpr int kGateSumPitch = kGateExperts + 8;
constexpr int kGateRuns = kGateSlab / 4;                // of 4 values, in a row
constexpr int kGateRowStep = kGateThreads / kGateRuns;  // rows that threads load at once
constexpr int kGateTile = 8;                            // tokens, experts of a thread

struct GateSmem {
  union {  // the stages are done with before the warps' sums, and these before the choice
    float stage[2][kGateRows][kGatePitch];
    float warp_sum[kGateWarps][kGateTokens][kGateSumPitch];
    GateChoiceSmem choice[kGateTokensPerCta];
  };
  float sum[kGateTokens][kGateExperts];  // this CTA's share of the depth
  int32_t is_last;
};
static_assert(sizeof(GateSmem) <= kGateSharedBytes);

// 4 consecutive values on their way from memory to shared memory: raw, so that nobody waits for
// them before they are stored. bf16 takes the first half.
using GateRun = uint4;

template <typename Bits>
__device__ __forceinline__ GateRun gate_load_part(const uint8_t* from, int left) {
  uint32_t v[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) v[i] = i < left ? reinterpret_cast<const Bits*>(from)[i] : 0u;
  return sizeof(Bits) == 2 ? make_uint4(v[0] | v[1] << 16, v[2] | v[3] << 16, 0u, 0u)
                           : make_uint4(v[0], v[1], v[2], v[3]);
}

__device__ __forceinline__ float4 gate_values(const GateRun& run, bool is_bf16) {
  if (!is_bf16) {
    return make_float4(__uint_as_float(run.x), __uint_as_float(run.y), __uint_as_float(run.z),
                       __uint_as_float(run.w));
  }
  return make_float4(__uint_as_float(run.x << 16), __uint_as_float(run.x & 0xffff0000u),
                     __uint_as_float(run.y << 16), __uint_as_float(run.y & 0xffff0000u));
}

// A thread's share of some rows of x or of the weights, all of which begin on whole runs or not.
// Rows behind the last repeat it: nobody reads their sums.
template <int kLoads>
class GateLoader {
 public:
  __device__ __forceinline__ GateLoader(const void* from, WideType type, int64_t ld, int depth,
                                        int first_row, int rows)
      : is_bf16_(type == WideType::kBfloat16), depth_(depth) {
    const int bytes = is_bf16_ ? 2 : 4;
    const auto* base = static_cast<const uint8_t*>(from);
    const auto past = (reinterpret_cast<uintptr_t>(base) | uintptr_t(ld * bytes)) % (4 * bytes);
    whole_slabs_ = past == 0 ? depth / kGateSlab : 0;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int row = min(first_row + i * kGateRowStep + int(threadIdx.x) / kGateRuns, rows - 1);
      from_[i] = base + (row * ld + int(threadIdx.x) % kGateRuns * 4) * bytes;
    }
  }

  // Behind the depth: zeros, and nothing is read.
  __device__ __forceinline__ void load(int slab) {
    const int left = depth_ - slab * kGateSlab - int(threadIdx.x) % kGateRuns * 4;
    const int64_t offset = int64_t(slab) * kGateSlab * (is_bf16_ ? 2 : 4);
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const uint8_t* at = from_[i] + offset;
      if (slab >= whole_slabs_) {
        run_[i] =
            is_bf16_ ? gate_load_part<uint16_t>(at, left) : gate_load_part<uint32_t>(at, left);
      } else if (is_bf16_) {
        const uint2 word = __ldg(reinterpret_cast<const uint2*>(at));
        run_[i].x = word.x;
        run_[i].y = word.y;
      } else {
        run_[i] = __ldg(reinterpret_cast<const uint4*>(at));
      }
    }
  }

  __device__ __forceinline__ void store(float (*row)[kGatePitch]) const {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      float* to = row[i * kGateRowStep + threadIdx.x / kGateRuns] + threadIdx.x % kGateRuns * 4;
      *reinterpret_cast<float4*>(to) = gate_values(run_[i], is_bf16_);
    }
  }

 private:
  bool is_bf16_;
  int depth_, whole_slabs_;
  const uint8_t* from_[kLoads];
  GateRun run_[kLoads];
};

// Of a thread: tokens 4 i + lane / 8, experts 8 j + lane % 8.
using GateSums = float[kGateTile][kGateTile];

__device__ __forceinline__ void gate_multiply_slab(const float (&stage)[kGateRows][kGatePitch],
                                                   GateSums& sum) {
  const int lane = threadIdx.x % kWarp;
  const int first = threadIdx.x / kWarp * kGateWarpDepth;
#pragma unroll
  for (int k = 0; k < kGateWarpDepth; k += 4) {
    float x[kGateTile][4];
#pragma unroll
    for (int i = 0; i < kGateTile; ++i) {
      *reinterpret_cast<float4*>(x[i]) =
          *reinterpret_cast<const float4*>(&stage[4 * i + lane / 8][first + k]);
    }
#pragma unroll
    for (int j = 0; j < kGateTile; ++j) {
      float w[4];
      *reinterpret_cast<float4*>(w) =
          *reinterpret_cast<const float4*>(&stage[kGateTokens + 8 * j + lane % 8][first + k]);
#pragma unroll
      for (int c = 0; c < 4; ++c) {  // outside: eight sums that do not wait for each other
#pragma unroll
        for (int i = 0; i < kGateTile; ++i) sum[i][j] = __fmaf_rn(x[i][c], w[c], sum[i][j]);
      }
    }
  }
}

// This CTA's share of the depth, for 32 tokens and 64 experts, into smem.sum.
__device__ __forceinline__ void gate_multiply(const MoeGateParams& p, GateSmem& smem,
                                              int first_token, int first_expert) {
  const int slabs = (p.depth + kGateSlab - 1) / kGateSlab;
  const int per_rank = (slabs + kGateCluster - 1) / kGateCluster;
  const int first = ptx::cluster_rank() * per_rank;
  GateSums sum = {};
  GateLoader<kGateTokens / kGateRowStep> x(p.x, p.x_type, p.ld_x, p.depth, first_token, p.tokens);
  GateLoader<kGateExperts / kGateRowStep> weight(p.weight, p.weight_type, p.depth, p.depth,
                                                 first_expert, p.experts);
  const auto load = [&](int i) {
    x.load(first + i);
    weight.load(first + i);
  };
  const auto store = [&](int i) {
    auto& stage = smem.stage[i % 2];  // everyone left it a barrier ago
    x.store(stage);
    weight.store(stage + kGateTokens);
    __syncthreads();
  };
  load(0);
  store(0);
  for (int i = 1; i < per_rank; ++i) {  // a slab is on its way while the one before is used
    load(i);
    gate_multiply_slab(smem.stage[(i - 1) % 2], sum);
    store(i);
  }
  gate_multiply_slab(smem.stage[(per_rank - 1) % 2], sum);
  __syncthreads();  // the warps' sums take the stages' place
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
#pragma unroll
  for (int i = 0; i < kGateTile; ++i) {
#pragma unroll
    for (int j = 0; j < kGateTile; ++j) {
      smem.warp_sum[warp][4 * i + lane / 8][8 * j + lane % 8] = sum[i][j];
    }
  }
  __syncthreads();
  each_in_cta<kGateThreads>(kGateTokens * kGateExperts, [&](int i) {
    float total = 0.f;
#pragma unroll
    for (int w = 0; w < kGateWarps; ++w) {
      total = __fadd_rn(total, smem.warp_sum[w][i / kGateExperts][i % kGateExperts]);
    }
    smem.sum[i / kGateExperts][i % kGateExperts] = total;
  });
}

// The shares' sum for one of this CTA's tokens and one expert a thread: logits, to memory.
__device__ __forceinline__ void gate_add_shares(const MoeGateParams& p, GateSmem& smem,
                                                int first_token, int first_expert) {
  static_assert(kGateTokensPerCta * kGateExperts == kGateThreads);
  const int within = ptx::cluster_rank() * kGateTokensPerCta + int(threadIdx.x) / kGateExperts;
  const int column = threadIdx.x % kGateExperts;
  const int token = first_token + within, expert = first_expert + column;
  if (token >= p.tokens || expert >= p.experts) return;
  float sum = 0.f;
#pragma unroll
  for (int rank = 0; rank < kGateCluster; ++rank) {
    sum = __fadd_rn(sum, *ptx::map_to_rank(&smem.sum[within][column], rank));
  }
  p.scores[int64_t(token) * p.experts + expert] = sum;
}

// Whether this is the last of the CTAs that had a share in its tokens' logits. The cluster's
// barrier before it has all threads' stores behind it.
__device__ __forceinline__ bool gate_is_last(const MoeGateParams& p, GateSmem& smem, int group,
                                             int slices) {
  __threadfence();  // the logits are out before this CTA says so
  if (threadIdx.x == 0) {
    int32_t* finished = p.finished + group * kGateCluster + ptx::cluster_rank();
    smem.is_last = atomicAdd(finished, 1) == slices - 1;
    __threadfence();  // and are read after the last one has heard from all
  }
  __syncthreads();
  return smem.is_last;
}

__device__ __forceinline__ void gate_tokens(const MoeGateParams& p) {
  using namespace cuda::ptx;
  extern __shared__ __align__(16) uint8_t shared_memory[];
  auto& smem = *reinterpret_cast<GateSmem*>(shared_memory);
  const int slices = (p.experts + kGateExperts - 1) / kGateExperts;
  const int cluster = int(blockIdx.x) / kGateCluster;
  const int group = cluster / slices, first_token = group * kGateTokens;
  const int first_expert = cluster % slices * kGateExperts;
  gate_multiply(p, smem, first_token, first_expert);
  barrier_cluster_arrive(sem_release);
  barrier_cluster_wait(sem_acquire);
  gate_add_shares(p, smem, first_token, first_expert);
  // Nobody leaves, and takes its share along, before all have read it.
  barrier_cluster_arrive(sem_release);
  barrier_cluster_wait(sem_acquire);
  if (!gate_is_last(p, smem, group, slices)) return;

  const int warp = threadIdx.x / kWarp;
  const int token = first_token + ptx::cluster_rank() * kGateTokensPerCta + warp;
  if (warp >= kGateTokensPerCta || token >= p.tokens) return;
  const float* logits = p.scores + int64_t(token) * p.experts;
  each_in_warp(p.experts, [&](int e) { smem.choice[warp].score[e] = __ldcg(logits + e); });
  choose_experts(p, smem.choice[warp], token);
}

}  // namespace dsk
