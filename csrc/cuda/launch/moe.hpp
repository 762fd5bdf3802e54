// Host launchers of the mixture-of-experts kernels. On the emulator a call returns when the kernel
// has run, on a GPU it is queued on `stream`. Empty problems launch nothing. All throw DeviceError
// on anything the driver refuses.
#pragma once

#include "cuda/launch/context.hpp"
#include "cuda/params/moe.hpp"

namespace dsk::launch {

struct MoeLaunch {
  Context& context;
  device::cu::Stream stream;
  int num_sms;  // bounds the grid where one CTA can do another's work; 0: every SM
};

void moe_gate(const MoeLaunch& on, const MoeGateParams& params, bool x_is_bf16);
void moe_layout(const MoeLaunch& on, const MoeLayoutParams& params);
// `rows` are those that x_perm and scale_perm have room for.
void moe_permute(const MoeLaunch& on, const MoePermuteParams& params, int64_t rows);
void moe_unpermute(const MoeLaunch& on, const MoeUnpermuteParams& params, int64_t rows);
void moe_unpermute_backward(const MoeLaunch& on, const MoeUnpermuteBackwardParams& params,
                            int64_t rows);

// Chunks of slots that the layout and the permutation work by: rows of their table.
constexpr int moe_chunks(int slots) { return (slots + kMoeChunk - 1) / kMoeChunk; }

}  // namespace dsk::launch
