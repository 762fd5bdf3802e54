#include "device/emulated_driver.hpp"

#include <chrono>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "emu/memory.hpp"
#include "emu/num/tensor_map.hpp"
#include "emu/system.hpp"

namespace dsk::device {
namespace {

using Clock = std::chrono::steady_clock;

struct LoadedKernel {
  std::shared_ptr<const emu::Module> module;
  std::string name;
};

struct LoadedLibrary {
  std::shared_ptr<const emu::Module> module;
  std::vector<std::unique_ptr<LoadedKernel>> kernels;  // handles stay valid until unload
};

struct EmulatedEvent {
  emu::EventId id = 0;
  std::shared_ptr<Clock::time_point> when = std::make_shared<Clock::time_point>();
};

thread_local std::exception_ptr last_cause;
thread_local std::string last_text;
thread_local int current_device = 0;

emu::System& system() { return emu::System::instance(); }

// Handles are small integers or pointers dressed as the driver's opaque pointers. Stream 0 is the
// current device's default stream, as in the driver.
emu::StreamId stream_id(cu::Stream stream) {
  if (!stream) return system().default_stream(unsigned(current_device));
  return reinterpret_cast<emu::StreamId>(stream);
}

// Every entry runs through here: an exception becomes an error number, its text and cause are kept.
template <typename Body>
cu::Result guarded(Body body) {
  try {
    return body();
  } catch (const emu::PtxError& error) {
    last_text = error.what();
    last_cause = std::current_exception();
    return cu::kInvalidImage;
  } catch (const emu::Error& error) {
    last_text = error.what();
    last_cause = std::current_exception();
    return cu::kLaunchFailed;
  } catch (const std::bad_alloc&) {
    last_text = "out of host memory";
    last_cause = std::current_exception();
    return cu::kOutOfMemory;
  } catch (const std::exception& error) {
    last_text = error.what();
    last_cause = std::current_exception();
    return cu::kInvalidValue;
  }
}

cu::Result refuse(cu::Result result, const std::string& text) {
  last_text = text;
  last_cause = nullptr;
  return result;
}

cu::Result init(unsigned) { return cu::kSuccess; }

cu::Result driver_get_version(int* version) {
  *version = 13000;
  return cu::kSuccess;
}

cu::Result device_get_count(int* count) {
  *count = int(system().device_count());
  return cu::kSuccess;
}

cu::Result device_get(cu::Device* device, int ordinal) {
  if (ordinal < 0 || unsigned(ordinal) >= system().device_count()) {
    return refuse(cu::kInvalidDevice, "no emulated device " + std::to_string(ordinal));
  }
  *device = ordinal;
  return cu::kSuccess;
}

cu::Result device_get_name(char* name, int length, cu::Device) {
  if (length <= 0) return refuse(cu::kInvalidValue, "name buffer of no length");
  std::strncpy(name, kEmulatedDeviceName, size_t(length));
  name[length - 1] = '\0';
  return cu::kSuccess;
}

cu::Result device_get_attribute(int* value, cu::DeviceAttribute attribute, cu::Device device) {
  const emu::DeviceProperties properties = system().properties(unsigned(device));
  switch (attribute) {
    case cu::kMaxThreadsPerBlock:
      *value = 1024;
      return cu::kSuccess;
    case cu::kMultiprocessorCount:
      *value = int(properties.num_sms);
      return cu::kSuccess;
    case cu::kComputeCapabilityMajor:
      *value = 9;
      return cu::kSuccess;
    case cu::kComputeCapabilityMinor:
      *value = 0;
      return cu::kSuccess;
    case cu::kMaxSharedMemoryPerBlockOptin:
      *value = int(properties.max_shared_per_block);
      return cu::kSuccess;
  }
  return refuse(cu::kInvalidValue, "device attribute " + std::to_string(int(attribute)));
}

// A context is its device's ordinal + 1, so that null stays "no context".
cu::Result primary_ctx_retain(cu::Context* context, cu::Device device) {
  *context = reinterpret_cast<cu::Context>(intptr_t(device) + 1);
  return cu::kSuccess;
}
cu::Result primary_ctx_release(cu::Device) { return cu::kSuccess; }
cu::Result ctx_set_current(cu::Context context) {
  if (!context) return refuse(cu::kInvalidContext, "no context");
  current_device = int(reinterpret_cast<intptr_t>(context)) - 1;
  return cu::kSuccess;
}

cu::Result library_load_data(cu::Library* library, const void* code, int*, void**, unsigned, int*,
                             void**, unsigned) {
  return guarded([&] {
    const char* text = static_cast<const char*>(code);
    if (std::memcmp(text,
                    "\x7f"
                    "ELF",
                    4) == 0) {
      return refuse(cu::kInvalidImage, "the emulator loads PTX text, got a cubin");
    }
    auto loaded = std::make_unique<LoadedLibrary>();
    loaded->module = emu::Module::load(text, "module");
    *library = reinterpret_cast<cu::Library>(loaded.release());
    return cu::kSuccess;
  });
}

cu::Result library_unload(cu::Library library) {
  delete reinterpret_cast<LoadedLibrary*>(library);
  return cu::kSuccess;
}

cu::Result library_get_kernel(cu::Kernel* kernel, cu::Library library, const char* name) {
  return guarded([&] {
    auto* loaded = reinterpret_cast<LoadedLibrary*>(library);
    loaded->module->kernel(name);  // throws, naming what there is
    loaded->kernels.push_back(std::make_unique<LoadedKernel>(LoadedKernel{loaded->module, name}));
    *kernel = reinterpret_cast<cu::Kernel>(loaded->kernels.back().get());
    return cu::kSuccess;
  });
}

// The emulator has no opt-in: the launch itself checks what a device allows.
cu::Result kernel_set_attribute(cu::FunctionAttribute, int, cu::Kernel, cu::Device) {
  return cu::kSuccess;
}

void apply_attributes(const cu::LaunchConfig& config, emu::LaunchConfig& launch) {
  for (unsigned i = 0; i < config.num_attributes; ++i) {
    const cu::LaunchAttribute& attribute = config.attributes[i];
    if (attribute.id == cu::kAttributeClusterDimension) {
      const auto& dim = attribute.value.cluster_dim;
      launch.cluster = {dim.x, dim.y, dim.z};
    } else if (attribute.id == cu::kAttributeProgrammaticStreamSerialization) {
      launch.programmatic = attribute.value.programmatic_stream_serialization != 0;
    }
  }
}

// Seed, checks and numerics come from the environment of the process so that a launcher needs to
// know nothing of the emulator; Python's registry of variables documents them.
std::string environment(const char* name) {
  const char* text = std::getenv(name);
  return text ? text : "";
}

void apply_environment(emu::LaunchConfig& launch) {
  launch.seed = std::strtoull(environment("DSK_EMU_SEED").c_str(), nullptr, 10);
  const std::string check = environment("DSK_EMU_CHECK");
  if (check != "" && check != "0" && check != "1" && check != "order" && check != "strict") {
    throw emu::Error("DSK_EMU_CHECK: expected 0, 1, order or strict, got " + check);
  }
  launch.check = check != "0";
  launch.strict = check == "strict"  ? emu::Strict::All
                  : check == "order" ? emu::Strict::Order
                                     : emu::Strict::No;
  const std::string numerics = environment("DSK_EMU_NUMERICS");
  if (numerics == "fast") {
    launch.numerics = emu::Numerics::Fast;
  } else if (numerics == "worst") {
    launch.numerics = emu::Numerics::Worst;
  } else if (numerics != "" && numerics != "exact") {
    throw emu::Error("DSK_EMU_NUMERICS: expected exact, fast or worst, got " + numerics);
  }
}

cu::Result launch_kernel_ex(const cu::LaunchConfig* config, cu::Function function, void** params,
                            void**) {
  return guarded([&] {
    const auto& kernel = *reinterpret_cast<const LoadedKernel*>(function);
    const emu::Program& program = kernel.module->kernel(kernel.name);
    std::vector<uint8_t> block(program.param_bytes);
    for (size_t i = 0; i < program.params.size(); ++i) {
      std::memcpy(block.data() + program.params[i].offset, params[i], program.params[i].size);
    }
    emu::LaunchConfig launch;
    launch.grid = {config->grid_x, config->grid_y, config->grid_z};
    launch.block = {config->block_x, config->block_y, config->block_z};
    launch.dynamic_shared = config->shared_bytes;
    apply_environment(launch);
    apply_attributes(*config, launch);
    system().launch(stream_id(config->stream), kernel.module, kernel.name, launch, block.data(),
                    block.size());
    return cu::kSuccess;
  });
}

cu::Result mem_alloc(cu::DevicePtr* address, size_t bytes) {
  return guarded([&] {
    *address = system().allocate(unsigned(current_device), bytes);
    return cu::kSuccess;
  });
}

cu::Result mem_free(cu::DevicePtr address) {
  return guarded([&] {
    system().release(address);
    return cu::kSuccess;
  });
}

// Registered host memory is memory that kernels may touch. Sizes are remembered because the
// driver's call to end it names the address only; the same address may be registered again by
// another call that overlaps in time, so registrations of one address are a stack.
std::mutex registered_mutex;
std::map<void*, std::vector<size_t>> registered;

cu::Result mem_host_register(void* address, size_t bytes, unsigned flags) {
  return guarded([&] {
    if (!address) return refuse(cu::kInvalidValue, "a kernel was given a null pointer to memory");
    const bool read_only = (flags & cu::kHostRegisterReadOnly) != 0;
    emu::AddressSpace::instance().lend(reinterpret_cast<uint64_t>(address), bytes, read_only,
                                       "host memory");
    std::lock_guard<std::mutex> lock(registered_mutex);
    registered[address].push_back(bytes);
    return cu::kSuccess;
  });
}

cu::Result mem_host_unregister(void* address) {
  return guarded([&] {
    size_t bytes = 0;
    {
      std::lock_guard<std::mutex> lock(registered_mutex);
      auto entry = registered.find(address);
      if (entry == registered.end()) {
        return refuse(cu::kInvalidValue, "this host memory is not registered");
      }
      bytes = entry->second.back();
      entry->second.pop_back();
      if (entry->second.empty()) registered.erase(entry);
    }
    emu::AddressSpace::instance().take_back(reinterpret_cast<uint64_t>(address), bytes);
    return cu::kSuccess;
  });
}

template <typename Work>
cu::Result enqueue(cu::Stream stream, Work work) {
  return guarded([&] {
    system().enqueue(stream_id(stream), work);
    return cu::kSuccess;
  });
}

cu::Result memcpy_to_device(cu::DevicePtr to, const void* from, size_t bytes, cu::Stream stream) {
  // Pageable host memory is staged at the call, as the driver does: the caller may reuse it.
  auto staged = std::make_shared<std::vector<uint8_t>>(static_cast<const uint8_t*>(from),
                                                       static_cast<const uint8_t*>(from) + bytes);
  return enqueue(stream, [=] {
    std::memcpy(reinterpret_cast<void*>(to), staged->data(), bytes);
    system().written_by_host(to, bytes);
  });
}

cu::Result memcpy_to_host(void* to, cu::DevicePtr from, size_t bytes, cu::Stream stream) {
  return enqueue(stream, [=] { std::memcpy(to, reinterpret_cast<const void*>(from), bytes); });
}

cu::Result memset_d8(cu::DevicePtr to, uint8_t value, size_t count, cu::Stream stream) {
  return enqueue(stream, [=] {
    std::memset(reinterpret_cast<void*>(to), value, count);
    system().written_by_host(to, count);
  });
}

cu::Result stream_create(cu::Stream* stream, unsigned) {
  return guarded([&] {
    *stream = reinterpret_cast<cu::Stream>(system().create_stream(unsigned(current_device)));
    return cu::kSuccess;
  });
}

cu::Result stream_destroy(cu::Stream stream) {
  return guarded([&] {
    system().destroy_stream(stream_id(stream));
    return cu::kSuccess;
  });
}

cu::Result stream_synchronize(cu::Stream stream) {
  return guarded([&] {
    system().synchronize(stream_id(stream));
    return cu::kSuccess;
  });
}

EmulatedEvent& event_of(cu::Event event) { return *reinterpret_cast<EmulatedEvent*>(event); }

cu::Result stream_wait_event(cu::Stream stream, cu::Event event, unsigned) {
  return guarded([&] {
    system().wait(stream_id(stream), event_of(event).id);
    return cu::kSuccess;
  });
}

cu::Result event_create(cu::Event* event, unsigned) {
  return guarded([&] {
    auto made = std::make_unique<EmulatedEvent>();
    made->id = system().create_event();
    *event = reinterpret_cast<cu::Event>(made.release());
    return cu::kSuccess;
  });
}

cu::Result event_destroy(cu::Event event) {
  delete reinterpret_cast<EmulatedEvent*>(event);
  return cu::kSuccess;
}

cu::Result event_record(cu::Event event, cu::Stream stream) {
  return guarded([&] {
    auto when = event_of(event).when;
    system().enqueue(stream_id(stream), [when] { *when = Clock::now(); });
    system().record(stream_id(stream), event_of(event).id);
    return cu::kSuccess;
  });
}

cu::Result event_synchronize(cu::Event event) {
  return guarded([&] {
    while (!system().query(event_of(event).id)) system().synchronize();
    return cu::kSuccess;
  });
}

// Host time between the two points: how long the emulation took, not a GPU's time.
cu::Result event_elapsed_ms(float* ms, cu::Event start, cu::Event stop) {
  const auto elapsed = *event_of(stop).when - *event_of(start).when;
  *ms = std::chrono::duration<float, std::milli>(elapsed).count();
  return cu::kSuccess;
}

cu::Result tensor_map_encode_tiled(cu::TensorMap* map, cu::TensorMapDataType type, uint32_t rank,
                                   void* address, const uint64_t* dims, const uint64_t* strides,
                                   const uint32_t* box, const uint32_t* element_strides,
                                   cu::TensorMapInterleave interleave, cu::TensorMapSwizzle swizzle,
                                   cu::TensorMapL2Promotion l2, cu::TensorMapOobFill fill) {
  return guarded([&] {
    emu::num::TensorMapArgs args;
    args.type = static_cast<emu::num::TmaType>(type);
    args.rank = rank;
    args.address = reinterpret_cast<uint64_t>(address);
    for (uint32_t i = 0; i < rank && i < 5; ++i) {
      args.dims[i] = dims[i];
      args.box[i] = box[i];
      args.element_strides[i] = element_strides[i];
      if (i + 1 < rank) args.strides[i] = strides[i];
    }
    args.interleave = static_cast<emu::num::TmaInterleave>(interleave);
    args.swizzle = static_cast<emu::num::Swizzle>(swizzle);
    args.l2_promotion = static_cast<uint8_t>(l2);
    args.fill = static_cast<emu::num::TmaFill>(fill);
    const emu::num::TensorMap encoded =
        emu::num::encode_tensor_map(args);  // throws the rule broken
    std::memcpy(map, encoded.bytes.data(), sizeof(*map));
    return cu::kSuccess;
  });
}

cu::Result get_error_name(cu::Result result, const char** text) {
  switch (result) {
    case cu::kSuccess:
      *text = "CUDA_SUCCESS";
      break;
    case cu::kInvalidValue:
      *text = "CUDA_ERROR_INVALID_VALUE";
      break;
    case cu::kOutOfMemory:
      *text = "CUDA_ERROR_OUT_OF_MEMORY";
      break;
    case cu::kInvalidDevice:
      *text = "CUDA_ERROR_INVALID_DEVICE";
      break;
    case cu::kInvalidImage:
      *text = "CUDA_ERROR_INVALID_IMAGE";
      break;
    case cu::kInvalidContext:
      *text = "CUDA_ERROR_INVALID_CONTEXT";
      break;
    case cu::kLaunchFailed:
      *text = "CUDA_ERROR_LAUNCH_FAILED";
      break;
    default:
      *text = "CUDA_ERROR_UNKNOWN";
      break;
  }
  return cu::kSuccess;
}

// The text of the last failure on this thread says more than the number's standard text would.
cu::Result get_error_string(cu::Result result, const char** text) {
  *text = result == cu::kSuccess ? "no error" : last_text.c_str();
  return cu::kSuccess;
}

void rethrow_cause() {
  if (std::exception_ptr cause = std::exchange(last_cause, nullptr)) std::rethrow_exception(cause);
}

}  // namespace

const cu::DriverApi& emulated_driver() {
  static const cu::DriverApi api = [] {
    cu::DriverApi table;
#define DSK_FILL_ENTRY(member, symbol, arguments) table.member = member;
    DSK_DRIVER_ENTRIES(DSK_FILL_ENTRY)
#undef DSK_FILL_ENTRY
    table.rethrow_cause = rethrow_cause;
    return table;
  }();
  return api;
}

}  // namespace dsk::device
