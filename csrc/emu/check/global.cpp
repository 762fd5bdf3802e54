#include "emu/check/global.hpp"

#include <algorithm>
#include <iterator>

#include "emu/memory.hpp"

namespace dsk::emu::check {

GlobalMemory& GlobalMemory::instance() {
  static GlobalMemory memory;
  return memory;
}

std::shared_ptr<const ClusterRecord> GlobalMemory::enter(const Cluster& cluster,
                                                         Agent predecessor) {
  const Grid& grid = *cluster.grid;
  auto record = std::make_shared<ClusterRecord>();
  record->predecessor = predecessor;
  for (const auto& cta : cluster.ctas) record->blocks.push_back(cta->index);
  const std::lock_guard lock(mutex_);
  record->grid = grids_[grid.id].lock();
  if (!record->grid) {
    auto made = std::make_shared<GridRecord>();
    made->stream = grid.stream;
    made->device = grid.device;
    made->programmatic = grid.config.programmatic;
    made->order = grid.order;
    made->module = grid.module;
    made->program = grid.program;
    grids_[grid.id] = made;
    record->grid = std::move(made);
  }
  record->home = {next_cluster_++, 0, grid.device};
  clusters_.push_back(record);
  return record;
}

std::shared_ptr<Region> GlobalMemory::region(u64 address) {
  const std::lock_guard lock(mutex_);
  auto next = regions_.upper_bound(address);
  if (next != regions_.begin()) {
    const auto& before = std::prev(next)->second;
    if (address < before->end) return before;
  }
  Allocation range;
  if (!AddressSpace::instance().find(address, 1, &range)) return nullptr;
  // Ranges lent later may reach around a region that exists.
  u64 base = range.base, end = range.end();
  if (next != regions_.end()) end = std::min(end, next->second->base);
  if (next != regions_.begin()) base = std::max(base, std::prev(next)->second->end);
  const auto init = init_.find(range.base);
  auto made = std::make_shared<Region>(
      base, end, init != init_.end() && base == range.base ? init->second.second : nullptr);
  regions_[base] = made;
  return made;
}

void GlobalMemory::forget_accesses() {
  const std::lock_guard lock(mutex_);
  generation_.fetch_add(1, std::memory_order_release);
  regions_.clear();
  clusters_.clear();
  grids_.clear();
  words_.clear();
}

void GlobalMemory::forget(u64 base, u64 bytes) {
  const std::lock_guard lock(mutex_);
  init_.erase(base);
  auto it = regions_.lower_bound(base);
  if (it != regions_.begin() && std::prev(it)->second->end > base) --it;
  bool any = false;
  while (it != regions_.end() && it->first < base + bytes) {
    it = regions_.erase(it);
    any = true;
  }
  if (any) generation_.fetch_add(1, std::memory_order_release);
}

void GlobalMemory::allocated(u64 base, u64 bytes) {
  forget(base, bytes);
  const std::lock_guard lock(mutex_);
  init_[base] = {bytes, std::make_shared<InitBits>(base, bytes)};
}

void GlobalMemory::written_by_host(u64 base, u64 bytes) {
  const std::lock_guard lock(mutex_);
  auto it = init_.upper_bound(base);
  if (it == init_.begin()) return;
  --it;
  if (base < it->first + it->second.first) it->second.second->mark(base, bytes);
}

void GlobalMemory::trust_contents() {
  const std::lock_guard lock(mutex_);
  for (auto& [base, entry] : init_) entry.second->trust();
}

}  // namespace dsk::emu::check
