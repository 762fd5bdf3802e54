#include "emu/memory.hpp"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "emu/check/global.hpp"
#include "emu/machine.hpp"

namespace dsk::emu {
namespace {
constexpr u64 kAlignment = 1024;  // of allocations; also keeps neighbours apart
}  // namespace

AddressSpace& AddressSpace::instance() {
  static AddressSpace space;
  return space;
}

u64 AddressSpace::allocate(u64 bytes, i32 device, const std::string& name) {
  if (bytes > (u64{1} << 40)) throw Error("allocation of " + std::to_string(bytes) + " bytes");
  const u64 rounded = (std::max<u64>(bytes, 1) + kAlignment - 1) / kAlignment * kAlignment;
  void* memory = std::aligned_alloc(kAlignment, rounded);
  if (memory == nullptr) throw Error("out of memory: " + std::to_string(bytes) + " bytes");
  std::memset(memory, 0xff, rounded);  // NaN in every format: reading it before writing shows
  const u64 base = reinterpret_cast<u64>(memory);
  const std::unique_lock lock(mutex_);
  owned_[base] = {base, bytes, device, false, name};
  rebuild();
  return base;
}

void AddressSpace::release(u64 base) {
  const std::unique_lock lock(mutex_);
  if (owned_.erase(base) == 0) throw Error("free of an address that was not allocated");
  graveyard_.push_back(base);
  rebuild();
}

void AddressSpace::collect() {
  std::vector<u64> dead;
  {
    const std::unique_lock lock(mutex_);
    dead.swap(graveyard_);
  }
  for (u64 base : dead) std::free(reinterpret_cast<void*>(base));
}

void AddressSpace::lend(u64 base, u64 bytes, bool read_only, const std::string& name) {
  const std::unique_lock lock(mutex_);
  for (Loan& loan : loans_) {
    if (loan.range.base == base && loan.range.bytes == bytes) {
      ++loan.count;
      loan.range.read_only &= read_only;
      return rebuild();
    }
  }
  loans_.push_back({{base, bytes, -1, read_only, name}, 1});
  rebuild();
}

void AddressSpace::take_back(u64 base, u64 bytes) {
  check::GlobalMemory::instance().forget(base, bytes);  // it may come back as something else
  const std::unique_lock lock(mutex_);
  for (std::size_t k = 0; k < loans_.size(); ++k) {
    if (loans_[k].range.base != base || loans_[k].range.bytes != bytes) continue;
    if (--loans_[k].count == 0) loans_.erase(loans_.begin() + static_cast<std::ptrdiff_t>(k));
    return rebuild();
  }
  throw Error("memory taken back that was not lent");
}

// Loans may overlap (views of one array): overlapping ones become one range, writable if any is.
void AddressSpace::rebuild() {
  ranges_.clear();
  for (const auto& [base, range] : owned_) ranges_.push_back(range);
  for (const Loan& loan : loans_) ranges_.push_back(loan.range);
  std::sort(ranges_.begin(), ranges_.end(),
            [](const Allocation& a, const Allocation& b) { return a.base < b.base; });
  std::size_t kept = 0;
  for (std::size_t k = 0; k < ranges_.size(); ++k) {
    if (kept > 0 && ranges_[k].base < ranges_[kept - 1].end()) {
      Allocation& into = ranges_[kept - 1];
      into.bytes = std::max(into.end(), ranges_[k].end()) - into.base;
      into.read_only &= ranges_[k].read_only;
    } else {
      ranges_[kept++] = ranges_[k];
    }
  }
  ranges_.resize(kept);
  generation_.fetch_add(1, std::memory_order_release);
}

bool AddressSpace::find(u64 address, u64 bytes, Allocation* out) const {
  const std::shared_lock lock(mutex_);
  auto it = std::upper_bound(ranges_.begin(), ranges_.end(), address,
                             [](u64 a, const Allocation& r) { return a < r.base; });
  if (it == ranges_.begin()) return false;
  --it;
  if (bytes > it->bytes || address - it->base > it->bytes - bytes) return false;
  *out = *it;
  return true;
}

std::vector<Allocation> AddressSpace::writable() const {
  const std::shared_lock lock(mutex_);
  std::vector<Allocation> out;
  for (const Allocation& r : ranges_) {
    if (!r.read_only && r.bytes != 0) out.push_back(r);
  }
  return out;
}

std::string AddressSpace::describe(u64 address) const {
  const std::shared_lock lock(mutex_);
  const Allocation* best = nullptr;
  u64 best_gap = ~u64{0};
  for (const Allocation& r : ranges_) {
    const u64 gap = address < r.base ? r.base - address : address - r.end();
    if (address >= r.base && address < r.end()) {
      best = &r, best_gap = 0;
      break;
    }
    if (gap < best_gap) best = &r, best_gap = gap;
  }
  char buffer[64];
  std::snprintf(buffer, sizeof buffer, "address 0x%llx", static_cast<unsigned long long>(address));
  std::string s = buffer;
  if (best == nullptr) return s + " (nothing is allocated)";
  const std::string name = best->name.empty() ? "an allocation" : "'" + best->name + "'";
  if (best_gap == 0) {
    return s + " reaches past the end of " + name + " of " + std::to_string(best->bytes) +
           " bytes, at offset " + std::to_string(address - best->base);
  }
  return s + " is " + std::to_string(best_gap) + " bytes " +
         (address < best->base ? "before " : "behind ") + name + " of " +
         std::to_string(best->bytes) + " bytes";
}

u8* global_pointer(Warp& w, u64 address, u64 bytes, u32 lanes, bool write) {
  AddressSpace& space = AddressSpace::instance();
  const u64 generation = space.generation();
  if (w.cache.generation != generation) {
    w.cache = AddressCache{};
    w.cache.generation = generation;
  }
  // Read-only ranges never enter the cache, so that a hit needs no second question.
  if (w.cache.hit(address, bytes)) return reinterpret_cast<u8*>(address);
  Allocation range;
  if (!space.find(address, bytes, &range)) {
    fail(w, lanes, address < kNullPage ? "null-access" : "global-out-of-bounds",
         std::to_string(bytes) + "-byte access: " + space.describe(address));
  }
  if (range.read_only) {
    if (write) {
      fail(w, lanes, "read-only-write", "write to read-only " + space.describe(address));
    }
    return reinterpret_cast<u8*>(address);
  }
  w.cache.base[w.cache.next] = range.base;
  w.cache.end[w.cache.next] = range.end();
  w.cache.next = (w.cache.next + 1) % AddressCache::kWays;
  return reinterpret_cast<u8*>(address);
}

u8* global_pointer_or_null(AddressCache& cache, u64 address, u64 bytes) {
  AddressSpace& space = AddressSpace::instance();
  const u64 generation = space.generation();
  if (cache.generation != generation) {
    cache = AddressCache{};
    cache.generation = generation;
  }
  if (cache.hit(address, bytes)) return reinterpret_cast<u8*>(address);
  Allocation range;
  if (!space.find(address, bytes, &range)) return nullptr;
  cache.base[cache.next] = range.base;
  cache.end[cache.next] = range.end();
  cache.next = (cache.next + 1) % AddressCache::kWays;
  return reinterpret_cast<u8*>(address);
}

}  // namespace dsk::emu
