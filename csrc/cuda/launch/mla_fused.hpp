// Host launchers of what surrounds latent attention. On the emulator a call returns when the kernel
// has run, on a GPU it is queued. Without tokens they launch nothing. Throw DeviceError.
#pragma once

#include "cuda/launch/context.hpp"
#include "cuda/params/mla_fused.hpp"

namespace dsk::launch {

// cache is params.num_slots rows, the last of which ends cache_bytes after the first begins.
void mla_latents(const LaunchOn& on, const MlaLatentsParams& params, size_t cache_bytes);

// q [t, h, 128 + 64] and y [t, h, 512 + 64] contiguous, w [h, 128, 512] with rows of 512 and heads
// w_rows rows apart, all bf16 at multiples of 16 bytes.
struct MlaAbsorbArgs {
  const void* x = nullptr;  // queries: q; outputs: [t, h, 512] contiguous
  const void* w = nullptr;
  void* y = nullptr;           // queries: y; outputs: [t, h, 128] contiguous
  const float* cos = nullptr;  // [t, 32]; queries only
  const float* sin = nullptr;
  int t = 0, h = 0, w_rows = 0;
  bool interleaved = true;
};

void mla_absorb_queries(const LaunchOn& on, const MlaAbsorbArgs& args);
void mla_absorb_output(const LaunchOn& on, const MlaAbsorbArgs& args);

}  // namespace dsk::launch
