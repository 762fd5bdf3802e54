// Global memory: which host bytes belong to which emulated allocation, and bounds-checked access.
#pragma once

#include <atomic>
#include <map>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <string>
#include <vector>

#include "emu/types.hpp"

namespace dsk::emu {

struct Allocation {
  u64 base = 0;
  u64 bytes = 0;
  i32 device = -1;  // -1: host memory lent to the emulator
  bool read_only = false;
  std::string name;  // what the host called it, for reports
  u64 end() const { return base + bytes; }
};

// A few ranges that a warp touched last; valid for one generation of the registry.
struct AddressCache {
  static constexpr int kWays = 4;
  u64 generation = 0;
  u64 base[kWays] = {0, 0, 0, 0};
  u64 end[kWays] = {0, 0, 0, 0};
  u32 next = 0;

  bool hit(u64 address, u64 bytes) const {
    for (int i = 0; i < kWays; ++i) {
      if (address >= base[i] && address + bytes <= end[i]) return true;
    }
    return false;
  }
};

// All memory that kernels may touch, of every virtual GPU: one address space, as with peer access.
// Thread-safe. Freed memory stays mapped until no kernel runs, so that a use after free is a report
// and not a crash.
class AddressSpace {
 public:
  static AddressSpace& instance();

  // New memory, filled with `poison` bytes (0xff reads as NaN), aligned to 256 bytes.
  u64 allocate(u64 bytes, i32 device, const std::string& name = "");
  void release(u64 base);
  // Lends host memory [base, base+bytes) to kernels; nested and overlapping loans are counted.
  void lend(u64 base, u64 bytes, bool read_only, const std::string& name);
  void take_back(u64 base, u64 bytes);
  // Frees what was released; call only when no kernel runs.
  void collect();

  u64 generation() const { return generation_.load(std::memory_order_acquire); }
  // The range that contains [address, address+bytes), if any.
  bool find(u64 address, u64 bytes, Allocation* out) const;
  // Every range that kernels may write.
  std::vector<Allocation> writable() const;
  // Nearest allocations around an address, in words, for reports.
  std::string describe(u64 address) const;

 private:
  struct Loan {
    Allocation range;
    u32 count;
  };
  void rebuild();
  mutable std::shared_mutex mutex_;
  std::map<u64, Allocation> owned_;
  std::vector<Loan> loans_;
  std::vector<Allocation> ranges_;  // disjoint, sorted
  std::vector<u64> graveyard_;
  std::atomic<u64> generation_{1};
};

struct Warp;
// Host pointer for a global access, or a hazard ("null-access", "global-out-of-bounds").
u8* global_pointer(Warp& w, u64 address, u64 bytes, u32 lanes, bool write);
// The same for code that has no warp at hand; nullptr when out of bounds.
u8* global_pointer_or_null(AddressCache& cache, u64 address, u64 bytes);

}  // namespace dsk::emu
