// The CUDA kernels' launchers, for Python: one bind_launch_<stem>.cpp each.
#include "api/bind_launch.hpp"

#include <pybind11/stl.h>

#include "api/bindings.hpp"

namespace py = pybind11;

namespace dsk::api {

void bind_launch(py::module_& m) {
  using namespace py::literals;
  py::module_ launch = m.def_submodule("launch", "Host launchers of the CUDA kernels.");
  py::register_exception<device::DeviceError>(launch, "DeviceError", PyExc_RuntimeError);
  launch.def("set_kernel_directory", &launch::set_kernel_directory, "path"_a);
  launch.def(
      "take_used_kernels",
      [](const std::string& machine, int ordinal) {
        return context_of(machine, ordinal).take_used_kernels();
      },
      "machine"_a, "ordinal"_a = 0, "Names of the instances launched since the last call.");
  bind_launch_rowwise(launch);
  bind_launch_gemm(launch);
  bind_launch_mla(launch);
  bind_launch_mla_prefill(launch);
  bind_launch_mla_fused(launch);
  bind_launch_ep(launch);
  bind_launch_moe(launch);
}

}  // namespace dsk::api
