#include "cuda/launch/rowwise.hpp"

#include <algorithm>

namespace dsk::launch {
namespace {

constexpr int kThreads = 256;  // as in instances/rowwise.def
constexpr int kWarps = kThreads / 32;
constexpr int64_t kGroup = 128;
constexpr int64_t kTransposeColumns = 64;  // of one tile of the transposing kernel

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

size_t bytes_of(InputType input) {
  return input == InputType::kFloat32 ? 4 : input == InputType::kBfloat16 ? 2 : 1;
}

std::string suffix(InputType input) {
  switch (input) {
    case InputType::kBfloat16:
      return "_bf16";
    case InputType::kFloat32:
      return "_f32";
    default:
      return "_e4m3";
  }
}

InputType input_of(WideType type) {
  return type == WideType::kBfloat16 ? InputType::kBfloat16 : InputType::kFloat32;
}

// Bytes from the first to the last of `rows` rows of `columns` elements.
size_t span(int64_t rows, int64_t ld, int64_t columns, size_t element) {
  return rows == 0 ? 0 : size_t((rows - 1) * ld + columns) * element;
}

// Floats of [planes][rows, groups] MN-major scales.
size_t scale_bytes(int64_t planes, int64_t plane_scale, int64_t groups, int64_t ld, int64_t rows) {
  return size_t((planes - 1) * plane_scale + (groups - 1) * ld + rows) * sizeof(float);
}

// A persistent grid: no more CTAs than there is work for, nor than run at once.
template <class Params>
void launch(const LaunchOn& on, const std::string& kernel, Params params, int64_t ctas_needed,
            int ctas_per_sm, size_t shared_bytes = 0) {
  const int sms = on.num_sms > 0 ? on.num_sms : on.context.device().num_sms();
  device::LaunchShape shape;
  shape.grid.x = unsigned(std::min<int64_t>(ctas_needed, int64_t(sms) * ctas_per_sm));
  shape.block.x = kThreads;
  shape.shared_bytes = unsigned(shared_bytes);
  void* arguments[] = {&params};
  on.context.device().launch(on.context.kernel(kernel), shape, arguments, on.stream);
  if (on.context.emulated()) on.context.device().synchronize(on.stream);
}

}  // namespace

void rowwise_quantize(const LaunchOn& on, const QuantizeParams& p, InputType input) {
  const int64_t groups = ceil_div(p.cols, kGroup), rows = int64_t(p.planes) * p.rows;
  if (groups * rows == 0) return;
  HostLoan x(on.context, p.x, span(rows, p.ld_x, p.cols, bytes_of(input)), true);
  HostLoan data(on.context, p.data, size_t(rows) * p.cols * (p.type == NarrowType::kE4m3 ? 1 : 2),
                false);
  HostLoan scale(on.context, p.scale,
                 scale_bytes(p.planes, p.plane_scale, groups, p.ld_scale, p.rows), false);
  launch(on, "rowwise_quantize" + suffix(input), p, ceil_div(groups * rows, kWarps), 8);
}

void rowwise_quantize_block(const LaunchOn& on, const QuantizeBlockParams& p, InputType input) {
  const int64_t blocks = ceil_div(p.rows, kGroup) * ceil_div(p.cols, kGroup) * p.planes;
  if (blocks == 0) return;
  const size_t elements = size_t(p.planes) * p.rows * p.cols;
  HostLoan x(on.context, p.x, elements * bytes_of(input), true);
  HostLoan data(on.context, p.data, elements, false);
  HostLoan scale(on.context, p.scale, size_t(blocks) * sizeof(float), false);
  launch(on, "rowwise_quantize_block" + suffix(input), p, blocks, 2);
}

void rowwise_quantize_transpose(const LaunchOn& on, const QuantizeTransposeParams& p,
                                InputType input) {
  const int64_t groups = ceil_div(p.rows, kGroup);
  if (groups * p.cols == 0) return;
  HostLoan x(on.context, p.x, span(p.rows, p.ld_x, p.cols, bytes_of(input)), true);
  HostLoan data(on.context, p.data, size_t(p.rows) * p.cols, false);
  HostLoan scale(on.context, p.scale, scale_bytes(1, 0, groups, p.ld_scale, p.cols), false);
  const int64_t last_scale = p.x_scale ? (p.rows - 1) / p.x_block_rows * p.x_scale_row +
                                             (p.cols - 1) / kGroup * p.x_scale_col + 1
                                       : 0;
  HostLoan x_scale(on.context, p.x_scale, size_t(last_scale) * sizeof(float), true);
  launch(on, "rowwise_quantize_transpose" + suffix(input), p,
         groups * ceil_div(p.cols, kTransposeColumns), 3);
}

void rowwise_rms_norm(const LaunchOn& on, const RmsNormParams& p, InputType input) {
  if (p.rows == 0 || p.cols == 0) return;
  if (p.cols > kRmsNormMaxColumns) {
    throw device::DeviceError("rms_norm: cols: expected at most " +
                              std::to_string(kRmsNormMaxColumns) + ", got " +
                              std::to_string(p.cols));
  }
  const size_t elements = size_t(p.rows) * p.cols;
  HostLoan x(on.context, p.x, elements * bytes_of(input), true);
  HostLoan residual(on.context, p.residual, p.residual ? elements * bytes_of(input) : 0, true);
  HostLoan weight(on.context, p.weight, p.cols * bytes_of(input_of(p.weight_type)), true);
  HostLoan total(on.context, p.total, p.residual ? elements * bytes_of(input) : 0, false);
  HostLoan y(on.context, p.y, elements * (p.scale ? 1 : bytes_of(input)), false);
  HostLoan scale(on.context, p.scale,
                 p.scale ? scale_bytes(p.rows / p.plane_rows, p.plane_scale,
                                       ceil_div(p.cols, kGroup), p.ld_scale, p.plane_rows)
                         : 0,
                 false);
  // A float4 for each thread and each pass over the row.
  const size_t shared = size_t(ceil_div(p.cols, 4 * kThreads)) * kThreads * 16;
  launch(on, "rowwise_rms_norm" + suffix(input), p, p.rows, 6, shared);
}

void rowwise_rope(const LaunchOn& on, const RopeParams& p) {
  if (p.rows == 0 || p.half == 0) return;
  const size_t bytes = size_t(p.rows) * 2 * p.half * bytes_of(input_of(p.type));
  const size_t angles = size_t(p.rows / p.heads) * p.half * sizeof(float);
  HostLoan x(on.context, p.x, bytes, true);
  HostLoan cosines(on.context, p.cos, angles, true);
  HostLoan sines(on.context, p.sin, angles, true);
  HostLoan y(on.context, p.y, bytes, false);
  launch(on, "rowwise_rope", p, ceil_div(p.rows, kWarps), 4);
}

void rowwise_swiglu(const LaunchOn& on, const SwigluParams& p) {
  const int64_t groups = ceil_div(p.cols, kGroup), rows = int64_t(p.planes) * p.rows;
  if (groups * rows == 0) return;
  const InputType input = input_of(p.type);
  HostLoan x(on.context, p.x, span(rows, p.ld_x, 2 * int64_t(p.cols), bytes_of(input)), true);
  HostLoan y(on.context, p.y, size_t(rows) * p.cols * (p.scale ? 1 : bytes_of(input)), false);
  HostLoan scale(on.context, p.scale,
                 p.scale ? scale_bytes(p.planes, p.plane_scale, groups, p.ld_scale, p.rows) : 0,
                 false);
  launch(on, "rowwise_swiglu", p, ceil_div(groups * rows, kWarps), 6);
}

void rowwise_swiglu_backward(const LaunchOn& on, const SwigluParams& p) {
  const int64_t groups = ceil_div(p.cols, kGroup), rows = int64_t(p.planes) * p.rows;
  if (groups * rows == 0) return;
  const size_t element = bytes_of(input_of(p.type));
  HostLoan x(on.context, p.x, span(rows, p.ld_x, 2 * int64_t(p.cols), element), true);
  HostLoan grad(on.context, p.grad, size_t(rows) * p.cols * element, true);
  HostLoan y(on.context, p.y, size_t(rows) * 2 * p.cols * element, false);
  launch(on, "rowwise_swiglu_backward", p, ceil_div(groups * rows, kWarps), 6);
}

void rowwise_dequantize(const LaunchOn& on, const DequantizeParams& p) {
  const size_t elements = size_t(p.planes) * p.rows * p.cols;
  if (elements == 0) return;
  HostLoan data(on.context, p.data, elements * (p.type == NarrowType::kE4m3 ? 1 : 2), true);
  const int64_t last_scale = (p.planes - 1) * p.scale_plane +
                             (p.rows - 1) / p.block_rows * p.scale_row +
                             (p.cols - 1) / p.block_cols * p.scale_col + 1;
  HostLoan scale(on.context, p.scale, size_t(last_scale) * sizeof(float), true);
  HostLoan y(on.context, p.y, elements * bytes_of(input_of(p.out)), false);
  const int64_t runs = ceil_div(p.cols, 4) * p.planes * p.rows;
  launch(on, "rowwise_dequantize", p, ceil_div(runs, kThreads), 8);
}

void rowwise_pack_e5m6(const LaunchOn& on, const PackE5m6Params& p) {
  const int64_t words = ceil_div(p.cols, 2) * p.rows;
  if (words == 0) return;
  HostLoan wide(on.context, p.wide, size_t(p.rows) * p.cols * 2, !p.unpack);
  HostLoan packed(on.context, p.packed, size_t(words) * 3, p.unpack != 0);
  launch(on, "rowwise_pack_e5m6", p, ceil_div(words, kThreads), 8);
}

}  // namespace dsk::launch
