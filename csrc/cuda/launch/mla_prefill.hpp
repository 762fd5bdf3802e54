// Host launcher of prefill attention.
#pragma once

#include <cstdint>

#include "cuda/launch/context.hpp"
#include "cuda/params/tensor_map.hpp"

namespace dsk::launch {

// A contiguous bf16 tensor [rows, heads, width] as TMA sees one head: boxes of box_rows x 64.
TensorMapBytes encode_heads(const Context& context, const void* address, int rows, int heads,
                            int width, int box_rows);

struct MlaPrefillArgs {
  const void* q = nullptr;                // [t, h, 192] bf16, contiguous
  const void* k = nullptr;                // [keys, h, 192] bf16, contiguous
  const void* v = nullptr;                // [keys, h, 128] bf16, contiguous
  const int32_t* cu_seqlens_q = nullptr;  // [b + 1], ascending from 0, at most t
  const int32_t* cu_seqlens_k = nullptr;  // [b + 1], ascending from 0, at most keys
  void* out = nullptr;                    // [t, h, 128] bf16, contiguous
  float* lse = nullptr;                   // [h, t]
  int t = 0, keys = 0, h = 0, b = 0;
  bool causal = true;
  float softmax_scale = 0;  // positive
};

// Addresses are multiples of 16 bytes; keys is at least 1. On the emulator the call returns when
// the kernel has run, on a GPU it is queued on `stream`. Without rows it launches nothing. Throws
// DeviceError.
void mla_prefill(Context& context, const MlaPrefillArgs& args, device::cu::Stream stream);

}  // namespace dsk::launch
