// Python's view of the device layer: is there a driver, and if not, why.
#include "api/bindings.hpp"
#include "device/driver_library.hpp"

namespace py = pybind11;

namespace dsk::api {

void bind_device(py::module_& m) {
  m.def(
      "driver_status",
      [](const std::string& path) {
        const device::DriverLibrary& driver = device::load_driver(path);
        int devices = 0;
        if (driver.api) driver.api->device_get_count(&devices);
        py::dict status;
        status["available"] = driver.api != nullptr && devices > 0;
        status["devices"] = devices;
        status["driver_version"] = driver.version;
        status["min_driver_version"] = device::kMinDriverVersion;
        status["reason"] = driver.reason;
        return status;
      },
      py::arg("path") = "",
      "The CUDA driver found at run time: available, devices, driver_version (13000 is CUDA 13.0), "
      "min_driver_version, reason. `path` names a libcuda.so.1; empty searches for it.");
}

}  // namespace dsk::api
