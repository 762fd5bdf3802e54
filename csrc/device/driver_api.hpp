// The part of the CUDA driver API that dskernels calls, declared here because the library must
// build without a toolkit. One table of entry points has two providers: libcuda.so.1, found with
// dlopen at run time, and the Hopper emulator. Host code sees no difference.
//
// Where a toolkit's cuda.h exists, tests/device/check_driver_api.cpp asserts that every struct and
// enumerator below agrees with it.
#pragma once

#include <cstddef>
#include <cstdint>

namespace dsk::device::cu {

using Result = int;              // CUresult: 0 is success
using Device = int;              // CUdevice
using DevicePtr = uint64_t;      // CUdeviceptr
using Context = struct CtxTag*;  // CUcontext and the other handles are opaque pointers
using Library = struct LibraryTag*;
using Kernel = struct KernelTag*;
using Function = struct FunctionTag*;
using Stream = struct StreamTag*;
using Event = struct EventTag*;

constexpr Result kSuccess = 0;
constexpr Result kInvalidValue = 1;
constexpr Result kOutOfMemory = 2;
constexpr Result kNotInitialized = 3;
constexpr Result kInvalidDevice = 101;
constexpr Result kInvalidImage = 200;
constexpr Result kInvalidContext = 201;
constexpr Result kInvalidHandle = 400;
constexpr Result kNotFound = 500;
constexpr Result kNotReady = 600;
constexpr Result kIllegalAddress = 700;
constexpr Result kLaunchFailed = 719;

enum DeviceAttribute : int {
  kMaxThreadsPerBlock = 1,
  kMultiprocessorCount = 16,
  kComputeCapabilityMajor = 75,
  kComputeCapabilityMinor = 76,
  kMaxSharedMemoryPerBlockOptin = 97,
};

enum FunctionAttribute : int {
  kMaxDynamicSharedSizeBytes = 8,
  kNonPortableClusterSizeAllowed = 14,
};

constexpr unsigned kHostRegisterReadOnly = 0x08;

enum LaunchAttributeId : int {
  kAttributeClusterDimension = 4,
  kAttributeProgrammaticStreamSerialization = 6,
};

union LaunchAttributeValue {
  char pad[64];
  struct {
    unsigned x, y, z;
  } cluster_dim;
  int programmatic_stream_serialization;
};

struct LaunchAttribute {
  LaunchAttributeId id;
  char pad[8 - sizeof(LaunchAttributeId)];
  LaunchAttributeValue value;
};

struct LaunchConfig {
  unsigned grid_x, grid_y, grid_z;
  unsigned block_x, block_y, block_z;
  unsigned shared_bytes;
  Stream stream;
  LaunchAttribute* attributes;
  unsigned num_attributes;
};

// cuda.h aligns it to 128 bytes since 13.0 (to 64 before); the stricter one satisfies both.
struct alignas(128) TensorMap {
  uint64_t opaque[16];
};

enum TensorMapDataType : int {
  kUint8 = 0,
  kUint16,
  kUint32,
  kInt32,
  kUint64,
  kInt64,
  kFloat16,
  kFloat32,
  kFloat64,
  kBfloat16,
  kFloat32Ftz,
  kTfloat32,
  kTfloat32Ftz,
};
enum TensorMapInterleave : int { kInterleaveNone = 0, kInterleave16B, kInterleave32B };
enum TensorMapSwizzle : int { kSwizzleNone = 0, kSwizzle32B, kSwizzle64B, kSwizzle128B };
enum TensorMapL2Promotion : int { kL2None = 0, kL2_64B, kL2_128B, kL2_256B };
enum TensorMapOobFill : int { kOobZero = 0, kOobNan };

// X(member, exported symbol, return type, arguments). The symbol is what cuGetProcAddress is asked
// for; where the driver versions a symbol (_v2), cuda.h maps the plain name to it and so do we.
#define DSK_DRIVER_ENTRIES(X)                                                                     \
  X(init, "cuInit", (unsigned flags))                                                             \
  X(driver_get_version, "cuDriverGetVersion", (int* version))                                     \
  X(device_get_count, "cuDeviceGetCount", (int* count))                                           \
  X(device_get, "cuDeviceGet", (Device * device, int ordinal))                                    \
  X(device_get_name, "cuDeviceGetName", (char* name, int length, Device device))                  \
  X(device_get_attribute, "cuDeviceGetAttribute", (int* value, DeviceAttribute a, Device device)) \
  X(primary_ctx_retain, "cuDevicePrimaryCtxRetain", (Context * context, Device device))           \
  X(primary_ctx_release, "cuDevicePrimaryCtxRelease", (Device device))                            \
  X(ctx_set_current, "cuCtxSetCurrent", (Context context))                                        \
  X(library_load_data, "cuLibraryLoadData",                                                       \
    (Library * library, const void* code, int* jit_options, void** jit_values, unsigned num_jit,  \
     int* options, void** option_values, unsigned num_options))                                   \
  X(library_unload, "cuLibraryUnload", (Library library))                                         \
  X(library_get_kernel, "cuLibraryGetKernel", (Kernel * kernel, Library library, const char* n))  \
  X(kernel_set_attribute, "cuKernelSetAttribute",                                                 \
    (FunctionAttribute attribute, int value, Kernel kernel, Device device))                       \
  X(launch_kernel_ex, "cuLaunchKernelEx",                                                         \
    (const LaunchConfig* config, Function function, void** params, void** extra))                 \
  X(mem_alloc, "cuMemAlloc_v2", (DevicePtr * address, size_t bytes))                              \
  X(mem_free, "cuMemFree_v2", (DevicePtr address))                                                \
  X(mem_host_register, "cuMemHostRegister_v2", (void* address, size_t bytes, unsigned flags))     \
  X(mem_host_unregister, "cuMemHostUnregister", (void* address))                                  \
  X(memcpy_to_device, "cuMemcpyHtoDAsync_v2",                                                     \
    (DevicePtr destination, const void* source, size_t bytes, Stream stream))                     \
  X(memcpy_to_host, "cuMemcpyDtoHAsync_v2",                                                       \
    (void* destination, DevicePtr source, size_t bytes, Stream stream))                           \
  X(memset_d8, "cuMemsetD8Async", (DevicePtr address, uint8_t value, size_t n, Stream stream))    \
  X(stream_create, "cuStreamCreate", (Stream * stream, unsigned flags))                           \
  X(stream_destroy, "cuStreamDestroy_v2", (Stream stream))                                        \
  X(stream_synchronize, "cuStreamSynchronize", (Stream stream))                                   \
  X(stream_wait_event, "cuStreamWaitEvent", (Stream stream, Event event, unsigned flags))         \
  X(event_create, "cuEventCreate", (Event * event, unsigned flags))                               \
  X(event_destroy, "cuEventDestroy_v2", (Event event))                                            \
  X(event_record, "cuEventRecord", (Event event, Stream stream))                                  \
  X(event_synchronize, "cuEventSynchronize", (Event event))                                       \
  X(event_elapsed_ms, "cuEventElapsedTime_v2", (float* ms, Event start, Event stop))              \
  X(tensor_map_encode_tiled, "cuTensorMapEncodeTiled",                                            \
    (TensorMap * map, TensorMapDataType type, uint32_t rank, void* address, const uint64_t* dims, \
     const uint64_t* strides, const uint32_t* box, const uint32_t* element_strides,               \
     TensorMapInterleave interleave, TensorMapSwizzle swizzle, TensorMapL2Promotion l2,           \
     TensorMapOobFill fill))                                                                      \
  X(get_error_name, "cuGetErrorName", (Result result, const char** text))                         \
  X(get_error_string, "cuGetErrorString", (Result result, const char** text))

struct DriverApi {
#define DSK_DECLARE_ENTRY(member, symbol, arguments) Result(*member) arguments = nullptr;
  DSK_DRIVER_ENTRIES(DSK_DECLARE_ENTRY)
#undef DSK_DECLARE_ENTRY
  // Emulator only (null on a GPU): rethrows the exception behind the last failed call of this
  // thread, which says far more than an error number: hazards, the state of every stuck warp.
  void (*rethrow_cause)() = nullptr;
};

}  // namespace dsk::device::cu
