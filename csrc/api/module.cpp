// The Python module `dskernels._C`. Each layer binds itself in its own bind_*.cpp; this file only
// lists them.
#include "api/bindings.hpp"

#include <pybind11/pybind11.h>

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled core of dskernels (torch-free; tensors cross the border by DLPack).";
  m.attr("__version__") = DSK_VERSION;
  m.attr("compiler") = DSK_COMPILER;
  bind_emu_num(m);
}
