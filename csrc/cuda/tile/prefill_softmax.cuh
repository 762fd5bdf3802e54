// The online softmax of prefill on a 64 x 128 tile of scores in wgmma accumulators: a thread holds
// rows r and r + 8 of its warp's 16, two columns of every eight. Maxima are those of
// score * scale * log2(e), unrounded: a row's largest weight is 1, which bf16 holds, so that a key
// that outweighs all others gives its value exactly. The backward subtracts sum(grad out) from
// grad v: what P V had lost there would be its error.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "cuda/params/mla_prefill.hpp"
#include "cuda/ptx/math.cuh"

namespace dsk {

constexpr int kPrefillScores = kPrefillBlock / 2;  // accumulators of a thread
constexpr int kPrefillSums = kPrefillValues / 2;
constexpr float kPrefillLowest = -1e30f;  // below any score; finite, so differences are not NaN

struct PrefillRows {
  float peak[2] = {kPrefillLowest, kPrefillLowest};
  float sum[2] = {0.f, 0.f};  // of this thread's columns

  // Raises the maxima to those of s, turns s into weights 2^(s * scale - peak); `factor` is what
  // the new maxima do to everything summed so far.
  __device__ __forceinline__ void add(float (&s)[kPrefillScores], float scale, float (&factor)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float best = -INFINITY;
#pragma unroll
      for (int i = half * 2; i < kPrefillScores; i += 4) best = fmaxf(best, fmaxf(s[i], s[i + 1]));
      best = fmaxf(best, __shfl_xor_sync(0xffffffffu, best, 1));
      best = fmaxf(best, __shfl_xor_sync(0xffffffffu, best, 2));
      best = fmaxf(peak[half], best * scale);
      factor[half] = ptx::exp2_approx(peak[half] - best);
      peak[half] = best;
      float total = 0.f;
#pragma unroll
      for (int i = half * 2; i < kPrefillScores; i += 4) {
        s[i] = ptx::exp2_approx(fmaf(s[i], scale, -best));
        s[i + 1] = ptx::exp2_approx(fmaf(s[i + 1], scale, -best));
        total += s[i] + s[i + 1];
      }
      sum[half] = fmaf(sum[half], factor[half], total);
    }
  }

  // The sum of a whole row, in every thread that holds a part of it.
  __device__ __forceinline__ float row_sum(int half) const {
    float total = sum[half];
    total += __shfl_xor_sync(0xffffffffu, total, 1);
    return total + __shfl_xor_sync(0xffffffffu, total, 2);
  }
};

// Weights in bf16 pairs: four registers for every 16 keys, the A operand of wgmma.
__device__ __forceinline__ void pack_weights(const float (&s)[kPrefillScores],
                                             uint32_t (&p)[kPrefillScores / 2]) {
#pragma unroll
  for (int i = 0; i < kPrefillScores / 2; ++i) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(s[2 * i], s[2 * i + 1]);
    p[i] = *reinterpret_cast<const uint32_t*>(&pair);
  }
}

__device__ __forceinline__ void scale_rows(float (&o)[kPrefillSums], const float (&factor)[2]) {
#pragma unroll
  for (int i = 0; i < kPrefillSums; ++i) o[i] *= factor[i / 2 % 2];
}

}  // namespace dsk
