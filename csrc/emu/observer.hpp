// Hook points for whoever watches a run without changing it: hazard checkers, the happens-before
// checker, the timing model, the trace.
//
// An Observer lives for one grid. It makes one ClusterObserver per cluster; all calls on a
// ClusterObserver come from one thread at a time, calls on different ones may be concurrent.
// Memory events carry RESOLVED places: shared memory as (CTA of the cluster, byte offset), global
// memory as host addresses.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "emu/types.hpp"

namespace dsk::emu {

struct Cta;
struct Cluster;
struct Grid;
struct Inst;
struct Warp;
enum class Wait : u8;

enum class AccessKind : u8 { Read, Write, ReadWrite };
enum class Proxy : u8 { Generic, Async, TensorMap };

// How a full warp's places lie, where that is known without looking at each.
enum class Pattern : u8 {
  Scattered,
  Uniform,
  Adjacent
};  // Adjacent: lane l at place[0] + l * size

// One executed memory instruction of a warp, or one row of an asynchronous operation.
struct Access {
  AccessKind kind = AccessKind::Read;
  Proxy proxy = Proxy::Generic;
  Space space = Space::Global;  // Global, Shared or Local: where the bytes really are
  bool atomic = false;
  Semantics semantics = Semantics::Weak;
  Scope scope = Scope::None;
  u32 size = 0;  // bytes per lane (vector width included)
  Pattern pattern = Pattern::Scattered;
};

// Asynchronous operations are agents of their own: they touch memory between issue and completion.
enum class AsyncKind : u8 {
  CpAsync,       // cp.async (generic proxy, per thread)
  BulkLoad,      // cp.async.bulk global -> shared
  BulkStore,     // cp.async.bulk shared -> global
  BulkCluster,   // cp.async.bulk shared::cta -> shared::cluster
  BulkReduce,    // cp.reduce.async.bulk
  TensorLoad,    // cp.async.bulk.tensor global -> shared
  TensorStore,   // cp.async.bulk.tensor shared -> global
  TensorReduce,  // cp.reduce.async.bulk.tensor
  StAsync,       // st.async / red.async
  Wgmma,         // one wgmma.mma_async of one warpgroup
};

// A run of bytes that an asynchronous operation reads or writes.
struct Footprint {
  AccessKind kind = AccessKind::Read;
  Space space = Space::Global;
  u32 rank = 0;     // Shared: CTA of the cluster
  u64 address = 0;  // Shared: offset; Global: host address
  u64 bytes = 0;
  u8 quarter = 0;  // of wgmma's A, 1 to 4: the rows that the results of one warp come from
};

struct AsyncInfo {
  u64 id = 0;  // unique within the cluster
  AsyncKind kind = AsyncKind::BulkLoad;
  const Warp* warp = nullptr;  // issuer (for Wgmma: the warp whose quarter this is)
  u32 lane = 0;
  u32 pc = 0;
  u64 bytes = 0;
  u64 map = 0;  // host address of the tensor map, where it lies in global memory
};

enum class SyncKind : u8 {
  BarArrive,      // named barrier: arrived (a = id, b = generation joined)
  BarPass,        // left the barrier (a = id, b = generation)
  ClusterArrive,  // barrier.cluster.arrive (a = phase, b = 1 for .relaxed)
  ClusterPass,
  MbarInit,  // a = rank, b = offset, c = count
  MbarInval,
  MbarArrive,    // a = rank, b = offset, c = phase joined
  MbarExpectTx,  // c = bytes
  MbarPass,      // a wait saw phase c completed
  FenceProxyAsync,
  FenceProxyTensorMap,  // a = 1 for an acquire, of the map at host address c
  Fence,                // a = Semantics, b = Scope
  FenceMbarInit,
  WarpSync,  // the lanes of the mask meet: bar.warp.sync and all other convergent instructions
  CpAsyncCommit,
  CpAsyncWait,
  BulkCommit,
  BulkWait,
  BulkWaitRead,
  WgmmaFence,
  WgmmaCommit,
  WgmmaWait,
  GridLaunchDependents,
  GridWait,
  Exit,
};

struct SyncEvent {
  SyncKind kind = SyncKind::Fence;
  u32 mask = 0;  // lanes
  u32 pc = 0;
  u64 a = 0, b = 0, c = 0;
};

class ClusterObserver {
 public:
  virtual ~ClusterObserver() = default;

  // Every instruction, before it executes. Called only if Observer::wants_instructions().
  virtual void on_instruction(const Warp&, u32 pc, u32 mask) {}
  // Generic-proxy accesses: lane l of `mask` touches `size` bytes at place[l]; for shared memory
  // rank[l] is the CTA of the cluster and place[l] the offset. `rank` is null for global and local.
  virtual void on_access(const Warp&, u32 pc, u32 mask, const Access&, const u64* place,
                         const u32* rank) {}
  // The same access, once it has its value: strong loads and atomics only. on_access comes before
  // the access takes effect, so that what a release publishes is there for whoever sees it.
  virtual void on_value(const Warp&, u32 pc, u32 mask, const Access&, const u64* place,
                        const u32* rank) {}
  virtual void on_sync(const Warp&, const SyncEvent&) {}
  // A warp's lanes stopped (reason as in the deadlock report), and went on again.
  virtual void on_wait(const Warp&, u32 pc, u32 mask) {}
  virtual void on_resume(const Warp&, u32 pc, u32 mask) {}
  // An asynchronous operation: issued with its whole footprint, done reading, done.
  virtual void on_async_issue(const AsyncInfo&, const std::vector<Footprint>&) {}
  virtual void on_async_read_done(const AsyncInfo&) {}
  // About to write; the mbarriers that it signals follow as on_complete_tx, then comes its end.
  virtual void on_async_landing(const AsyncInfo&) {}
  virtual void on_complete_tx(u32 rank, u32 offset) {}
  virtual void on_async_done(const AsyncInfo&) {}
  virtual void on_mbarrier_complete(u32 rank, u32 offset, u64 phase) {}
  virtual void on_cluster_end() {}
  // More about a warp that cannot go on, or polls, for the report; "" or "; ...".
  virtual std::string describe_wait(const Warp&, Wait) { return ""; }
};

class Observer {
 public:
  virtual ~Observer() = default;
  virtual bool wants_instructions() const { return false; }
  virtual std::unique_ptr<ClusterObserver> on_cluster(const Cluster&) = 0;
  virtual void on_grid_end(const Grid&) {}
};

}  // namespace dsk::emu
