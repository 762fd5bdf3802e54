// One bind_* function per layer, each defined in csrc/api/bind_<layer>.cpp.
#pragma once

namespace pybind11 {
class module_;
}

void bind_emu_num(pybind11::module_& m);
