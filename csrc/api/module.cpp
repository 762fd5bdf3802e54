// The Python module `dskernels._C`. Each layer binds itself in its own bind_*.cpp; this file only
// lists them.
#include "api/bindings.hpp"

#include <pybind11/pybind11.h>

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled core of dskernels (torch-free; tensors cross the border by DLPack).";
  m.attr("__version__") = DSK_VERSION;
  m.attr("compiler") = DSK_COMPILER;
  m.attr("nvcc") = DSK_NVCC_VERSION;  // "" when the CUDA kernels were left out

  dsk::api::bind_ops(m);
  dsk::api::bind_cpu(m);
  dsk::api::bind_comm(m);
  dsk::api::bind_device(m);
  dsk::api::bind_launch(m);
  dsk::api::bind_emu(m);
  dsk::api::bind_emu_timing(m);
  dsk::api::bind_emu_num(m);
}
