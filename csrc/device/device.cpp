#include "device/device.hpp"

#include <array>

namespace dsk::device {
namespace {

// Dynamic shared memory above this needs the kernel's opt-in attribute.
constexpr unsigned kDefaultSharedBytes = 48 * 1024;
// Clusters above this size need the non-portable attribute.
constexpr unsigned kPortableClusterSize = 8;

std::string shape_text(const LaunchShape& shape) {
  auto dim = [](const Dim3& d) {
    return "(" + std::to_string(d.x) + "," + std::to_string(d.y) + "," + std::to_string(d.z) + ")";
  };
  return "grid " + dim(shape.grid) + ", block " + dim(shape.block) + ", cluster " +
         dim(shape.cluster) + ", " + std::to_string(shape.shared_bytes) + " bytes of shared memory";
}

}  // namespace

Module::~Module() { device_.api().library_unload(library_); }

cu::Kernel Module::kernel(const std::string& name) const {
  cu::Kernel kernel = nullptr;
  device_.check(device_.api().library_get_kernel(&kernel, library_, name.c_str()),
                ("finding kernel " + name).c_str());
  return kernel;
}

Device::Device(const cu::DriverApi& api, int ordinal) : api_(api) {
  int count = 0;
  check(api_.device_get_count(&count), "counting devices");
  if (ordinal < 0 || ordinal >= count) {
    throw DeviceError("device ordinal: expected 0.." + std::to_string(count - 1) + ", got " +
                      std::to_string(ordinal));
  }
  check(api_.device_get(&device_, ordinal), "opening the device");
  char name[256] = {};
  check(api_.device_get_name(name, sizeof(name), device_), "reading the device's name");
  name_ = name;
  auto attribute = [&](cu::DeviceAttribute which) {
    int value = 0;
    check(api_.device_get_attribute(&value, which, device_), "reading a device attribute");
    return value;
  };
  num_sms_ = attribute(cu::kMultiprocessorCount);
  compute_capability_ =
      10 * attribute(cu::kComputeCapabilityMajor) + attribute(cu::kComputeCapabilityMinor);
  max_shared_bytes_ = attribute(cu::kMaxSharedMemoryPerBlockOptin);
  check(api_.primary_ctx_retain(&context_, device_), "retaining the primary context");
}

Device::~Device() { api_.primary_ctx_release(device_); }

void Device::check(cu::Result result, const char* attempt) const {
  if (result == cu::kSuccess) return;
  if (api_.rethrow_cause) api_.rethrow_cause();
  const char* error_name = nullptr;
  const char* error_text = nullptr;
  api_.get_error_name(result, &error_name);
  api_.get_error_string(result, &error_text);
  throw DeviceError(std::string(attempt) + (name_.empty() ? "" : " on " + name_) +
                    " failed: " + (error_name ? error_name : "error " + std::to_string(result)) +
                    (error_text ? std::string(" (") + error_text + ")" : ""));
}

void Device::make_current() const {
  check(api_.ctx_set_current(context_), "making the context current");
}

std::unique_ptr<Module> Device::load_module(const void* image) const {
  make_current();
  cu::Library library = nullptr;
  check(api_.library_load_data(&library, image, nullptr, nullptr, 0, nullptr, nullptr, 0),
        "loading a module");
  return std::unique_ptr<Module>(new Module(*this, library));
}

cu::DevicePtr Device::allocate(size_t bytes) const {
  make_current();
  cu::DevicePtr address = 0;
  // The driver refuses zero bytes; an empty tensor is legal here and still gets an address.
  check(api_.mem_alloc(&address, bytes ? bytes : 1),
        ("allocating " + std::to_string(bytes) + " bytes").c_str());
  return address;
}

void Device::release(cu::DevicePtr address) const {
  if (api_.ctx_set_current(context_) == cu::kSuccess) api_.mem_free(address);
}

void Device::copy_to_device(cu::DevicePtr to, const void* from, size_t bytes,
                            cu::Stream stream) const {
  make_current();
  if (bytes) check(api_.memcpy_to_device(to, from, bytes, stream), "copying to the device");
}

void Device::copy_to_host(void* to, cu::DevicePtr from, size_t bytes, cu::Stream stream) const {
  make_current();
  if (bytes) check(api_.memcpy_to_host(to, from, bytes, stream), "copying to the host");
}

void Device::fill(cu::DevicePtr to, uint8_t value, size_t bytes, cu::Stream stream) const {
  make_current();
  if (bytes) check(api_.memset_d8(to, value, bytes, stream), "filling device memory");
}

void Device::synchronize(cu::Stream stream) const {
  make_current();
  check(api_.stream_synchronize(stream), "waiting for the stream");
}

cu::TensorMap Device::encode(const TensorMapSpec& spec) const {
  make_current();
  cu::TensorMap map{};
  check(api_.tensor_map_encode_tiled(&map, spec.type, spec.rank,
                                     reinterpret_cast<void*>(spec.address), spec.dims, spec.strides,
                                     spec.box, spec.element_strides, cu::kInterleaveNone,
                                     spec.swizzle, spec.l2, spec.fill),
        "encoding a tensor map");
  return map;
}

void Device::launch(cu::Kernel kernel, const LaunchShape& shape, std::span<void*> params,
                    cu::Stream stream) const {
  make_current();
  const unsigned cluster_size = shape.cluster.x * shape.cluster.y * shape.cluster.z;
  if (shape.shared_bytes > kDefaultSharedBytes) {
    check(api_.kernel_set_attribute(cu::kMaxDynamicSharedSizeBytes, int(shape.shared_bytes), kernel,
                                    device_),
          ("asking for " + shape_text(shape)).c_str());
  }
  if (cluster_size > kPortableClusterSize) {
    check(api_.kernel_set_attribute(cu::kNonPortableClusterSizeAllowed, 1, kernel, device_),
          ("asking for " + shape_text(shape)).c_str());
  }
  std::array<cu::LaunchAttribute, 2> attributes{};
  unsigned num_attributes = 0;
  if (cluster_size > 1) {
    auto& attribute = attributes[num_attributes++];
    attribute.id = cu::kAttributeClusterDimension;
    attribute.value.cluster_dim = {shape.cluster.x, shape.cluster.y, shape.cluster.z};
  }
  if (shape.programmatic_launch) {
    auto& attribute = attributes[num_attributes++];
    attribute.id = cu::kAttributeProgrammaticStreamSerialization;
    attribute.value.programmatic_stream_serialization = 1;
  }
  const cu::LaunchConfig config{shape.grid.x,      shape.grid.y,  shape.grid.z,       shape.block.x,
                                shape.block.y,     shape.block.z, shape.shared_bytes, stream,
                                attributes.data(), num_attributes};
  // A CUkernel may stand where cuLaunchKernelEx expects a CUfunction (driver documentation).
  check(api_.launch_kernel_ex(&config, reinterpret_cast<cu::Function>(kernel), params.data(),
                              nullptr),
        ("launching with " + shape_text(shape)).c_str());
}

}  // namespace dsk::device
