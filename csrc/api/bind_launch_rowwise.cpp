// The launchers of csrc/cuda/launch/rowwise.hpp, for Python.
#include "cuda/launch/rowwise.hpp"

#include "api/bind_launch.hpp"

namespace py = pybind11;

namespace dsk::api {
namespace {

void quantize(const std::string& machine, int ordinal, uint64_t stream, uint64_t x, bool is_bf16,
              uint64_t data, uint64_t scale, int rows, int cols, int64_t ld_x, int64_t ld_data,
              int64_t ld_scale, bool ue8m0, int num_sms) {
  QuantizeParams params{pointer<void>(x),
                        pointer<uint8_t>(data),
                        pointer<float>(scale),
                        ld_x,
                        ld_data,
                        ld_scale,
                        rows,
                        cols};
  launch::rowwise_quantize(context_of(machine, ordinal), params,
                           is_bf16 ? launch::InputType::kBfloat16 : launch::InputType::kFloat32,
                           ue8m0 ? ScaleFormat::kUe8m0 : ScaleFormat::kFp32, num_sms,
                           stream_of(stream));
}

}  // namespace

void bind_launch_rowwise(py::module_& launch) {
  using namespace py::literals;
  const auto release = py::call_guard<py::gil_scoped_release>();
  launch.def("rowwise_quantize", &quantize, "machine"_a, "ordinal"_a, "stream"_a, "x"_a,
             "is_bf16"_a, "data"_a, "scale"_a, "rows"_a, "cols"_a, "ld_x"_a, "ld_data"_a,
             "ld_scale"_a, "ue8m0"_a, "num_sms"_a, release);
}

}  // namespace dsk::api
