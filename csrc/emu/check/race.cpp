#include "emu/check/race.hpp"

#include <bit>
#include <map>
#include <optional>
#include <set>
#include <tuple>

#include "emu/check/agents.hpp"
#include "emu/check/barrier_init.hpp"
#include "emu/check/global_side.hpp"
#include "emu/check/lane_side.hpp"
#include "emu/check/runs.hpp"
#include "emu/check/shadow.hpp"
#include "emu/check/shared_life.hpp"
#include "emu/machine.hpp"
#include "emu/system.hpp"

namespace dsk::emu::check {
namespace {

class RaceChecker : public ClusterObserver {
 public:
  explicit RaceChecker(const Cluster& cluster)
      : cluster_(cluster), life_(cluster.ctas.size()), lanes_(cluster) {
    for (const auto& cta : cluster.ctas) {
      first_agent_.push_back(num_warps_);
      num_warps_ += static_cast<u32>(cta->warps.size());
      shadows_.emplace_back(cta->shared_bytes);
      written_.push_back(std::make_unique<InitBits>(0, cta->shared_bytes));
    }
    warps_.resize(num_warps_);
    first_slot_ = num_warps_ + 1;  // between them: the grid that griddepcontrol.wait waits for
    global_ = std::make_unique<GlobalSide>(cluster, num_warps_);
    for (Agent a = 0; a < num_warps_; ++a) warps_[a].knowledge.happened.set(a, 1);
  }

  void on_access(const Warp& w, u32 pc, u32 mask, const Access& access, const u64* place,
                 const u32* rank) override {
    const Agent agent = agent_of(w);
    WarpState& state = warps_[agent];
    if (access.space == Space::Local) return;
    settle();
    if (access.space == Space::Global) {
      if (access.kind != AccessKind::Write) {
        state.looked_at = place[std::countr_zero(mask)];
        state.looked_bytes = access.size;
      }
      if (global_->access(w, agent, state, pc, mask, access, place)) tick(agent);
      if (access.kind != AccessKind::Write || !global_->only_stores_meet()) {
        return global_->report(w, pc, mask, access.kind, "");
      }
      for (u32 m = mask; m != 0; m &= m - 1) {
        held_.keep(reinterpret_cast<const u8*>(place[std::countr_zero(m)]), access.size);
      }
      held_.hazards = global_->errors(w, pc, mask, access.kind, "");
      return;
    }
    const bool strong = is_strong(access);
    Touch touch{{agent, state.knowledge.happened.of(agent)}, pc, 0, false, strong};
    findings_.clear();
    for_each_run(shadows_.size(), mask, access, place, rank, [&](u32 cta, u32 offset, u32 bytes) {
      note_shared(w, access.kind, pc, cta, offset, bytes);
      if (cta != w.cta->rank) life_.visit(cta, touch.when, w, pc);
      shadows_[cta].access(access.kind, touch, offset, bytes, state.knowledge, findings_);
      lanes_.relies(w, pc, {agent, state.knowledge.happened}, access.kind, cta, offset, bytes);
      if (strong && access.kind != AccessKind::Read) release_access(agent, access, cta, offset);
    });
    if (strong) {
      meet(w);
    } else {
      lanes_.access(w, pc, mask, access, place, rank);
    }
    if (!hold(mask, access, place, rank)) return report(w, pc, mask, access.kind, "");
    held_.hazards = errors_of(w, pc, mask, access.kind, "");
  }

  void on_value(const Warp& w, u32 pc, u32 mask, const Access& access, const u64* place,
                const u32* rank) override {
    WarpState& state = warps_[agent_of(w)];
    if (access.space == Space::Global) return global_->value(w, state, mask, access, place);
    if (access.space != Space::Shared) return;
    for_each_run(shadows_.size(), mask, access, place, rank, [&](u32 cta, u32 offset, u32) {
      const auto it = words_.find({cta, offset});
      if (it == words_.end()) return;
      acquire_from(it->second, state, global_->home(w.cta->rank), access, global_->refused());
    });
  }

  void on_sync(const Warp& w, const SyncEvent& event) override {
    const Agent agent = agent_of(w);
    WarpState& state = warps_[agent];
    const u64 cta = w.cta->rank;
    settle();
    switch (event.kind) {
      case SyncKind::WarpSync:
        meet(w);
        break;
      case SyncKind::BarArrive:
        state.drain(agent);
        release(agent, named_[{cta, event.a, event.b}]);
        break;
      case SyncKind::BarPass:
        meet(w);
        state.knowledge.join(named_[{cta, event.a, event.b}]);
        if (event.b > 0) named_.erase({cta, event.a, event.b - 1});
        break;
      case SyncKind::ClusterArrive:
        cluster_arrive(agent, event);
        break;
      case SyncKind::ClusterPass:
        meet(w);
        state.knowledge.join(cluster_phase_[event.a]);
        executed_.join(cluster_executed_[event.a]);
        break;
      case SyncKind::MbarInit:
        barriers_[{event.a, event.b}] = BarrierState{};
        written_[event.a]->mark(event.b, 8);
        inits_.init(event.a, event.b, {agent, state.knowledge.happened.of(agent)}, w, event.pc);
        break;
      case SyncKind::FenceMbarInit:
        inits_.fence({agent, state.knowledge.happened.of(agent)});
        break;
      case SyncKind::MbarExpectTx:
        use_barrier(event.a, event.b, w, event.pc, event.mask);
        break;
      case SyncKind::MbarArrive:
        use_barrier(event.a, event.b, w, event.pc, event.mask);
        if (event.a != cta) {
          life_.visit(static_cast<u32>(event.a), {agent, state.knowledge.happened.of(agent)}, w,
                      event.pc);
        }
        if (landing_.clock == 0) {
          const Epoch when{agent, state.knowledge.happened.of(agent)};
          lanes_.arrive(w, when, event.mask, event.pc);
        }
        arrive(agent, barriers_[{event.a, event.b}].gathering);
        break;
      case SyncKind::MbarPass:
        meet(w);
        pass(state, {event.a, event.b}, event.c);
        break;
      case SyncKind::FenceProxyAsync:
        state.knowledge.fenced.join(state.knowledge.happened);
        fence_foreign(state.knowledge.foreign);
        tick(agent);  // what this warp writes from here on is not fenced
        break;
      case SyncKind::FenceProxyTensorMap:
        global_->map_fence(w, {agent, state.knowledge.happened.of(agent)}, state, event.a == 0,
                           event.c);
        tick(agent);
        break;
      case SyncKind::Fence:
        meet(w);
        fence(state, global_->home(w.cta->rank), static_cast<Scope>(event.b), global_->refused());
        tick(agent);
        break;
      case SyncKind::GridWait:
        state.knowledge.happened.set(num_warps_, 1);
        break;
      case SyncKind::Exit:
        check_exit(w);
        break;
      case SyncKind::CpAsyncCommit:
        state.cp_async.commit();
        break;
      case SyncKind::CpAsyncWait:
        wait(state, state.cp_async, event.a);
        break;
      case SyncKind::BulkCommit:
        state.bulk.commit();
        state.bulk_writes.commit();
        break;
      case SyncKind::BulkWait:
        wait(state, state.bulk, event.a);
        wait(state, state.bulk_writes, event.a);
        break;
      case SyncKind::BulkWaitRead:
        wait_read(state, event.a);
        break;
      case SyncKind::WgmmaCommit:  // a = groups committed by this warp, counted from the start
        commit_wgmma(w, state, event.a);
        break;
      case SyncKind::WgmmaWait:  // a = groups of this warp that are over, counted from the start
        while (state.wgmma_over < event.a) wait_wgmma(w, state, ++state.wgmma_over);
        break;
      default:
        break;
    }
  }

  void on_async_issue(const AsyncInfo& info, const std::vector<Footprint>& footprint) override {
    settle();
    const Agent issuer = agent_of(*info.warp);
    WarpState& state = warps_[issuer];
    const Agent agent = take_slot(info, state.knowledge);
    const Epoch when{agent, slots_[agent - first_slot_].clock};
    running_[info.id] = when;
    // cp.async and st.async belong to the generic proxy.
    const bool async = info.kind != AsyncKind::CpAsync && info.kind != AsyncKind::StAsync;
    findings_.clear();
    AccessKind kind = AccessKind::Read;
    for (const Footprint& part : footprint) {
      if (part.space != Space::Shared || part.rank >= shadows_.size()) continue;
      Touch touch{when, info.pc, 0, async, info.kind == AsyncKind::StAsync};
      touch.matrix = info.kind == AsyncKind::Wgmma;
      if (part.quarter > 1) touch.rows = static_cast<u32>(info.id);
      const std::size_t before = findings_.size();
      note_shared(*info.warp, part.kind, info.pc, part.rank, static_cast<u32>(part.address),
                  static_cast<u32>(part.bytes));
      const bool own = part.rank == info.warp->cta->rank;
      if (!own || outlives(info.kind, part.kind)) life_.visit(part.rank, when, *info.warp, info.pc);
      if (own && joins_bulk_group(info)) lanes_.source(info, part);
      shadows_[part.rank].access(part.kind, touch, static_cast<u32>(part.address),
                                 static_cast<u32>(part.bytes), state.knowledge, findings_);
      lanes_.relies(*info.warp, info.pc, {issuer, state.knowledge.happened}, part.kind, part.rank,
                    static_cast<u32>(part.address), static_cast<u32>(part.bytes));
      if (findings_.size() > before) kind = part.kind;
    }
    report(*info.warp, info.pc, 1u << info.lane, kind, name_of(info.kind));
    if (info.kind == AsyncKind::Wgmma) state.wgmma.push_back(when);
    if (info.kind == AsyncKind::CpAsync) state.cp_async.open.push_back(when);
    if (joins_bulk_group(info)) state.bulk.open.push_back(when);
    if (info.kind != AsyncKind::Wgmma) issue_global(info, footprint, when, state);
  }

  void on_async_landing(const AsyncInfo& info) override {
    settle();
    landing_ = running_[info.id];
    landing_kind_ = info.kind;
  }

  // A barrier's phase carries the operation's own effects, not its issuer's past.
  void on_complete_tx(u32 rank, u32 offset) override {
    const Slot& slot = slots_[landing_.agent - first_slot_];
    use_barrier(rank, offset, *slot.warp, slot.pc, slot.warp->live);
    Knowledge& gathering = barriers_[{rank, offset}].gathering;
    gathering.happened.set(landing_.agent, landing_.clock);
    gathering.fenced.set(landing_.agent, landing_.clock);
  }

  void on_async_done(const AsyncInfo& info) override {
    const auto it = running_.find(info.id);
    if (it == running_.end()) return;
    slots_[it->second.agent - first_slot_].busy = false;
    running_.erase(it);
    landing_ = Epoch{};
  }

  std::string describe_wait(const Warp& w, Wait wait) override {
    const WarpState& state = warps_[agent_of(w)];
    if (wait != Wait::None || state.looked_at == 0) return "";
    return "; last read " + global_->describe(state.looked_at, state.looked_bytes);
  }

  void on_cluster_end() override { settle(); }

  void on_mbarrier_complete(u32 rank, u32 offset, u64 phase) override {
    BarrierState& barrier = barriers_[{rank, offset}];
    barrier.phases[phase] = std::move(barrier.gathering);
    barrier.gathering = Knowledge{};
    while (barrier.phases.size() > kPhasesKept) barrier.phases.erase(barrier.phases.begin());
  }

 private:
  using Key = std::pair<u64, u64>;
  static constexpr std::size_t kPhasesKept = 4;

  Agent agent_of(const Warp& w) const { return first_agent_[w.cta->rank] + w.index; }

  static bool joins_bulk_group(const AsyncInfo& info) {
    switch (info.kind) {
      case AsyncKind::BulkStore:
      case AsyncKind::BulkReduce:
      case AsyncKind::TensorStore:
      case AsyncKind::TensorReduce:
        return true;
      default:
        return false;
    }
  }

  void tick(Agent agent) {
    VectorClock& happened = warps_[agent].knowledge.happened;
    happened.set(agent, happened.of(agent) + 1);
  }

  void release(Agent agent, Knowledge& into) {
    into.join(warps_[agent].knowledge);
    tick(agent);
  }

  // An arrive that cp.async.mbarrier.arrive makes for a warp comes when the warp's copies have
  // landed, and carries them; any other carries what the warp knows.
  void arrive(Agent agent, Knowledge& gathering) {
    if (landing_.clock == 0 || landing_kind_ != AsyncKind::CpAsync) {
      release(agent, gathering);
      return;
    }
    const PendingGroups& copies = warps_[agent].cp_async;
    learn(gathering, copies.open);
    for (const auto& group : copies.committed) learn(gathering, group);
  }

  void use_barrier(u64 rank, u64 offset, const Warp& w, u32 pc, u32 lanes) const {
    inits_.use(rank, offset, w, pc, lanes, warps_[agent_of(w)].knowledge.happened, executed_);
  }

  void pass(WarpState& state, const Key& key, u64 phase) {
    const BarrierState& barrier = barriers_[key];
    const auto it = barrier.phases.find(phase);
    if (it != barrier.phases.end()) state.knowledge.join(it->second);
  }

  static void learn(Knowledge& knowledge, const std::vector<Epoch>& epochs) {
    for (const Epoch& e : epochs) {
      knowledge.happened.set(e.agent, e.clock);
      knowledge.fenced.set(e.agent, e.clock);
    }
  }

  static void wait(WarpState& state, PendingGroups& groups, u64 pending) {
    while (groups.committed.size() > pending) {
      learn(state.knowledge, groups.committed.front());
      groups.committed.pop_front();
    }
  }

  // The groups stay for a later full wait.
  static void wait_read(WarpState& state, u64 pending) {
    std::size_t over = state.bulk.committed.size();
    for (const auto& group : state.bulk.committed) {
      if (over-- <= pending) break;
      learn(state.knowledge, group);
    }
  }

  // A group belongs to the warpgroup: it is over for a warp that waits when all four have committed
  // their parts, and what they did before is then over too.
  void commit_wgmma(const Warp& w, WarpState& state, u64 index) {
    WgmmaGroup& group = wgmma_groups_[{agent_of(w) - w.index % kWarpsPerGroup, index}];
    learn(group.done, state.wgmma);
    state.wgmma.clear();
    release(agent_of(w), group.done);
  }
  void wait_wgmma(const Warp& w, WarpState& state, u64 index) {
    const auto it = wgmma_groups_.find({agent_of(w) - w.index % kWarpsPerGroup, index});
    if (it == wgmma_groups_.end()) return;
    state.knowledge.join(it->second.done);
    if (++it->second.waits == kWarpsPerGroup) wgmma_groups_.erase(it);
  }

  Agent take_slot(const AsyncInfo& info, const Knowledge& issuer) {
    std::size_t index = 0;
    for (; index < slots_.size(); ++index) {
      const Slot& slot = slots_[index];
      const Epoch last{first_slot_ + static_cast<Agent>(index), slot.clock};
      // Results of a wgmma are its warp's to use: its slots stay with the warp.
      const bool matrix = slot.kind == AsyncKind::Wgmma || info.kind == AsyncKind::Wgmma;
      if (matrix && (slot.kind != info.kind || slot.warp != info.warp)) continue;
      if (!slot.busy && issuer.happened.knows(last)) break;
    }
    if (index == slots_.size()) slots_.emplace_back();
    Slot& slot = slots_[index];
    ++slot.clock;
    // A wgmma's end is its issuer's wait, which knowledge of the epoch tells.
    slot.busy = info.kind != AsyncKind::Wgmma;
    slot.kind = info.kind;
    slot.warp = info.warp;
    slot.pc = info.pc;
    return first_slot_ + static_cast<Agent>(index);
  }

  // The global side of an asynchronous copy. All bulk stores of a warp write as one agent: their
  // groups complete in order, so knowing a later write is over implies knowing the earlier ones.
  void issue_global(const AsyncInfo& info, const std::vector<Footprint>& footprint, Epoch when,
                    WarpState& state) {
    AccessKind kind = AccessKind::Read;
    if (joins_bulk_group(info)) {
      if (state.writer.clock == 0) {
        state.writer.agent = first_slot_ + static_cast<Agent>(slots_.size());
        slots_.push_back({0, true, info.kind, info.warp, info.pc});  // never anybody else's
      }
      when = {state.writer.agent, ++state.writer.clock};
      state.bulk_writes.open.push_back(when);
      kind = AccessKind::Write;
    }
    const bool reduces = info.kind == AsyncKind::BulkReduce || info.kind == AsyncKind::TensorReduce;
    if (info.map != 0) global_->tensor_map(*info.warp, state, info.pc, info.map);
    global_->async(*info.warp, when, state, info.pc, footprint, info.kind == AsyncKind::CpAsync,
                   reduces);
    global_->report(*info.warp, info.pc, 1u << info.lane, kind, name_of(info.kind));
  }

  void release_access(Agent agent, const Access& access, u32 cta, u32 offset) {
    const Home home = global_->home(warp_at(agent)->cta->rank);
    release_into(words_[{cta, offset}], warps_[agent], home, access);
    if (releases(access)) tick(agent);
  }

  // barrier.cluster.arrive.relaxed orders no memory accesses, only who has come how far.
  void cluster_arrive(Agent agent, const SyncEvent& event) {
    WarpState& state = warps_[agent];
    if (event.b == 0) return release(agent, cluster_phase_[event.a]);
    absorb(cluster_phase_[event.a], global_->home().cluster, state.flushed(Scope::Cluster));
    cluster_executed_[event.a].join(state.knowledge.happened);
    tick(agent);
  }

  // --- shared memory of other CTAs, and of nobody yet, or no more
  static bool outlives(AsyncKind kind, AccessKind access) {
    return access != AccessKind::Read && kind != AsyncKind::CpAsync && kind != AsyncKind::StAsync;
  }

  void check_exit(const Warp& w) {
    if (!w.cta->done()) return;
    VectorClock known = executed_;
    for (const auto& warp : w.cta->warps) known.join(warps_[agent_of(*warp)].knowledge.happened);
    life_.leave(w.cta->rank, known);
    for (const auto& warp : w.cta->warps) {
      const PendingGroups& stores = warps_[agent_of(*warp)].bulk;
      check_stores(known, stores.open);
      for (const auto& group : stores.committed) check_stores(known, group);
    }
  }

  // Shipping kernels leave their last stores to the hardware, which is not known to free shared
  // memory before they have read it.
  void check_stores(const VectorClock& known, const std::vector<Epoch>& stores) {
    for (const Epoch& when : stores) {
      if (known.knows(when)) continue;
      const Slot& slot = slots_[when.agent - first_slot_];
      if (!formal_.insert({slot.pc, slot.pc}).second) continue;
      add_formal(make_hazard(*slot.warp, slot.pc, slot.warp->live, "store-outlives-cta",
                             "reads shared memory of its CTA, which exits without waiting for it"));
    }
  }

  void meet(const Warp& w) {
    const Agent agent = agent_of(w);
    lanes_.meet(w, {agent, warps_[agent].knowledge.happened.of(agent)});
  }

  // --- stores that race with stores of the same bytes
  // Whether all that is wrong with a store is earlier stores of other warps: then the next event,
  // when it has been executed, tells whether it changed anything.
  bool hold(u32 mask, const Access& access, const u64* place, const u32* rank) {
    if (findings_.empty() || access.kind != AccessKind::Write) return false;
    for (const Finding& f : findings_) {
      if (f.conflict != Conflict::Race || !f.earlier_wrote || f.earlier.async) return false;
    }
    for_each_run(shadows_.size(), mask, access, place, rank, [&](u32 cta, u32 offset, u32 bytes) {
      held_.keep(cluster_.ctas[cta]->shared + offset, bytes);
    });
    return true;
  }
  void settle() {
    if (held_.hazards.empty()) [[likely]]
      return;
    const HeldStore held = std::move(held_);
    held_ = {};
    if (held.changed()) throw HazardError(held.hazards);
    for (Hazard hazard : held.hazards) {
      if (!equal_.emplace(hazard.ptx_line, hazard.message).second) continue;
      hazard.kind = "equal-stores";
      hazard.message += " (the same bytes)";
      add_formal(std::move(hazard));
    }
  }

  void note_shared(const Warp& w, AccessKind kind, u32 pc, u32 cta, u32 offset, u32 bytes) {
    InitBits& bits = *written_[cta];
    if (kind != AccessKind::Read) bits.mark(offset, bytes);
    if (kind == AccessKind::Write) return;
    const u64 hole = bits.first_unwritten(offset, bytes);
    if (hole == 0 || !formal_.insert({pc, pc}).second) return;
    add_formal(make_hazard(w, pc, w.active_lanes(), "uninitialized-read",
                           "reads shared offset " + std::to_string(hole - kSharedReserved) +
                               ", which nobody in the CTA has written"));
  }

  void add_formal(Hazard hazard) { note_formal(*cluster_.grid, std::move(hazard)); }

  std::string who(const Finding& finding) const {
    const Agent agent = finding.earlier.when.agent;
    const bool is_warp = agent < num_warps_;
    const Warp* warp = is_warp ? warp_at(agent) : slots_[agent - first_slot_].warp;
    std::string text =
        is_warp ? ""
                : std::string("a ") + name_of(slots_[agent - first_slot_].kind) + " issued by ";
    text += "warp " + std::to_string(warp->index);
    if (cluster_.ctas.size() > 1) text += " of cluster CTA " + std::to_string(warp->cta->rank);
    return text + place_of(*cluster_.grid, finding.earlier.pc);
  }

  const Warp* warp_at(Agent agent) const {
    for (std::size_t rank = cluster_.ctas.size(); rank-- > 0;) {
      if (agent >= first_agent_[rank]) {
        return cluster_.ctas[rank]->warps[agent - first_agent_[rank]].get();
      }
    }
    return nullptr;
  }

  void report(const Warp& w, u32 pc, u32 lanes, AccessKind kind, const std::string& what) {
    if (findings_.empty()) return;
    std::vector<Hazard> errors = errors_of(w, pc, lanes, kind, what);
    if (!errors.empty()) throw HazardError(std::move(errors));
  }

  // A race of rows of A that the results of one warp alone come from: an error if it has used them,
  // or once it does. A tile shorter than the instruction's 64 rows reads what lies behind it and
  // drops the results.
  bool harmless(const Warp& w, u32 pc, const Finding& finding, Hazard hazard) {
    const Warp& reader =
        finding.earlier_wrote ? w : *slots_[finding.earlier.when.agent - first_slot_].warp;
    const Inst& wgmma =
        cluster_.grid->program->code[finding.earlier_wrote ? pc : finding.earlier.pc];
    ResultUse& use = cluster_.ctas[reader.cta->rank]->warps[reader.index]->wgmma.use;
    if (use.used_since(wgmma.ext->matrix_writes, finding.rows)) return false;
    use.distrust(wgmma.ext->matrix_writes, finding.rows, hazard);
    if (!formal_.insert({pc, finding.earlier.pc}).second) return true;
    hazard.message += " (rows whose results are not used)";
    add_formal(std::move(hazard));
    return true;
  }

  // The findings in words; formal ones go to the launch's statistics.
  std::vector<Hazard> errors_of(const Warp& w, u32 pc, u32 lanes, AccessKind kind,
                                const std::string& what) {
    std::vector<Hazard> errors;
    for (const Finding& finding : findings_) {
      const bool formal =
          finding.conflict != Conflict::Race && finding.conflict != Conflict::UnfencedWrite;
      if (formal && !formal_.insert({pc, finding.earlier.pc}).second) continue;
      const std::string text = std::string(what.empty() ? "" : what + " ") +
                               (kind == AccessKind::Read ? "reads" : "writes") + " shared offset " +
                               std::to_string(finding.offset - kSharedReserved) + ", which " +
                               who(finding) + (finding.earlier_wrote ? " wrote" : " read") +
                               explain(finding.conflict);
      Hazard hazard = make_hazard(w, pc, lanes, kind_of(finding.conflict), text);
      if (formal) {
        add_formal(std::move(hazard));
      } else if (finding.rows == 0 || !harmless(w, pc, finding, hazard)) {
        errors.push_back(std::move(hazard));
      }
    }
    return errors;
  }

  const Cluster& cluster_;
  u32 num_warps_ = 0;
  Agent first_slot_ = 0;
  std::unique_ptr<GlobalSide> global_;
  std::vector<Agent> first_agent_;  // of each CTA
  std::vector<WarpState> warps_;
  std::vector<Shadow> shadows_;  // of each CTA
  std::vector<Slot> slots_;
  std::map<u64, Epoch> running_;  // asynchronous operations by id
  Epoch landing_;                 // the one whose effects are arriving; clock 0: none
  AsyncKind landing_kind_ = AsyncKind::BulkLoad;
  std::map<std::tuple<u64, u64, u64>, Knowledge> named_;  // (CTA, barrier id, generation)
  std::map<u64, Knowledge> cluster_phase_;
  std::map<u64, VectorClock> cluster_executed_;
  VectorClock executed_;
  SharedLife life_;
  std::vector<std::unique_ptr<InitBits>> written_;
  std::map<Key, BarrierState> barriers_;
  BarrierInits inits_;
  std::map<Key, WgmmaGroup> wgmma_groups_;  // (first warp of the warpgroup, number of the group)
  std::map<Key, Word> words_;               // of shared memory
  std::vector<Finding> findings_;
  std::set<std::pair<u32, u32>> formal_;
  LaneSide lanes_;
  HeldStore held_;
  std::set<std::pair<u32, std::string>> equal_;
};

class RaceObserver : public Observer {
 public:
  std::unique_ptr<ClusterObserver> on_cluster(const Cluster& cluster) override {
    return std::make_unique<RaceChecker>(cluster);
  }
};

}  // namespace

std::shared_ptr<Observer> make_race_checker() { return std::make_shared<RaceObserver>(); }

}  // namespace dsk::emu::check
