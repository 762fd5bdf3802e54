// What follows the down-projections of latent attention, a CTA for each token: RMSNorm of the query
// latent (1536 values) and of the key-value latent (512), rotation of the shared key (64), and the
// cache row, bf16 or quantised. Without norm and angles it is the plain append.
//
// Bound by memory, and at decode size by latency: 128 tokens read 541 KB and write 541 KB (bf16
// cache), 0.3 us at 3.35 TB/s, of some 2 us that any kernel takes. Apart they are five launches.
//
// 2112 values are 8 warps of 256, 8 to a lane, and one warp of 32 pairs; so a row is read once, in
// 16-byte words, and kept in registers. One barrier carries the sums of squares and the answer to
// whether a later token has the same slot: of those the last one stays, whole.
#pragma once

#include "cuda/mla_shape.hpp"
#include "cuda/params/mla_fused.hpp"
#include "cuda/tile/quantize.cuh"
#include "cuda/tile/rotation.cuh"

namespace dsk {

constexpr int kLatentRun = 8;                       // values of a lane: 16 bytes
constexpr int kLatentWarpRun = kLatentRun * kWarp;  // 256
constexpr int kQueryWarps = kMlaQueryLatent / kLatentWarpRun;
constexpr int kKeyWarps = kMlaLatent / kLatentWarpRun;
constexpr int kNormedWarps = kQueryWarps + kKeyWarps;  // and one more for the pairs
constexpr int kLatentThreads = (kNormedWarps + 1) * kWarp;
constexpr int kGroupLanes = kQuantGroup / kLatentRun;  // lanes that share a scale
static_assert(kLatentThreads == 288, "as in instances/mla.def");
static_assert(kMlaRope == 2 * kWarp, "a pair for each lane of the last warp");

using Bf16 = __nv_bfloat16;

// Where a thread's values come from: a run of 8 of the queries' latent or of the keys'.
struct LatentRun {
  const Bf16* from;
  const void* weight;  // null: stored as they come
  WideType weight_type;
  int column;
  int first_warp;  // warps whose sums of squares make the norm
  int num_warps;
};

__device__ __forceinline__ LatentRun latent_run(const MlaLatentsParams& p, int64_t token,
                                                int warp) {
  const bool query = warp < kQueryWarps;
  const int first = query ? 0 : kQueryWarps;
  const int column = (warp - first) * kLatentWarpRun + threadIdx.x % kWarp * kLatentRun;
  const void* base = query ? p.q : p.latent;
  const int64_t row = token * (query ? p.ld_q : p.ld_latent);
  return {base ? static_cast<const Bf16*>(base) + row + column : nullptr,
          query ? p.q_weight : p.latent_weight,
          query ? p.q_weight_type : p.latent_weight_type,
          column,
          first,
          query ? kQueryWarps : kKeyWarps};
}

// Whether this thread sees a later token with the same slot.
__device__ __forceinline__ bool is_superseded(const MlaLatentsParams& p, int64_t slot, int token) {
  bool found = false;
  for (int later = token + 1 + threadIdx.x; later < p.t; later += kLatentThreads) {
    found |= __ldg(p.slots + later) == slot;
  }
  return found;
}

__device__ __forceinline__ void normalise(const MlaLatentsParams& p, const LatentRun& run,
                                          const float* squares, float (&x)[kLatentRun]) {
  if (!run.weight) return;
  float sum = 0.f;
  for (int i = 0; i < run.num_warps; ++i) sum += squares[run.first_warp + i];
  const float mean = __fdiv_rn(sum, float(run.num_warps * kLatentWarpRun));
  const float inverse = __fdiv_rn(1.f, __fsqrt_rn(__fadd_rn(mean, p.eps)));
  float weight[kLatentRun];
  if (run.weight_type == WideType::kBfloat16) {
    load_run(static_cast<const Bf16*>(run.weight) + run.column, kLatentRun, weight);
  } else {
#pragma unroll
    for (int i = 0; i < kLatentRun; ++i) {
      weight[i] = __ldg(static_cast<const float*>(run.weight) + run.column + i);
    }
  }
#pragma unroll
  for (int i = 0; i < kLatentRun; ++i) x[i] = __fmul_rn(__fmul_rn(x[i], inverse), weight[i]);
}

// 8 latents of a cache row; of an FP8 row with the scale of their 128, from values rounded to bf16.
__device__ __forceinline__ void store_latents(const MlaLatentsParams& p, uint8_t* row, int column,
                                              float (&x)[kLatentRun]) {
  if (!p.fp8) {
    store_run(reinterpret_cast<Bf16*>(row) + column, kLatentRun, x);
    return;
  }
#pragma unroll
  for (float& value : x) value = to_float(from_float<Bf16>(value));
  float amax = largest(x);
#pragma unroll
  for (int offset = kGroupLanes / 2; offset > 0; offset /= 2) {
    amax = fmaxf(amax, __shfl_xor_sync(0xffffffffu, amax, offset));
  }
  const float scale = block_scale(amax, kE4m3Max, ScaleFormat::kFp32);
  float low[4], high[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    low[i] = __fdiv_rn(x[i], scale);
    high[i] = __fdiv_rn(x[i + 4], scale);
  }
  *reinterpret_cast<uint2*>(row + column) = make_uint2(cast_e4m3x4(low), cast_e4m3x4(high));
  if (column % kQuantGroup == 0) {
    reinterpret_cast<float*>(row + kMlaLatent)[column / kQuantGroup] = scale;
  }
}

__device__ __forceinline__ void store_rotated(const MlaLatentsParams& p, int token, uint8_t* row) {
  const int pair = threadIdx.x % kWarp;
  const Bf16* from = static_cast<const Bf16*>(p.k_rope) + token * p.ld_rope;
  auto* to = reinterpret_cast<Bf16*>(row + (p.fp8 ? kMlaLatent + kMlaScaleBytes : kMlaLatent * 2));
  if (p.cos) {
    const int at = token * kWarp + pair;
    turn_pair(from, to, pair, kWarp, p.interleaved, __ldg(p.cos + at), __ldg(p.sin + at));
  } else {
    to[2 * pair] = from[2 * pair];
    to[2 * pair + 1] = from[2 * pair + 1];
  }
}

__device__ __forceinline__ void store_token_latents(const MlaLatentsParams& p, int token,
                                                    float (&squares)[kNormedWarps]) {
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / kWarp, 0);
  const int64_t slot = __ldg(p.slots + token);
  if (slot < -1 || slot >= p.num_slots) __trap();  // the caller's error
  const LatentRun run = latent_run(p, token, warp);
  const bool normed = warp < kNormedWarps && run.from;
  float x[kLatentRun];
  if (normed) {
    load_run(run.from, kLatentRun, x);
    float square = 0.f;
#pragma unroll
    for (float value : x) square = __fmaf_rn(value, value, square);
    square = warp_sum(square);
    if (threadIdx.x % kWarp == 0) squares[warp] = square;
  }
  const bool dropped = __syncthreads_or(slot < 0 || is_superseded(p, slot, token));
  uint8_t* row = p.cache + slot / p.page * p.ld_page + slot % p.page * p.ld_token;
  if (normed) normalise(p, run, squares, x);
  if (normed && warp < kQueryWarps) {
    store_run(static_cast<Bf16*>(p.q_out) + int64_t(token) * kMlaQueryLatent + run.column,
              kLatentRun, x);
  } else if (!dropped && warp < kNormedWarps) {
    if (normed) store_latents(p, row, run.column, x);
  } else if (!dropped) {
    store_rotated(p, token, row);
  }
}

__device__ __forceinline__ void mla_store_latents(const MlaLatentsParams& p) {
  // Reads of one token's sums are over before the next but one is written: there is a barrier
  // between.
  __shared__ float squares[2][kNormedWarps];
  int set = 0;
  for (int token = blockIdx.x; token < p.t; token += gridDim.x, set ^= 1) {
    store_token_latents(p, token, squares[set]);
  }
}

}  // namespace dsk
