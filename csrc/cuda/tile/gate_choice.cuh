// One warp chooses one token's experts from its logits: scores, groups, top-k, weights. The order
// of every comparison and sum is that of dskernels.ref.moe.moe_gate.
#pragma once

#include <cfloat>

#include "cuda/params/moe.hpp"
#include "cuda/tile/activation.cuh"
#include "cuda/tile/each.cuh"
#include "cuda/tile/quantize.cuh"

namespace dsk {

struct GateChoiceSmem {
  float score[kMoeMaxExperts];  // logits, then unbiased scores
  float key[kMoeMaxExperts];    // biased, finite; NaN once out of the running
  float group[kMoeMaxExperts];  // how good each group is; NaN once chosen
  int chosen[kMoeMaxExperts];
};

__device__ __forceinline__ float not_a_number() { return __int_as_float(0x7fffffff); }

// Integers in the order of the numbers; the zeros are equal.
__device__ __forceinline__ uint32_t ordered(float value) {
  const uint32_t bits = __float_as_uint(__fadd_rn(value, 0.f));
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// The index of the largest value, the lowest of equal ones; NaNs are not in the running.
__device__ __forceinline__ int warp_arg_max(const float* value, int count) {
  float best = -INFINITY;
  int at = count;
  each_in_warp(count, [&](int i) {
    const float v = value[i];
    if (v > best || (v == best && at == count)) {
      best = v;
      at = i;
    }
  });
  const uint32_t key = ordered(best);
  const uint32_t top = __reduce_max_sync(0xffffffffu, key);
  return int(__reduce_min_sync(0xffffffffu, uint32_t(key == top ? at : count)));
}

// Take the `count` best of `values`, one after another; each becomes NaN. A lane reads and writes
// the values lane, lane + 32, ... only.
template <class Take>
__device__ __forceinline__ void take_best(float* value, int size, int count, Take&& take) {
  for (int i = 0; i < count; ++i) {
    const int best = warp_arg_max(value, size);
    if (threadIdx.x % kWarp == best % kWarp) value[best] = not_a_number();
    take(i, best);
  }
}

__device__ __forceinline__ void scores_of_logits(const MoeGateParams& p, float* value) {
  if (!p.softmax) {
    each_in_warp(p.experts, [&](int e) { value[e] = sigmoid(value[e]); });
    return;
  }
  float largest = -INFINITY;
  each_in_warp(p.experts, [&](int e) { largest = fmaxf(largest, value[e]); });
  largest = warp_max(largest);
  float sum = 0.f;
  each_in_warp(p.experts, [&](int e) {
    value[e] = expf(__fsub_rn(value[e], largest));
    sum = __fadd_rn(sum, value[e]);
  });
  sum = warp_sum(sum);
  each_in_warp(p.experts, [&](int e) { value[e] = __fdiv_rn(value[e], sum); });
}

// Unbiased scores to memory, biased ones to `key`. A NaN ranks behind every number.
__device__ __forceinline__ void keys_of_scores(const MoeGateParams& p, GateChoiceSmem& s,
                                               int token) {
  float* out = p.scores + int64_t(token) * p.experts;
  each_in_warp(p.experts, [&](int e) {
    out[e] = s.score[e];
    const float biased = p.bias ? __fadd_rn(s.score[e], __ldg(p.bias + e)) : s.score[e];
    s.key[e] = biased == biased ? fminf(fmaxf(biased, -FLT_MAX), FLT_MAX) : -FLT_MAX;
  });
  __syncwarp();
}

// Leave only the experts of the best groups in the running.
__device__ __forceinline__ void limit_groups(const MoeGateParams& p, GateChoiceSmem& s) {
  const int size = p.experts / p.num_groups;
  each_in_warp(p.num_groups, [&](int g) {
    float first = -INFINITY, second = -INFINITY;
    for (int e = g * size; e < (g + 1) * size; ++e) {
      second = fmaxf(second, fminf(first, s.key[e]));
      first = fmaxf(first, s.key[e]);
    }
    s.group[g] = p.top2 && size > 1 ? __fadd_rn(first, second) : first;
  });
  take_best(s.group, p.num_groups, p.topk_group, [](int, int) {});
  __syncwarp();
  each_in_warp(p.experts, [&](int e) {
    const float group = s.group[e / size];
    if (group == group) s.key[e] = not_a_number();
  });
}

constexpr float kWeightSumFloor = 1e-20f;  // keeps the division finite when all scores are 0

__device__ __forceinline__ void add_to(int64_t* at, int64_t value) {
  atomicAdd(reinterpret_cast<unsigned long long*>(at), static_cast<unsigned long long>(value));
}

// Who was chosen, and every expert's share of the token's scores. Integers: their sums do not
// depend on the order of the tokens.
__device__ __forceinline__ void count_choices(const MoeGateParams& p, const GateChoiceSmem& s,
                                              int token) {
  constexpr float kUnit = 1099511627776.f;  // 2^40: a share's error is below fp32's
  const int lane = threadIdx.x % kWarp;
  const int64_t sequence = token / p.sequence;
  each_in_warp(p.topk, [&](int i) { add_to(p.counts + sequence * p.experts + s.chosen[i], 1); });
  float sum = 0.f;
  each_in_warp(p.experts, [&](int e) { sum = __fadd_rn(sum, s.score[e]); });
  sum = __fadd_rn(warp_sum(sum), kWeightSumFloor);
  int64_t* affinity = p.affinity + sequence * (p.experts + 1);
  if (sum != sum) {
    if (lane == 0) add_to(affinity + p.experts, 1);
    return;
  }
  each_in_warp(p.experts, [&](int e) {
    add_to(affinity + e, __float2ll_rn(__fmul_rn(__fdiv_rn(s.score[e], sum), kUnit)));
  });
}

// Each lane has written the scores e = lane, lane + 32, ... itself.
__device__ __forceinline__ void choose_experts(const MoeGateParams& p, GateChoiceSmem& s,
                                               int token) {
  const int lane = threadIdx.x % kWarp;
  scores_of_logits(p, s.score);
  keys_of_scores(p, s, token);
  if (p.topk_group != p.num_groups) limit_groups(p, s);

  float sum = 0.f;  // in the order of the choices
  take_best(s.key, p.experts, p.topk, [&](int i, int expert) {
    sum = __fadd_rn(sum, s.score[expert]);
    if (lane != 0) return;
    s.chosen[i] = expert;
  });
  __syncwarp();
  const int64_t at = int64_t(token) * p.topk;
  each_in_warp(p.topk, [&](int i) {
    const int expert = s.chosen[i];
    float weight = s.score[expert];
    if (p.renormalize) weight = __fdiv_rn(weight, __fadd_rn(sum, kWeightSumFloor));
    p.topk_idx[at + i] = expert;
    p.topk_weights[at + i] = __fmul_rn(weight, p.scale);
  });
  if (p.counts) count_choices(p, s, token);
}

}  // namespace dsk
