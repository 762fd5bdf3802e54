// A growing array for kernels: std::vector's members are weak symbols, and the linker could keep
// the copy that was compiled for an instruction set the processor lacks.
#pragma once

#include <cstdlib>
#include <new>

#include "cpu/simd.hpp"

namespace dsk::cpu::DSK_CPU_NS {

template <typename T>
class List {
  static_assert(std::is_trivially_copyable_v<T>);

 public:
  List() = default;
  List(const List&) = delete;
  List& operator=(const List&) = delete;
  inline __attribute__((always_inline)) ~List() { std::free(data_); }

  inline __attribute__((always_inline)) void push(const T& value) {
    if (size_ == capacity_) {
      capacity_ = max_of<int64_t>(16, 2 * capacity_);
      void* grown =
          std::realloc(static_cast<void*>(data_), static_cast<size_t>(capacity_) * sizeof(T));
      if (grown == nullptr) throw std::bad_alloc();
      data_ = static_cast<T*>(grown);
    }
    new (data_ + size_++) T(value);
  }
  inline __attribute__((always_inline)) void clear() { size_ = 0; }
  inline __attribute__((always_inline)) int64_t size() const { return size_; }
  inline __attribute__((always_inline)) T& operator[](int64_t i) { return data_[i]; }
  inline __attribute__((always_inline)) const T& operator[](int64_t i) const { return data_[i]; }

 private:
  T* data_ = nullptr;
  int64_t size_ = 0, capacity_ = 0;
};

}  // namespace dsk::cpu::DSK_CPU_NS
