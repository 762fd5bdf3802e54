// The public face of System.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <utility>

#include "emu/check/global.hpp"
#include "emu/check/race.hpp"
#include "emu/launch.hpp"
#include "emu/memory.hpp"
#include "emu/seeds.hpp"
#include "emu/system_impl.hpp"

namespace dsk::emu {
namespace {

constexpr u64 kWorkspaceBytes = 256;  // cooperative groups use the first 8

}  // namespace

System& System::instance() {
  static System system;
  return system;
}

System::System() : impl_(std::make_unique<Impl>()) {
  const char* wish = std::getenv("DSK_EMU_THREADS");
  const long n = wish != nullptr ? std::strtol(wish, nullptr, 10) : 0;
  impl_->threads = n > 0 ? static_cast<u32>(n) : std::max(1u, std::thread::hardware_concurrency());
  set_device_count(1);
}
System::~System() = default;

u32 System::device_count() const {
  const std::lock_guard lock(impl_->mutex);
  return static_cast<u32>(impl_->devices.size());
}
void System::set_device_count(u32 n) {
  const std::lock_guard lock(impl_->mutex);
  if (n > kMaxDevices) throw Error("at most 64 virtual devices, got " + std::to_string(n));
  while (impl_->devices.size() < n) {
    impl_->streams[impl_->devices.size()].device = static_cast<u32>(impl_->devices.size());
    impl_->devices.emplace_back();
  }
}
DeviceProperties System::properties(u32 device) const {
  const std::lock_guard lock(impl_->mutex);
  return impl_->device(device);
}
void System::set_properties(u32 device, const DeviceProperties& p) {
  const std::lock_guard lock(impl_->mutex);
  impl_->device(device) = p;
}
void System::set_threads(u32 n) {
  const std::lock_guard lock(impl_->mutex);
  impl_->threads = std::max(1u, n);
}
void System::set_printer(std::function<void(const std::string&)> print) {
  const std::lock_guard lock(impl_->mutex);
  impl_->print = std::move(print);
}

u64 System::allocate(u32 device, u64 bytes, const std::string& name) {
  properties(device);
  const u64 base = AddressSpace::instance().allocate(bytes, static_cast<i32>(device), name);
  check::GlobalMemory::instance().allocated(base, bytes);
  return base;
}
void System::release(u64 address) {
  AddressSpace::instance().release(address);
  check::GlobalMemory::instance().forget(address, 1);
  const std::lock_guard lock(impl_->mutex);
  if (impl_->empty()) AddressSpace::instance().collect();
}
std::pair<u64, u64> System::symbol(u32 device, const std::shared_ptr<const Module>& m,
                                   const std::string& name) {
  const std::lock_guard lock(impl_->mutex);
  const auto& addresses = impl_->symbol_addresses(m, device);
  for (std::size_t k = 0; k < addresses.size(); ++k) {
    if (m->symbols()[k]->name == name) return {addresses[k], m->symbols()[k]->bytes()};
  }
  throw Error("no global variable '" + name + "' in " + m->name());
}

void System::set_launch_hook(std::function<void(Grid&)> hook) {
  const std::lock_guard lock(impl_->mutex);
  if (hook && impl_->launch_hook) throw Error("profiling: another profiler is on already");
  impl_->launch_hook = std::move(hook);
}

StreamId System::create_stream(u32 device) {
  const std::lock_guard lock(impl_->mutex);
  impl_->device(device);
  const StreamId id = impl_->next_stream++;
  impl_->streams[id].device = device;
  return id;
}
void System::destroy_stream(StreamId s) {
  const std::lock_guard lock(impl_->mutex);
  if (s < kMaxDevices) throw Error("a default stream cannot be destroyed");
  impl_->stream(s).destroyed = true;
}
StreamId System::default_stream(u32 device) {
  properties(device);
  return device;
}

u64 System::launch(StreamId s, std::shared_ptr<const Module> m, const std::string& kernel,
                   const LaunchConfig& config, const void* params, std::size_t param_bytes) {
  const u32 seeds = config.seed == 0 ? seeds_wanted() : 0;
  if (seeds == 0) return launch_once(s, std::move(m), kernel, config, params, param_bytes);
  return launch_over_seeds(*this, s, m, kernel, config, params, param_bytes, seeds);
}

u64 System::launch_once(StreamId s, std::shared_ptr<const Module> m, const std::string& kernel,
                        const LaunchConfig& config, const void* params, std::size_t param_bytes) {
  const Program& program = m->kernel(kernel);
  const std::lock_guard lock(impl_->mutex);
  Stream& stream = impl_->stream(s);
  const DeviceProperties& device = impl_->devices[stream.device];
  check_launch(program, config, param_bytes, device);
  auto grid = std::make_shared<Grid>();
  grid->id = impl_->next_grid++;
  grid->device = stream.device;
  grid->stream = s;
  grid->program = &program;
  grid->config = config;
  grid->num_sms = device.num_sms;
  grid->param_storage.reset(new u8[program.param_bytes + 256]);
  const u64 raw = reinterpret_cast<u64>(grid->param_storage.get());
  grid->params = reinterpret_cast<u8*>((raw + 127) / 128 * 128);
  if (param_bytes != 0) std::memcpy(grid->params, params, param_bytes);
  grid->symbol_addresses = impl_->symbol_addresses(m, stream.device);
  if (program.uses_grid_workspace) {
    grid->workspace = AddressSpace::instance().allocate(
        kWorkspaceBytes, static_cast<i32>(stream.device), "the grid's workspace");
    std::memset(reinterpret_cast<void*>(grid->workspace), 0, kWorkspaceBytes);
    check::GlobalMemory::instance().written_by_host(grid->workspace, kWorkspaceBytes);
  }
  grid->module = std::move(m);
  if (impl_->launch_hook) impl_->launch_hook(*grid);
  if (grid->config.check)
    grid->config.observers.push_back(check::make_race_checker());
  else
    check::GlobalMemory::instance().trust_contents();
  const u64 cluster = config.cluster.count();
  const u64 clusters =
      grid->config.only.empty() ? config.grid.count() / cluster : grid->config.only.size();
  grid->ctas_total = static_cast<u32>(clusters * cluster);
  grid->clusters_total = static_cast<u32>(clusters);
  grid->stats.kernel = kernel;
  grid->print = impl_->print;
  Item item;
  item.kind = Item::Kind::Kernel;
  item.grid = grid;
  grid->order.number = ++stream.launched;
  impl_->queue(stream, std::move(item));
  return grid->id;
}

void System::enqueue(StreamId s, std::function<void()> host_work) {
  const std::lock_guard lock(impl_->mutex);
  Item item;
  item.work = std::move(host_work);
  impl_->queue(impl_->stream(s), std::move(item));
}
void System::written_by_host(u64 address, u64 bytes) {
  check::GlobalMemory::instance().written_by_host(address, bytes);
}
EventId System::create_event() {
  const std::lock_guard lock(impl_->mutex);
  impl_->events[impl_->next_event];
  return impl_->next_event++;
}
void System::record(StreamId s, EventId e) {
  const std::lock_guard lock(impl_->mutex);
  Item item;
  item.kind = Item::Kind::Record;
  item.event = e;
  item.ticket = ++impl_->events[e].recorded;
  impl_->queue(impl_->stream(s), std::move(item));
}
void System::wait(StreamId s, EventId e) {
  const std::lock_guard lock(impl_->mutex);
  Item item;
  item.kind = Item::Kind::Wait;
  item.event = e;
  item.ticket = impl_->events[e].recorded;  // never recorded: nothing to wait for, as in CUDA
  impl_->queue(impl_->stream(s), std::move(item));
}
bool System::query(EventId e) {
  u32 slices = 0;
  impl_->drive([&] {
    const Event& event = impl_->events[e];
    return event.reached >= event.recorded || slices++ > 2 || impl_->empty();
  });
  const std::lock_guard lock(impl_->mutex);
  const Event& event = impl_->events[e];
  if (event.reached < event.recorded) return false;
  impl_->host_knows.join(event.known);
  return true;
}

namespace {
bool is_deadlock(const std::exception_ptr& error) {
  try {
    std::rethrow_exception(error);
  } catch (const DeadlockError&) {
    return true;
  } catch (...) {
    return false;
  }
}
}  // namespace

void System::synchronize(StreamId s) {
  impl_->drive([&] {
    const Stream& stream = impl_->stream(s);
    return stream.error != nullptr || (stream.items.empty() && !stream.busy);
  });
  const std::lock_guard lock(impl_->mutex);
  Stream& stream = impl_->stream(s);
  impl_->host_knows.join(stream.known);
  impl_->forget_the_past();
  if (stream.error) std::rethrow_exception(std::exchange(stream.error, nullptr));
}

void System::synchronize() {
  impl_->drive([&] { return impl_->empty(); });
  const std::lock_guard lock(impl_->mutex);
  impl_->host_knows.join(impl_->all_over);
  impl_->forget_the_past();
  // A kernel that failed leaves those that wait for it in a deadlock: the cause goes first.
  std::exception_ptr cause;
  for (auto& [id, stream] : impl_->streams) {
    const std::exception_ptr error = std::exchange(stream.error, nullptr);
    if (error && (!cause || (is_deadlock(cause) && !is_deadlock(error)))) cause = error;
  }
  if (cause) std::rethrow_exception(cause);
}

bool System::idle(StreamId s) {
  u32 slices = 0;
  impl_->drive([&] {
    const Stream& stream = impl_->stream(s);
    return stream.items.empty() || slices++ > 2;
  });
  const std::lock_guard lock(impl_->mutex);
  const Stream& stream = impl_->stream(s);
  if (stream.items.empty()) impl_->host_knows.join(stream.known);
  return stream.items.empty();
}

LaunchStats System::stats(u64 launch) {
  const std::lock_guard lock(impl_->mutex);
  const auto it = impl_->finished.find(launch);
  if (it == impl_->finished.end()) {
    throw Error("no statistics of launch " + std::to_string(launch));
  }
  return it->second;
}

}  // namespace dsk::emu
