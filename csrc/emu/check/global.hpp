// What is known about global memory between launches and across devices: who touched it, what was
// released into which word, which bytes of device allocations were ever written.
#pragma once

#include <map>

#include "emu/check/global_shadow.hpp"

namespace dsk::emu::check {

// Thread-safe; one per process, like the address space.
class GlobalMemory {
 public:
  static GlobalMemory& instance();

  // A cluster begins; `predecessor` is its agent for griddepcontrol.wait.
  std::shared_ptr<const ClusterRecord> enter(const Cluster& cluster, Agent predecessor);

  // The region that holds `address`; null outside any allocation.
  std::shared_ptr<Region> region(u64 address);
  u64 generation() const { return generation_.load(std::memory_order_acquire); }
  Words& words() { return words_; }

  // Everything so far is ordered before everything to come.
  void forget_accesses();
  // Memory that is no longer what it was: freed, or taken back by the host.
  void forget(u64 base, u64 bytes);

  // Device memory starts unwritten; memory that nobody registered counts as written.
  void allocated(u64 base, u64 bytes);
  void written_by_host(u64 base, u64 bytes);
  // A launch that is not watched may write anything.
  void trust_contents();

 private:
  std::mutex mutex_;
  ClusterId next_cluster_ = 1;
  std::map<u64, std::weak_ptr<const GridRecord>> grids_;
  std::vector<std::shared_ptr<const ClusterRecord>> clusters_;
  std::map<u64, std::shared_ptr<Region>> regions_;                 // by base
  std::map<u64, std::pair<u64, std::shared_ptr<InitBits>>> init_;  // base -> bytes, bits
  std::atomic<u64> generation_{1};
  Words words_;
};

}  // namespace dsk::emu::check
