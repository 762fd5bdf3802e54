// The scheduler's state, shared by system.cpp (running) and system_api.cpp (the public face).
#pragma once

#include <condition_variable>
#include <deque>
#include <exception>
#include <mutex>

#include "emu/system.hpp"

namespace dsk::emu {

inline constexpr u32 kMaxDevices = 64;

struct Item {
  enum class Kind { Kernel, Host, Record, Wait } kind = Kind::Host;
  std::shared_ptr<Grid> grid;
  bool started = false;
  std::function<void()> work;
  EventId event = 0;
  u64 ticket = 0;          // Wait: the record it waits for
  StreamClock host_knows;  // at the call that queued it
};

struct Stream {
  u32 device = 0;
  std::deque<Item> items;
  std::exception_ptr error;
  bool busy = false;  // a host item is running
  bool destroyed = false;
  u64 launched = 0;   // grids
  StreamClock known;  // to what comes next in the stream
  // The kernel that the next one may be programmatically dependent on; none after other work.
  bool after_kernel = false;
  GridOrder last;
};

struct Event {
  u64 recorded = 0;  // tickets given by record()
  u64 reached = 0;   // tickets that the streams have come past
  StreamClock known;
};

struct Task {
  std::shared_ptr<Grid> grid;
  std::unique_ptr<Cluster> cluster;
};

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
  std::function<void(Grid&)> launch_hook;
  std::map<u64, LaunchStats> finished;

  std::vector<std::shared_ptr<Grid>> active;
  std::map<const Grid*, u32> resident;
  std::map<const Grid*, bool> failed;
  std::deque<Task> ready, idle;
  u32 running = 0;
  u64 idle_streak = 0;
  u64 picks = 0;
  u64 rng = 1;
  StreamClock host_knows;  // by waiting; all host threads count as one
  StreamClock all_over;    // grids that are over, known to the host or not

  Stream& stream(StreamId id) {
    const auto it = streams.find(id);
    if (it == streams.end()) throw Error("no stream " + std::to_string(id));
    return it->second;
  }

  DeviceProperties& device(u32 n) {
    if (n >= devices.size()) throw Error("no device " + std::to_string(n));
    return devices[n];
  }

  const std::vector<u64>& symbol_addresses(const std::shared_ptr<const Module>& m, u32 device);

  // --- streams
  bool advance_streams(std::unique_lock<std::mutex>& lock);
  bool advance(Stream& s, std::unique_lock<std::mutex>& lock);
  void queue(Stream& s, Item item);
  void start(Stream& s, Item& item, bool predecessor_done);
  void forget_the_past();
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

}  // namespace dsk::emu
