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
constexpr int kGateLoads = kGateRows / kGateRowStep;    // runs of a thread
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
// them before they are stored.
struct GateRun {
  uint4 raw;  // bf16: the first half

  __device__ __forceinline__ void load(const void* row, WideType type, int column, int left) {
    if (type == WideType::kBfloat16) {
      load_words(static_cast<const uint16_t*>(row) + column, left);
    } else {
      load_words(static_cast<const uint32_t*>(row) + column, left);
    }
  }

  __device__ __forceinline__ float4 values(WideType type) const {
    if (type != WideType::kBfloat16) {
      return make_float4(__uint_as_float(raw.x), __uint_as_float(raw.y), __uint_as_float(raw.z),
                         __uint_as_float(raw.w));
    }
    return make_float4(__uint_as_float(raw.x << 16), __uint_as_float(raw.x & 0xffff0000u),
                       __uint_as_float(raw.y << 16), __uint_as_float(raw.y & 0xffff0000u));
  }

 private:
  template <typename Bits>
  __device__ __forceinline__ void load_words(const Bits* at, int left) {
    using W = typename Word<4 * sizeof(Bits)>::Type;
    if (is_word<Bits, 4>(at, left)) {
      *reinterpret_cast<W*>(&raw) = __ldg(reinterpret_cast<const W*>(at));
      return;
    }
    uint32_t v[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) v[i] = i < left ? uint32_t(at[i]) : 0u;
    raw = sizeof(Bits) == 2 ? make_uint4(v[0] | v[1] << 16, v[2] | v[3] << 16, 0u, 0u)
                            : make_uint4(v[0], v[1], v[2], v[3]);
  }
};

// Where a thread loads from. Rows behind the last token or expert repeat it: nobody reads their
// sums.
class GateLoader {
 public:
  __device__ __forceinline__ GateLoader(const MoeGateParams& p, int first_token, int first_expert)
      : p_(p), token_(first_token), expert_(first_expert) {}

  __device__ __forceinline__ void load(int k) {
    const int column = k + int(threadIdx.x) % kGateRuns * 4;
#pragma unroll
    for (int i = 0; i < kGateLoads; ++i) {
      const int row = i * kGateRowStep + int(threadIdx.x) / kGateRuns;
      const bool is_x = i * kGateRowStep < kGateTokens;
      const int64_t at = is_x
                             ? min(token_ + row, p_.tokens - 1) * p_.ld_x
                             : min(expert_ + row - kGateTokens, p_.experts - 1) * int64_t(p_.depth);
      const WideType type = is_x ? p_.x_type : p_.weight_type;
      const int bytes = type == WideType::kBfloat16 ? 2 : 4;
      const void* from = static_cast<const uint8_t*>(is_x ? p_.x : p_.weight) + at * bytes;
      run_[i].load(from, type, column, p_.depth - column);
    }
  }

  __device__ __forceinline__ void store(float (&stage)[kGateRows][kGatePitch]) const {
#pragma unroll
    for (int i = 0; i < kGateLoads; ++i) {
      const int row = i * kGateRowStep + int(threadIdx.x) / kGateRuns;
      const WideType type = i * kGateRowStep < kGateTokens ? p_.x_type : p_.weight_type;
      *reinterpret_cast<float4*>(&stage[row][threadIdx.x % kGateRuns * 4]) = run_[i].values(type);
    }
  }

 private:
  const MoeGateParams& p_;
  int token_, expert_;
  GateRun run_[kGateLoads];
};

// Of a thread: tokens 4 i + lane / 8, experts 8 j + lane % 8.
using GateSums = float[kGateTile][kGateTile];

__device__ __forceinline__ void gate_multiply_slab(const float (&stage)[kGateRows][kGatePitch],
                                                   GateSums& sum) {
  const int lane = threadIdx.x % kWarp;
  const int first = threadIdx.x / kWarp * kGateWarpDepth;
#pragma unroll
  for (int k = 0; k < kGateWarpDepth; k += 4) {
    float4 x[kGateTile];
#pragma unroll
    for (int i = 0; i < kGateTile; ++i) {
      x[i] = *reinterpret_cast<const float4*>(&stage[4 * i + lane / 8][first + k]);
    }
#pragma unroll
    for (int j = 0; j < kGateTile; ++j) {
      const int row = kGateTokens + 8 * j + lane % 8;
      const float4 w = *reinterpret_cast<const float4*>(&stage[row][first + k]);
#pragma unroll
      for (int i = 0; i < kGateTile; ++i) {
        float s = sum[i][j];
        s = __fmaf_rn(x[i].x, w.x, s);
        s = __fmaf_rn(x[i].y, w.y, s);
        s = __fmaf_rn(x[i].z, w.z, s);
        sum[i][j] = __fmaf_rn(x[i].w, w.w, s);
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
  const int last = min(first + per_rank, slabs);
  GateSums sum = {};
  GateLoader loader(p, first_token, first_expert);
  if (first < last) loader.load(first * kGateSlab);
  for (int i = first; i < last; ++i) {
    auto& stage = smem.stage[(i - first) % 2];  // everyone left it a barrier ago
    loader.store(stage);
    __syncthreads();
    if (i + 1 < last) loader.load((i + 1) * kGateSlab);
    gate_multiply_slab(stage, sum);
  }
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
  for (int i = threadIdx.x; i < kGateTokens * kGateExperts; i += kGateThreads) {
    float total = 0.f;
#pragma unroll
    for (int w = 0; w < kGateWarps; ++w) {
      total = __fadd_rn(total, smem.warp_sum[w][i / kGateExperts][i % kGateExperts]);
    }
    smem.sum[i / kGateExperts][i % kGateExperts] = total;
  }
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

// Whether this is the last of the CTAs that had a share in its tokens' logits.
__device__ __forceinline__ bool gate_is_last(const MoeGateParams& p, GateSmem& smem, int group,
                                             int slices) {
  __threadfence();  // the logits are out before this CTA says so
  __syncthreads();
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
  for (int e = threadIdx.x % kWarp; e < p.experts; e += kWarp) {
    smem.choice[warp].score[e] = __ldcg(logits + e);
  }
  __syncwarp();
  choose_experts(p, smem.choice[warp], token);
}

}  // namespace dsk
