// Barriers of the CTA and of the cluster, and fences.
#include <atomic>

#include "emu/isa/common.hpp"

namespace dsk::emu {
namespace {

// Threads that a barrier without a count waits for: whole warps that have not left.
u32 whole_cta_threads(const Cta& cta) {
  return static_cast<u32>(cta.warps.size() - cta.warps_done) * kLanes;
}

void complete(Cta& cta, NamedBarrier& bar) {
  bar.result_and = bar.and_all, bar.result_or = bar.or_any, bar.result_popc = bar.popc;
  bar.and_all = 1, bar.or_any = 0, bar.popc = 0;
  bar.arrived = bar.expected = bar.warps = 0;
  ++bar.generation;
  ++cta.cluster->changes;
}

// Counts an arrival; the generation joined.
u64 arrive(Warp& w, const Inst& i, u32 mask) {
  const int first = std::countr_zero(mask);
  const u32 id = w.reg<u32>(i.a)[first];
  if (id > 15) fail(w, mask, "barrier-misuse", "barrier " + std::to_string(id) + " (0..15 exist)");
  NamedBarrier& bar = w.cta->barriers[id];
  const bool whole = i.b == kNoReg;
  const u32 expected = whole ? whole_cta_threads(*w.cta) : w.reg<u32>(i.b)[first];
  if (expected == 0 || expected % kLanes != 0 || expected > w.cta->warps.size() * kLanes) {
    fail(w, mask, "barrier-misuse",
         "barrier " + std::to_string(id) + ": " + std::to_string(expected) +
             " threads is not a positive multiple of 32 up to the CTA's " +
             std::to_string(w.cta->warps.size() * kLanes));
  }
  if (bar.arrived != 0 && bar.expected != expected) {
    fail(w, mask, "barrier-count-mismatch",
         "barrier " + std::to_string(id) + ": participants disagree on the thread count, " +
             std::to_string(bar.expected) + " and " + std::to_string(expected));
  }
  bar.expected = expected;
  bar.whole_cta = whole;
  bar.last_pc = w.current_pc;
  bar.last_warp = w.index;
  bar.warps |= 1u << w.index % kLanes;
  // The whole warp counts 32 even where its last lanes do not exist.
  bar.arrived += (mask & w.active_lanes()) == w.active_lanes()
                     ? static_cast<u32>(kLanes)
                     : static_cast<u32>(std::popcount(mask));
  if (bar.arrived > bar.expected) {
    fail(w, mask, "barrier-over-arrival",
         "barrier " + std::to_string(id) + ": " + std::to_string(bar.arrived) +
             " threads arrived, " + std::to_string(bar.expected) + " expected");
  }
  const u64 generation = bar.generation;
  ++w.cta->cluster->changes;
  notify(w, SyncKind::BarArrive, mask, id, generation);
  if (bar.arrived == bar.expected) complete(*w.cta, bar);
  return generation;
}

Step bar_sync(Warp& w, const Inst& i, u32 mask, Split& s) {
  const u32 id = w.reg<u32>(i.a)[std::countr_zero(mask)] & 15;
  if (s.wait == Wait::None && s.value == 0) {
    const u64 generation = arrive(w, i, mask);
    if (w.cta->barriers[id].generation == generation) {
      s.wait = Wait::Barrier;
      s.id = id;
      s.value = generation + 1;
      return Step::Wait;
    }
  }
  s.value = 0;
  notify(w, SyncKind::BarPass, mask, id, w.cta->barriers[id].generation - 1);
  return Step::Next;
}

void bar_arrive(Warp& w, const Inst& i, u32 mask) { arrive(w, i, mask); }

// The predicate of every arriving thread enters before the arrival is counted.
Step bar_red(Warp& w, const Inst& i, u32 mask, Split& s) {
  const u32 id = w.reg<u32>(i.a)[std::countr_zero(mask)] & 15;
  NamedBarrier& bar = w.cta->barriers[id];
  if (s.value == 0) {
    const u32 p = (w.pred(i.c) ^ (i.sub ? kFullMask : 0)) & mask;
    bar.and_all &= p == mask;
    bar.or_any |= p != 0;
    bar.popc += static_cast<u32>(std::popcount(p));
  }
  const Step step = bar_sync(w, i, mask, s);
  if (step == Step::Wait) return step;
  if (i.op == 2)
    each_lane(mask, [&](int l) { w.reg<u32>(i.d)[l] = bar.result_popc; });
  else
    set_pred(w, i.d, mask, (i.op == 0 ? bar.result_and : bar.result_or) ? kFullMask : 0);
  return step;
}

// bar.X is barrier.X.aligned; barrier.X without .aligned need not be executed by a whole warp.
void bind_aligned(Decoder& d, Inst& i) {
  if (d.in().opcode == "bar" || d.has("aligned")) i.flags |= kAligned;
}
void bind_bar_sync(Decoder& d, Inst& i) {
  d.arity(1, 2);
  i.a = d.src(0, 4);
  if (d.operands() > 1) i.b = d.src(1, 4);
  bind_aligned(d, i);
  make_blocking(i, bar_sync);
}
void bind_bar_arrive(Decoder& d, Inst& i) {
  d.arity(2);
  i.a = d.src(0, 4);
  i.b = d.src(1, 4);
  bind_aligned(d, i);
  i.fn = bar_arrive;
}
void bind_bar_red(Decoder& d, Inst& i) {
  d.arity(3, 4);
  i.op = d.has("and") ? 0 : d.has("or") ? 1 : 2;
  i.d = d.dst(0, i.op == 2 ? 4 : 0);
  i.a = d.src(1, 4);
  if (d.operands() == 4) i.b = d.src(2, 4);
  const std::size_t last = d.operands() - 1;
  i.c = d.src(last, 0);
  i.sub = d.operand(last).negated;
  bind_aligned(d, i);
  make_blocking(i, bar_red);
}

// --- cluster barrier: threads arrive; threads that left count as arrived
u32 cluster_threads(const Cluster& cluster) {
  u32 n = 0;
  for (const auto& cta : cluster.ctas) {
    for (const auto& warp : cta->warps) n += static_cast<u32>(std::popcount(warp->active_lanes()));
  }
  return n;
}

void finish_cluster_barrier(Cluster& cluster) {
  if (cluster.barrier_arrived == 0 || cluster.barrier_arrived < cluster_threads(cluster)) return;
  cluster.barrier_arrived = 0;
  ++cluster.barrier_phase;
  ++cluster.changes;
}

void cluster_arrive(Warp& w, const Inst& i, u32 mask) {
  Cluster& cluster = *w.cta->cluster;
  if ((w.cluster_arrived & mask) != 0) {
    fail(w, mask, "cluster-barrier-misuse", "arrives twice without a wait in between");
  }
  w.cluster_arrived |= mask;
  w.cluster_phase = cluster.barrier_phase;
  cluster.barrier_arrived += static_cast<u32>(std::popcount(mask));
  ++cluster.changes;
  notify(w, SyncKind::ClusterArrive, mask, cluster.barrier_phase, i.op);
  finish_cluster_barrier(cluster);
}
Step cluster_wait(Warp& w, const Inst& i, u32 mask, Split& s) {
  if ((w.cluster_arrived & mask) != mask) {
    fail(w, mask, "cluster-barrier-misuse", "waits without having arrived");
  }
  Cluster& cluster = *w.cta->cluster;
  if (cluster.barrier_phase > w.cluster_phase) {
    w.cluster_arrived &= ~mask;
    notify(w, SyncKind::ClusterPass, mask, w.cluster_phase);
    return Step::Next;
  }
  s.wait = Wait::ClusterBarrier;
  s.value = w.cluster_phase + 1;
  return Step::Wait;
}
void bind_cluster_arrive(Decoder& d, Inst& i) {
  d.arity(0);
  if (d.has("aligned")) i.flags |= kAligned;
  i.op = d.has("relaxed");
  i.fn = cluster_arrive;
}
void bind_cluster_wait(Decoder& d, Inst& i) {
  d.arity(0);
  if (d.has("aligned")) i.flags |= kAligned;
  make_blocking(i, cluster_wait);
}

// --- fences
void fence(Warp& w, const Inst& i, u32 mask) {
  std::atomic_thread_fence(std::memory_order_seq_cst);
  notify(w, static_cast<SyncKind>(i.op), mask, i.sem & 15, i.sem >> 4);
}
void map_fence(Warp& w, const Inst& i, u32 mask) {
  const bool acquire = i.sub != 0;
  each_lane(mask, [&](int l) {
    const u64 map = acquire ? lane_address(w, i, l) : 0;
    notify(w, SyncKind::FenceProxyTensorMap, 1u << l, acquire, i.sem >> 4, map);
  });
}
void bind_fence(Decoder& d, Inst& i) {
  bind_space(d, i);
  SyncKind kind = SyncKind::Fence;
  if (d.has("mbarrier_init")) kind = SyncKind::FenceMbarInit;
  for (const std::string& m : d.in().modifiers) {
    if (m.rfind("tensormap", 0) == 0)
      kind = SyncKind::FenceProxyTensorMap;
    else if (m.rfind("async", 0) == 0)
      kind = SyncKind::FenceProxyAsync;
  }
  i.op = static_cast<u8>(kind);
  if (kind == SyncKind::FenceProxyTensorMap && d.has("acquire")) {
    d.arity(2);
    i.space = Space::Generic;
    d.address(0, i);
    i.sub = 1;
  } else {
    d.arity(0);
  }
  if (d.has("gl")) i.sem = static_cast<u8>((i.sem & 15) | static_cast<u8>(Scope::Gpu) << 4);
  i.fn = kind == SyncKind::FenceProxyTensorMap ? map_fence : fence;
}

constexpr Entry kEntries[] = {
    {"bar.cta?.sync", bind_bar_sync, "named barrier: arrive and wait"},
    {"barrier.cta?.sync.aligned?", bind_bar_sync, "named barrier: arrive and wait"},
    {"bar.cta?.arrive", bind_bar_arrive, "named barrier: arrive"},
    {"barrier.cta?.arrive.aligned?", bind_bar_arrive, "named barrier: arrive"},
    {"bar.cta?.red.and|or.pred", bind_bar_red, "named barrier with a reduction"},
    {"bar.cta?.red.popc.u32", bind_bar_red, "named barrier with a count"},
    {"barrier.cta?.red.and|or.aligned?.pred", bind_bar_red, "named barrier with a reduction"},
    {"barrier.cta?.red.popc.aligned?.u32", bind_bar_red, "named barrier with a count"},
    {"barrier.cluster.arrive.release|relaxed?.aligned?", bind_cluster_arrive,
     "cluster barrier: arrive", 90},
    {"barrier.cluster.wait.acquire?.aligned?", bind_cluster_wait, "cluster barrier: wait", 90},
    {"fence.sc|acq_rel|acquire|release?.{scope}", bind_fence, "memory fence", 70},
    {"fence.mbarrier_init.release.cluster", bind_fence, "makes mbarrier.init visible", 90},
    {"fence.acquire|release.sync_restrict::shared::cta|sync_restrict::shared::cluster.cluster",
     bind_fence, "memory fence of shared memory", 90},
    {"fence.proxy.alias", bind_fence, "proxy fence", 70},
    {"fence.proxy.async", bind_fence, "generic writes before asynchronous accesses", 90},
    {"fence.proxy.async.global|shared::cta|shared::cluster", bind_fence, "the same in one space",
     90},
    {"fence.proxy.async::generic.acquire|release.sync_restrict::shared::cta|"
     "sync_restrict::shared::cluster.cluster",
     bind_fence, "the same, one way", 90},
    {"fence.proxy.tensormap::generic.release.{scope}", bind_fence, "after tensormap.replace", 90},
    {"fence.proxy.tensormap::generic.acquire.{scope}", bind_fence, "before using the map", 90},
    {"membar.cta|gl|sys", bind_fence, "memory fence"},
    {"membar.proxy.alias", bind_fence, "proxy fence"},
};

}  // namespace

void on_warp_exit(Warp& w) {
  Cta& cta = *w.cta;
  ++cta.warps_done;
  ++cta.cluster->changes;
  notify(w, SyncKind::Exit, w.live);
  for (NamedBarrier& bar : cta.barriers) {
    if (bar.arrived == 0 || !bar.whole_cta) continue;
    bar.expected = whole_cta_threads(cta);
    if (bar.expected != 0 && bar.arrived >= bar.expected) complete(cta, bar);
  }
  finish_cluster_barrier(*cta.cluster);
}

std::span<const Entry> sync_entries() { return kEntries; }

}  // namespace dsk::emu
