// Host launcher of prefill attention's gradients.
#pragma once

#include <cstdint>

#include "cuda/launch/mla_prefill.hpp"

namespace dsk::launch {

struct MlaPrefillBackwardArgs {
  MlaPrefillArgs forward;           // its inputs, and what it gave: out and lse are read
  const void* grad = nullptr;       // [t, h, 128] bf16, contiguous
  const float* grad_lse = nullptr;  // [h, t]
  void* statistics = nullptr;       // workspace, mla_prefill_backward_workspace() bytes
  void* dq = nullptr;               // [t, h, 192] bf16, contiguous
  void* dk = nullptr;               // [keys, h, 192] bf16, contiguous
  void* dv = nullptr;               // [keys, h, 128] bf16, contiguous
};

size_t mla_prefill_backward_workspace(int t, int b, int h);

// Three kernels, one after the other on `stream`; as mla_prefill() otherwise. t is at least 1.
void mla_prefill_backward(Context& context, const MlaPrefillBackwardArgs& args,
                          device::cu::Stream stream);

}  // namespace dsk::launch
