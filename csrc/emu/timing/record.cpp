#include "emu/timing/record.hpp"

#include <algorithm>
#include <array>
#include <bit>
#include <unordered_map>

#include "emu/machine.hpp"
#include "emu/memory.hpp"

namespace dsk::emu::timing {
namespace {

constexpr u32 kBanks = 32, kBankBytes = 4;
constexpr u32 kSector = 32, kLine = 128;
constexpr u64 kMaxEvents = 200'000'000;  // 800 MB: no run that is meant to be timed gets here

// Cycles of the shared-memory port for one request: lanes go in as many passes as 128 bytes need
// (8-byte accesses half a warp at a time, 16-byte ones a quarter), and a pass takes as many cycles
// as one bank has different words to give.
struct Wavefronts {
  u32 taken = 0, least = 0;
};

Wavefronts wavefronts(u32 mask, u32 size, const u64* place) {
  const u32 lanes_per_pass = size >= 16 ? 8 : size == 8 ? 16 : 32;
  Wavefronts w;
  for (u32 first = 0; first < kLanes; first += lanes_per_pass) {
    std::array<std::array<u32, kLanes>, kBanks> words;
    std::array<u8, kBanks> used{};
    u32 most = 0, different = 0;
    for (u32 l = first; l < first + lanes_per_pass; ++l) {
      if ((mask >> l & 1) == 0) continue;
      const u32 begin = static_cast<u32>(place[l]) / kBankBytes;
      const u32 end = (static_cast<u32>(place[l]) + size - 1) / kBankBytes;
      for (u32 word = begin; word <= end; ++word) {
        const u32 bank = word % kBanks;
        auto& in_bank = words[bank];
        const auto stop = in_bank.begin() + used[bank];
        if (std::find(in_bank.begin(), stop, word) != stop || used[bank] == kLanes) continue;
        in_bank[used[bank]++] = word;
        ++different;
        most = std::max<u32>(most, used[bank]);
      }
    }
    w.taken += most;
    w.least += (different + kBanks - 1) / kBanks;
  }
  return w;
}

// A small direct-mapped L1: enough to tell the first touch of a line from the next ones.
class FirstLevel {
 public:
  explicit FirstLevel(u32 lines) : tags_(lines, ~u64{0}), sectors_(lines, 0) {}
  // Whether the sector was there; it is now.
  bool touch(u64 address) {
    const u64 line = address / kLine;
    const std::size_t slot = line % tags_.size();
    const u8 bit = static_cast<u8>(1u << (address % kLine / kSector));
    if (tags_[slot] != line) tags_[slot] = line, sectors_[slot] = 0;
    const bool hit = (sectors_[slot] & bit) != 0;
    sectors_[slot] |= bit;
    return hit;
  }

 private:
  std::vector<u64> tags_;
  std::vector<u8> sectors_;
};

class Recorder : public ClusterObserver {
 public:
  Recorder(const Cluster& cluster, std::shared_ptr<Recording> into)
      : cluster_(cluster), into_(std::move(into)) {
    record_.linear = cluster.linear;
    for (const auto& cta : cluster.ctas) {
      first_warp_.push_back(static_cast<u32>(record_.warps.size()));
      for (const auto& w : cta->warps) {
        record_.warps.emplace_back();
        record_.warps.back().cta = cta->rank;
        record_.warps.back().index = w->index;
      }
      const u32 left = 256 * 1024 - std::min<u32>(cta->shared_bytes, 224 * 1024);
      caches_.emplace_back(left / kLine);
    }
    resumed_.assign(record_.warps.size(), kNone);
    polls_.resize(record_.warps.size());
    counts_.resize(into_->program->code.size());
  }

  void on_instruction(const Warp& w, u32 pc, u32 mask) override {
    const u32 at = slot(w);
    WarpRecord& warp = record_.warps[at];
    const bool again = resumed_[at] == pc;
    resumed_[at] = kNone;
    warp.events.push_back(again ? pc | kResumed : pc);
    if (++total_ > kMaxEvents) throw Error("profiling: more than 2e8 instructions in one cluster");
    counts_[pc].executed += !again;
  }

  // An instruction that has to wait runs again: keep its first try only if it did something.
  void on_wait(const Warp& w, u32 pc, u32) override {
    WarpRecord& warp = record_.warps[slot(w)];
    const u32 last = static_cast<u32>(warp.events.size()) - 1;
    if (!warp.actions.empty() && warp.actions.back().event == last) return;
    warp.events.pop_back();
    --counts_[pc].executed;
  }
  void on_resume(const Warp& w, u32 pc, u32) override {
    const u32 at = slot(w);
    const WarpRecord& warp = record_.warps[at];
    if (!warp.events.empty() && (warp.events.back() & kPcMask) == pc) resumed_[at] = pc;
  }

  void on_access(const Warp& w, u32 pc, u32 mask, const Access& access, const u64* place,
                 const u32* rank) override {
    if (access.space == Space::Shared) {
      shared(w, pc, mask, access, place, rank);
    } else if (access.space == Space::Global) {
      if (access.semantics != Semantics::Weak && access.kind == AccessKind::Read) {
        poll(w, pc, place[std::countr_zero(mask)]);
      }
      global(w, pc, mask, access, place);
    }
  }

  void on_sync(const Warp& w, const SyncEvent& e) override {
    switch (e.kind) {
      case SyncKind::MbarArrive:
        contribute(w,
                   node(Node::Kind::Mbarrier, static_cast<u32>(e.a), static_cast<u32>(e.b), e.c));
        break;
      case SyncKind::MbarPass:
        if (e.c != ~u64{0}) {
          pass(w, node(Node::Kind::Mbarrier, static_cast<u32>(e.a), static_cast<u32>(e.b), e.c));
        }
        break;
      case SyncKind::BarArrive:
        contribute(w, node(Node::Kind::Named, w.cta->rank, static_cast<u32>(e.a), e.b));
        break;
      case SyncKind::BarPass:
        pass(w, node(Node::Kind::Named, w.cta->rank, static_cast<u32>(e.a), e.b));
        break;
      case SyncKind::ClusterArrive:
        contribute(w, node(Node::Kind::Cluster, 0, 0, e.a));
        break;
      case SyncKind::ClusterPass:
        pass(w, node(Node::Kind::Cluster, 0, 0, e.a));
        break;
      case SyncKind::WgmmaCommit:
        act(w, Act::WgmmaCommit, static_cast<u32>(e.a));
        break;
      case SyncKind::WgmmaWait:
        act(w, Act::WgmmaWait, static_cast<u32>(e.a));
        break;
      case SyncKind::BulkCommit:
        act(w, Act::BulkCommit);
        break;
      case SyncKind::BulkWait:
        act(w, Act::BulkWait, static_cast<u32>(e.a));
        break;
      case SyncKind::BulkWaitRead:
        act(w, Act::BulkWaitRead, static_cast<u32>(e.a));
        break;
      case SyncKind::CpAsyncCommit:
        act(w, Act::CpCommit);
        break;
      case SyncKind::CpAsyncWait:
        act(w, Act::CpWait, static_cast<u32>(e.a));
        break;
      default:
        break;
    }
  }

  void on_async_issue(const AsyncInfo& info, const std::vector<Footprint>& footprint) override {
    Operation op;
    op.kind = info.kind;
    op.warp = slot(*info.warp);
    op.pc = info.pc;
    u64 in_global = 0;
    for (const Footprint& f : footprint) {
      if (f.space == Space::Global) {
        in_global += f.bytes;
        count_global(f.address, f.bytes, f.kind != AccessKind::Write, f.kind != AccessKind::Read);
      } else if (f.space == Space::Shared) {
        op.ranks |= 1u << f.rank;
        if (op.shared_bytes == 0) op.shared_offset = static_cast<u32>(f.address);
        if (info.kind == AsyncKind::Wgmma) {
          op.shared_bytes += static_cast<u32>(f.bytes) * (f.quarter != 0 ? 4 : 1);
        } else {
          op.shared_bytes = static_cast<u32>(f.bytes);
        }
        if (info.kind != AsyncKind::Wgmma) {
          (f.kind == AccessKind::Read ? shared_read_ : shared_written_) += f.bytes;
        }
        if (f.rank != info.warp->cta->rank) remote_ += f.bytes;
      }
    }
    // Each of the four warps names the operands of the whole warpgroup.
    if (info.kind == AsyncKind::Wgmma && info.warp->index % 4 == 0)
      wgmma_shared_ += op.shared_bytes;
    op.global_bytes = static_cast<u32>(in_global);
    const u32 index = static_cast<u32>(record_.operations.size());
    operation_of_[info.id] = index;
    record_.operations.push_back(std::move(op));
    act(*info.warp, Act::Issue, index);
  }
  void on_async_landing(const AsyncInfo& info) override {
    const auto it = operation_of_.find(info.id);
    landing_ = it == operation_of_.end() ? kNone : it->second;
  }
  void on_complete_tx(u32 rank, u32 offset) override {
    if (landing_ == kNone) return;
    const Mbarrier* bar = cluster_.ctas[rank]->find_mbarrier(offset);
    const u32 n = node(Node::Kind::Mbarrier, rank, offset, bar->phase);
    ++record_.nodes[n].contributions;
    record_.operations[landing_].nodes.push_back(n);
  }
  void on_async_done(const AsyncInfo& info) override {
    landing_ = kNone;
    operation_of_.erase(info.id);
  }

  void on_cluster_end() override {
    const std::lock_guard lock(into_->mutex);
    into_->clusters.push_back(std::move(record_));
    for (std::size_t pc = 0; pc < counts_.size(); ++pc) {
      PcCount& to = into_->counts[pc];
      const PcCount& from = counts_[pc];
      to.executed += from.executed, to.requests += from.requests;
      to.wavefronts += from.wavefronts, to.least += from.least;
      to.sectors += from.sectors, to.least_sectors += from.least_sectors;
      to.worst = std::max(to.worst, from.worst);
    }
    for (auto& [base, from] : traffic_) {
      const auto [at, fresh] = into_->traffic.try_emplace(base, from);
      if (fresh) continue;
      Traffic& to = at->second;
      to.read += from.read, to.written += from.written;
      for (std::size_t l = 0; l < from.read_lines.size() && l < to.read_lines.size(); ++l) {
        if (from.read_lines[l]) to.read_lines[l] = true;
        if (from.written_lines[l]) to.written_lines[l] = true;
      }
    }
    into_->shared_read += shared_read_, into_->shared_written += shared_written_;
    into_->remote += remote_, into_->wgmma_shared += wgmma_shared_, into_->l1_hits += l1_hits_;
  }

 private:
  u32 slot(const Warp& w) const { return first_warp_[w.cta->rank] + w.index; }

  void act(const Warp& w, Act kind, u32 a = 0, u32 b = 0) {
    WarpRecord& warp = record_.warps[slot(w)];
    const u32 event = warp.events.empty() ? 0 : static_cast<u32>(warp.events.size()) - 1;
    // Lanes of one instruction that pass, or are told of, the same thing count once.
    if (kind == Act::Pass && !warp.actions.empty()) {
      const Action& last = warp.actions.back();
      if (last.event == event && last.act == kind && last.a == a) return;
    }
    warp.actions.push_back({event, kind, a, b});
  }

  // How often a warp looks at a flag before it changes is the emulator's schedule, not the kernel's
  // doing: of one look after another at the same word, with nothing else done, the last one counts.
  void poll(const Warp& w, u32 pc, u64 address) {
    WarpRecord& warp = record_.warps[slot(w)];
    Poll& last = polls_[slot(w)];
    const std::size_t event = warp.events.size() - 1;
    const bool again = last.pc == pc && last.address == address &&
                       warp.actions.size() == last.actions + 1 &&
                       warp.actions.back().event == last.event;
    if (!again) {
      last = {pc, address, static_cast<u32>(event), warp.actions.size()};
      return;
    }
    for (std::size_t e = last.event; e < event; ++e) {
      counts_[warp.events[e] & kPcMask].executed -= (warp.events[e] & kResumed) == 0;
    }
    --counts_[pc].requests;
    warp.events[last.event] = warp.events[event];
    warp.events.resize(last.event + 1);
    warp.actions.resize(last.actions);
  }

  u32 node(Node::Kind kind, u32 rank, u32 place, u64 phase) {
    const u64 key = u64{rank} << 60 | static_cast<u64>(kind) << 58 | u64{place} << 34 |
                    (phase & 0x3ffffffffull);
    const auto [it, fresh] = nodes_.try_emplace(key, static_cast<u32>(record_.nodes.size()));
    if (fresh) record_.nodes.push_back({kind, rank, place, 0});
    return it->second;
  }

  // Arrivals that a landing operation makes (cp.async.mbarrier.arrive) belong to the operation.
  void contribute(const Warp& w, u32 n) {
    ++record_.nodes[n].contributions;
    if (landing_ != kNone) {
      record_.operations[landing_].nodes.push_back(n);
    } else {
      act(w, Act::Arrive, n);
    }
  }
  void pass(const Warp& w, u32 n) { act(w, Act::Pass, n); }

  void shared(const Warp& w, u32 pc, u32 mask, const Access& access, const u64* place,
              const u32* rank) {
    u32 own = 0;
    for (u32 m = mask; m != 0; m &= m - 1) {
      const int l = std::countr_zero(m);
      if (rank[l] == w.cta->rank) own |= 1u << l;
    }
    const u32 far = static_cast<u32>(std::popcount(mask & ~own));
    if (far != 0) {
      remote_ += u64{far} * access.size;
      act(w, Act::Remote, far * access.size);
    }
    if (own == 0) return;
    const Wavefronts taken = wavefronts(own, access.size, place);
    PcCount& c = counts_[pc];
    ++c.requests;
    c.wavefronts += taken.taken, c.least += taken.least;
    c.worst = std::max(c.worst, taken.taken);
    const u64 bytes = static_cast<u64>(std::popcount(own)) * access.size;
    (access.kind == AccessKind::Read ? shared_read_ : shared_written_) += bytes;
    act(w, Act::Shared, taken.taken, taken.least);
  }

  void global(const Warp& w, u32 pc, u32 mask, const Access& access, const u64* place) {
    u64 sectors[kLanes * 2];
    u32 n = 0;
    for (u32 m = mask; m != 0; m &= m - 1) {
      const int l = std::countr_zero(m);
      for (u64 s = place[l] / kSector; s <= (place[l] + access.size - 1) / kSector; ++s) {
        if (n == 0 || sectors[n - 1] != s) sectors[n++] = s;
        if (n == kLanes * 2) break;
      }
    }
    std::sort(sectors, sectors + n);
    n = static_cast<u32>(std::unique(sectors, sectors + n) - sectors);
    PcCount& c = counts_[pc];
    ++c.requests;
    c.sectors += n;
    const u32 bytes = static_cast<u32>(std::popcount(mask)) * access.size;
    c.least_sectors += std::min(n, (bytes + kSector - 1) / kSector);
    const bool read = access.kind != AccessKind::Write, write = access.kind != AccessKind::Read;
    u32 missing = n;
    if (read && !write && access.semantics == Semantics::Weak) {
      missing = 0;
      for (u32 k = 0; k < n; ++k) missing += !caches_[w.cta->rank].touch(sectors[k] * kSector);
      l1_hits_ += n - missing;
    }
    if (missing != 0) {
      for (u32 k = 0; k < n; ++k) count_global(sectors[k] * kSector, kSector, read, write);
    }
    const Act kind = access.atomic ? Act::Atomic : write ? Act::Store : Act::Load;
    act(w, kind, missing, n);
  }

  void count_global(u64 address, u64 bytes, bool read, bool write) {
    Traffic* t = find_traffic(address);
    if (t == nullptr || bytes == 0) return;
    if (read) t->read += bytes;
    if (write) t->written += bytes;
    const u64 first = (std::max(address, t->base) - t->base) / kLine;
    const u64 last = (address + bytes - 1 - t->base) / kLine;
    for (u64 l = first; l <= last && l < t->read_lines.size(); ++l) {
      if (read) t->read_lines[l] = true;
      if (write) t->written_lines[l] = true;
    }
  }

  Traffic* find_traffic(u64 address) {
    if (last_ != nullptr && address >= last_->base && address < last_->base + last_->bytes) {
      return last_;
    }
    auto it = traffic_.upper_bound(address);
    if (it != traffic_.begin()) {
      Traffic& t = std::prev(it)->second;
      if (address < t.base + t.bytes) return last_ = &t;
    }
    Allocation where;
    if (!AddressSpace::instance().find(address, 1, &where)) return nullptr;
    Traffic& t = traffic_[where.base];
    t.name = where.name;
    t.base = where.base, t.bytes = where.bytes;
    t.read_lines.assign((where.bytes + kLine - 1) / kLine, false);
    t.written_lines.assign((where.bytes + kLine - 1) / kLine, false);
    return last_ = &t;
  }

  // A warp's last strong load of global memory.
  struct Poll {
    u32 pc = kNone;
    u64 address = 0;
    u32 event = 0;
    std::size_t actions = 0;  // of the warp, before the load's
  };

  const Cluster& cluster_;
  std::shared_ptr<Recording> into_;
  ClusterRecord record_;
  std::vector<u32> first_warp_;  // by CTA
  std::vector<FirstLevel> caches_;
  std::vector<u32> resumed_;  // by warp: pc whose second try comes next
  std::vector<Poll> polls_;   // by warp
  std::vector<PcCount> counts_;
  std::unordered_map<u64, u32> nodes_, operation_of_;
  std::map<u64, Traffic> traffic_;
  Traffic* last_ = nullptr;
  u32 landing_ = kNone;
  u64 total_ = 0;
  u64 shared_read_ = 0, shared_written_ = 0, remote_ = 0, wgmma_shared_ = 0, l1_hits_ = 0;
};

class RecordingObserver : public Observer {
 public:
  explicit RecordingObserver(std::shared_ptr<Recording> into) : into_(std::move(into)) {}
  bool wants_instructions() const override { return true; }
  std::unique_ptr<ClusterObserver> on_cluster(const Cluster& cluster) override {
    const auto& sample = into_->sample;
    const bool wanted =
        sample.empty() || std::find(sample.begin(), sample.end(), cluster.linear) != sample.end();
    return wanted ? std::make_unique<Recorder>(cluster, into_) : nullptr;
  }
  void on_grid_end(const Grid& grid) override {
    const std::lock_guard lock(into_->mutex);
    into_->launch = grid.stats;
    into_->complete = true;
    std::sort(into_->clusters.begin(), into_->clusters.end(),
              [](const auto& a, const auto& b) { return a.linear < b.linear; });
  }

 private:
  std::shared_ptr<Recording> into_;
};

}  // namespace

double Recording::scale() const {
  return clusters.empty() ? 1.0 : static_cast<double>(clusters_total) / clusters.size();
}

std::vector<u32> sample_of(u32 total, u32 wanted) {
  std::vector<u32> out;
  if (wanted == 0 || wanted >= total) return out;
  for (u32 k = 0; k < wanted; ++k) {
    out.push_back(static_cast<u32>(u64{k} * total / wanted));
  }
  return out;
}

std::shared_ptr<Observer> make_recorder(std::shared_ptr<Recording> into) {
  into->counts.resize(into->program->code.size());
  return std::make_shared<RecordingObserver>(std::move(into));
}

}  // namespace dsk::emu::timing
