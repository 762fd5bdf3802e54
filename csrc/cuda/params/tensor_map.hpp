// What every stem's parameter structs share. A parameter struct is plain data, passed by value, the
// same on host and device.
#pragma once

#include <cstdint>

namespace dsk {

// The driver's 128-byte tensor map, opaque; kernels only pass its address to TMA.
struct alignas(128) TensorMapBytes {
  uint64_t opaque[16];
};

}  // namespace dsk
