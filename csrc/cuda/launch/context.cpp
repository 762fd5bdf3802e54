#include "cuda/launch/context.hpp"

#include <cstdlib>
#include <fstream>
#include <iterator>
#include <utility>
#include <vector>

#include "device/driver_library.hpp"
#include "device/emulated_driver.hpp"

namespace dsk::launch {
namespace {

std::string& kernel_directory() {
  static std::string path;
  return path;
}

const device::cu::DriverApi& api_of(Machine machine) {
  if (machine == Machine::kEmulated) return device::emulated_driver();
  const char* path = std::getenv("DSK_CUDA_DRIVER");
  const device::DriverLibrary& driver = device::load_driver(path ? path : "");
  if (!driver.api) throw device::DeviceError(driver.reason);
  return *driver.api;
}

std::vector<char> read_image(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw device::DeviceError("no kernel file " + path + " (built without nvcc?)");
  std::vector<char> image{std::istreambuf_iterator<char>(file), {}};
  image.push_back('\0');  // PTX is loaded as text
  return image;
}

}  // namespace

Context::Context(Machine machine, int ordinal)
    : device_(api_of(machine), ordinal),
      emulated_(device_.name().rfind(device::kEmulatedDeviceName, 0) == 0) {
  if (device_.compute_capability() != 90) {
    throw device::DeviceError(device_.name() + " has compute capability " +
                              std::to_string(device_.compute_capability()) +
                              "; these kernels are built for sm_90a (Hopper) only");
  }
}

device::cu::Kernel Context::kernel(const std::string& name) {
  std::lock_guard<std::mutex> lock(mutex_);
  used_.insert(name);
  auto& module = modules_[name];
  if (!module) {
    const char* suffix = emulated_ ? ".ptx" : ".cubin";
    module = device_.load_module(read_image(kernel_directory() + "/" + name + suffix).data());
  }
  return module->kernel(name);
}

std::set<std::string> Context::take_used_kernels() {
  std::lock_guard<std::mutex> lock(mutex_);
  return std::exchange(used_, {});
}

Context& context(Machine machine, int ordinal) {
  static std::mutex mutex;
  static std::map<std::pair<Machine, int>, std::unique_ptr<Context>> contexts;
  std::lock_guard<std::mutex> lock(mutex);
  auto& entry = contexts[{machine, ordinal}];
  if (!entry) entry = std::make_unique<Context>(machine, ordinal);
  return *entry;
}

void set_kernel_directory(const std::string& path) { kernel_directory() = path; }

HostLoan::HostLoan(const Context& context, const void* address, size_t bytes, bool read_only)
    : context_(context), address_(nullptr) {
  if (!context.emulated() || bytes == 0) return;
  const device::Device& device = context.device();
  device.check(device.api().mem_host_register(const_cast<void*>(address), bytes,
                                              read_only ? device::cu::kHostRegisterReadOnly : 0),
               "lending host memory to the emulator");
  address_ = const_cast<void*>(address);
}

HostLoan::~HostLoan() {
  if (address_) context_.device().api().mem_host_unregister(address_);
}

}  // namespace dsk::launch
