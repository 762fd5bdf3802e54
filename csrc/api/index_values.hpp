// Questions about the values of small integer tensors on the CPU, asked by the ops on every call.
// Each answers yes only when the rule that dskernels/ops/_values.py states in Python holds; on no,
// Python decides and writes the message.
#pragma once

#include <cstdint>

#include "check.hpp"
#include "dskernels.h"

namespace dsk::api {

// Calls visit(value) for each element in row-major order until it returns false; whether all did.
template <typename T, typename Visit>
bool all_of(const DLTensor& t, int dim, const T* at, Visit&& visit) {
  if (dim == t.ndim) return visit(static_cast<int64_t>(*at));
  int64_t stride = 1;
  if (t.strides != nullptr) {
    stride = t.strides[dim];
  } else {
    for (int i = dim + 1; i < t.ndim; ++i) stride *= t.shape[i];
  }
  for (int64_t i = 0; i < t.shape[dim]; ++i) {
    if (!all_of(t, dim + 1, at + i * stride, visit)) return false;
  }
  return true;
}

template <typename Visit>
bool all_of(const DLTensor& t, Visit&& visit) {
  DSK_CHECK(t.device.device_type == 1, "index tensor: expected one on the CPU, got device type ",
            t.device.device_type);
  DSK_CHECK(t.dtype.code == 0 && t.dtype.lanes == 1 && (t.dtype.bits == 32 || t.dtype.bits == 64),
            "index tensor: expected int32 or int64, got DLPack type code ", int{t.dtype.code},
            " of ", int{t.dtype.bits}, " bits");
  const char* data = static_cast<const char*>(t.data) + t.byte_offset;
  if (t.dtype.bits == 32) return all_of(t, 0, reinterpret_cast<const int32_t*>(data), visit);
  return all_of(t, 0, reinterpret_cast<const int64_t*>(data), visit);
}

// Every element is in [low, high).
inline bool indices_fit(const DLTensor& t, int64_t low, int64_t high) {
  return all_of(t, [=](int64_t value) { return value >= low && value < high; });
}

// Every element is in [0, each] and a multiple of `multiple`, and their sum is at most `total`.
inline bool sizes_fit(const DLTensor& t, int64_t each, int64_t total, int64_t multiple) {
  int64_t left = total;
  return all_of(t, [&](int64_t size) {
    if (size < 0 || size > each || size > left || size % multiple != 0) return false;
    left -= size;
    return true;
  });
}

// [b + 1] ends of consecutive segments: the first is 0, none is below its predecessor or above
// `limit`.
inline bool ends_fit(const DLTensor& t, int64_t limit) {
  if (t.ndim != 1 || t.shape[0] == 0) return false;
  int64_t before = 0;
  bool first = true;
  return all_of(t, [&](int64_t end) {
    const bool fits = (first ? end == 0 : end >= before) && end <= limit;
    first = false;
    before = end;
    return fits;
  });
}

// Of table [b, max_pages], the first ceil(lens[i] / page) entries of row i are in [0, pages), and
// every length is in [0, max_pages * page].
inline bool pages_fit(const DLTensor& table, const DLTensor& lens, int64_t page, int64_t pages) {
  if (table.ndim != 2 || lens.ndim != 1 || table.shape[0] != lens.shape[0] || page < 1)
    return false;
  const int64_t max_pages = table.shape[1];
  const int64_t stride = table.strides != nullptr ? table.strides[0] : max_pages;
  const uint64_t row_bytes = static_cast<uint64_t>(stride) * (table.dtype.bits / 8);
  int64_t used = 0;
  DLTensor row = table;  // the used part of a request's row
  row.ndim = 1;
  row.shape = &used;
  if (table.strides != nullptr) row.strides = table.strides + 1;
  return all_of(lens, [&](int64_t length) {
    if (length < 0 || length > max_pages * page) return false;
    used = (length + page - 1) / page;
    const bool fits = indices_fit(row, 0, pages);
    row.byte_offset += row_bytes;
    return fits;
  });
}

}  // namespace dsk::api
