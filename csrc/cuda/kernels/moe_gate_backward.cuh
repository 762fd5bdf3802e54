// The router's backward: gradients of weights and scores to gradients of the logits, and from those
// to hidden states and router weights.
//
// Logits: three rows of e values a token move; 4096 x 256 are 13 MB, 4 us. The products are 15
// GFLOP each for 4096 tokens x 7168 x 256 experts, 250 us of fp32 FMA at 60 TFLOP/s, and fp32 like
// the forward: their operands are gradients of a choice between close scores, which bf16 would
// round away. A CTA computes a tile of 64 x 128, a thread 4 x 8 of it, with the next slab of 16
// along the sum on its way while one is used. Every sum has one order.
#pragma once

#include "cuda/params/moe.hpp"
#include "cuda/tile/each.cuh"
#include "cuda/tile/quantize.cuh"

namespace dsk {

constexpr int kGateBackwardWarps = 8;

struct GateBackwardSmem {
  float gradient[kGateBackwardWarps][kMoeMaxExperts];  // of the chosen scores, in order of choice
  int chosen[kGateBackwardWarps][kMoeMaxExperts];
};

// g = scale dw; renormalised weights w = s / S: (g - <g, s> / S) / S. For one token, by one warp.
__device__ __forceinline__ void chosen_scores_backward(const MoeGateBackwardParams& p,
                                                       int64_t token, float* gradient,
                                                       int* chosen) {
  constexpr float kWeightSumFloor = 1e-20f;  // as in the forward
  const float* score = p.scores + token * p.experts;
  float sum = 0.f, dot = 0.f;
  each_in_warp(p.topk, [&](int i) {
    chosen[i] = int(__ldg(p.topk_idx + token * p.topk + i));
    gradient[i] = __fmul_rn(__ldg(p.grad_weights + token * p.topk + i), p.scale);
    const float s = __ldg(score + chosen[i]);
    sum = __fadd_rn(sum, s);
    dot = __fmaf_rn(gradient[i], s, dot);
  });
  if (p.renormalize) {
    const float total = __fadd_rn(warp_sum(sum), kWeightSumFloor);
    const float mean = __fdiv_rn(warp_sum(dot), total);
    each_in_warp(p.topk,
                 [&](int i) { gradient[i] = __fdiv_rn(__fsub_rn(gradient[i], mean), total); });
  }
  __syncwarp();
}

__device__ __forceinline__ void logits_backward(const MoeGateBackwardParams& p, int64_t token,
                                                const float* gradient, const int* chosen) {
  const int64_t row = token * p.experts;
  float dot = 0.f;
  each_in_warp(p.experts, [&](int e) {
    float ds = __ldg(p.grad_scores + row + e);
    for (int i = 0; i < p.topk; ++i) {
      if (chosen[i] == e) ds = __fadd_rn(ds, gradient[i]);
    }
    const float s = __ldg(p.scores + row + e);
    if (!p.softmax) ds = __fmul_rn(__fmul_rn(ds, s), __fsub_rn(1.f, s));
    dot = __fmaf_rn(ds, s, dot);
    p.dlogits[row + e] = ds;
  });
  if (!p.softmax) return;
  dot = warp_sum(dot);
  each_in_warp(p.experts, [&](int e) {  // each lane its own values again
    p.dlogits[row + e] = __fmul_rn(__ldg(p.scores + row + e), __fsub_rn(p.dlogits[row + e], dot));
  });
}

__device__ __forceinline__ void gate_logits_backward(const MoeGateBackwardParams& p) {
  __shared__ GateBackwardSmem smem;
  const int warp = threadIdx.x / kWarp;
  const int64_t step = int64_t(gridDim.x) * kGateBackwardWarps;
  for (int64_t token = int64_t(blockIdx.x) * kGateBackwardWarps + warp; token < p.tokens;
       token += step) {
    chosen_scores_backward(p, token, smem.gradient[warp], smem.chosen[warp]);
    logits_backward(p, token, smem.gradient[warp], smem.chosen[warp]);
    __syncwarp();  // the next token's values take these ones' place
  }
}

// ---- products: out [m, n] = A [m, k] B [k, n] ---------------------------------------------------

constexpr int kProductRows = 64, kProductColumns = 128, kProductSlab = 16;

struct GateProductSmem {
  alignas(16) float a[kProductSlab][kProductRows];
  alignas(16) float b[kProductSlab][kProductColumns];
};

// One slab on its way from memory to shared memory, in registers.
class GateProductSlab {
 public:
  __device__ __forceinline__ void load(const MoeGateProductParams& p, int row, int column, int k) {
    if (p.a_transposed) {  // a is [k, m]
      const int at = k + int(threadIdx.x) / 16, from = row + int(threadIdx.x) % 16 * 4;
      load_run(p.a + int64_t(at) * p.m + from, at < p.k ? p.m - from : 0, a_);
    } else {
      const int at = k + int(threadIdx.x) % 4 * 4, from = row + int(threadIdx.x) / 4;
      load_run(p.a + int64_t(from) * p.k + at, from < p.m ? p.k - at : 0, a_);
    }
    const int at = k + int(threadIdx.x) / 16;
    const int left = at < p.k ? p.n - column : 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int within = half * 64 + int(threadIdx.x) % 16 * 4;
      const int64_t offset = at * p.ld_b + column + within;
      if (p.b_type == WideType::kBfloat16) {
        load_run(static_cast<const __nv_bfloat16*>(p.b) + offset, left - within, b_[half]);
      } else {
        load_run(static_cast<const float*>(p.b) + offset, left - within, b_[half]);
      }
    }
  }

  __device__ __forceinline__ void store(const MoeGateProductParams& p,
                                        GateProductSmem& smem) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (p.a_transposed) {
        smem.a[threadIdx.x / 16][threadIdx.x % 16 * 4 + i] = a_[i];
      } else {
        smem.a[threadIdx.x % 4 * 4 + i][threadIdx.x / 4] = a_[i];
      }
      smem.b[threadIdx.x / 16][threadIdx.x % 16 * 4 + i] = b_[0][i];
      smem.b[threadIdx.x / 16][64 + threadIdx.x % 16 * 4 + i] = b_[1][i];
    }
  }

 private:
  float a_[4], b_[2][4];
};

using GateProductSums = float[4][2][4];  // rows; columns 4 c + 0..3 and 64 + 4 c + 0..3

__device__ __forceinline__ void multiply_product_slab(const GateProductSmem& smem,
                                                      GateProductSums& sum) {
  const int row = threadIdx.x / 16 * 4, column = threadIdx.x % 16 * 4;
#pragma unroll
  for (int k = 0; k < kProductSlab; ++k) {
    const float4 x = *reinterpret_cast<const float4*>(&smem.a[k][row]);
    const float a[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float4 y = *reinterpret_cast<const float4*>(&smem.b[k][half * 64 + column]);
      const float b[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[i][half][j] = __fmaf_rn(a[i], b[j], sum[i][half][j]);
      }
    }
  }
}

__device__ __forceinline__ void gate_product(const MoeGateProductParams& p) {
  __shared__ GateProductSmem smem;
  const int column = int(blockIdx.x) * kProductColumns, row = int(blockIdx.y) * kProductRows;
  GateProductSums sum = {};
  GateProductSlab slab;
  slab.load(p, row, column, 0);
  for (int k = 0; k < p.k; k += kProductSlab) {
    __syncthreads();  // everyone is done with the slab before
    slab.store(p, smem);
    __syncthreads();
    slab.load(p, row, column, k + kProductSlab);  // behind the depth: zeros, nothing read
    multiply_product_slab(smem, sum);
  }
  const int first = row + int(threadIdx.x) / 16 * 4;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (first + i >= p.m) continue;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int at = column + half * 64 + int(threadIdx.x) % 16 * 4;
      const int64_t offset = int64_t(first + i) * p.n + at;
      if (p.out_type == WideType::kBfloat16) {
        store_run(static_cast<__nv_bfloat16*>(p.out) + offset, p.n - at, sum[i][half]);
      } else {
        store_run(static_cast<float*>(p.out) + offset, p.n - at, sum[i][half]);
      }
    }
  }
}

}  // namespace dsk
