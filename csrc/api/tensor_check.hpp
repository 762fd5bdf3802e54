// Reads DLTensors into params, refusing what a kernel could not handle by name, expectation and
// value. Used by the C ABI, so every caller gets the same checks.
#pragma once

#include <initializer_list>
#include <string>

#include "check.hpp"
#include "dskernels.h"
#include "params.hpp"

namespace dsk::api {

inline std::string type_name(DLDataType type) {
  static constexpr const char* kNames[] = {"int",    "uint",    "float", "opaque",
                                           "bfloat", "complex", "bool"};
  if (type.code == 10) return "float8_e4m3fn";
  if (type.code >= 7) return "DLPack type code " + std::to_string(type.code);
  return kNames[type.code] + std::to_string(type.bits);
}

inline std::string shape_text(int ndim, const int64_t* shape) {
  std::string text = "[";
  for (int i = 0; i < ndim; ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

// One argument under examination.
class Arg {
 public:
  Arg(const char* name, const DLTensor* tensor) : name_(name), tensor_(tensor) {
    DSK_CHECK(tensor != nullptr, name, ": expected a tensor, got none");
    DSK_CHECK(tensor->device.device_type == 1, name, ": expected a CPU tensor, got device type ",
              tensor->device.device_type);
    DSK_CHECK(tensor->dtype.lanes == 1, name, ": expected 1 lane, got ", tensor->dtype.lanes);
  }

  // -1 accepts any size.
  const Arg& shape(std::initializer_list<int64_t> expected) const {
    bool same = static_cast<int>(expected.size()) == tensor_->ndim;
    for (int i = 0; same && i < tensor_->ndim; ++i) {
      const int64_t want = expected.begin()[i];
      same = want < 0 || want == tensor_->shape[i];
    }
    DSK_CHECK(same, name_, ": expected shape ",
              shape_text(static_cast<int>(expected.size()), expected.begin()), " (-1: any), got ",
              shape_text(tensor_->ndim, tensor_->shape));
    return *this;
  }

  const Arg& contiguous_last() const {
    const int last = tensor_->ndim - 1;
    DSK_CHECK(last < 0 || tensor_->shape[last] <= 1 || stride(last) == 1, name_,
              ": expected a contiguous last dimension, got stride ", stride(last));
    return *this;
  }

  const Arg& contiguous() const {
    int64_t expected = 1;
    for (int i = tensor_->ndim - 1; i >= 0; --i) {
      DSK_CHECK(tensor_->shape[i] <= 1 || stride(i) == expected, name_,
                ": expected a contiguous tensor, got stride ", stride(i), " in dimension ", i,
                " instead of ", expected);
      expected *= tensor_->shape[i];
    }
    return *this;
  }

  // Written to: no two elements may share an address (stride 0 views do).
  const Arg& writable() const {
    for (int i = 0; i < tensor_->ndim; ++i) {
      DSK_CHECK(tensor_->shape[i] <= 1 || stride(i) != 0, name_,
                ": expected an output without broadcast (stride 0) dimensions, got stride 0 in "
                "dimension ",
                i);
    }
    return *this;
  }

  Type type(std::initializer_list<Type> allowed) const {
    const Type actual = type_of();
    for (Type candidate : allowed) {
      if (candidate == actual) return actual;
    }
    fail_type(allowed);
  }

  int dims() const { return tensor_->ndim; }
  int64_t size(int dim) const { return tensor_->shape[dim]; }
  int64_t stride(int dim) const {
    if (tensor_->strides != nullptr) return tensor_->strides[dim];
    int64_t stride = 1;
    for (int i = tensor_->ndim - 1; i > dim; --i) stride *= tensor_->shape[i];
    return stride;
  }
  bool empty() const {
    for (int i = 0; i < tensor_->ndim; ++i) {
      if (tensor_->shape[i] == 0) return true;
    }
    return false;
  }

  template <typename T = void>
  T* data() const {
    return reinterpret_cast<T*>(static_cast<char*>(tensor_->data) + tensor_->byte_offset);
  }

  // Integers of exactly this width, signed.
  template <typename T>
  const T* integers() const {
    const DLDataType& t = tensor_->dtype;
    DSK_CHECK(t.code == 0 && t.bits == 8 * sizeof(T), name_, ": expected int", 8 * sizeof(T),
              ", got ", type_name(t));
    return data<const T>();
  }
  const Arg& bytes() const {
    DSK_CHECK(is_bytes(), name_, ": expected uint8, got ", type_name(tensor_->dtype));
    return *this;
  }
  bool is_bytes() const { return tensor_->dtype.code == 1 && tensor_->dtype.bits == 8; }

  // A matrix [rows, columns] of one of `allowed`.
  Matrix matrix(std::initializer_list<Type> allowed) const {
    contiguous_last();
    return {data<const void>(), tensor_->ndim > 1 ? stride(tensor_->ndim - 2) : 0, type(allowed)};
  }
  MutableMatrix output(std::initializer_list<Type> allowed) const {
    writable().contiguous_last();
    return {data<void>(), tensor_->ndim > 1 ? stride(tensor_->ndim - 2) : 0, type(allowed)};
  }
  Scales scales() const {
    type({Type::kF32});
    return {data<float>(), stride(tensor_->ndim - 2), stride(tensor_->ndim - 1)};
  }

 private:
  Type type_of() const {
    const DLDataType& t = tensor_->dtype;
    if (t.code == 2 && t.bits == 32) return Type::kF32;
    if (t.code == 2 && t.bits == 16) return Type::kF16;
    if (t.code == 4 && t.bits == 16) return Type::kBF16;
    if (t.code == 10) return Type::kE4M3;
    return static_cast<Type>(-1);
  }

  [[noreturn]] void fail_type(std::initializer_list<Type> allowed) const {
    static constexpr const char* kNames[] = {"float32", "bfloat16", "float16", "float8_e4m3fn"};
    std::string names;
    for (Type candidate : allowed) {
      names += (names.empty() ? "" : " or ") + std::string(kNames[static_cast<int>(candidate)]);
    }
    fail(name_, ": expected ", names, ", got ", type_name(tensor_->dtype));
  }

  const char* name_;
  const DLTensor* tensor_;
};

// The frame of every C entry point: exceptions stop here.
void set_error(const char* message);

template <typename Body>
int guarded(Body&& body) {
  try {
    body();
    return 0;
  } catch (const std::exception& error) {
    set_error(error.what());
    return -1;
  }
}

}  // namespace dsk::api
