// Host launchers of the row-wise kernels. `num_sms` bounds the grid; 0 means every SM. On the
// emulator a call returns when the kernel has run, on a GPU it is queued on `stream`. Empty
// problems launch nothing. All throw DeviceError on anything the driver refuses.
#pragma once

#include "cuda/launch/context.hpp"
#include "cuda/params/rowwise.hpp"

namespace dsk::launch {

enum class InputType { kBfloat16, kFloat32, kE4m3 };

void rowwise_quantize(const LaunchOn& on, const QuantizeParams& params, InputType input);
void rowwise_quantize_block(const LaunchOn& on, const QuantizeBlockParams& params, InputType input);
void rowwise_quantize_transpose(const LaunchOn& on, const QuantizeTransposeParams& params,
                                InputType input);
// Rows may have up to kRmsNormMaxColumns: what fits shared memory.
constexpr int kRmsNormMaxColumns = 55 * 1024;
void rowwise_rms_norm(const LaunchOn& on, const RmsNormParams& params, InputType input);
void rowwise_rope(const LaunchOn& on, const RopeParams& params);
void rowwise_swiglu(const LaunchOn& on, const SwigluParams& params);
void rowwise_swiglu_backward(const LaunchOn& on, const SwigluParams& params);
void rowwise_dequantize(const LaunchOn& on, const DequantizeParams& params);
void rowwise_pack_e5m6(const LaunchOn& on, const PackE5m6Params& params);

}  // namespace dsk::launch
