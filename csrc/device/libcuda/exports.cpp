// The emulator as a libcuda.so.1: what a program that finds its driver with dlopen gets. As in the
// real driver, cuGetProcAddress names every entry point; it is the only symbol exported.
#include <cstring>

#include "device/emulated_driver.hpp"

namespace cu = dsk::device::cu;

extern "C" __attribute__((visibility("default"))) cu::Result cuGetProcAddress_v2(
    const char* symbol, void** address, int /*cuda_version*/, uint64_t /*flags*/, int* status) {
  const cu::DriverApi& api = dsk::device::emulated_driver();
  *address = nullptr;
#define DSK_MATCH_ENTRY(member, name, arguments) \
  if (std::strcmp(symbol, name) == 0) *address = reinterpret_cast<void*>(api.member);
  DSK_DRIVER_ENTRIES(DSK_MATCH_ENTRY)
#undef DSK_MATCH_ENTRY
  if (status) *status = *address ? 0 : 1;  // 1: symbol not found
  return *address ? cu::kSuccess : cu::kNotFound;
}
