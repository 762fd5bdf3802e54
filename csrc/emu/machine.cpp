// What the parts of the machine share: reports, mbarriers, asynchronous operations.
#include "emu/machine.hpp"

#include <algorithm>
#include <cstring>

#include "emu/system.hpp"

namespace dsk::emu {
namespace {

constexpr i64 kMaxTx = (1 << 20) - 1;
constexpr u32 kMaxCount = (1 << 20) - 1;

// The 8 bytes in shared memory: what the program sees of the object. Bit 0 the phase parity; the
// counts follow. Programs must not look, and a stray write over it is noticed.
u64 mirror_of(const Mbarrier& b) {
  return (b.phase & 1) | (static_cast<u64>(b.pending) & 0xfffff) << 1 | u64{b.count} << 21 |
         (static_cast<u64>(b.tx) & 0x1fffff) << 41 | u64{1} << 62;
}

void write_mirror(Cta& cta, Mbarrier& b) {
  b.mirror = mirror_of(b);
  std::memcpy(cta.shared + b.offset, &b.mirror, 8);
}

std::string offset_text(u32 offset) {
  return "mbarrier at shared offset " + std::to_string(offset - kSharedReserved);
}

// Warpgroups matter to a reader only where there are some; what a warp has done so far says the
// rest.
std::string role_of(const Warp& w) {
  const bool groups = w.cta->cluster->grid->program->uses_wgmma && w.cta->warps.size() > 4;
  std::string role = groups ? "warpgroup " + std::to_string(w.index / 4) : "";
  const char* work = w.wgmma.committed != 0 || !w.wgmma.open.empty() ? "wgmma"
                     : w.copies                                      ? "bulk copies"
                                                                     : "";
  if (*work != 0) role += (role.empty() ? "" : ", ") + std::string(work);
  return role;
}

}  // namespace

void ResultUse::issue(const std::vector<u32>& registers, u64 id, bool accumulate) {
  if (!accumulate) trust(registers);
  auto tile = std::find_if(tiles_.begin(), tiles_.end(), [&](const Tile& t) {
    return t.registers == &registers || *t.registers == registers;
  });
  if (tile == tiles_.end()) tile = tiles_.insert(tile, Tile{&registers});
  if (!accumulate) tile->begun = id;
  if (!tile->unread) ++unread_;
  tile->unread = true;
}

const Hazard* ResultUse::touch(const std::vector<u32>& reads, const std::vector<u32>& writes,
                               u64 id) {
  for (const u32 r : reads) {
    if (r < suspect_.size() && suspect_[r] != 0) return &suspects_[suspect_[r] - 1u];
    for (Tile& tile : tiles_) {
      const auto& own = *tile.registers;
      if (!tile.unread || std::find(own.begin(), own.end(), r) == own.end()) continue;
      tile.used = id;
      tile.unread = false;
      --unread_;
    }
  }
  trust(writes);
  return nullptr;
}

void ResultUse::distrust(const std::vector<u32>& registers, u64 id, const Hazard& hazard) {
  constexpr std::size_t kSuspects = 64;
  for (const Tile& tile : tiles_) {  // the results are gone
    if (*tile.registers == registers && tile.begun > id) return;
  }
  const u32 last = *std::max_element(registers.begin(), registers.end());
  if (suspect_.size() <= last) suspect_.resize(last + 1, 0);
  auto known = std::find_if(suspects_.begin(), suspects_.end(), [&](const Hazard& h) {
    return h.ptx_line == hazard.ptx_line && h.message == hazard.message;
  });
  if (known == suspects_.end()) {
    if (suspects_.size() == kSuspects) suspects_.pop_back();
    known = suspects_.insert(suspects_.end(), hazard);
  }
  const auto place = static_cast<u8>(known - suspects_.begin() + 1);
  for (const u32 r : registers) {
    num_suspect_ += suspect_[r] == 0;
    suspect_[r] = place;
  }
}

bool ResultUse::used_since(const std::vector<u32>& registers, u64 id) const {
  return std::any_of(tiles_.begin(), tiles_.end(), [&](const Tile& tile) {
    if (tile.used <= id) return false;
    return std::find_first_of(tile.registers->begin(), tile.registers->end(), registers.begin(),
                              registers.end()) != tile.registers->end();
  });
}

void ResultUse::trust(const std::vector<u32>& registers) {
  if (num_suspect_ == 0) return;
  for (const u32 r : registers) {
    if (r >= suspect_.size() || suspect_[r] == 0) continue;
    suspect_[r] = 0;
    if (--num_suspect_ == 0) suspects_.clear();
  }
}

Hazard make_hazard(const Warp& w, u32 pc, u32 lanes, const char* kind, const std::string& message) {
  const Grid& grid = *w.cta->cluster->grid;
  const InstInfo& info = grid.program->info[pc];
  Hazard h;
  h.kind = kind;
  h.kernel = grid.program->name;
  h.block[0] = w.cta->index.x, h.block[1] = w.cta->index.y, h.block[2] = w.cta->index.z;
  h.warp = w.index;
  h.role = role_of(w);
  h.lanes = lanes;
  h.ptx_line = info.ptx_line;
  h.source_line = info.source.line;
  if (grid.module) {
    const auto it = grid.module->file().files.find(info.source.file);
    if (it != grid.module->file().files.end()) h.source_file = it->second;
  }
  h.message = grid.program->texts[info.text] + ": " + message;
  return h;
}

void fail(const Warp& w, u32 lanes, const char* kind, const std::string& message) {
  throw HazardError({make_hazard(w, w.current_pc, lanes, kind, message)});
}

void note_formal(Grid& grid, Hazard hazard) {
  const bool usual = hazard.kind == "formal-proxy-order";
  const bool lenient = hazard.kind == "uninitialized-read";
  const Strict least = lenient ? Strict::All : Strict::Order;
  if (!usual && grid.config.strict >= least) throw HazardError({std::move(hazard)});
  hazard.severity = Severity::Formal;
  const std::lock_guard<std::mutex> lock(grid.mutex);
  grid.stats.hazards.push_back(std::move(hazard));
}

void notify(const Warp& w, SyncKind kind, u32 mask, u64 a, u64 b, u64 c) {
  for (auto& o : w.cta->cluster->observers) {
    o->on_sync(w, {kind, mask, w.current_pc, a, b, c});
  }
}

u32 Cluster::random(u32 bound) {
  rng = rng * 6364136223846793005ull + 1442695040888963407ull;
  return bound == 0 ? 0 : static_cast<u32>((rng >> 33) % bound);
}

bool Cluster::done() const {
  for (const auto& cta : ctas) {
    if (!cta->done()) return false;
  }
  return true;
}

Mbarrier* Cta::find_mbarrier(u32 offset) {
  for (Mbarrier& b : mbarriers) {
    if (b.offset == offset) return &b;
  }
  return nullptr;
}

Mbarrier& mbarrier_at(Warp& w, Cta& cta, u32 offset, u32 lanes, const char* what) {
  Mbarrier* b = cta.find_mbarrier(offset);
  if (b == nullptr) {
    fail(w, lanes, "mbarrier-uninitialized",
         std::string(what) + " on an uninitialized " + offset_text(offset));
  }
  u64 seen;
  std::memcpy(&seen, cta.shared + offset, 8);
  if (seen != b->mirror) {
    fail(w, lanes, "mbarrier-overwritten",
         offset_text(offset) + " was overwritten since it was initialized");
  }
  return *b;
}

void mbarrier_init(Warp& w, Cta& cta, u32 offset, u32 count, u32 lanes) {
  if (count == 0 || count > kMaxCount) {
    fail(w, lanes, "mbarrier-bad-count",
         "count must be 1.." + std::to_string(kMaxCount) + ", got " + std::to_string(count));
  }
  Mbarrier* b = cta.find_mbarrier(offset);
  if (b == nullptr) {
    cta.mbarriers.emplace_back();
    b = &cta.mbarriers.back();
  }
  const u64 phase = b->count != 0 ? b->phase + (b->phase & 1) + 2 : 0;  // waits on the old one end
  *b = Mbarrier{};
  b->offset = offset;
  b->count = count;
  b->pending = count;
  b->phase = phase;
  b->init_pc = b->last_pc = w.current_pc;
  b->last_warp = w.index;
  write_mirror(cta, *b);
  ++w.cta->cluster->changes;
  notify(w, SyncKind::MbarInit, lanes, cta.rank, offset, count);
}

void mbarrier_inval(Warp& w, Cta& cta, u32 offset, u32 lanes) {
  mbarrier_at(w, cta, offset, lanes, "mbarrier.inval");
  std::erase_if(cta.mbarriers, [&](const Mbarrier& b) { return b.offset == offset; });
  ++w.cta->cluster->changes;
  notify(w, SyncKind::MbarInval, lanes, cta.rank, offset);
}

void mbarrier_update(Warp& w, Cta& cta, Mbarrier& b, i64 arrivals, i64 expect_tx, i64 complete_tx,
                     u32 lanes, const char* what) {
  b.last_pc = w.current_pc;
  b.last_warp = w.index;
  b.tx += expect_tx - complete_tx;
  b.pending -= arrivals;
  if (b.pending < 0) {
    fail(w, lanes, "mbarrier-over-arrival",
         std::string(what) + ": more arrivals than the " + std::to_string(b.count) +
             " expected in phase " + std::to_string(b.phase) + " of the " + offset_text(b.offset) +
             " (was a wait for the slot skipped?)");
  }
  if (b.tx > kMaxTx || b.tx < -kMaxTx) {
    fail(w, lanes, "mbarrier-tx-overflow",
         std::string(what) + ": pending bytes " + std::to_string(b.tx) + " of the " +
             offset_text(b.offset) + " exceed 2^20-1");
  }
  ++w.cta->cluster->changes;
  if (b.pending == 0 && b.tx == 0) {
    const u64 phase = b.phase++;
    b.pending = b.count;
    for (auto& o : w.cta->cluster->observers) o->on_mbarrier_complete(cta.rank, b.offset, phase);
  }
  write_mirror(cta, b);
}

void GroupQueue::commit(u32 mask) {
  AsyncGroup group;
  group.mask = mask;
  // Operations belong to lanes: those of lanes that do not commit stay open.
  std::vector<AsyncPtr> rest;
  for (AsyncPtr& op : open) {
    (mask >> op->info.lane & 1 ? group.ops : rest).push_back(std::move(op));
  }
  open = std::move(rest);
  committed.push_back(std::move(group));
}

bool GroupQueue::reached(u32 mask, u64 pending, AsyncOp::Stage stage) {
  while (!committed.empty()) {  // forget what is over
    bool over = true;
    for (const AsyncPtr& op : committed.front().ops) over &= op->stage == AsyncOp::Stage::Done;
    if (!over) break;
    committed.pop_front();
  }
  u64 newer[kLanes] = {};
  for (auto g = committed.rbegin(); g != committed.rend(); ++g) {
    for (const AsyncPtr& op : g->ops) {
      const u32 lane = op->info.lane;
      if ((mask >> lane & 1) && newer[lane] >= pending && op->stage < stage) return false;
    }
    for (int l = 0; l < kLanes; ++l) newer[l] += g->mask >> l & 1;
  }
  return true;
}

AsyncPtr issue_async(Warp& w, u32 lane, AsyncKind kind, u64 bytes,
                     const std::vector<Footprint>& footprint, std::function<void(AsyncOp&)> read,
                     std::function<void(AsyncOp&)> write, u64 map) {
  Cluster& cluster = *w.cta->cluster;
  auto op = std::make_shared<AsyncOp>();
  op->info = {cluster.next_async_id++, kind, &w, lane, w.current_pc, bytes, map};
  op->born = cluster.rounds;
  w.copies |= kind != AsyncKind::CpAsync && kind != AsyncKind::StAsync;
  op->read = std::move(read);
  op->write = std::move(write);
  for (auto& o : cluster.observers) o->on_async_issue(op->info, footprint);
  cluster.async.push_back(op);
  ++cluster.changes;
  return op;
}

}  // namespace dsk::emu
