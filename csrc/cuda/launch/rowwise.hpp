// Host launchers of the row-wise kernels.
#pragma once

#include "cuda/launch/context.hpp"
#include "cuda/params/rowwise.hpp"

namespace dsk::launch {

enum class InputType { kBfloat16, kFloat32 };

// Quantise rows x cols values in groups of 128 (see csrc/cuda/kernels/rowwise_quantize.cuh).
// `num_sms` bounds the grid; 0 means every SM. On the emulator the call returns when the kernel has
// run, on a GPU it is queued on `stream`.
void rowwise_quantize(Context& context, const QuantizeParams& params, InputType input,
                      ScaleFormat format, int num_sms, device::cu::Stream stream);

}  // namespace dsk::launch
