#include "emu/timing/replay.hpp"

#include <algorithm>

#include "emu/timing/replay_impl.hpp"

namespace dsk::emu::timing {
namespace {

constexpr double kPortQueue = 32;  // cycles of work that may wait for shared memory

}  // namespace

// The next run of instructions of one region, in the order in which they are issued.
bool Replay::fetch(WarpSim& w) {
  const auto& events = w.record->events;
  const auto& actions = w.record->actions;
  w.order.clear(), w.first_action.clear();
  w.at = 0;
  if (w.next_event >= events.size()) return false;
  const u32 first = w.next_event;
  const u32 region = table_.region[events[first] & kPcMask];
  u32 end = first + 1;
  while (end < events.size() && table_.region[events[end] & kPcMask] == region &&
         (events[end] & kPcMask) > (events[end - 1] & kPcMask)) {
    ++end;
  }
  for (u32 e = first; e < end; ++e) {
    w.order.push_back(e);
    while (w.next_action < actions.size() && actions[w.next_action].event < e) ++w.next_action;
    w.first_action.push_back(w.next_action);
  }
  if (end - first > 2) {
    std::sort(w.order.begin(), w.order.end(), [&](u32 a, u32 b) {
      return table_.rank[events[a] & kPcMask] < table_.rank[events[b] & kPcMask];
    });
  }
  w.run_first = first;
  w.next_event = end;
  while (w.next_action < actions.size() && actions[w.next_action].event < end) ++w.next_action;
  return true;
}

void Replay::prepare(WarpSim& w) {
  w.issued = false;
  u32 pc = 0;
  while (true) {
    if (w.at >= w.order.size() && !fetch(w)) return finish_warp(w);
    pc = w.record->events[w.order[w.at]] & kPcMask;
    if (table_.cost[pc].slots != 0 || table_.cost[pc].memory) break;
    vanish(w, recording_.program->info[pc]);
    ++w.at;
  }
  const Cost& c = table_.cost[pc];
  double t = w.time;
  Producer by = Producer::Arithmetic;
  if (c.group != Class::Tensor || c.pipe != Pipe::None) {
    for (u32 r : recording_.program->info[pc].reads) {
      if (w.ready[r] > t) t = w.ready[r], by = w.producer[r];
    }
  }
  if (t > w.time) {
    note(w, by == Producer::Memory ? State::Memory : State::Result, 0, w.time, t);
    w.time = t;
  }
  push(w);
}

// An instruction that the assembler makes an operand of others: its result is its operand.
void Replay::vanish(WarpSim& w, const InstInfo& info) {
  double from = 0;
  Producer by = Producer::Arithmetic;
  for (u32 r : info.reads) {
    if (w.ready[r] > from) from = w.ready[r], by = w.producer[r];
  }
  for (u32 r : info.writes) w.ready[r] = from, w.producer[r] = by;
}

void Replay::step(WarpSim& w) {
  if (w.issued) return go_on(w);  // woken
  const u32 event = w.record->events[w.order[w.at]];
  const Cost& c = table_.cost[event & kPcMask];
  double t = std::max(w.time, w.part->issue_free);
  if (c.pipe != Pipe::None) {
    // A pipe's queue takes one instruction ahead of the one that it works on.
    t = std::max(t, w.part->pipe_free[static_cast<u32>(c.pipe)] - c.busy);
  }
  // The queue in front of the shared-memory port is short.
  if (c.memory) t = std::max(t, w.sm->shared.free - kPortQueue);
  if (t > w.time + 1e-9) {
    note(w, State::Busy, 0, w.time, t);
    w.time = t;
    return push(w);
  }
  issue(w, t);
}

// Of what ends a region only fences take this long.
constexpr double kNoted = 16;

void Replay::issue(WarpSim& w, double t) {
  const u32 event = w.record->events[w.order[w.at]];
  const u32 pc = event & kPcMask;
  const Cost& c = table_.cost[pc];
  const double slots = event & kResumed ? 0 : c.slots;
  w.part->issue_free = t + slots;
  w.part->issued += slots;
  double start = t;
  if (c.pipe != Pipe::None) {
    double& free = w.part->pipe_free[static_cast<u32>(c.pipe)];
    start = std::max(t, free);
    free = start + c.busy;
    w.part->pipe_busy[static_cast<u32>(c.pipe)] += c.busy;
  }
  busy(w, t, t + std::max(slots, 1.0));
  w.issued = true;
  w.issue_time = start;
  w.time = t + std::max(slots, slots == 0 ? 0.0 : 1.0);
  w.memory_ready = start + c.latency;
  w.order_tag = ++tags_;             // the others of the sub-partition come first next time
  if (c.group == Class::Exchange) {  // shuffles share the port of shared memory
    w.memory_ready = std::max(w.memory_ready, w.sm->shared.take(t, 1) + c.latency);
  }
  if ((c.group == Class::Sync || c.group == Class::Control) && t + c.latency > w.time) {
    if (c.latency >= kNoted) note(w, State::Fence, 0, w.time, t + c.latency);
    w.time = t + c.latency;
  }
  w.action = w.first_action[w.order[w.at] - w.run_first];
  go_on(w);
}

void Replay::go_on(WarpSim& w) {
  const auto& actions = w.record->actions;
  const u32 event = w.order[w.at];
  while (w.action < actions.size() && actions[w.action].event == event) {
    const Action& a = actions[w.action];
    ++w.action;
    if (!act(w, a)) return;  // whoever it waits for pushes it again
  }
  complete(w);
}

void Replay::complete(WarpSim& w) {
  const u32 pc = w.record->events[w.order[w.at]] & kPcMask;
  const InstInfo& info = recording_.program->info[pc];
  const Cost& c = table_.cost[pc];
  if (c.memory) w.drain = std::max(w.drain, w.memory_ready);  // a warp ends after its loads
  const bool tensor = c.group == Class::Tensor && c.pipe == Pipe::None;
  for (u32 r : info.writes) {
    // Accumulators are the tensor core's until a wait, which blocks the warp itself.
    w.ready[r] = tensor ? w.time : std::max(w.memory_ready, w.time);
    w.producer[r] = c.memory ? Producer::Memory : Producer::Arithmetic;
  }
  ++w.at;
  prepare(w);
}

bool Replay::act(WarpSim& w, const Action& a) {
  Instance& in = *w.in;
  const double t = w.issue_time;
  switch (a.act) {
    case Act::Shared:
      w.memory_ready = w.sm->shared.take(t, a.a) + m_.shared;
      return true;
    case Act::Remote:
      w.memory_ready = w.sm->dsmem.take(t, a.a / m_.dsmem_bytes) + m_.dsmem;
      return true;
    case Act::Load:
      load(w, a.a, a.b);
      return true;
    case Act::Store:
    case Act::Atomic: {
      const double bytes = 32.0 * a.a;
      w.sm->shared.take(t, (a.a + 3) / 4);
      const double done = w.sm->memory(t, bytes, out_.miss) + m_.l2;
      w.drain = std::max(w.drain, done);
      if (a.act == Act::Atomic) w.memory_ready = done;
      return true;
    }
    case Act::Issue:
      launch(w, a.a);
      return true;
    case Act::Arrive:
      contribute(in, a.a,
                 t + (in.record->nodes[a.a].kind == Node::Kind::Mbarrier ? m_.mbar_arrive : 0));
      return true;
    case Act::Pass: {
      NodeSim& node = in.nodes[a.a];
      const Node& what = in.record->nodes[a.a];
      if (node.left != 0) {
        node.waiters.push_back(&w);
        --w.action;  // looks again when woken
        return false;
      }
      const bool mbar = what.kind == Node::Kind::Mbarrier;
      const double latency = mbar                               ? m_.mbar_wait
                             : what.kind == Node::Kind::Cluster ? m_.cluster_barrier
                                                                : m_.barrier;
      const double begin = w.time;
      const double over = std::max(t, node.time) + latency;
      if (mbar) w.passed = std::max(t, node.time);
      if (over > w.time) {
        const State s = mbar                               ? State::Mbarrier
                        : what.kind == Node::Kind::Cluster ? State::ClusterBarrier
                                                           : State::Named;
        note(w, s, what.place, begin, over);
        w.time = over;
      }
      w.memory_ready = std::max(w.memory_ready, w.time);
      return true;
    }
    case Act::WgmmaCommit:
      w.wgmma_groups.push_back(w.wgmma_issued);
      return true;
    case Act::WgmmaWait:
      if (wait_wgmma(w, a.a)) return true;
      --w.action;
      return false;
    case Act::BulkCommit:
      w.bulk.commit();
      return true;
    case Act::CpCommit:
      w.cp.commit();
      return true;
    case Act::BulkWait:
    case Act::BulkWaitRead:
    case Act::CpWait: {
      const Groups& g = a.act == Act::CpWait ? w.cp : w.bulk;
      const double over = g.over(a.a, a.act == Act::BulkWaitRead);
      if (over > w.time) {
        note(w, State::Copies, 0, w.time, over);
        w.time = over;
      }
      return true;
    }
  }
  return true;
}

void Replay::load(WarpSim& w, u32 missing, u32 sectors) {
  const double t = w.issue_time;
  const double through = w.sm->shared.take(t, std::max(1u, (sectors + 3) / 4));
  double ready = through + m_.l1;
  if (missing != 0) {
    const double latency = m_.l2 + out_.miss * (m_.hbm - m_.l2);
    ready = w.sm->memory(t, 32.0 * missing, out_.miss) + latency;
  }
  w.memory_ready = std::max(w.memory_ready, ready);
}

void Replay::contribute(Instance& in, u32 node, double time) {
  NodeSim& n = in.nodes[node];
  n.time = std::max(n.time, time);
  if (n.left == 0 || --n.left != 0) return;
  for (WarpSim* w : n.waiters) push(*w);
  n.waiters.clear();
}

void Replay::launch(WarpSim& w, u32 operation) {
  const Operation& op = w.in->record->operations[operation];
  const double t = w.issue_time;
  double done = t, read = t;
  switch (op.kind) {
    case AsyncKind::Wgmma:
      return wgmma(w, op, operation);
    case AsyncKind::CpAsync: {
      if (op.global_bytes + op.shared_bytes == 0) {  // an arrival behind the copies so far
        done = std::max(t, w.cp.open_done);
        break;
      }
      w.sm->shared.take(t, op.shared_bytes / 128.0);
      done = w.sm->memory(t, op.global_bytes, out_.miss) + m_.l2 + out_.miss * (m_.hbm - m_.l2);
      w.cp.add(done, done);
      break;
    }
    case AsyncKind::BulkLoad:
    case AsyncKind::TensorLoad: {
      const double from = w.sm->tma.take(t, m_.tma_gap);
      const double latency = m_.tma + m_.l2 + out_.miss * (m_.hbm - m_.l2);
      // Every SM that a multicast reaches takes the bytes in; L2 and HBM give them once.
      double last = w.sm->memory(from, op.global_bytes, out_.miss);
      for (u32 k = 0; k < cluster_size_; ++k) {
        if ((op.ranks >> k & 1) == 0) continue;
        if (sms_[k].get() != w.sm) {
          last = std::max(last, sms_[k]->port.take(from, op.shared_bytes / m_.l2_port));
        }
        sms_[k]->shared.use(op.shared_bytes / 128.0);
      }
      done = last + latency;
      if (w.in->traced) out_.copy_spans.push_back({operation, t, done, w.passed});
      break;
    }
    case AsyncKind::BulkStore:
    case AsyncKind::BulkReduce:
    case AsyncKind::TensorStore:
    case AsyncKind::TensorReduce: {
      const double from = w.sm->tma.take(t, m_.tma_gap) + m_.tma;
      read = w.sm->shared.take(from, op.shared_bytes / 128.0) + m_.shared;
      done = w.sm->memory(read, op.global_bytes, out_.miss) + m_.l2;
      w.bulk.add(read, done);
      w.drain = std::max(w.drain, done);
      if (w.in->traced) out_.copy_spans.push_back({operation, t, done, 0});
      break;
    }
    case AsyncKind::BulkCluster:
    case AsyncKind::StAsync:
      done = w.sm->dsmem.take(t, op.shared_bytes / m_.dsmem_bytes) + m_.dsmem;
      break;
  }
  for (u32 n : op.nodes) contribute(*w.in, n, done);
}

void Replay::wgmma(WarpSim& w, const Operation& op, u32 operation) {
  WarpgroupSim& g = *w.group;
  const u32 k = w.wgmma_issued++;
  if (k >= g.ops.size()) g.ops.resize(k + 1);
  WarpgroupSim::Op& o = g.ops[k];
  o.ready = std::max(o.ready, w.issue_time);
  if (++o.issued < 4) return;
  const Inst& inst = recording_.program->code[op.pc];
  const double columns = static_cast<double>(inst.ext->v[0]);
  // n / 2 cycles at the full rate; operands come from shared memory at 128 bytes a cycle.
  const double cycles =
      std::max(columns / 2 * m_.tensor_scale, static_cast<double>(op.shared_bytes) / 128);
  const double begin = std::max(o.ready, w.sm->tensor.free);
  const double over = w.sm->tensor.take(o.ready, cycles);
  o.end = over + m_.wgmma_tail;
  if (w.in->traced) out_.tensor_spans.push_back({operation, begin, over, 0});
  for (auto it = g.waiters.begin(); it != g.waiters.end();) {
    if (it->first <= k) {
      push(*it->second);
      it = g.waiters.erase(it);
    } else {
      ++it;
    }
  }
}

bool Replay::wait_wgmma(WarpSim& w, u32 groups) {
  if (groups == 0 || groups > w.wgmma_groups.size()) return true;
  const u32 ops = w.wgmma_groups[groups - 1];
  if (ops == 0) return true;
  WarpgroupSim& g = *w.group;
  if (ops > g.ops.size() || g.ops[ops - 1].issued < 4) {
    g.waiters.emplace_back(ops - 1, &w);
    return false;
  }
  const double over = g.ops[ops - 1].end;
  if (over > w.time) {
    note(w, State::Wgmma, 0, w.time, over);
    w.time = over;
  }
  return true;
}

}  // namespace dsk::emu::timing
