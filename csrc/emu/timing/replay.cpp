#include "emu/timing/replay.hpp"

#include <algorithm>
#include <cmath>
#include <deque>
#include <limits>
#include <queue>

#include "emu/timing/resources.hpp"

namespace dsk::emu::timing {
namespace {

constexpr double kNever = std::numeric_limits<double>::infinity();
constexpr double kPortQueue = 32;          // cycles of work that may wait for shared memory
constexpr double kJoinGap = 12;            // issue spans closer than this are drawn as one
constexpr std::size_t kMaxSpans = 400000;  // of a trace
constexpr u32 kSimulatedWaves = 3;

enum class Producer : u8 { Arithmetic, Memory };

struct WarpSim;

struct NodeSim {
  u32 left = 0;
  double time = 0;
  std::vector<WarpSim*> waiters;
};

// The k-th wgmma of a warpgroup starts once its four warps have issued it.
struct WarpgroupSim {
  struct Op {
    u32 issued = 0;
    double ready = 0;
    double end = kNever;
  };
  std::vector<Op> ops;
  std::vector<std::pair<u32, WarpSim*>> waiters;  // until op is scheduled
};

struct Groups {
  double open_read = 0, open_done = 0;
  bool any = false;
  std::deque<std::pair<double, double>> committed;  // (read, done) of everything up to here
  void add(double read, double done) {
    open_read = std::max(open_read, read), open_done = std::max(open_done, done);
  }
  void commit() {
    committed.emplace_back(open_read, open_done);
    if (committed.size() > 64) committed.pop_front();
  }
  // When all but the newest `pending` groups are over; open_* only grows.
  double over(u32 pending, bool read) const {
    if (committed.size() <= pending) return 0;
    const auto& g = committed[committed.size() - 1 - pending];
    return read ? g.first : g.second;
  }
};

struct Instance;

struct WarpSim {
  const WarpRecord* record = nullptr;
  Instance* in = nullptr;
  u32 number = 0;  // in the cluster
  Sm* sm = nullptr;
  Partition* part = nullptr;
  WarpgroupSim* group = nullptr;
  std::vector<double> ready;  // by virtual register
  std::vector<Producer> producer;
  // The run of events being issued: order[at..], as indices of events.
  std::vector<u32> order, first_action;
  u32 at = 0;
  u32 run_first = 0, next_event = 0, next_action = 0;
  u32 action = 0;  // within the current event, while parked
  double begin = 0;
  double time = 0;    // earliest issue of what comes next
  double passed = 0;  // when the last mbarrier waited for was released
  u32 wgmma_issued = 0;
  std::vector<u32> wgmma_groups;  // wgmmas issued when group k was committed
  Groups bulk, cp;
  double drain = 0;  // stores on their way
  u64 order_tag = 0;
  bool issued = false;  // the current event has been issued; its actions are not over
  double issue_time = 0, extra_latency = 0, memory_ready = 0;
  // Trace.
  Span open;
  bool has_open = false;
};

struct Instance {
  const ClusterRecord* record = nullptr;
  std::vector<NodeSim> nodes;
  std::vector<WarpgroupSim> groups;
  std::vector<std::unique_ptr<WarpSim>> warps;
  u32 running = 0;
  u32 slot = 0, wave = 0;
  bool traced = false;
};

class Replay {
 public:
  Replay(const Recording& r, const ReplayOptions& o)
      : recording_(r), options_(o), m_(o.model), table_(*r.program, o.model) {}

  Timing run();

 private:
  struct Key {
    double time;
    u64 tag;
    WarpSim* warp;
    bool operator>(const Key& other) const {
      return time != other.time ? time > other.time : tag > other.tag;
    }
  };

  void plan();
  void start(u32 slot, u32 wave, double time);
  void finish_warp(WarpSim& w);
  void push(WarpSim& w) { queue_.push({w.time, w.order_tag, &w}); }
  bool fetch(WarpSim& w);
  void prepare(WarpSim& w);
  void vanish(WarpSim& w, const InstInfo& info);
  void step(WarpSim& w);
  void issue(WarpSim& w, double t);
  bool act(WarpSim& w, const Action& a);  // false: parked
  void go_on(WarpSim& w);
  void complete(WarpSim& w);
  void contribute(Instance& in, u32 node, double time);
  void launch(WarpSim& w, u32 operation);
  void wgmma(WarpSim& w, const Operation& op, u32 operation);
  bool wait_wgmma(WarpSim& w, u32 groups);
  void load(WarpSim& w, u32 missing, u32 sectors);
  void note(WarpSim& w, State s, u32 detail, double begin, double end);
  void busy(WarpSim& w, double begin, double end);
  void close_span(WarpSim& w);
  void conclude();
  void name_bottleneck();

  const Recording& recording_;
  ReplayOptions options_;
  Model m_;
  CostTable table_;
  GridTraffic traffic_;
  Timing out_;
  u32 cluster_size_ = 1, slots_ = 1, waves_ = 1;
  double active_sms_ = 1;
  std::vector<std::unique_ptr<Sm>> sms_;
  std::vector<std::unique_ptr<Instance>> live_;
  std::vector<double> wave_end_;
  u32 started_ = 0;
  double end_ = 0;
  u64 tags_ = 0;
  std::priority_queue<Key, std::vector<Key>, std::greater<Key>> queue_;
};

u32 residents(const Recording& r, const ReplayOptions& o) {
  if (o.ctas_per_sm != 0) return o.ctas_per_sm;
  const Model& m = o.model;
  const u32 threads = (static_cast<u32>(r.config.block.count()) + 31) / 32 * 32;
  u32 n = std::min(m.max_blocks_per_sm, m.max_threads_per_sm / threads);
  n = std::min(n, m.shared_per_sm / (r.shared_bytes + kSharedReserved));
  const u32 guess = std::min<u32>(255, (r.program->peak_registers + 7 + 8) / 8 * 8);
  const u32 registers = o.registers != 0 ? (o.registers + 7) / 8 * 8 : guess;
  n = std::min(n, m.registers_per_sm / (registers * threads));
  return std::max(1u, n);
}

void Replay::plan() {
  cluster_size_ = static_cast<u32>(recording_.config.cluster.count());
  const u32 per_sm = residents(recording_, options_);
  out_.ctas_per_sm = per_sm;
  const double sms = std::max(1u, m_.num_sms / cluster_size_);  // groups of SMs
  const double per_group = recording_.clusters_total / sms;
  slots_ = std::min<u32>(per_sm, static_cast<u32>(std::ceil(per_group)));
  out_.waves = std::max(1.0, std::ceil(per_group) / slots_);
  waves_ = std::min<u32>(kSimulatedWaves, static_cast<u32>(std::ceil(out_.waves)));
  active_sms_ = std::min<double>(m_.num_sms, double(recording_.clusters_total) * cluster_size_);
  traffic_ = grid_traffic(recording_);
  out_.l2_bytes = traffic_.read + traffic_.written;
  double unique = traffic_.unique_read + traffic_.unique_written;
  if (options_.unique_bytes != 0) unique = options_.unique_bytes;
  out_.hbm_bytes = std::min(unique, out_.l2_bytes);
  out_.miss = out_.l2_bytes > 0 ? out_.hbm_bytes / out_.l2_bytes : 0;
  const double hbm = m_.hbm_gbytes * m_.hbm_efficiency / m_.clock_ghz;  // bytes per cycle
  for (u32 k = 0; k < cluster_size_; ++k) {
    auto sm = std::make_unique<Sm>();
    sm->l2_rate = std::min(m_.l2_port, m_.l2_bytes / active_sms_);
    sm->hbm_rate = hbm / active_sms_;
    sms_.push_back(std::move(sm));
  }
  wave_end_.assign(waves_, 0);
}

void Replay::start(u32 slot, u32 wave, double time) {
  live_.push_back(std::make_unique<Instance>());
  Instance& in = *live_.back();
  in.record = &recording_.clusters[started_ % recording_.clusters.size()];
  in.traced = options_.trace && started_ == 0;
  ++started_;
  in.slot = slot, in.wave = wave;
  in.nodes.resize(in.record->nodes.size());
  for (std::size_t k = 0; k < in.nodes.size(); ++k) {
    in.nodes[k].left = in.record->nodes[k].contributions;
  }
  u32 most = 0;
  for (const WarpRecord& w : in.record->warps) most = std::max(most, w.index / 4 + 1);
  in.groups.resize(std::size_t{most} * cluster_size_);
  for (u32 k = 0; k < in.record->warps.size(); ++k) {
    const WarpRecord& record = in.record->warps[k];
    in.warps.push_back(std::make_unique<WarpSim>());
    WarpSim& w = *in.warps.back();
    w.record = &record;
    w.in = &in;
    w.number = k;
    w.sm = sms_[record.cta % cluster_size_].get();
    w.part = &w.sm->parts[record.index % 4];
    w.group = &in.groups[record.cta * most + record.index / 4];
    w.ready.assign(recording_.program->num_virtual, time);
    w.producer.assign(recording_.program->num_virtual, Producer::Arithmetic);
    w.time = w.begin = time;
    w.order_tag = ++tags_;
    ++in.running;
  }
  for (auto& w : in.warps) prepare(*w);
}

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
  w.memory_ready = start + (c.slots > 1 ? c.slots - 1 : 0) + c.latency;
  w.order_tag = ++tags_;             // the others of the sub-partition come first next time
  if (c.group == Class::Exchange) {  // shuffles share the port of shared memory
    w.memory_ready = std::max(w.memory_ready, w.sm->shared.take(t, 1) + c.latency);
  }
  if (c.group == Class::Sync || c.group == Class::Control) w.time = std::max(w.time, t + c.latency);
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
  w.sm->shared.use(op.shared_bytes / 128.0);
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

void Replay::finish_warp(WarpSim& w) {
  close_span(w);
  Instance& in = *w.in;
  const double over = std::max(w.time, w.drain);
  end_ = std::max(end_, over);
  wave_end_[in.wave] = std::max(wave_end_[in.wave], over);
  out_.warp_cycles += w.time - w.begin;
  w.ready = {}, w.producer = {};
  if (--in.running != 0) return;
  double last = 0;
  for (const auto& each : in.warps) last = std::max(last, std::max(each->time, each->drain));
  if (in.wave + 1 < waves_) start(in.slot, in.wave + 1, last + m_.cta_start);
}

// --- what is kept for people

void Replay::note(WarpSim& w, State s, u32 detail, double begin, double end) {
  if (end <= begin) return;
  WaitTotal& total = out_.waits[{s, detail}];
  ++total.times;
  total.cycles += end - begin;
  if (!w.in->traced) return;
  const bool small = s == State::Result || s == State::Busy;
  if (small && end - begin < kJoinGap) return;  // part of issuing
  close_span(w);
  if (out_.spans.size() >= kMaxSpans) {
    out_.spans_cut = true;
    return;
  }
  const u32 pc = w.at < w.order.size() ? w.record->events[w.order[w.at]] & kPcMask : 0;
  out_.spans.push_back({w.number, s, detail, pc, begin, end});
}

void Replay::busy(WarpSim& w, double begin, double end) {
  WaitTotal& total = out_.waits[{State::Issue, 0}];
  ++total.times;
  total.cycles += end - begin;
  if (!w.in->traced) return;
  if (w.has_open && begin - w.open.end < kJoinGap) {
    w.open.end = end;
    return;
  }
  close_span(w);
  const u32 pc = w.record->events[w.order[w.at]] & kPcMask;
  w.open = {w.number, State::Issue, 0, pc, begin, end};
  w.has_open = true;
}

void Replay::close_span(WarpSim& w) {
  if (!w.has_open) return;
  w.has_open = false;
  if (out_.spans.size() < kMaxSpans) {
    out_.spans.push_back(w.open);
  } else {
    out_.spans_cut = true;
  }
}

void Replay::name_bottleneck() {
  const std::pair<double, const char*> uses[] = {
      {out_.tensor, "tensor"}, {out_.issue, "issue"}, {out_.shared, "shared memory"},
      {out_.l2, "L2"},         {out_.hbm, "HBM"},     {out_.special, "special functions"}};
  const auto top = *std::max_element(std::begin(uses), std::end(uses));
  out_.bottleneck = top.first >= 0.6 ? top.second : "latency";
}

void Replay::conclude() {
  out_.sample_cycles = end_;
  double cycles = end_;
  if (out_.waves > waves_) {
    const double step = waves_ > 1 ? (wave_end_.back() - wave_end_.front()) / (waves_ - 1) : end_;
    cycles += (out_.waves - waves_) * step;
  }
  const double hz = m_.clock_ghz * 1e3;  // cycles per microsecond
  out_.floor_hbm_us = out_.hbm_bytes / (m_.hbm_gbytes * m_.hbm_efficiency) * 1e-3;
  out_.floor_l2_us = out_.l2_bytes / m_.l2_bytes / hz;
  double tensor = 0, issued = 0, shared = 0, l2 = 0, hbm = 0, special = 0;
  for (const auto& sm : sms_) {
    tensor += sm->tensor.busy, shared += sm->shared.busy;
    l2 += sm->l2.busy, hbm += sm->hbm.busy;
    double mma = 0;
    for (const Partition& p : sm->parts) {
      issued += p.issued / 4;
      mma += p.pipe_busy[static_cast<u32>(Pipe::Tensor)] / 4;
      special += p.pipe_busy[static_cast<u32>(Pipe::Special)] / 4;
    }
    tensor += mma;
  }
  const double total = end_ * cluster_size_;
  if (total > 0) {
    out_.tensor = tensor / total, out_.issue = issued / total, out_.shared = shared / total;
    out_.l2 = l2 / total, out_.hbm = hbm / total, out_.special = special / total;
  }
  out_.cycles = cycles;
  out_.floor_tensor_us = end_ > 0 ? tensor / cluster_size_ / hz * (cycles / end_) : 0;
  const double us = std::max({cycles / hz, out_.floor_hbm_us, out_.floor_l2_us});
  out_.microseconds = us + m_.launch_us;
  name_bottleneck();
}

Timing Replay::run() {
  plan();
  for (u32 slot = 0; slot < slots_; ++slot) start(slot, 0, 0);
  while (!queue_.empty()) {
    WarpSim& w = *queue_.top().warp;
    queue_.pop();
    step(w);
  }
  for (const auto& in : live_) {
    if (in->running != 0) throw Error("timing: a replayed warp waits for what never comes");
  }
  conclude();
  return std::move(out_);
}

}  // namespace

const char* state_name(State s) {
  static const char* const names[kStates] = {"issue",           "mbarrier", "barrier",
                                             "cluster barrier", "wgmma",    "copies",
                                             "memory",          "result",   "busy"};
  return names[static_cast<u32>(s)];
}

GridTraffic grid_traffic(const Recording& r) {
  GridTraffic g;
  const double scale = r.scale();
  for (const auto& [base, t] : r.traffic) {
    const double read = static_cast<double>(t.read) * scale;
    const double written = static_cast<double>(t.written) * scale;
    const auto touched = [&](const std::vector<bool>& lines) {
      const auto n = static_cast<double>(std::count(lines.begin(), lines.end(), true));
      return std::min(static_cast<double>(t.bytes), n * 128 * scale);
    };
    g.read += read, g.written += written;
    g.unique_read += std::min(read, touched(t.read_lines));
    g.unique_written += std::min(written, touched(t.written_lines));
  }
  return g;
}

Timing replay(const Recording& recording, const ReplayOptions& options) {
  if (!recording.complete || recording.clusters.empty()) {
    throw Error("timing: the launch has not finished, or none of its CTAs was recorded");
  }
  return Replay(recording, options).run();
}

}  // namespace dsk::emu::timing
