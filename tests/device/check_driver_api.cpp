// Compiled (never run) against the toolkit's cuda.h: csrc/device/driver_api.hpp must agree with it.
#include <cuda.h>

#include <type_traits>

#include "device/driver_api.hpp"

namespace cu = dsk::device::cu;

#define SAME_OFFSET(ours, our_field, theirs, their_field) \
  static_assert(offsetof(ours, our_field) == offsetof(theirs, their_field))

static_assert(sizeof(cu::LaunchConfig) == sizeof(CUlaunchConfig));
SAME_OFFSET(cu::LaunchConfig, grid_x, CUlaunchConfig, gridDimX);
SAME_OFFSET(cu::LaunchConfig, block_z, CUlaunchConfig, blockDimZ);
SAME_OFFSET(cu::LaunchConfig, shared_bytes, CUlaunchConfig, sharedMemBytes);
SAME_OFFSET(cu::LaunchConfig, stream, CUlaunchConfig, hStream);
SAME_OFFSET(cu::LaunchConfig, attributes, CUlaunchConfig, attrs);
SAME_OFFSET(cu::LaunchConfig, num_attributes, CUlaunchConfig, numAttrs);

static_assert(sizeof(cu::LaunchAttribute) == sizeof(CUlaunchAttribute));
SAME_OFFSET(cu::LaunchAttribute, value, CUlaunchAttribute, value);
static_assert(sizeof(cu::LaunchAttributeValue) == sizeof(CUlaunchAttributeValue));
static_assert(int(cu::kAttributeClusterDimension) == int(CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION));
static_assert(int(cu::kAttributeProgrammaticStreamSerialization) ==
              int(CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION));

static_assert(sizeof(cu::TensorMap) == sizeof(CUtensorMap));
static_assert(alignof(cu::TensorMap) >= alignof(CUtensorMap));
static_assert(int(cu::kTfloat32Ftz) == int(CU_TENSOR_MAP_DATA_TYPE_TFLOAT32_FTZ));
static_assert(int(cu::kBfloat16) == int(CU_TENSOR_MAP_DATA_TYPE_BFLOAT16));
static_assert(int(cu::kFloat32Ftz) == int(CU_TENSOR_MAP_DATA_TYPE_FLOAT32_FTZ));
static_assert(int(cu::kSwizzle128B) == int(CU_TENSOR_MAP_SWIZZLE_128B));
static_assert(int(cu::kInterleave32B) == int(CU_TENSOR_MAP_INTERLEAVE_32B));
static_assert(int(cu::kL2_256B) == int(CU_TENSOR_MAP_L2_PROMOTION_L2_256B));
static_assert(int(cu::kOobNan) == int(CU_TENSOR_MAP_FLOAT_OOB_FILL_NAN_REQUEST_ZERO_FMA));

static_assert(int(cu::kMaxThreadsPerBlock) == int(CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK));
static_assert(int(cu::kMultiprocessorCount) == int(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT));
static_assert(int(cu::kComputeCapabilityMajor) ==
              int(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR));
static_assert(int(cu::kComputeCapabilityMinor) ==
              int(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR));
static_assert(int(cu::kMaxSharedMemoryPerBlockOptin) ==
              int(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN));
static_assert(int(cu::kMaxDynamicSharedSizeBytes) ==
              int(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES));
static_assert(int(cu::kNonPortableClusterSizeAllowed) ==
              int(CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED));

static_assert(cu::kHostRegisterReadOnly == CU_MEMHOSTREGISTER_READ_ONLY);

static_assert(cu::kInvalidImage == CUDA_ERROR_INVALID_IMAGE);
static_assert(cu::kInvalidHandle == CUDA_ERROR_INVALID_HANDLE);
static_assert(cu::kInvalidContext == CUDA_ERROR_INVALID_CONTEXT);
static_assert(cu::kInvalidDevice == CUDA_ERROR_INVALID_DEVICE);
static_assert(cu::kNotFound == CUDA_ERROR_NOT_FOUND);
static_assert(cu::kNotReady == CUDA_ERROR_NOT_READY);
static_assert(cu::kIllegalAddress == CUDA_ERROR_ILLEGAL_ADDRESS);
static_assert(cu::kLaunchFailed == CUDA_ERROR_LAUNCH_FAILED);
static_assert(cu::kOutOfMemory == CUDA_ERROR_OUT_OF_MEMORY);

// Every entry point: the same number of arguments, each of the same size, returning a CUresult.
template <typename Ours, typename Theirs>
struct SameShape : std::false_type {};
template <typename... A, typename... B>
struct SameShape<cu::Result (*)(A...), CUresult (*)(B...)> {
  static constexpr bool value = sizeof...(A) == sizeof...(B) && ((sizeof(A) == sizeof(B)) && ...);
};

#define CHECK_ENTRY(member, function) \
  static_assert(SameShape<decltype(cu::DriverApi::member), decltype(&function)>::value, #function)
CHECK_ENTRY(init, cuInit);
CHECK_ENTRY(driver_get_version, cuDriverGetVersion);
CHECK_ENTRY(device_get_count, cuDeviceGetCount);
CHECK_ENTRY(device_get, cuDeviceGet);
CHECK_ENTRY(device_get_name, cuDeviceGetName);
CHECK_ENTRY(device_get_attribute, cuDeviceGetAttribute);
CHECK_ENTRY(primary_ctx_retain, cuDevicePrimaryCtxRetain);
CHECK_ENTRY(primary_ctx_release, cuDevicePrimaryCtxRelease);
CHECK_ENTRY(ctx_set_current, cuCtxSetCurrent);
CHECK_ENTRY(library_load_data, cuLibraryLoadData);
CHECK_ENTRY(library_unload, cuLibraryUnload);
CHECK_ENTRY(library_get_kernel, cuLibraryGetKernel);
CHECK_ENTRY(kernel_set_attribute, cuKernelSetAttribute);
CHECK_ENTRY(launch_kernel_ex, cuLaunchKernelEx);
CHECK_ENTRY(mem_alloc, cuMemAlloc);
CHECK_ENTRY(mem_free, cuMemFree);
CHECK_ENTRY(mem_host_register, cuMemHostRegister);
CHECK_ENTRY(mem_host_unregister, cuMemHostUnregister);
CHECK_ENTRY(memcpy_to_device, cuMemcpyHtoDAsync);
CHECK_ENTRY(memcpy_to_host, cuMemcpyDtoHAsync);
CHECK_ENTRY(memset_d8, cuMemsetD8Async);
CHECK_ENTRY(stream_create, cuStreamCreate);
CHECK_ENTRY(stream_destroy, cuStreamDestroy);
CHECK_ENTRY(stream_synchronize, cuStreamSynchronize);
CHECK_ENTRY(stream_wait_event, cuStreamWaitEvent);
CHECK_ENTRY(event_create, cuEventCreate);
CHECK_ENTRY(event_destroy, cuEventDestroy);
CHECK_ENTRY(event_record, cuEventRecord);
CHECK_ENTRY(event_synchronize, cuEventSynchronize);
CHECK_ENTRY(event_elapsed_ms, cuEventElapsedTime);
CHECK_ENTRY(tensor_map_encode_tiled, cuTensorMapEncodeTiled);
CHECK_ENTRY(get_error_name, cuGetErrorName);
CHECK_ENTRY(get_error_string, cuGetErrorString);

int main() {}
