// Host launchers of the mixture-of-experts kernels. On the emulator a call returns when the kernel
// has run, on a GPU it is queued on `stream`. Empty problems launch nothing. All throw DeviceError
// on anything the driver refuses.
#pragma once

#include "cuda/launch/context.hpp"
#include "cuda/params/moe.hpp"

namespace dsk::launch {

void moe_gate(const LaunchOn& on, const MoeGateParams& params);
// `mapped` are the rows of expert_map.
void moe_layout(const LaunchOn& on, const MoeLayoutParams& params, int64_t mapped);
// `rows` are those that the result has room for; for the second, whole planes.
void moe_permute(const LaunchOn& on, const MoePermuteParams& params, int64_t rows);
void moe_permute_quantize(const LaunchOn& on, const MoePermuteQuantizeParams& params, int64_t rows);
void moe_unpermute(const LaunchOn& on, const MoeUnpermuteParams& params, int64_t rows);
void moe_unpermute_backward(const LaunchOn& on, const MoeUnpermuteBackwardParams& params,
                            int64_t rows);
// `rows` are those of h, back, dh and act.
void moe_hidden_backward(const LaunchOn& on, const MoeHiddenBackwardParams& params, int64_t rows);
void moe_hidden_quantize(const LaunchOn& on, const MoeHiddenQuantizeParams& params, int64_t slots);
void moe_gate_backward(const LaunchOn& on, const MoeGateBackwardParams& params);
void moe_gate_product(const LaunchOn& on, const MoeGateProductParams& params);

// Groups of tokens that the gate works by: rows of `finished`, of kGateCluster entries each.
constexpr int gate_groups(int tokens) { return (tokens + kGateTokens - 1) / kGateTokens; }

// Chunks of slots that the layout and the permutation work by: rows of their table.
constexpr int moe_chunks(int slots) { return (slots + kMoeChunk - 1) / kMoeChunk; }

}  // namespace dsk::launch
