// The simulation's state, shared by replay.cpp (instructions and operations) and replay_grid.cpp
// (from a few CTAs to a launch, and what is kept for people).
#pragma once

#include <deque>
#include <limits>
#include <memory>
#include <queue>

#include "emu/timing/replay.hpp"
#include "emu/timing/resources.hpp"

namespace dsk::emu::timing {
inline constexpr double kNever = std::numeric_limits<double>::infinity();

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
  double drawn = 0;             // up to where the warp's time is accounted for
  State small = State::Result;  // of short stalls since
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

}  // namespace dsk::emu::timing
