#include "cuda/launch/rowwise.hpp"

#include <algorithm>

namespace dsk::launch {
namespace {

constexpr int kThreads = 256;  // as in instances/rowwise.def
constexpr int kCtasPerSm = 8;  // 2048 threads: full occupancy hides the loads' latency
constexpr int64_t kGroup = 128;

std::string kernel_name(InputType input, ScaleFormat format) {
  return std::string("rowwise_quantize_") + (input == InputType::kBfloat16 ? "bf16" : "f32") +
         (format == ScaleFormat::kUe8m0 ? "_ue8m0" : "_fp32");
}

}  // namespace

void rowwise_quantize(Context& context, const QuantizeParams& params, InputType input,
                      ScaleFormat format, int num_sms, device::cu::Stream stream) {
  const int64_t groups_per_row = (params.cols + kGroup - 1) / kGroup;
  const int64_t num_groups = groups_per_row * params.rows;
  if (num_groups == 0) return;

  const size_t element = input == InputType::kBfloat16 ? 2 : 4;
  const size_t last_row = size_t(params.rows) - 1;
  HostLoan x(context, params.x, (last_row * params.ld_x + params.cols) * element, true);
  HostLoan data(context, params.data, last_row * params.ld_data + params.cols, false);
  HostLoan scale(context, params.scale,
                 (size_t(groups_per_row - 1) * params.ld_scale + params.rows) * sizeof(float),
                 false);

  const int sms = num_sms > 0 ? num_sms : context.device().num_sms();
  const int64_t ctas_needed = (num_groups + kThreads / 32 - 1) / (kThreads / 32);
  device::LaunchShape shape;
  shape.grid.x = unsigned(std::min<int64_t>(ctas_needed, int64_t(sms) * kCtasPerSm));
  shape.block.x = kThreads;
  QuantizeParams argument = params;
  void* arguments[] = {&argument};
  context.device().launch(context.kernel(kernel_name(input, format)), shape, arguments, stream);
  if (context.emulated()) context.device().synchronize(stream);
}

}  // namespace dsk::launch
