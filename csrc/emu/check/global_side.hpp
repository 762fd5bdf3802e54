// One cluster's view of global memory: turns its accesses into touches of the shared shadow, and
// what they conflict with into findings.
#pragma once

#include "emu/check/global.hpp"
#include "emu/check/sync_state.hpp"

namespace dsk::emu::check {

class GlobalSide {
 public:
  GlobalSide(const Cluster& cluster, Agent predecessor);

  const Home& home() const { return record_->home; }
  Home home(u32 rank) const { return {record_->home.cluster, rank, record_->home.device}; }
  ForeignPtr& refused() { return refused_; }

  // A warp's generic access, before it happens. A release ends with a tick of the agent's clock,
  // which is the caller's: true if there was one.
  bool access(const Warp& w, Agent agent, SyncState& state, u32 pc, u32 mask, const Access& access,
              const u64* place);
  // A strong access has its value.
  void value(const Warp& w, SyncState& state, u32 mask, const Access& access, const u64* place);

  // The global side of an asynchronous operation of `agent`, issued by `w`. `strong`: a reduction.
  void async(const Warp& w, Epoch agent, const SyncState& issuer, u32 pc,
             const std::vector<Footprint>& footprint, bool generic, bool strong);
  // It reads the tensor map at `map`.
  void tensor_map(const Warp& w, const SyncState& state, u32 pc, u64 map);
  void map_fence(const Warp& w, Epoch agent, const SyncState& state, bool release, u64 map);

  // Throws HazardError for what was found since the last call, located at `pc`; adds formal
  // findings to the launch's.
  void report(const Warp& w, u32 pc, u32 lanes, AccessKind kind, const std::string& what);
  // The same findings, but errors are returned instead of thrown.
  std::vector<Hazard> errors(const Warp& w, u32 pc, u32 lanes, AccessKind kind,
                             const std::string& what);
  // Whether all that was found are earlier stores of the same cluster's warps.
  bool only_stores_meet() const;
  // "block (1,0,0) warp 2 (PTX line 7, source line 3)"
  std::string who(const GlobalTouch& touch) const;
  // What lies at an address, what it holds, and who wrote it last.
  std::string describe(u64 address, u32 bytes) const;

 private:
  struct MapAcquire {
    Epoch when;
    Knowledge knowledge;
  };

  u32 clock_of_write(Agent agent, const SyncState& state, const Access& access) const;
  void touch(AccessKind kind, const GlobalTouch& touch, Box box, const SyncState& state);
  Region* region(u64 address);

  const Cluster& cluster_;
  std::shared_ptr<const ClusterRecord> record_;
  static constexpr int kWays = 4;
  std::shared_ptr<Region> recent_[kWays];
  u32 next_way_ = 0;
  u64 generation_ = 0;
  ForeignPtr refused_;
  GlobalFindings findings_;
  std::map<u64, std::vector<MapAcquire>> acquired_maps_;
  std::map<std::pair<u32, u32>, bool> formal_;
};

}  // namespace dsk::emu::check
