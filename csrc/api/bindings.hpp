// One bind_* function per layer, each defined in csrc/api/bind_<layer>.cpp.
#pragma once

namespace pybind11 {
class module_;
}
