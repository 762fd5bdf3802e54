// What the op layer (dskernels/ops) does on every call and Python is too slow for: `_C.ops`.
#include "api/bindings.hpp"
#include "api/index_values.hpp"
#include "api/signature.hpp"

namespace dsk::api {
namespace {

DLTensor borrowed(py::handle tensor) {
  DLTensor out;
  DSK_CHECK(borrow(tensor, &out), "index tensor: expected a dense torch tensor");
  return out;
}

}  // namespace

void bind_ops(py::module_& m) {
  py::module_ ops = m.def_submodule("ops", "Signatures and index values; see dskernels.ops");
  py::class_<Signatures>(ops, "Signatures")
      .def(py::init<py::tuple, py::object>(), py::arg("tensor_types"), py::arg("dtype_type"))
      .def("known", &Signatures::known, py::arg("args"), py::arg("grad"))
      .def("remember", &Signatures::remember, py::arg("args"))
      .def("clear", &Signatures::clear)
      .def("__len__", &Signatures::size)
      .def_readonly_static("CAPACITY", &Signatures::kCapacity);
  ops.def("indices_fit", [](py::handle t, int64_t low, int64_t high) {
    return indices_fit(borrowed(t), low, high);
  });
  ops.def("sizes_fit", [](py::handle t, int64_t each, int64_t total, int64_t multiple) {
    return sizes_fit(borrowed(t), each, total, multiple);
  });
  ops.def("ends_fit", [](py::handle t, int64_t limit) { return ends_fit(borrowed(t), limit); });
  ops.def("pages_fit", [](py::handle table, py::handle lens, int64_t page, int64_t pages) {
    return pages_fit(borrowed(table), borrowed(lens), page, pages);
  });
}

}  // namespace dsk::api
