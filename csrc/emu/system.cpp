// Streams, and the scheduler that spreads clusters over host threads.
#include "emu/system_impl.hpp"

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <thread>
#include <utility>

#include "emu/check/global.hpp"
#include "emu/launch.hpp"
#include "emu/memory.hpp"

namespace dsk::emu {
namespace {

constexpr u64 kSliceBudget = 200000;  // warp-instructions before other clusters get a chance
constexpr u64 kIdleSlices = 20000;    // slices without any change before it is a livelock
constexpr std::size_t kStatsKept = 1024;

double now() {
  using Clock = std::chrono::steady_clock;
  return std::chrono::duration<double>(Clock::now().time_since_epoch()).count();
}

void check_limit(const Cluster& cluster) {
  const u64 limit = cluster.grid->config.max_instructions;
  if (limit == 0) return;
  u64 executed = 0;
  for (const auto& cta : cluster.ctas) {
    for (const auto& w : cta->warps) executed += w->instructions;
  }
  if (executed <= limit) return;
  throw DeadlockError("endless: a cluster executed " + std::to_string(executed) +
                          " warp-instructions, the launch allows " + std::to_string(limit),
                      describe(cluster));
}

// The first CTA of a grid that has not started.
std::string first_block(const Grid& grid) {
  const Dim3 size = grid.config.cluster, dim = grid.config.grid;
  const u32 x = dim.x / size.x, y = dim.y / size.y, c = grid.clusters_started;
  return "block (" + std::to_string(c % x * size.x) + "," + std::to_string(c / x % y * size.y) +
         "," + std::to_string(c / x / y * size.z) + ")";
}

}  // namespace

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

void System::Impl::queue(Stream& s, Item item) {
  item.host_knows = host_knows;
  s.items.push_back(std::move(item));
}

// The order is what the API promises, not how early the emulator happens to start a grid.
void System::Impl::start(Stream& s, Item& item, bool predecessor_done) {
  GridOrder& order = item.grid->order;
  s.known.join(item.host_knows);
  order.after_wait = s.known;
  if (item.grid->config.programmatic && s.after_kernel) {
    order.before = s.last.before;
    order.before.join(item.host_knows);
    order.after_wait.join(s.last.after_wait);
    order.after_wait.set(item.grid->stream, order.number - 1);
  } else {
    order.before = s.known;
  }
  s.after_kernel = true;
  s.last = order;
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
  if (first.grid->ctas_launched_dependents >= first.grid->ctas_total) start(s, second, false);
}

bool System::Impl::advance(Stream& s, std::unique_lock<std::mutex>& lock) {
  bool moved = false;
  while (!s.items.empty() && !s.busy) {
    Item& item = s.items.front();
    if (item.kind == Item::Kind::Kernel) {
      if (item.started) {
        try_early_start(s);
        break;
      }
      start(s, item, true);
      moved = true;
      break;
    }
    if (item.kind == Item::Kind::Wait && events[item.event].reached < item.ticket) break;
    s.after_kernel = false;
    s.known.join(item.host_knows);
    if (item.kind == Item::Kind::Wait) {
      s.known.join(events[item.event].known);
    } else if (item.kind == Item::Kind::Record) {
      Event& e = events[item.event];
      e.reached = std::max(e.reached, item.ticket);
      e.known.join(s.known);
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
  return moved;
}

bool System::Impl::advance_streams(std::unique_lock<std::mutex>& lock) {
  bool moved = false, again = true;
  while (again) {
    again = false;
    for (auto& [id, s] : streams) again |= advance(s, lock);
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
  grid->over = true;
  // A dependent grid may be over before the one that it did not wait for.
  while (!s.items.empty() && s.items.front().grid && s.items.front().grid->over) {
    const Grid& over = *s.items.front().grid;
    s.known.join(over.order.after_wait);
    s.known.set(over.stream, over.order.number);
    all_over.join(s.known);
    s.items.pop_front();
  }
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
    s.known.set(g->stream, g->order.number);
    failed[g.get()] = true;
    std::erase(active, g);
    resident.erase(g.get());
    for (auto* queue : {&ready, &idle}) {
      std::erase_if(*queue, [&](const Task& t) { return t.grid == g; });
    }
  }
}

// When nothing runs and the host has waited for all there was, whatever comes is ordered after it.
void System::Impl::forget_the_past() {
  if (!empty()) return;
  AddressSpace::instance().collect();
  if (!host_knows.covers(all_over)) return;
  check::GlobalMemory::instance().forget_accesses();
  host_knows.clear();
  all_over.clear();
  for (auto& [id, s] : streams) s.known.clear(), s.last = {}, s.after_kernel = false;
  for (auto& [id, e] : events) e.known.clear();
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
    const u32 next = grid->clusters_started++;
    const auto& only = grid->config.only;
    task->cluster = make_cluster(*grid, only.empty() ? next : only[next]);
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
    const auto draw = [&] {
      rng = rng * 6364136223846793005ull + active.front()->config.seed * 2 + 1;
      return rng >> 33;
    };
    // Clusters are there before they first run: short ones must not always run in their order.
    for (Task fresh; draw() % 4 != 0 && pick_new(&fresh);) ready.push_back(std::move(fresh));
    const std::size_t n = ready.size() + idle.size();
    if (n != 0) {
      const std::size_t at = draw() % n;
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
    if (slice != Slice::Done) check_limit(*task.cluster);
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
                  " clusters of '" + grid->program->name + "', the first with " +
                  first_block(*grid) + ", cannot start because the device is full: it holds " +
                  std::to_string(resident_clusters(*grid, devices[grid->device])) +
                  " at once, and CTAs that are waited for must be co-resident";
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

}  // namespace dsk::emu
