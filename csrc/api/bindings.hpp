// One bind_* function per layer, each defined in csrc/api/bind_<layer>.cpp.
#pragma once

#include <pybind11/pybind11.h>

namespace dsk::api {

void bind_ops(pybind11::module_& m);
void bind_cpu(pybind11::module_& m);
void bind_comm(pybind11::module_& m);
void bind_device(pybind11::module_& m);
void bind_launch(pybind11::module_& m);
void bind_emu(pybind11::module_& m);
void bind_emu_timing(pybind11::module_& m);
void bind_emu_num(pybind11::module_& m);

}  // namespace dsk::api
