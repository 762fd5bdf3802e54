#include "cpu/threads.hpp"

#include <pthread.h>
#include <sched.h>

#include <atomic>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace dsk::cpu {
namespace {

// About 50 us: long enough to bridge the gap between two ops of a model, short enough that an
// idle process costs nothing.
constexpr int kSpins = 1 << 11;

inline void relax() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

// One parallel region at a time. `gate_` holds the region's free seats (upper half) and the workers
// that sit in it (lower half). A worker takes a seat if one is left; the caller works too, and
// removes the empty seats when no task is left. So it waits only for workers that are in the middle
// of a task, never for one that the system has not even started: on a busy machine that takes
// milliseconds, and the caller finishes alone meanwhile.
class Pool {
 public:
  ~Pool() {
    stopping_.store(true);
    epoch_.fetch_add(1);
    epoch_.notify_all();
    for (std::thread& worker : workers_) worker.join();
  }

  // False when the pool is busy: the caller then runs its own tasks.
  bool try_run(int64_t tasks, int threads, TaskBody body, void* context) {
    std::unique_lock<std::mutex> lock(region_, std::try_to_lock);
    if (!lock.owns_lock()) return false;
    while (static_cast<int>(workers_.size()) < threads - 1) {
      workers_.emplace_back([this, seen = epoch_.load()] { work(seen); });
    }
    body_ = body;
    context_ = context;
    tasks_ = tasks;
    next_task_.store(0, std::memory_order_relaxed);
    gate_.store(static_cast<uint32_t>(threads - 1) * kSeat, std::memory_order_release);
    epoch_.fetch_add(1);
    epoch_.notify_all();
    drain(0);
    gate_.fetch_and(kSeat - 1, std::memory_order_relaxed);  // no more seats
    for (int spins = 0; uint32_t left = gate_.load(std::memory_order_acquire); ++spins) {
      if (spins < kSpins) {
        relax();
      } else {
        gate_.wait(left, std::memory_order_acquire);
      }
    }
    return true;
  }

  int size() const { return static_cast<int>(workers_.size()); }

 private:
  static constexpr uint32_t kSeat = 1 << 16;
  static_assert(kMaxThreads < static_cast<int>(kSeat));

  void drain(int thread) {
    for (;;) {
      const int64_t task = next_task_.fetch_add(1, std::memory_order_relaxed);
      if (task >= tasks_) return;
      body_(context_, task, thread);
    }
  }

  void work(uint32_t seen);
  int sit_down();
  void stand_up();

  std::vector<std::thread> workers_;
  std::mutex region_;
  // The region, written while gate_ is 0 and read by those who sit in it.
  TaskBody body_ = nullptr;
  void* context_ = nullptr;
  int64_t tasks_ = 0;
  // Each on its own cache line: they are written by different threads at different times.
  alignas(64) std::atomic<uint32_t> epoch_{0};
  alignas(64) std::atomic<int64_t> next_task_{0};
  alignas(64) std::atomic<uint32_t> gate_{0};
  alignas(64) std::atomic<bool> stopping_{false};
};

thread_local bool inside_task = false;

// The number of the seat, from 1; 0: none is free.
int Pool::sit_down() {
  uint32_t gate = gate_.load(std::memory_order_relaxed);
  while (gate >= kSeat) {
    if (gate_.compare_exchange_weak(gate, gate - kSeat + 1, std::memory_order_acquire)) {
      return static_cast<int>(gate / kSeat);
    }
  }
  return 0;
}

void Pool::stand_up() {
  if (gate_.fetch_sub(1, std::memory_order_release) == 1) gate_.notify_one();
}

void Pool::work(uint32_t seen) {
  inside_task = true;
  for (;;) {
    uint32_t epoch;
    for (int spins = 0; (epoch = epoch_.load(std::memory_order_acquire)) == seen; ++spins) {
      if (spins < kSpins) {
        relax();
      } else {
        epoch_.wait(seen, std::memory_order_acquire);
      }
    }
    seen = epoch;  // regions that came and went meanwhile are no longer of interest
    if (stopping_.load()) return;
    if (const int thread = sit_down()) {
      drain(thread);
      stand_up();
    }
  }
}

// A forked child inherits no worker: it gets a new pool, and the parent's is deliberately leaked
// there (joining threads that do not exist would hang).
std::unique_ptr<Pool> the_pool;

Pool& pool() {
  static const bool registered = [] {
    the_pool = std::make_unique<Pool>();
    pthread_atfork(nullptr, nullptr, [] {
      (void)the_pool.release();
      the_pool = std::make_unique<Pool>();
    });
    return true;
  }();
  (void)registered;
  return *the_pool;
}

struct Buffer {
  void* data = nullptr;
  uint64_t bytes = 0;
  ~Buffer() { std::free(data); }
};

}  // namespace

void run_tasks(int64_t tasks, int threads, TaskBody body, void* context) {
  if (threads > tasks) threads = static_cast<int>(tasks);
  if (threads > 1 && !inside_task) {
    inside_task = true;
    const bool ran = pool().try_run(tasks, threads, body, context);
    inside_task = false;
    if (ran) return;
  }
  for (int64_t task = 0; task < tasks; ++task) body(context, task, 0);
}

int resolve_threads(int threads) {
  if (threads <= 0) {
    cpu_set_t set;
    CPU_ZERO(&set);
    threads = sched_getaffinity(0, sizeof(set), &set) == 0
                  ? CPU_COUNT(&set)
                  : static_cast<int>(std::thread::hardware_concurrency());
  }
  return threads < 1 ? 1 : threads > kMaxThreads ? kMaxThreads : threads;
}

int pool_size() { return the_pool ? the_pool->size() : 0; }

void* scratch(int slot, uint64_t bytes) {
  thread_local Buffer buffers[kScratchSlots];
  Buffer& buffer = buffers[slot];
  if (buffer.bytes < bytes) {
    std::free(buffer.data);
    buffer.bytes = (bytes + bytes / 4 + 4095) / 4096 * 4096;
    buffer.data = std::aligned_alloc(4096, buffer.bytes);
    if (buffer.data == nullptr) {
      buffer.bytes = 0;
      throw std::bad_alloc();
    }
  }
  return buffer.data;
}

}  // namespace dsk::cpu
