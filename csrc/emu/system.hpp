// The public face of the emulator for host code: virtual GPUs, modules, streams, launches.
//
// One process holds one System with N virtual GPUs that share an address space (peer access is
// always on, host memory may be lent). Work queued on streams runs when somebody waits for it:
// synchronize(), or query(), which runs a slice. Waiting threads do the work themselves, together
// with helper threads that live only as long as the wait; there are no background threads.
#pragma once

#include <atomic>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "emu/error.hpp"
#include "emu/machine.hpp"
#include "emu/observer.hpp"
#include "emu/program.hpp"

namespace dsk::emu {

// A parsed and decoded PTX file; immutable, shared by devices.
class Module {
 public:
  // `name` is for reports. Throws PtxError: bad syntax, or an instruction that is not supported
  // (with its line; nothing is skipped).
  static std::shared_ptr<const Module> load(std::string_view ptx_text, const std::string& name);

  const ptx::File& file() const { return file_; }
  const std::string& name() const { return name_; }
  std::vector<std::string> kernel_names() const;
  // Throws Error, naming what there is.
  const Program& kernel(const std::string& name) const;
  // Global and constant variables, in the order of ConstantReg::symbol.
  const std::vector<const ptx::Variable*>& symbols() const { return symbols_; }

 private:
  friend class Linker;
  std::string name_;
  ptx::File file_;
  std::vector<const ptx::Variable*> symbols_;
  std::map<std::string, std::unique_ptr<Program>> programs_;
};

enum class Numerics : u8 {
  Exact,  // tensor cores as on Hopper: aligned, truncated sums
  Fast,   // tensor cores in plain fp32
  Worst,  // as Exact, and approximate functions are off by the largest documented error
};

// Which formal findings are errors: none, those about order (the ones that kernels have no reason
// for), or uninitialized reads too. "formal-proxy-order" never is.
enum class Strict : u8 { No, Order, All };

struct LaunchConfig {
  Dim3 grid, block, cluster;
  u32 dynamic_shared = 0;
  bool programmatic = false;  // may start before its predecessor ends (griddepcontrol)
  bool cooperative = false;
  // seed 0: the fixed schedule (oldest first, asynchronous work as late as possible), CTAs spread
  // over host threads. Any other: a random schedule that the seed reproduces, on one host thread.
  u64 seed = 0;
  bool check = true;  // hazard observers on
  Strict strict = Strict::No;
  // Warp-instructions of one cluster after which it counts as endless; 0: no limit.
  u64 max_instructions = 0;
  Numerics numerics = Numerics::Exact;
  std::vector<std::shared_ptr<Observer>> observers;
  std::vector<u32> only;  // clusters to run, by number; empty: all (profiling runs a sample)
};

struct LaunchStats {
  std::string kernel;
  u64 warp_instructions = 0;
  u64 thread_instructions = 0;
  u64 async_operations = 0, async_bytes = 0;
  u64 wgmma = 0;
  double seconds = 0;           // host time, first CTA to last
  std::vector<Hazard> hazards;  // formal findings
};

// How far each stream is known to have come: the number of its last grid that is over.
class StreamClock {
 public:
  u64 of(u64 stream) const {
    const auto it = grids_.find(stream);
    return it == grids_.end() ? 0 : it->second;
  }
  void set(u64 stream, u64 number) {
    u64& known = grids_[stream];
    known = known < number ? number : known;
  }
  void join(const StreamClock& other) {
    for (const auto& [stream, number] : other.grids_) set(stream, number);
  }
  bool covers(const StreamClock& other) const {
    for (const auto& [stream, number] : other.grids_) {
      if (of(stream) < number) return false;
    }
    return true;
  }
  void clear() { grids_.clear(); }

 private:
  std::map<u64, u64> grids_;
};

// A grid's place in the order that streams, events and the host's waiting give. With programmatic
// dependent launch only those who passed griddepcontrol.wait know that the predecessor is over.
struct GridOrder {
  u64 number = 0;  // in its stream, from 1
  StreamClock before, after_wait;
};

// A grid under way.
struct Grid {
  u64 id = 0;
  GridOrder order;
  u32 device = 0;
  u64 stream = 0;
  std::shared_ptr<const Module> module;
  const Program* program = nullptr;
  LaunchConfig config;
  std::unique_ptr<u8[]> param_storage;
  u8* params = nullptr;
  std::vector<u64> symbol_addresses;
  u64 workspace = 0;  // of grid-wide barriers; owned
  u32 num_sms = 132;
  u32 clusters_total = 0, clusters_started = 0, clusters_done = 0;
  u32 ctas_launched_dependents = 0, ctas_total = 0;
  std::atomic<bool> predecessor_done{true};  // griddepcontrol.wait passes
  bool over = false;                         // every cluster is done
  std::mutex mutex;                          // stats, hazards
  LaunchStats stats;
  std::function<void(const std::string&)> print;  // device printf
  Grid() = default;
  ~Grid();
  Grid(const Grid&) = delete;
  Grid& operator=(const Grid&) = delete;
  u32 shared_bytes() const;
};

// Properties of a virtual GPU; the defaults are an H100 SXM.
struct DeviceProperties {
  u32 num_sms = 132;
  u32 max_shared_per_block = 232448;  // 227 KiB
  u32 shared_per_sm = 233472;         // 228 KiB
  u32 max_threads_per_sm = 2048;
  u32 max_blocks_per_sm = 32;
  u32 max_cluster = 16;
  double clock_ghz = 1.755;
};

using StreamId = u64;  // 0 is device 0's default stream; others come from create_stream
using EventId = u64;

class System {
 public:
  static System& instance();

  u32 device_count() const;
  void set_device_count(u32 n);  // only grows; at most 64
  DeviceProperties properties(u32 device) const;
  void set_properties(u32 device, const DeviceProperties& p);
  void set_threads(u32 n);  // host threads for waiting; default: DSK_EMU_THREADS or cores
  void set_printer(std::function<void(const std::string&)> print);  // device printf
  // Sees every launch before it is queued, and may change its configuration (not its shape).
  // Empty: none. Throws Error if there is one already.
  void set_launch_hook(std::function<void(Grid&)> hook);

  // Memory. Addresses are host addresses.
  u64 allocate(u32 device, u64 bytes, const std::string& name = "");
  void release(u64 address);
  // Address and size of a module's global variable on a device.
  std::pair<u64, u64> symbol(u32 device, const std::shared_ptr<const Module>& m,
                             const std::string& name);

  StreamId create_stream(u32 device);
  void destroy_stream(StreamId s);  // its queued work still runs
  StreamId default_stream(u32 device);

  // Queue work. `params` is the kernel's parameter block as PTX lays it out (Program::params gives
  // offsets). Returns the launch's number for stats(). Throws Error on an illegal configuration.
  u64 launch(StreamId s, std::shared_ptr<const Module> m, const std::string& kernel,
             const LaunchConfig& config, const void* params, std::size_t param_bytes);
  // The same, whatever DSK_EMU_SEEDS says.
  u64 launch_once(StreamId s, std::shared_ptr<const Module> m, const std::string& kernel,
                  const LaunchConfig& config, const void* params, std::size_t param_bytes);
  void enqueue(StreamId s, std::function<void()> host_work);  // copies, fills, callbacks
  // The host wrote device memory: its bytes are no longer uninitialized.
  void written_by_host(u64 address, u64 bytes);
  EventId create_event();
  void record(StreamId s, EventId e);
  void wait(StreamId s, EventId e);
  bool query(EventId e);

  // Run until the stream (or everything) is empty. Rethrows what a kernel of it threw; a kernel
  // that threw is gone, and so is all work queued behind it.
  void synchronize(StreamId s);
  void synchronize();
  bool idle(StreamId s);  // runs a slice first

  LaunchStats stats(u64 launch);  // of one of the last 1024 finished launches

 private:
  System();
  ~System();
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace dsk::emu
