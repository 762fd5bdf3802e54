// The CUDA driver API on the Hopper emulator: the same table that libcuda fills, so that host
// launch code runs unchanged on a machine without a GPU. Modules are PTX text. Work on a stream
// runs when somebody waits for it.
#pragma once

#include "device/driver_api.hpp"

namespace dsk::device {

inline constexpr char kEmulatedDeviceName[] = "Hopper emulator (sm_90a)";

const cu::DriverApi& emulated_driver();

}  // namespace dsk::device
