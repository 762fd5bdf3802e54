#include "device/driver_library.hpp"

#include <dlfcn.h>

#include <map>
#include <memory>
#include <mutex>

namespace dsk::device {
namespace {

using GetProcAddress = cu::Result (*)(const char*, void**, int, uint64_t, void*);

// cuda.h gives plain names to versioned symbols; cuGetProcAddress takes the plain name and a
// version, dlsym takes the versioned symbol. dlsym is tried second so that a library without
// cuGetProcAddress (our emulated one may be built so) still serves.
void* find_symbol(void* library, GetProcAddress get_proc_address, const char* symbol) {
  void* address = dlsym(library, symbol);
  if (!address && get_proc_address) {
    if (get_proc_address(symbol, &address, kMinDriverVersion, 0, nullptr) != cu::kSuccess) {
      address = nullptr;
    }
  }
  return address;
}

std::string fill_table(void* library, cu::DriverApi& api) {
  auto get_proc_address = reinterpret_cast<GetProcAddress>(dlsym(library, "cuGetProcAddress_v2"));
  std::string missing;
  auto resolve = [&](const char* symbol, auto& member) {
    void* address = find_symbol(library, get_proc_address, symbol);
    if (!address) missing += std::string(missing.empty() ? "" : ", ") + symbol;
    member = reinterpret_cast<std::remove_reference_t<decltype(member)>>(address);
  };
#define DSK_RESOLVE_ENTRY(member, symbol, arguments) resolve(symbol, api.member);
  DSK_DRIVER_ENTRIES(DSK_RESOLVE_ENTRY)
#undef DSK_RESOLVE_ENTRY
  return missing;
}

std::string version_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

DriverLibrary open_driver(const std::string& path) {
  const std::string name = path.empty() ? "libcuda.so.1" : path;
  DriverLibrary found;
  void* library = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!library) {
    const char* error = dlerror();
    found.reason = "no CUDA driver: " + std::string(error ? error : name + " not found");
    return found;
  }
  auto api = std::make_unique<cu::DriverApi>();
  const std::string missing = fill_table(library, *api);
  if (api->driver_get_version) api->driver_get_version(&found.version);
  if (found.version != 0 && found.version < kMinDriverVersion) {
    found.reason = name + " is the driver of CUDA " + version_text(found.version) +
                   "; this build's kernels need CUDA " + version_text(kMinDriverVersion) +
                   " (R580) or newer";
  } else if (!missing.empty()) {
    found.reason = name + " lacks " + missing;
  } else if (cu::Result result = api->init(0); result != cu::kSuccess) {
    found.reason = name + ": cuInit failed with error " + std::to_string(result);
  } else {
    found.reason = name + ", CUDA " + version_text(found.version);
    found.api = api.release();  // lives as long as the process, like the library itself
  }
  return found;
}

}  // namespace

const DriverLibrary& load_driver(const std::string& path) {
  static std::mutex mutex;
  static std::map<std::string, DriverLibrary> loaded;
  std::lock_guard<std::mutex> lock(mutex);
  auto entry = loaded.find(path);
  if (entry == loaded.end()) entry = loaded.emplace(path, open_driver(path)).first;
  return entry->second;
}

}  // namespace dsk::device
