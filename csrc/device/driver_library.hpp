// Finding libcuda at run time.
#pragma once

#include <string>

#include "device/driver_api.hpp"

namespace dsk::device {

// The oldest driver that loads cubins of the toolkit that built this package, as
// cuDriverGetVersion prints it (13000 is CUDA 13.0, R580).
constexpr int kMinDriverVersion = 13000;

struct DriverLibrary {
  const cu::DriverApi* api = nullptr;  // null when there is no usable driver
  int version = 0;                     // as cuDriverGetVersion prints it; 0 when not known
  std::string reason;                  // why api is null, or where the library was found
};

// Load the driver from `path` (empty: libcuda.so.1 by the loader's search). Never throws: a machine
// without a GPU is a normal machine. The result is cached per path for the process's lifetime.
const DriverLibrary& load_driver(const std::string& path = "");

}  // namespace dsk::device
