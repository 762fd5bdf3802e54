// Virtual GPUs, streams, and the scheduler that spreads clusters over host threads.
#include "emu/system.hpp"

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <thread>
#include <utility>

#include "emu/check/race.hpp"
#include "emu/launch.hpp"
#include "emu/memory.hpp"

namespace dsk::emu {
namespace {

constexpr u64 kSliceBudget = 200000;  // warp-instructions before other clusters get a chance
constexpr u64 kIdleSlices = 20000;    // slices without any change before it is a livelock
constexpr std::size_t kStatsKept = 1024;
constexpr u32 kMaxDevices = 64;

double now() {
  using Clock = std::chrono::steady_clock;
  return std::chrono::duration<double>(Clock::now().time_since_epoch()).count();
}

struct Item {
  enum class Kind { Kernel, Host, Record, Wait } kind = Kind::Host;
  std::shared_ptr<Grid> grid;
  bool started = false;
  std::function<void()> work;
  EventId event = 0;
  u64 ticket = 0;  // Wait: the record it waits for
};

struct Stream {
  u32 device = 0;
  std::deque<Item> items;
  std::exception_ptr error;
  bool busy = false;  // a host item is running
  bool destroyed = false;
};

struct Event {
  u64 recorded = 0;  // tickets given by record()
  u64 reached = 0;   // tickets that the streams have come past
};

struct Task {
  std::shared_ptr<Grid> grid;
  std::unique_ptr<Cluster> cluster;
};

}  // namespace

struct System::Impl {
  std::mutex mutex;
  std::condition_variable changed;
  std::vector<DeviceProperties> devices;
  std::map<StreamId, Stream> streams;
  std::map<EventId, Event> events;
  std::map<std::pair<const Module*, u32>,
           std::pair<std::shared_ptr<const Module>, std::vector<u64>>>
      symbols;
  StreamId next_stream = kMaxDevices;  // lower numbers are the devices' default streams
  EventId next_event = 1;
  u64 next_grid = 1;
  u32 threads = 1;
  std::function<void(const std::string&)> print;
  std::map<u64, LaunchStats> finished;

  std::vector<std::shared_ptr<Grid>> active;
  std::map<const Grid*, u32> resident;
  std::map<const Grid*, bool> failed;
  std::deque<Task> ready, idle;
  u32 running = 0;
  u64 idle_streak = 0;
  u64 picks = 0;
  u64 rng = 1;

  Stream& stream(StreamId id) {
    const auto it = streams.find(id);
    if (it == streams.end()) throw Error("no stream " + std::to_string(id));
    return it->second;
  }

  const std::vector<u64>& symbol_addresses(const std::shared_ptr<const Module>& m, u32 device);

  // --- streams
  bool advance_streams(std::unique_lock<std::mutex>& lock);
  bool advance(StreamId id, Stream& s, std::unique_lock<std::mutex>& lock);
  void start(Item& item, bool predecessor_done);
  void try_early_start(Stream& s);
  void finish(const std::shared_ptr<Grid>& grid);
  void fail_grid(const std::shared_ptr<Grid>& grid, std::exception_ptr error);
  bool empty() const;

  // --- work
  bool pick(Task* task);
  bool pick_new(Task* task);
  void run(Task task, std::unique_lock<std::mutex>& lock);
  void check_livelock();
  void work(const std::function<bool()>& done);
  void drive(const std::function<bool()>& done);
};

const std::vector<u64>& System::Impl::symbol_addresses(const std::shared_ptr<const Module>& m,
                                                       u32 device) {
  auto& entry = symbols[{m.get(), device}];
  if (entry.first) return entry.second;
  entry.first = m;
  AddressSpace& space = AddressSpace::instance();
  std::map<std::string, u64> by_name;
  for (const ptx::Variable* v : m->symbols()) {
    const u64 bytes = std::max<u64>(v->bytes(), 1);
    const u64 base = space.allocate(bytes, static_cast<i32>(device), v->name);
    std::memset(reinterpret_cast<void*>(base), 0, bytes);
    if (!v->init.empty())
      std::memcpy(reinterpret_cast<void*>(base), v->init.data(), v->init.size());
    entry.second.push_back(base);
    by_name[v->name] = base;
  }
  for (std::size_t k = 0; k < m->symbols().size(); ++k) {
    for (const auto& init : m->symbols()[k]->address_inits) {
      const auto it = by_name.find(init.symbol);
      if (it == by_name.end()) {
        throw Error("initial value names unknown symbol '" + init.symbol + "'");
      }
      const u64 address = it->second + static_cast<u64>(init.addend);
      std::memcpy(reinterpret_cast<u8*>(entry.second[k]) + init.offset, &address,
                  static_cast<std::size_t>(type_size(m->symbols()[k]->type)));
    }
  }
  return entry.second;
}

void System::Impl::start(Item& item, bool predecessor_done) {
  item.started = true;
  item.grid->predecessor_done = predecessor_done;
  item.grid->stats.seconds = -now();
  active.push_back(item.grid);
  resident[item.grid.get()] = 0;
}

// Programmatic dependent launch: the next kernel may start once every CTA of this one has said so
// or ended.
void System::Impl::try_early_start(Stream& s) {
  if (s.items.size() < 2) return;
  const Item& first = s.items[0];
  Item& second = s.items[1];
  if (second.kind != Item::Kind::Kernel || second.started || !second.grid->config.programmatic) {
    return;
  }
  const std::lock_guard lock(first.grid->mutex);
  if (first.grid->ctas_launched_dependents >= first.grid->ctas_total) start(second, false);
}

bool System::Impl::advance(StreamId id, Stream& s, std::unique_lock<std::mutex>& lock) {
  bool moved = false;
  while (!s.items.empty() && !s.busy) {
    Item& item = s.items.front();
    if (item.kind == Item::Kind::Kernel) {
      if (item.started) {
        try_early_start(s);
        break;
      }
      start(item, true);
      moved = true;
      break;
    }
    if (item.kind == Item::Kind::Wait) {
      if (events[item.event].reached < item.ticket) break;
    } else if (item.kind == Item::Kind::Record) {
      Event& e = events[item.event];
      e.reached = std::max(e.reached, item.ticket);
    } else {
      const std::function<void()> work = std::move(item.work);
      s.busy = true;
      lock.unlock();
      std::exception_ptr error;
      try {
        work();
      } catch (...) {
        error = std::current_exception();
      }
      lock.lock();
      s.busy = false;
      if (error) {
        s.error = error;
        s.items.clear();
        return true;
      }
    }
    s.items.pop_front();
    moved = true;
  }
  (void)id;
  return moved;
}

bool System::Impl::advance_streams(std::unique_lock<std::mutex>& lock) {
  bool moved = false, again = true;
  while (again) {
    again = false;
    for (auto& [id, s] : streams) again |= advance(id, s, lock);
    moved |= again;
  }
  std::erase_if(streams, [](const auto& entry) {
    return entry.second.destroyed && entry.second.items.empty() && !entry.second.busy;
  });
  return moved;
}

void System::Impl::finish(const std::shared_ptr<Grid>& grid) {
  grid->stats.seconds += now();
  for (const auto& o : grid->config.observers) o->on_grid_end(*grid);
  finished[grid->id] = grid->stats;
  while (finished.size() > kStatsKept) finished.erase(finished.begin());
  std::erase(active, grid);
  resident.erase(grid.get());
  failed.erase(grid.get());
  Stream& s = stream(grid->stream);
  if (!s.items.empty() && s.items.front().grid == grid) s.items.pop_front();
  if (!s.items.empty() && s.items.front().kind == Item::Kind::Kernel && s.items.front().started) {
    s.items.front().grid->predecessor_done = true;
  }
}

// The grid's waiting clusters go; those that run on other threads go when they come back.
void System::Impl::fail_grid(const std::shared_ptr<Grid>& grid, std::exception_ptr error) {
  Stream& s = stream(grid->stream);
  if (!s.error) s.error = error;
  std::vector<std::shared_ptr<Grid>> gone;
  for (const Item& item : s.items) {
    if (item.kind == Item::Kind::Kernel && item.started) gone.push_back(item.grid);
    // Others may wait for events behind the failure: they must not wait for ever.
    if (item.kind == Item::Kind::Record) {
      events[item.event].reached = std::max(events[item.event].reached, item.ticket);
    }
  }
  s.items.clear();
  for (const auto& g : gone) {
    failed[g.get()] = true;
    std::erase(active, g);
    resident.erase(g.get());
    for (auto* queue : {&ready, &idle}) {
      std::erase_if(*queue, [&](const Task& t) { return t.grid == g; });
    }
  }
}

bool System::Impl::empty() const {
  if (running != 0) return false;
  for (const auto& [id, s] : streams) {
    if (!s.items.empty() || s.busy) return false;
  }
  return true;
}

bool System::Impl::pick_new(Task* task) {
  for (const auto& grid : active) {
    if (grid->clusters_started == grid->clusters_total) continue;
    if (resident[grid.get()] >= resident_clusters(*grid, devices[grid->device])) continue;
    ++resident[grid.get()];
    task->grid = grid;
    task->cluster = make_cluster(*grid, grid->clusters_started++);
    return true;
  }
  return false;
}

bool System::Impl::pick(Task* task) {
  const auto take = [&](std::deque<Task>& queue, std::size_t at) {
    *task = std::move(queue[at]);
    queue.erase(queue.begin() + static_cast<std::ptrdiff_t>(at));
    return true;
  };
  ++picks;
  const bool seeded = !active.empty() && active.front()->config.seed != 0;
  if (seeded) {  // any resident cluster, or a new one
    rng = rng * 6364136223846793005ull + active.front()->config.seed * 2 + 1;
    const u64 r = rng >> 33;
    if ((ready.size() + idle.size() < 2 || r % 4 == 0) && pick_new(task)) return true;
    const std::size_t n = ready.size() + idle.size();
    if (n != 0) {
      const std::size_t at = r / 4 % n;
      return at < ready.size() ? take(ready, at) : take(idle, at - ready.size());
    }
    return pick_new(task);
  }
  // Clusters that poll need the others to run; the others must not starve them for ever either.
  if (picks % 4 == 0 && !idle.empty()) return take(idle, 0);
  if (!ready.empty()) return take(ready, 0);
  if (pick_new(task)) return true;
  if (!idle.empty()) return take(idle, 0);
  return false;
}

void System::Impl::run(Task task, std::unique_lock<std::mutex>& lock) {
  ++running;
  const bool seeded = task.grid->config.seed != 0;
  const u64 budget = seeded ? 2000 : kSliceBudget;
  lock.unlock();
  Slice slice = Slice::Idle;
  std::exception_ptr error;
  try {
    slice = run_cluster(*task.cluster, budget);
    if (slice == Slice::Done) {
      for (auto& o : task.cluster->observers) o->on_cluster_end();
      account(*task.grid, *task.cluster);
    }
  } catch (...) {
    error = std::current_exception();
  }
  if (error || slice == Slice::Done) task.cluster.reset();
  lock.lock();
  --running;
  const std::shared_ptr<Grid> grid = task.grid;
  const bool gone = failed.count(grid.get()) != 0;
  if (gone) {
    task.cluster.reset();
  } else if (error) {
    fail_grid(grid, error);
  } else if (slice == Slice::Done) {
    idle_streak = 0;
    --resident[grid.get()];
    if (++grid->clusters_done == grid->clusters_total) finish(grid);
  } else if (slice == Slice::Progress) {
    idle_streak = 0;
    ready.push_back(std::move(task));
  } else {
    ++idle_streak;
    idle.push_back(std::move(task));
  }
  if (running == 0) failed.clear();  // nobody brings a cluster of a failed grid back any more
  changed.notify_all();
}

// Everything resident polls and nothing changes.
void System::Impl::check_livelock() {
  if (idle_streak < kIdleSlices + 200 * idle.size() || running != 0 || !ready.empty()) return;
  idle_streak = 0;
  std::vector<StuckWarp> warps;
  std::string headline = "livelock: every warp polls or waits, and nothing changes any more";
  for (const Task& t : idle) {
    const auto more = describe(*t.cluster);
    warps.insert(warps.end(), more.begin(), more.end());
  }
  for (const auto& grid : active) {
    if (grid->clusters_started < grid->clusters_total) {
      headline += "; " + std::to_string(grid->clusters_total - grid->clusters_started) +
                  " clusters of '" + grid->program->name +
                  "' cannot start because the device is full (CTAs that are waited for must be "
                  "co-resident)";
    }
  }
  const std::vector<std::shared_ptr<Grid>> all = active;
  const auto error = std::make_exception_ptr(DeadlockError(headline, warps));
  for (const auto& grid : all) {
    if (failed.count(grid.get()) == 0) fail_grid(grid, error);
  }
  failed.clear();
}

void System::Impl::work(const std::function<bool()>& done) {
  std::unique_lock lock(mutex);
  while (!done()) {
    advance_streams(lock);
    if (done()) break;
    Task task;
    if (pick(&task)) {
      run(std::move(task), lock);
      check_livelock();
      continue;
    }
    if (running != 0) {
      changed.wait(lock);
      continue;
    }
    if (advance_streams(lock)) continue;
    if (done()) break;
    // Nothing runs, nothing can start, and the caller still waits.
    for (auto& [id, s] : streams) {
      if (s.items.empty() || s.busy) continue;
      s.error = std::make_exception_ptr(
          Error("stream " + std::to_string(id) + " waits for an event that is never recorded"));
      s.items.clear();
    }
  }
  changed.notify_all();
}

void System::Impl::drive(const std::function<bool()>& done) {
  u32 helpers = 0;
  {
    const std::lock_guard lock(mutex);
    u64 clusters = 0;
    bool seeded = false;
    for (const auto& [id, s] : streams) {
      for (const Item& item : s.items) {
        if (item.kind != Item::Kind::Kernel) continue;
        clusters += item.grid->clusters_total;
        seeded |= item.grid->config.seed != 0;
      }
    }
    if (!seeded) helpers = static_cast<u32>(std::min<u64>(threads, clusters));
  }
  std::vector<std::thread> pool;
  for (u32 k = 1; k < helpers; ++k) pool.emplace_back([&] { work(done); });
  work(done);
  for (std::thread& t : pool) t.join();
}

// --- the public face

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
  if (device >= impl_->devices.size()) throw Error("no device " + std::to_string(device));
  return impl_->devices[device];
}
void System::set_properties(u32 device, const DeviceProperties& p) {
  const std::lock_guard lock(impl_->mutex);
  if (device >= impl_->devices.size()) throw Error("no device " + std::to_string(device));
  impl_->devices[device] = p;
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
  if (device >= device_count()) throw Error("no device " + std::to_string(device));
  return AddressSpace::instance().allocate(bytes, static_cast<i32>(device), name);
}
void System::release(u64 address) {
  AddressSpace::instance().release(address);
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

StreamId System::create_stream(u32 device) {
  const std::lock_guard lock(impl_->mutex);
  if (device >= impl_->devices.size()) throw Error("no device " + std::to_string(device));
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
  if (device >= device_count()) throw Error("no device " + std::to_string(device));
  return device;
}

u64 System::launch(StreamId s, std::shared_ptr<const Module> m, const std::string& kernel,
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
  if (config.check) grid->config.observers.push_back(check::make_race_checker());
  grid->num_sms = device.num_sms;
  grid->param_storage.reset(new u8[program.param_bytes + 256]);
  const u64 raw = reinterpret_cast<u64>(grid->param_storage.get());
  grid->params = reinterpret_cast<u8*>((raw + 127) / 128 * 128);
  if (param_bytes != 0) std::memcpy(grid->params, params, param_bytes);
  grid->symbol_addresses = impl_->symbol_addresses(m, stream.device);
  grid->module = std::move(m);
  grid->ctas_total = static_cast<u32>(config.grid.count());
  grid->clusters_total = static_cast<u32>(config.grid.count() / config.cluster.count());
  grid->stats.kernel = kernel;
  grid->print = impl_->print;
  Item item;
  item.kind = Item::Kind::Kernel;
  item.grid = grid;
  stream.items.push_back(std::move(item));
  return grid->id;
}

void System::enqueue(StreamId s, std::function<void()> host_work) {
  const std::lock_guard lock(impl_->mutex);
  Item item;
  item.work = std::move(host_work);
  impl_->stream(s).items.push_back(std::move(item));
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
  impl_->stream(s).items.push_back(std::move(item));
}
void System::wait(StreamId s, EventId e) {
  const std::lock_guard lock(impl_->mutex);
  Item item;
  item.kind = Item::Kind::Wait;
  item.event = e;
  item.ticket = impl_->events[e].recorded;  // never recorded: nothing to wait for, as in CUDA
  impl_->stream(s).items.push_back(std::move(item));
}
bool System::query(EventId e) {
  u32 slices = 0;
  impl_->drive([&] {
    const Event& event = impl_->events[e];
    return event.reached >= event.recorded || slices++ > 2 || impl_->empty();
  });
  const std::lock_guard lock(impl_->mutex);
  return impl_->events[e].reached >= impl_->events[e].recorded;
}

void System::synchronize(StreamId s) {
  impl_->drive([&] {
    const Stream& stream = impl_->stream(s);
    return stream.error != nullptr || (stream.items.empty() && !stream.busy);
  });
  const std::lock_guard lock(impl_->mutex);
  Stream& stream = impl_->stream(s);
  if (impl_->empty()) AddressSpace::instance().collect();
  if (stream.error) std::rethrow_exception(std::exchange(stream.error, nullptr));
}

void System::synchronize() {
  impl_->drive([&] { return impl_->empty(); });
  const std::lock_guard lock(impl_->mutex);
  if (impl_->empty()) AddressSpace::instance().collect();
  for (auto& [id, stream] : impl_->streams) {
    if (stream.error) std::rethrow_exception(std::exchange(stream.error, nullptr));
  }
}

bool System::idle(StreamId s) {
  u32 slices = 0;
  impl_->drive([&] {
    const Stream& stream = impl_->stream(s);
    return stream.items.empty() || slices++ > 2;
  });
  const std::lock_guard lock(impl_->mutex);
  return impl_->stream(s).items.empty();
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
