// One machine to launch kernels on: a GPU through the CUDA driver, or the Hopper emulator. Both are
// a DriverApi table (driver_api.hpp); these classes add ownership and errors that say what failed.
#pragma once

#include <cstddef>
#include <memory>
#include <span>
#include <stdexcept>
#include <string>

#include "device/driver_api.hpp"

namespace dsk::device {

// A driver call that failed; what() names the call, the error and what was being attempted.
class DeviceError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
};

struct LaunchShape {
  Dim3 grid;
  Dim3 block;
  Dim3 cluster;                      // CTAs per cluster; 1,1,1 is no cluster
  unsigned shared_bytes = 0;         // dynamic shared memory per CTA
  bool programmatic_launch = false;  // may start before the previous kernel of the stream has ended
};

struct TensorMapSpec {
  cu::TensorMapDataType type = cu::kUint8;
  uint32_t rank = 0;          // 1..5; index 0 is the innermost (contiguous) dimension
  cu::DevicePtr address = 0;  // 16-byte aligned
  uint64_t dims[5] = {};      // elements
  uint64_t strides[4] = {};   // bytes, of dimensions 1..rank-1; multiples of 16
  uint32_t box[5] = {};       // elements
  uint32_t element_strides[5] = {1, 1, 1, 1, 1};
  cu::TensorMapSwizzle swizzle = cu::kSwizzleNone;
  cu::TensorMapL2Promotion l2 = cu::kL2_256B;
  cu::TensorMapOobFill fill = cu::kOobZero;
};

class Device;

// A loaded cubin (GPU) or PTX text (emulator). Kernels stay valid while the module lives.
class Module {
 public:
  ~Module();
  cu::Kernel kernel(const std::string& name) const;

 private:
  friend class Device;
  Module(const Device& device, cu::Library library) : device_(device), library_(library) {}
  const Device& device_;
  cu::Library library_;
};

class Device {
 public:
  // Retains the device's primary context for this object's lifetime.
  Device(const cu::DriverApi& api, int ordinal);
  ~Device();
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  const std::string& name() const { return name_; }
  int num_sms() const { return num_sms_; }
  int compute_capability() const { return compute_capability_; }  // 90 for Hopper
  int max_shared_bytes() const { return max_shared_bytes_; }      // per CTA, opt-in

  // `image` must be NUL-terminated when it is PTX text.
  std::unique_ptr<Module> load_module(const void* image) const;

  cu::DevicePtr allocate(size_t bytes) const;
  void release(cu::DevicePtr address) const;
  void copy_to_device(cu::DevicePtr to, const void* from, size_t bytes, cu::Stream stream) const;
  void copy_to_host(void* to, cu::DevicePtr from, size_t bytes, cu::Stream stream) const;
  void fill(cu::DevicePtr to, uint8_t value, size_t bytes, cu::Stream stream) const;
  void synchronize(cu::Stream stream) const;

  cu::TensorMap encode(const TensorMapSpec& spec) const;

  // `params[i]` points at the i-th kernel parameter's value, as in cuLaunchKernel.
  void launch(cu::Kernel kernel, const LaunchShape& shape, std::span<void*> params,
              cu::Stream stream) const;

  // Throws DeviceError unless `result` is success; `attempt` says what was being done.
  void check(cu::Result result, const char* attempt) const;
  const cu::DriverApi& api() const { return api_; }

 private:
  void make_current() const;

  const cu::DriverApi& api_;
  cu::Device device_ = 0;
  cu::Context context_ = nullptr;
  std::string name_;
  int num_sms_ = 0;
  int compute_capability_ = 0;
  int max_shared_bytes_ = 0;
};

// Device memory that frees itself.
class Buffer {
 public:
  Buffer(const Device& device, size_t bytes)
      : device_(device), bytes_(bytes), address_(device.allocate(bytes)) {}
  ~Buffer() { device_.release(address_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  cu::DevicePtr address() const { return address_; }
  size_t bytes() const { return bytes_; }

 private:
  const Device& device_;
  size_t bytes_;
  cu::DevicePtr address_;
};

}  // namespace dsk::device
