// The launchers of csrc/cuda/launch/rowwise.hpp, for Python. `on` is (machine, ordinal, stream,
// num_sms); types come as the enums' numbers.
#include "cuda/launch/rowwise.hpp"

#include <pybind11/stl.h>

#include <tuple>

#include "api/bind_launch.hpp"

namespace py = pybind11;

namespace dsk::api {
namespace {

launch::InputType input_of(const std::string& name) {
  if (name == "bfloat16") return launch::InputType::kBfloat16;
  if (name == "float32") return launch::InputType::kFloat32;
  if (name == "e4m3") return launch::InputType::kE4m3;
  throw std::invalid_argument("type: expected bfloat16, float32 or e4m3, got " + name);
}

WideType wide_of(const std::string& name) {
  if (name == "bfloat16") return WideType::kBfloat16;
  if (name == "float32") return WideType::kFloat32;
  throw std::invalid_argument("type: expected bfloat16 or float32, got " + name);
}

NarrowType narrow_of(const std::string& name) {
  if (name == "e4m3") return NarrowType::kE4m3;
  if (name == "e5m6") return NarrowType::kE5m6;
  throw std::invalid_argument("type: expected e4m3 or e5m6, got " + name);
}

ScaleFormat format_of(bool ue8m0) { return ue8m0 ? ScaleFormat::kUe8m0 : ScaleFormat::kFp32; }

void quantize(const On& on, Address x, const std::string& type, Address data,
              const std::string& data_type, Address scale, int planes, int rows, int cols,
              int64_t ld_x, int64_t ld_scale, int64_t plane_scale, bool ue8m0) {
  QuantizeParams p{};
  p.x = pointer<void>(x);
  p.data = pointer<void>(data);
  p.scale = pointer<float>(scale);
  p.ld_x = ld_x;
  p.ld_scale = ld_scale;
  p.plane_scale = plane_scale;
  p.planes = planes;
  p.rows = rows;
  p.cols = cols;
  p.format = format_of(ue8m0);
  p.type = narrow_of(data_type);
  launch::rowwise_quantize(launch_on(on), p, input_of(type));
}

void quantize_block(const On& on, Address x, const std::string& type, Address data, Address scale,
                    int planes, int rows, int cols, bool ue8m0) {
  const QuantizeBlockParams p{
      pointer<void>(x), pointer<uint8_t>(data), pointer<float>(scale), planes, rows, cols,
      format_of(ue8m0)};
  launch::rowwise_quantize_block(launch_on(on), p, input_of(type));
}

void quantize_transpose(const On& on, Address x, const std::string& type, Address data,
                        Address scale, int rows, int cols, int64_t ld_x, int64_t ld_scale,
                        Address x_scale, int64_t x_scale_row, int64_t x_scale_col, int x_block_rows,
                        bool ue8m0) {
  QuantizeTransposeParams p{};
  p.x = pointer<void>(x);
  p.data = pointer<uint8_t>(data);
  p.scale = pointer<float>(scale);
  p.x_scale = pointer<float>(x_scale);
  p.ld_x = ld_x;
  p.ld_scale = ld_scale;
  p.x_scale_row = x_scale_row;
  p.x_scale_col = x_scale_col;
  p.x_block_rows = x_block_rows;
  p.rows = rows;
  p.cols = cols;
  p.format = format_of(ue8m0);
  launch::rowwise_quantize_transpose(launch_on(on), p, input_of(type));
}

void rms_norm(const On& on, Address x, const std::string& type, Address residual, Address weight,
              const std::string& weight_type, Address total, Address y, Address scale, int rows,
              int cols, int plane_rows, float eps, int64_t ld_scale, int64_t plane_scale,
              bool ue8m0) {
  RmsNormParams p{};
  p.x = pointer<void>(x);
  p.residual = pointer<void>(residual);
  p.weight = pointer<void>(weight);
  p.total = pointer<void>(total);
  p.y = pointer<void>(y);
  p.scale = pointer<float>(scale);
  p.ld_scale = ld_scale;
  p.plane_scale = plane_scale;
  p.rows = rows;
  p.cols = cols;
  p.plane_rows = plane_rows;
  p.eps = eps;
  p.weight_type = wide_of(weight_type);
  p.format = format_of(ue8m0);
  launch::rowwise_rms_norm(launch_on(on), p, input_of(type));
}

void rope(const On& on, Address x, const std::string& type, Address cosines, Address sines,
          Address y, int rows, int heads, int half, bool interleaved, bool inverse) {
  const RopeParams p{pointer<void>(x),
                     pointer<float>(cosines),
                     pointer<float>(sines),
                     pointer<void>(y),
                     rows,
                     heads,
                     half,
                     interleaved,
                     inverse,
                     wide_of(type)};
  launch::rowwise_rope(launch_on(on), p);
}

void swiglu(const On& on, Address x, const std::string& type, Address y, Address scale, int planes,
            int rows, int cols, int64_t ld_x, int64_t ld_scale, int64_t plane_scale, bool ue8m0) {
  SwigluParams p{};
  p.x = pointer<void>(x);
  p.y = pointer<void>(y);
  p.scale = pointer<float>(scale);
  p.ld_x = ld_x;
  p.ld_scale = ld_scale;
  p.plane_scale = plane_scale;
  p.planes = planes;
  p.rows = rows;
  p.cols = cols;
  p.format = format_of(ue8m0);
  p.type = wide_of(type);
  launch::rowwise_swiglu(launch_on(on), p);
}

void swiglu_backward(const On& on, Address grad, Address x, const std::string& type, Address dx,
                     int rows, int cols, int64_t ld_x) {
  SwigluParams p{};
  p.x = pointer<void>(x);
  p.grad = pointer<void>(grad);
  p.y = pointer<void>(dx);
  p.ld_x = ld_x;
  p.planes = 1;
  p.rows = rows;
  p.cols = cols;
  p.type = wide_of(type);
  launch::rowwise_swiglu_backward(launch_on(on), p);
}

void dequantize(const On& on, Address data, const std::string& type, Address scale, Address y,
                const std::string& y_type, int planes, int rows, int cols, int block_rows,
                int block_cols, int64_t scale_plane, int64_t scale_row, int64_t scale_col) {
  DequantizeParams p{};
  p.data = pointer<void>(data);
  p.scale = pointer<float>(scale);
  p.y = pointer<void>(y);
  p.scale_plane = scale_plane;
  p.scale_row = scale_row;
  p.scale_col = scale_col;
  p.block_rows = block_rows;
  p.block_cols = block_cols;
  p.planes = planes;
  p.rows = rows;
  p.cols = cols;
  p.type = narrow_of(type);
  p.out = wide_of(y_type);
  launch::rowwise_dequantize(launch_on(on), p);
}

void pack_e5m6(const On& on, Address wide, Address packed, int rows, int cols, bool unpack) {
  const PackE5m6Params p{pointer<uint16_t>(wide), pointer<uint8_t>(packed), rows, cols, unpack};
  launch::rowwise_pack_e5m6(launch_on(on), p);
}

}  // namespace

void bind_launch_rowwise(py::module_& launch) {
  using namespace py::literals;
  const auto release = py::call_guard<py::gil_scoped_release>();
  launch.def("rowwise_quantize", &quantize, "on"_a, "x"_a, "type"_a, "data"_a, "data_type"_a,
             "scale"_a, "planes"_a, "rows"_a, "cols"_a, "ld_x"_a, "ld_scale"_a, "plane_scale"_a,
             "ue8m0"_a, release);
  launch.def("rowwise_quantize_block", &quantize_block, "on"_a, "x"_a, "type"_a, "data"_a,
             "scale"_a, "planes"_a, "rows"_a, "cols"_a, "ue8m0"_a, release);
  launch.def("rowwise_quantize_transpose", &quantize_transpose, "on"_a, "x"_a, "type"_a, "data"_a,
             "scale"_a, "rows"_a, "cols"_a, "ld_x"_a, "ld_scale"_a, "x_scale"_a, "x_scale_row"_a,
             "x_scale_col"_a, "x_block_rows"_a, "ue8m0"_a, release);
  launch.def("rowwise_rms_norm", &rms_norm, "on"_a, "x"_a, "type"_a, "residual"_a, "weight"_a,
             "weight_type"_a, "total"_a, "y"_a, "scale"_a, "rows"_a, "cols"_a, "plane_rows"_a,
             "eps"_a, "ld_scale"_a, "plane_scale"_a, "ue8m0"_a, release);
  launch.def("rowwise_rope", &rope, "on"_a, "x"_a, "type"_a, "cos"_a, "sin"_a, "y"_a, "rows"_a,
             "heads"_a, "half"_a, "interleaved"_a, "inverse"_a, release);
  launch.def("rowwise_swiglu", &swiglu, "on"_a, "x"_a, "type"_a, "y"_a, "scale"_a, "planes"_a,
             "rows"_a, "cols"_a, "ld_x"_a, "ld_scale"_a, "plane_scale"_a, "ue8m0"_a, release);
  launch.def("rowwise_swiglu_backward", &swiglu_backward, "on"_a, "grad"_a, "x"_a, "type"_a, "dx"_a,
             "rows"_a, "cols"_a, "ld_x"_a, release);
  launch.def("rowwise_dequantize", &dequantize, "on"_a, "data"_a, "type"_a, "scale"_a, "y"_a,
             "y_type"_a, "planes"_a, "rows"_a, "cols"_a, "block_rows"_a, "block_cols"_a,
             "scale_plane"_a, "scale_row"_a, "scale_col"_a, release);
  launch.def("rowwise_pack_e5m6", &pack_e5m6, "on"_a, "wide"_a, "packed"_a, "rows"_a, "cols"_a,
             "unpack"_a, release);
  launch.attr("kRmsNormMaxColumns") = launch::kRmsNormMaxColumns;
}

}  // namespace dsk::api
