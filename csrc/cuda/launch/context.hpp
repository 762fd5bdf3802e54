// Where launchers find a device and its kernels.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>

#include "device/device.hpp"

namespace dsk::launch {

enum class Machine { kCuda, kEmulated };

// One device with the shipped kernels, each loaded at its first use.
class Context {
 public:
  Context(Machine machine, int ordinal);

  const device::Device& device() const { return device_; }
  // Whether kernels run in the emulator, in this process or behind a libcuda.so.1. It takes PTX
  // instead of cubins and host memory instead of device memory.
  bool emulated() const { return emulated_; }

  // The instance of that name in csrc/cuda/instances/. Throws DeviceError if it is not shipped.
  device::cu::Kernel kernel(const std::string& name);

  // Names of the instances asked for since the last call: which kernels did a test run?
  std::set<std::string> take_used_kernels();

 private:
  device::Device device_;
  bool emulated_;
  std::mutex mutex_;
  std::map<std::string, std::unique_ptr<device::Module>> modules_;
  std::set<std::string> used_;
};

// Where a launch goes. `num_sms` bounds the grid where one CTA can do another's work; 0: every SM.
struct LaunchOn {
  Context& context;
  device::cu::Stream stream;
  int num_sms;
};

// The context of a device, made at first use. Throws DeviceError, saying why, where there is none.
Context& context(Machine machine, int ordinal);

// The folder that holds <name>.cubin and <name>.ptx; set once by the package when it is imported.
void set_kernel_directory(const std::string& path);

// On the emulator, kernels may touch only memory that was handed to them: this lends a tensor's
// host memory for the duration of a launch. On a GPU tensors are device memory already, and it does
// nothing.
class HostLoan {
 public:
  HostLoan(const Context& context, const void* address, size_t bytes, bool read_only);
  ~HostLoan();
  HostLoan(const HostLoan&) = delete;
  HostLoan& operator=(const HostLoan&) = delete;

 private:
  const Context& context_;
  void* address_;
};

}  // namespace dsk::launch
