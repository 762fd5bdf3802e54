// The signature of a call: everything about its arguments that can be known without reading a
// tensor's elements. Ops validate a signature once and remember it (dskernels/ops/_registry.py).
#pragma once

#include <pybind11/pybind11.h>

#include <string>
#include <unordered_set>

#include "api/dlpack.hpp"

namespace dsk::api {

// Signatures of one op that passed validation. Two calls share a signature exactly when their
// arguments have the same types, and
//   tensors  device, dtype, shape and strides
//   None, bool, int, float, str, torch.dtype, and lists or tuples of int  values
// The whole signature is stored and compared, not a hash of it: a look-up cannot be wrong by
// chance.
class Signatures {
 public:
  // tensor_types, dtype_type: torch's own classes, handed in because this library is torch-free.
  Signatures(py::tuple tensor_types, py::object dtype_type)
      : tensor_types_(std::move(tensor_types)), dtype_type_(std::move(dtype_type)) {}

  // Whether this signature was remembered, and no tensor needs torch's help: a gradient to record
  // (requires_grad while `grad` is on), or a lazy negation that its memory does not show.
  bool known(const py::tuple& args, bool grad) {
    if (!encode(args) || known_.find(key_) == known_.end()) return false;
    for (py::handle arg : args) {
      if (is_tensor(arg) && !is_ordinary(arg, grad)) return false;
    }
    return true;
  }

  void remember(const py::tuple& args) {
    if (!encode(args)) return;
    if (known_.size() == kCapacity) known_.clear();  // ever new shapes: the common ones come back
    known_.insert(key_);
  }

  size_t size() const { return known_.size(); }
  void clear() { known_.clear(); }

  static constexpr size_t kCapacity = 1024;

 private:
  enum Tag : char { kNone, kBool, kInt, kFloat, kText, kDtype, kList, kTuple, kTensor };

  // Writes the signature to key_; false when an argument has none (a subclass, a symbolic size, a
  // tensor without memory): such a call is validated every time.
  bool encode(const py::tuple& args) {
    key_.clear();
    for (py::handle arg : args) {
      if (!encode(arg.ptr())) return false;
    }
    return true;
  }

  bool encode(PyObject* arg) {
    if (arg == Py_None) return put(kNone);
    if (PyBool_Check(arg)) return put(kBool) && put(arg == Py_True);
    if (PyLong_CheckExact(arg)) return put(kInt) && put_integer(arg);
    if (PyFloat_CheckExact(arg)) return put(kFloat) && put(PyFloat_AS_DOUBLE(arg));
    if (PyUnicode_CheckExact(arg)) return put(kText) && put_text(arg);
    if (PyList_CheckExact(arg) || PyTuple_CheckExact(arg)) return put_sequence(arg);
    if (Py_TYPE(arg) == reinterpret_cast<PyTypeObject*>(dtype_type_.ptr())) {
      return put(kDtype) && put(arg);  // a singleton, too
    }
    return is_tensor(arg) && put_tensor(arg);
  }

  bool is_tensor(py::handle arg) const {
    for (py::handle type : tensor_types_) {
      if (py::type::handle_of(arg).ptr() == type.ptr()) return true;
    }
    return false;
  }

  template <typename T>
  bool put(const T& value) {
    put_bytes(&value, sizeof(T));
    return true;
  }

  void put_bytes(const void* bytes, size_t count) {
    key_.append(static_cast<const char*>(bytes), count);
  }

  bool put_integer(PyObject* arg) {
    int overflow = 0;
    const long long value = PyLong_AsLongLongAndOverflow(arg, &overflow);
    return overflow == 0 && put(value);
  }

  bool put_text(PyObject* arg) {
    Py_ssize_t length = 0;
    const char* text = PyUnicode_AsUTF8AndSize(arg, &length);
    if (text == nullptr) {  // a lone surrogate
      PyErr_Clear();
      return false;
    }
    put(length);
    put_bytes(text, static_cast<size_t>(length));
    return true;
  }

  bool put_sequence(PyObject* arg) {
    put(PyList_CheckExact(arg) ? kList : kTuple);
    const Py_ssize_t count = PySequence_Fast_GET_SIZE(arg);
    put(count);
    for (Py_ssize_t i = 0; i < count; ++i) {
      PyObject* item = PySequence_Fast_GET_ITEM(arg, i);
      if (!PyLong_CheckExact(item) || !put_integer(item)) return false;
    }
    return true;
  }

  bool put_tensor(PyObject* arg) {
    static PyObject* is_meta = PyUnicode_InternFromString("is_meta");
    DLTensor tensor;
    // DLPack would refuse a meta tensor too, in a millisecond: torch records where its error is
    // from.
    if (is_true(PyObject_GetAttr(arg, is_meta)) || !borrow(arg, &tensor)) return false;
    put(kTensor);
    put(tensor.device.device_type);
    put(tensor.device.device_id);
    put_dtype(arg);
    put(tensor.ndim);
    put_bytes(tensor.shape, sizeof(int64_t) * static_cast<size_t>(tensor.ndim));
    put(tensor.strides != nullptr);
    if (tensor.strides != nullptr) {
      put_bytes(tensor.strides, sizeof(int64_t) * static_cast<size_t>(tensor.ndim));
    }
    return true;
  }

  // Torch's own dtype: DLPack's says "8-bit unsigned" of torch.uint1 .. uint7 as well.
  void put_dtype(PyObject* tensor) {
    static PyObject* dtype = PyUnicode_InternFromString("dtype");
    PyObject* result = PyObject_GetAttr(tensor, dtype);
    if (result == nullptr) throw py::error_already_set();
    put(result);
    Py_DECREF(result);  // dtypes are singletons that live as long as torch
  }

  static bool is_ordinary(py::handle tensor, bool grad) {
    static PyObject* requires_grad = PyUnicode_InternFromString("requires_grad");
    static PyObject* is_neg = PyUnicode_InternFromString("is_neg");
    if (grad && is_true(PyObject_GetAttr(tensor.ptr(), requires_grad))) return false;
    return !is_true(PyObject_CallMethodNoArgs(tensor.ptr(), is_neg));
  }

  static bool is_true(PyObject* result) {  // takes the reference
    if (result == nullptr) throw py::error_already_set();
    Py_DECREF(result);
    return result == Py_True;
  }

  py::tuple tensor_types_;
  py::object dtype_type_;
  std::unordered_set<std::string> known_;
  std::string key_;  // the signature being looked at; kept for its memory
};

}  // namespace dsk::api
