// The tensor border. A Python object becomes a borrowed DLTensor through DLPack's C exchange API
// (torch >= 2.10: well under a microsecond, FP8 included) or, where a library lacks it, through a
// capsule (NumPy). The struct layouts are DLPack 1.3's own; its header is not needed.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "check.hpp"
#include "dskernels.h"

namespace dsk::api {

namespace py = pybind11;

struct DLPackVersion {
  uint32_t major, minor;
};

struct DLManagedTensor {
  DLTensor dl_tensor;
  void* manager_ctx;
  void (*deleter)(DLManagedTensor* self);
};

struct DLManagedTensorVersioned {
  DLPackVersion version;
  void* manager_ctx;
  void (*deleter)(DLManagedTensorVersioned* self);
  uint64_t flags;
  DLTensor dl_tensor;
};

struct DLPackExchangeAPI {
  DLPackVersion version;
  DLPackExchangeAPI* previous;
  void* managed_tensor_allocator;
  int (*managed_tensor_from_py_object)(void* object, DLManagedTensorVersioned** out);
  int (*managed_tensor_to_py_object)(DLManagedTensorVersioned* tensor, void** out);
  int (*dltensor_from_py_object)(void* object, DLTensor* out);  // may be null
  int (*current_work_stream)(int device_type, int32_t device_id, void** out);
};

constexpr uint64_t kReadOnlyFlag = 1;

// The exchange API of a type, null where it has none (another library, or torch before 2.10).
inline const DLPackExchangeAPI* exchange_api(py::handle type) {
  static PyObject* attribute = PyUnicode_InternFromString("__dlpack_c_exchange_api__");
  // Two entries cover torch.Tensor and torch.nn.Parameter without an attribute look-up.
  static PyObject* known_type[2] = {};
  static const DLPackExchangeAPI* known_api[2] = {};
  for (int i = 0; i < 2; ++i) {
    if (known_type[i] == type.ptr()) return known_api[i];
  }
  PyObject* capsule = PyObject_GetAttr(type.ptr(), attribute);
  if (capsule == nullptr) {
    PyErr_Clear();
    return nullptr;
  }
  auto* api =
      static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
  if (api == nullptr) PyErr_Clear();
  Py_DECREF(capsule);
  while (api != nullptr && api->version.major != 1) api = api->previous;
  if (api == nullptr || api->dltensor_from_py_object == nullptr) return nullptr;
  for (int i = 0; i < 2; ++i) {
    if (known_type[i] == nullptr) {
      Py_INCREF(type.ptr());  // types are few and live as long as the process
      known_type[i] = type.ptr();
      known_api[i] = api;
      break;
    }
  }
  return api;
}

// Fills `out` by the exchange API; false where the object has none or refuses (a meta tensor, a
// sparse one). What `out` points to belongs to the object.
inline bool borrow(py::handle object, DLTensor* out) {
  const DLPackExchangeAPI* api = exchange_api(py::type::handle_of(object));
  if (api == nullptr) return false;
  if (api->dltensor_from_py_object(object.ptr(), out) == 0) return true;
  PyErr_Clear();
  return false;
}

// Borrows a tensor from a Python object for the duration of a call. Null when built from None.
// Torch tensors that the exchange API would pass on silently although their memory is not what it
// looks like (conjugate or negative views) are refused; gradients are the caller's business:
// the Python ops detach before they come here.
class TensorArg {
 public:
  TensorArg(const char* name, py::handle object, bool writable = false) {
    if (object.is_none()) return;
    if (!borrow_fast(name, object)) borrow_capsule(name, object, writable);
    present_ = true;
  }
  TensorArg(const TensorArg&) = delete;
  TensorArg& operator=(const TensorArg&) = delete;

  const DLTensor* get() const { return present_ ? &tensor_ : nullptr; }

 private:
  bool borrow_fast(const char* name, py::handle object) {
    const DLPackExchangeAPI* api = exchange_api(py::type::handle_of(object));
    if (api == nullptr) return false;
    if (api->dltensor_from_py_object(object.ptr(), &tensor_) != 0) {
      py::error_already_set error;
      throw Error(std::string(name) +
                  ": expected a dense tensor, got one that DLPack refuses: " + error.what());
    }
    return true;
  }

  void borrow_capsule(const char* name, py::handle object, bool writable) {
    if (!py::hasattr(object, "__dlpack__")) {
      throw py::type_error(std::string(name) + ": expected a tensor, got " +
                           std::string(py::str(py::type::handle_of(object))));
    }
    try {
      capsule_ = object.attr("__dlpack__")(py::arg("max_version") = py::make_tuple(1, 0));
    } catch (py::error_already_set& error) {
      if (!error.matches(PyExc_TypeError)) throw;
      capsule_ = object.attr("__dlpack__")();
    }
    if (PyCapsule_IsValid(capsule_.ptr(), "dltensor_versioned")) {
      auto* managed = static_cast<DLManagedTensorVersioned*>(
          PyCapsule_GetPointer(capsule_.ptr(), "dltensor_versioned"));
      DSK_CHECK(managed->version.major == 1, name, ": expected DLPack 1.x, got ",
                managed->version.major, ".", managed->version.minor);
      DSK_CHECK(!writable || !(managed->flags & kReadOnlyFlag), name,
                ": expected a writable tensor, got a read-only one");
      tensor_ = managed->dl_tensor;
    } else {
      auto* managed =
          static_cast<DLManagedTensor*>(PyCapsule_GetPointer(capsule_.ptr(), "dltensor"));
      if (managed == nullptr) throw py::error_already_set();
      tensor_ = managed->dl_tensor;
    }
    // The capsule is not renamed to "used": it keeps ownership and frees the tensor with itself.
  }

  DLTensor tensor_ = {};
  py::object capsule_;
  bool present_ = false;
};

}  // namespace dsk::api
