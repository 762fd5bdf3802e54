// The interpreter: runs warps, splits and merges diverged lanes, moves a cluster forward.
#include <algorithm>
#include <bit>

#include "emu/machine.hpp"
#include "emu/system.hpp"

namespace dsk::emu {
namespace {

constexpr u64 kQuantum = 4096;      // instructions of one warp before the next one's turn
constexpr u32 kYieldsPerTurn = 4;   // polls before the next warp's turn
constexpr u32 kLateRounds = 16;     // unseeded: the age at which asynchronous work is delivered
constexpr u32 kQuietRounds = 8;     // rounds without a change before a cluster counts as idle
constexpr u32 kTimeoutRounds = 64;  // expired try_waits in a row before a cluster counts as stuck

class WarpRunner {
 public:
  WarpRunner(Warp& w, u64 quantum)
      : w_(w), program_(*w.cta->cluster->grid->program), quantum_(quantum) {}

  // Returns the number of instructions executed.
  u64 run() {
    wake();
    while (!w_.done && executed_ < quantum_ && yields_ < kYieldsPerTurn) {
      merge();
      if (!select()) break;
      run_split();
    }
    w_.instructions += executed_;
    w_.thread_instructions += threads_;
    return executed_;
  }
  bool polled() const { return yields_ > 0; }

 private:
  enum class Ready : u8 { Yes, Wait };

  void wake() {
    for (Split& s : w_.splits) {
      if (s.wait == Wait::None || s.wait == Wait::Converge) continue;
      w_.current_pc = s.pc;
      if (!wait_over(w_, s)) continue;
      s.wait = Wait::None;
      for (auto& o : w_.cta->cluster->observers) o->on_resume(w_, s.pc, s.mask);
    }
  }

  static bool mergeable(const Split& s) {
    // A split that has arrived at a barrier must not absorb one that has not.
    return (s.wait == Wait::None && !s.timed_out && s.value == 0) || s.wait == Wait::Converge;
  }

  void merge() {
    auto& splits = w_.splits;
    for (std::size_t a = 0; a < splits.size(); ++a) {
      for (std::size_t b = a + 1; b < splits.size();) {
        if (splits[a].pc == splits[b].pc && mergeable(splits[a]) && mergeable(splits[b])) {
          splits[a].mask |= splits[b].mask;
          splits[a].wait = Wait::None;
          splits.erase(splits.begin() + static_cast<std::ptrdiff_t>(b));
        } else {
          ++b;
        }
      }
    }
  }

  // The runnable split with the smallest pc, or, when lanes poll, each in turn: a lane may poll for
  // what a lane of its own warp must still do.
  bool select() {
    auto& splits = w_.splits;
    std::size_t runnable = 0;
    for (std::size_t k = 0; k < splits.size(); ++k) {
      if (splits[k].wait != Wait::None) continue;
      if (runnable == 0 || splits[k].pc < splits[current_].pc) current_ = k;
      ++runnable;
    }
    if (runnable == 0) {
      check_convergence();
      return false;
    }
    if (runnable > 1 && w_.turn != 0) {
      std::size_t pick = w_.turn++ % runnable;
      for (std::size_t k = 0; k < splits.size(); ++k) {
        if (splits[k].wait == Wait::None && pick-- == 0) current_ = k;
      }
    }
    return true;
  }

  // Nothing can run. If lanes wait for lanes that wait for them, no event will ever help.
  void check_convergence() {
    const auto& splits = w_.splits;
    if (splits.empty()) return;
    for (const Split& s : splits) {
      if (s.wait != Wait::Converge) return;
    }
    const Split& s = splits.front();
    w_.current_pc = s.pc;
    fail(w_, s.mask, "partial-warp",
         "needs all lanes it names, but the warp is split: other lanes wait at PTX line " +
             std::to_string(program_.info[splits.back().pc].ptx_line));
  }

  // Where the selected split must stop to merge or to let lower lanes catch up.
  u32 stop_pc(u32 pc) const {
    u32 stop = ~0u;
    for (std::size_t k = 0; k < w_.splits.size(); ++k) {
      const Split& s = w_.splits[k];
      if (k != current_ && mergeable(s) && s.pc > pc) stop = std::min(stop, s.pc);
    }
    return stop;
  }

  void run_split() {
    const Inst* code = program_.code.data();
    u32 pc = w_.splits[current_].pc;
    const u32 mask = w_.splits[current_].mask;
    const u64 lanes = static_cast<u64>(std::popcount(mask));
    const u32 stop = w_.splits.size() > 1 ? stop_pc(pc) : ~0u;
    const bool watch = w_.cta->cluster->watch_instructions;
    u64 n = executed_;
    const u64 end = quantum_;
    const auto leave = [&](u64 count) {
      threads_ += (count - executed_) * lanes;
      executed_ = count;
    };
    while (true) {
      if (pc >= stop || n >= end) [[unlikely]] {
        w_.splits[current_].pc = pc;
        return leave(n);
      }
      const Inst& i = code[pc];
      if (const u32 run = run_length(i); run > 1 && !watch) {
        const u32 last = pc + static_cast<u32>(std::min<u64>({run, end - n, stop - pc}));
        n += last - pc;
        for (; pc < last; ++pc) {
          w_.current_pc = pc;
          code[pc].fn(w_, code[pc], mask);
        }
        continue;
      }
      u32 m = mask;
      if (i.pred != kNoReg) m &= i.flags & kPredNegated ? ~w_.pred(i.pred) : w_.pred(i.pred);
      w_.current_pc = pc;
      if (watch) [[unlikely]]
        notify_instruction(pc, m);
      ++n;
      if (i.kind == Kind::Plain) [[likely]] {
        if (m != 0) {
          if (i.flags & (kAligned | kMemberMask | kTouchesMatrix)) [[unlikely]] {
            if (!run_special(i, pc, m, mask)) return leave(n - 1);
          } else {
            i.fn(w_, i, m);
          }
        }
        ++pc;
        continue;
      }
      if (i.kind == Kind::Branch) {
        if (m == mask) {
          pc = i.target;
          if (w_.splits.size() > 1) {  // the others may be behind or ahead now
            w_.splits[current_].pc = pc;
            return leave(n);
          }
        } else if (m == 0) {
          ++pc;
        } else {
          diverge(pc, mask, m, i.target);
          return leave(n);
        }
        continue;
      }
      if (i.kind == Kind::Yield) {
        if (m != 0) i.fn(w_, i, m);
        ++pc;
        ++yields_;
        if (w_.splits.size() > 1 || yields_ >= kYieldsPerTurn) {
          w_.turn += w_.splits.size() > 1;
          w_.splits[current_].pc = pc;
          return leave(n);
        }
        continue;
      }
      leave(n);
      if (i.kind == Kind::Exit) return exit_lanes(pc, mask, m);
      if (m == 0) {
        ++pc;
        continue;
      }
      if (!run_blocking(i, pc, m, mask)) return;
      if (w_.done) return;
      ++pc;
    }
  }

  // How many instructions need nothing but their handlers.
  u32 run_length(const Inst& i) const {
    const bool quiet = !w_.cta->cluster->check || w_.wgmma.idle();
    return quiet ? i.quiet_run : i.run;
  }

  void notify_instruction(u32 pc, u32 m) {
    for (auto& o : w_.cta->cluster->observers) o->on_instruction(w_, pc, m);
  }

  void diverge(u32 pc, u32 mask, u32 taken, u32 target) {
    Split& s = w_.splits[current_];
    s.mask = mask & ~taken;
    s.pc = pc + 1;
    Split other;
    other.pc = target;
    other.mask = taken;
    w_.splits.push_back(other);
  }

  void exit_lanes(u32 pc, u32 mask, u32 m) {
    if (m == 0) {
      w_.splits[current_].pc = pc + 1;
      return;
    }
    w_.exited |= m;
    ++w_.cta->cluster->changes;
    if (m == mask) {
      w_.splits.erase(w_.splits.begin() + static_cast<std::ptrdiff_t>(current_));
    } else {
      w_.splits[current_].mask = mask & ~m;
      w_.splits[current_].pc = pc + 1;
    }
    for (Split& s : w_.splits) {  // fewer lanes are needed now
      if (s.wait == Wait::Converge) s.wait = Wait::None;
    }
    if (w_.splits.empty()) {
      w_.done = true;
      on_warp_exit(w_);
    }
  }

  u32 lanes_needed(const Inst& i, u32 m) {
    u32 need = kFullMask;
    if (i.flags & kMemberMask) {
      need = w_.reg<u32>(i.e)[std::countr_zero(m)];
      if ((need & m) == 0) {
        fail(w_, m, "member-mask", "executed by a lane that its member mask does not name");
      }
    }
    return need & w_.active_lanes();
  }

  // False: the split now waits for other lanes.
  bool converge(const Inst& i, u32 pc, u32 m, u32 mask) {
    const u32 need = lanes_needed(i, m);
    if ((m & need) == need) return true;
    if ((mask & need) == need || w_.splits.size() == 1) {
      fail(w_, m, "partial-warp",
           "needs lanes that do not execute it (their predicate is false or they have left)");
    }
    Split& s = w_.splits[current_];
    s.pc = pc;
    s.wait = Wait::Converge;
    return false;
  }

  static bool all_named(const u32* masks, u32 m) {
    for (u32 rest = m; rest != 0; rest &= rest - 1) {
      const int l = std::countr_zero(rest);
      if ((masks[l] >> l & 1) == 0) return false;
    }
    return true;
  }

  // A lane executes an instruction whose mask does not name it: undefined in PTX. Hardware lets
  // whoever executes it take part, which is all lanes if the warp is together; it need not be.
  void loose_mask(u32 m) {
    Cluster& cluster = *w_.cta->cluster;
    const char* text = "a lane is not named by its own member mask";
    if (m != w_.active_lanes()) fail(w_, m, "member-mask", text);
    auto& known = cluster.loose_masks;
    if (std::find(known.begin(), known.end(), w_.current_pc) != known.end()) return;
    known.push_back(w_.current_pc);
    note_formal(*cluster.grid, make_hazard(w_, w_.current_pc, m, "member-mask",
                                           std::string(text) + " (all lanes execute it together)"));
  }

  // Lanes of one instruction may name different groups of lanes (tiles of a warp).
  void run_groups(const Inst& i, u32 m) {
    const u32* masks = w_.reg<u32>(i.e);
    if (!all_named(masks, m)) {
      if (w_.cta->cluster->check) loose_mask(m);
      return i.fn(w_, i, m);
    }
    while (m != 0) {
      const u32 group = masks[std::countr_zero(m)] & m;
      i.fn(w_, i, group);
      m &= ~group;
    }
  }

  bool run_special(const Inst& i, u32 pc, u32 m, u32 mask) {
    if (i.flags & (kAligned | kMemberMask)) {
      if (!converge(i, pc, m, mask)) return false;
      if (watched(w_)) notify(w_, SyncKind::WarpSync, m);
    }
    if ((i.flags & kTouchesMatrix) && w_.cta->cluster->check) check_matrix(pc, m);
    if (i.flags & kMemberMask) {
      run_groups(i, m);
    } else {
      i.fn(w_, i, m);
    }
    return true;
  }

  // The registers of an asynchronous wgmma are not the program's until it has waited.
  void check_matrix(u32 pc, u32 m) {
    WgmmaState& g = w_.wgmma;
    const InstInfo& info = program_.info[pc];
    for (u32 r : info.reads) {
      if (g.pending[r] != 0) {
        fail(w_, m, "wgmma-result-before-wait",
             "reads an accumulator of a wgmma that no wgmma.wait_group has completed");
      }
    }
    for (u32 r : info.writes) {
      if (g.pending[r] != 0 || g.reading[r] != 0) {
        fail(w_, m, g.pending[r] != 0 ? "wgmma-result-before-wait" : "wgmma-operand-overwritten",
             "writes a register that a wgmma in flight still " +
                 std::string(g.pending[r] != 0 ? "accumulates into" : "reads"));
      }
      g.dirty[r] = 1;
    }
    if (!g.use.watches()) return;
    const u64 next = w_.cta->cluster->next_async_id;
    if (const Hazard* race = g.use.touch(info.reads, info.writes, next)) throw HazardError({*race});
  }

  // True: go on with the next instruction. False: the split waits.
  bool run_blocking(const Inst& i, u32 pc, u32 m, u32 mask) {
    if ((i.flags & (kAligned | kMemberMask)) && !converge(i, pc, m, mask)) {
      --executed_;
      return false;
    }
    if ((i.flags & (kAligned | kMemberMask)) && watched(w_)) notify(w_, SyncKind::WarpSync, m);
    Split& s = w_.splits[current_];
    s.pc = pc;
    if (i.blocking(w_, i, m, s) == Step::Next) {
      s.timed_out = false;
      s.value = 0;
      return true;
    }
    for (auto& o : w_.cta->cluster->observers) o->on_wait(w_, pc, m);
    return false;
  }

  Warp& w_;
  const Program& program_;
  u64 quantum_;
  u64 executed_ = 0, threads_ = 0;
  u32 yields_ = 0;
  std::size_t current_ = 0;
};

// --- asynchronous work

void advance(Cluster& cluster, AsyncOp& op, bool both) {
  if (op.stage == AsyncOp::Stage::Issued) {
    op.read(op);
    op.stage = AsyncOp::Stage::Read;
    for (auto& o : cluster.observers) o->on_async_read_done(op.info);
    ++cluster.changes;
    if (!both) return;
  }
  for (auto& o : cluster.observers) o->on_async_landing(op.info);
  op.write(op);
  op.stage = AsyncOp::Stage::Done;
  op.buffer = {};
  for (auto& o : cluster.observers) o->on_async_done(op.info);
  ++cluster.changes;
}

void forget_done(Cluster& cluster) {
  std::erase_if(cluster.async,
                [](const AsyncPtr& op) { return op->stage == AsyncOp::Stage::Done; });
}

bool is_store(const AsyncOp& op) {
  return op.info.kind == AsyncKind::BulkStore || op.info.kind == AsyncKind::TensorStore ||
         op.info.kind == AsyncKind::BulkReduce || op.info.kind == AsyncKind::TensorReduce;
}

// As late as can be without a seed: loads when nobody can run or they are old, stores in two steps
// (source read, then written). With a seed some operations in random order, each one step.
void deliver(Cluster& cluster, bool stalled) {
  if (cluster.async.empty()) return;
  if (cluster.rng != 0) {
    const u32 n = static_cast<u32>(cluster.async.size());
    const u32 steps = stalled ? 1 + cluster.random(n) : cluster.random(n + 1);
    for (u32 k = 0; k < steps && !cluster.async.empty(); ++k) {
      const AsyncPtr op = cluster.async[cluster.random(static_cast<u32>(cluster.async.size()))];
      if (op->stage != AsyncOp::Stage::Done) advance(cluster, *op, cluster.random(2) != 0);
      forget_done(cluster);
    }
    return;
  }
  const std::deque<AsyncPtr> now = cluster.async;
  for (const AsyncPtr& op : now) {
    if (stalled || cluster.rounds - op->born > kLateRounds) advance(cluster, *op, !is_store(*op));
  }
  forget_done(cluster);
}

void flush(Cluster& cluster) {
  while (!cluster.async.empty()) deliver(cluster, true);
}

struct Round {
  u64 executed = 0;
  bool polled = false;
  bool skipped = false;
};

Round run_round(Cluster& cluster) {
  Round round;
  std::vector<Warp*> order;
  for (auto& cta : cluster.ctas) {
    for (auto& warp : cta->warps) {
      if (!warp->done) order.push_back(warp.get());
    }
  }
  const bool seeded = cluster.rng != 0;
  if (seeded) {
    for (std::size_t k = order.size(); k > 1; --k) {
      std::swap(order[k - 1], order[cluster.random(static_cast<u32>(k))]);
    }
  }
  for (Warp* w : order) {
    u64 quantum = kQuantum;
    if (seeded) {
      // Warps are left out at random, but never in every round: who cannot run must show.
      if (order.size() > 1 && cluster.rounds % 4 != 0 && cluster.random(8) < 2) {
        round.skipped = true;
        continue;
      }
      quantum = 16 + cluster.random(1024);
    }
    WarpRunner runner(*w, quantum);
    const u64 n = runner.run();
    round.executed += n;
    round.polled |= runner.polled();
    // A warp that computes for a whole quantum without polling is making progress.
    if (n >= quantum && !runner.polled()) ++cluster.changes;
  }
  return round;
}

// Ends the time limit of every try_wait; false if there is none.
bool expire_waits(Cluster& cluster) {
  bool any = false;
  for (auto& cta : cluster.ctas) {
    for (auto& warp : cta->warps) {
      for (Split& s : warp->splits) {
        if (s.wait == Wait::Mbarrier) s.timed_out = any = true;
      }
    }
  }
  return any;
}

bool waits_for_grid(const Cluster& cluster) {
  for (auto& cta : cluster.ctas) {
    for (auto& warp : cta->warps) {
      for (const Split& s : warp->splits) {
        if (s.wait == Wait::Grid) return true;
      }
    }
  }
  return false;
}

}  // namespace

Slice run_cluster(Cluster& cluster, u64 budget) {
  u64 executed = 0;
  while (true) {
    ++cluster.rounds;
    const u64 before = cluster.changes;
    const Round round = run_round(cluster);
    executed += round.executed;
    if (cluster.done()) {
      flush(cluster);
      return Slice::Done;
    }
    const bool stalled = round.executed == 0 && !round.polled && !round.skipped;
    deliver(cluster, stalled);
    if (round.skipped && cluster.changes == before && executed < budget) continue;
    if (cluster.changes != before) {
      cluster.quiet_rounds = 0;
      if (executed >= budget) return Slice::Progress;
      continue;
    }
    ++cluster.quiet_rounds;
    if (!cluster.async.empty()) {
      if (cluster.quiet_rounds >= kQuietRounds) deliver(cluster, true);
      continue;
    }
    if (stalled) {
      if (waits_for_grid(cluster)) return Slice::Idle;
      const bool expired = expire_waits(cluster);
      if (!expired || cluster.quiet_rounds > kTimeoutRounds) {
        throw DeadlockError("deadlock: no warp of the cluster can go on", describe(cluster));
      }
      continue;
    }
    if (cluster.quiet_rounds % kQuietRounds == 0) {
      expire_waits(cluster);
      if (round.polled) return Slice::Idle;
      // Only expired try_waits are running round in circles.
      if (cluster.quiet_rounds > 4 * kTimeoutRounds) {
        throw DeadlockError("deadlock: every warp waits for a barrier that nobody completes",
                            describe(cluster));
      }
    }
    if (executed >= budget) return Slice::Progress;
  }
}

}  // namespace dsk::emu
