#include "emu/check/global_side.hpp"

#include <bit>
#include <cstring>

#include "emu/machine.hpp"
#include "emu/memory.hpp"
#include "emu/system.hpp"

namespace dsk::emu::check {
namespace {

constexpr std::size_t kAcquiresKept = 64;  // of one tensor map
constexpr u64 kMapBytes = 128;

std::string place_text(u64 address) {
  Allocation range;
  if (!AddressSpace::instance().find(address, 1, &range)) return "freed global memory";
  const std::string name = range.name.empty() ? "an allocation" : "'" + range.name + "'";
  return "offset " + std::to_string(address - range.base) + " of " + name;
}

// Rows of equal length at one distance, as tensor copies have them, are one box.
template <class Visit>
void for_each_box(const std::vector<Footprint>& parts, Visit visit) {
  for (std::size_t k = 0; k < parts.size();) {
    const Footprint& first = parts[k];
    Box box{first.address, first.bytes, 0, 1};
    std::size_t next = k + 1;
    if (first.space == Space::Global && next < parts.size() &&
        parts[next].address > first.address) {
      box.pitch = parts[next].address - first.address;
    }
    while (box.pitch != 0 && next < parts.size() && parts[next].space == Space::Global &&
           parts[next].kind == first.kind && parts[next].bytes == first.bytes &&
           parts[next].address == first.address + box.rows * box.pitch) {
      ++box.rows, ++next;
    }
    if (first.space == Space::Global && first.bytes != 0) visit(first.kind, box);
    k = next;
  }
}

const char* kind_of(GlobalConflict conflict) {
  switch (conflict) {
    case GlobalConflict::Race:
      return "global-race";
    case GlobalConflict::Scope:
    case GlobalConflict::ReleaseScope:
      return "scope-too-narrow";
    case GlobalConflict::GridDependency:
      return "missing-grid-wait";
    case GlobalConflict::UnfencedWrite:
      return "missing-proxy-fence";
    case GlobalConflict::UnfencedRead:
      return "formal-proxy-order";
    default:
      return "uninitialized-read";
  }
}

const char* explain(GlobalConflict conflict) {
  switch (conflict) {
    case GlobalConflict::Race:
      return " with nothing to order the two";
    case GlobalConflict::Scope:
      return ": both are strong, but the scope of one does not include the other";
    case GlobalConflict::ReleaseScope:
      return ": a release and an acquire lie between, but the scope of one does not include the "
             "other";
    case GlobalConflict::GridDependency:
      return " in the preceding grid: no griddepcontrol.wait comes before";
    case GlobalConflict::UnfencedWrite:
      return " through the generic proxy: no fence.proxy.async between";
    default:
      return " through the generic proxy: ordered, but the memory model asks for a proxy fence as "
             "well";
  }
}

}  // namespace

GlobalSide::GlobalSide(const Cluster& cluster, Agent predecessor)
    : cluster_(cluster), record_(GlobalMemory::instance().enter(cluster, predecessor)) {}

Region* GlobalSide::region(u64 address) {
  GlobalMemory& memory = GlobalMemory::instance();
  if (generation_ != memory.generation()) {
    for (auto& r : recent_) r.reset();
    generation_ = memory.generation();
  }
  for (const auto& r : recent_) {
    if (r && address >= r->base && address < r->end) return r.get();
  }
  std::shared_ptr<Region>& slot = recent_[next_way_++ % kWays];
  slot = memory.region(address);
  return slot.get();
}

void GlobalSide::touch(AccessKind kind, const GlobalTouch& touch, Box box, const SyncState& state) {
  const Asker asker{*record_, state.knowledge, refused_};
  while (box.rows != 0 && box.bytes != 0) {
    Region* r = region(box.address);
    if (r == nullptr) return;  // out of bounds: another check's finding
    const u64 end = box.address + (box.rows - 1) * box.pitch + box.bytes;
    if (end <= r->end) return r->access(kind, touch, box, asker, findings_);
    // Across regions, which is rare: row by row, each cut at the region's end.
    const u64 here = std::min(box.bytes, r->end - box.address);
    r->access(kind, touch, {box.address, here, 0, 1}, asker, findings_);
    if (here < box.bytes) {
      this->touch(kind, touch, {box.address + here, box.bytes - here, 0, 1}, state);
    }
    box.address += box.pitch;
    --box.rows;
  }
}

// When a strong write happened, for those who ask whether they know of it. A write that a fence
// comes before is itself a part of what the two release (PTX memory model, release patterns): who
// sees its value and fences knows of it as of the fence, and may then write there without atomics.
u32 GlobalSide::clock_of_write(Agent agent, const SyncState& state, const Access& access) const {
  const u32 now = state.knowledge.happened.of(agent);
  const Past* fenced = past_of(state.flushed(scope_of(access)), record_->home.cluster);
  return fenced != nullptr && fenced->happened.of(agent) + 1 == now ? now - 1 : now;
}

bool GlobalSide::access(const Warp& w, Agent agent, SyncState& state, u32 pc, u32 mask,
                        const Access& access, const u64* place) {
  const bool strong = is_strong(access);
  GlobalTouch made{record_.get(),
                   agent,
                   state.knowledge.happened.of(agent),
                   pc,
                   static_cast<u16>(w.index),
                   static_cast<u8>(w.cta->rank),
                   strong ? scope_of(access) : Scope::None,
                   strong,
                   false};
  if (strong && access.kind != AccessKind::Read) {
    made.clock = clock_of_write(agent, state, access);
  }
  // Lanes at consecutive addresses, or at the same one, are one run.
  u64 begin = 0, end = 0;
  for (u32 m = mask; m != 0; m &= m - 1) {
    const u64 at = place[std::countr_zero(m)];
    if (end != 0 && at >= begin && at <= end) {
      end = std::max(end, at + access.size);
      continue;
    }
    if (end != 0) touch(access.kind, made, {begin, end - begin, 0, 1}, state);
    begin = at, end = at + access.size;
  }
  if (end != 0) touch(access.kind, made, {begin, end - begin, 0, 1}, state);
  if (!strong || access.kind == AccessKind::Read) return false;
  const bool released = releases(access);
  const bool news = released || state.flushed(Scope::Cta) || state.flushed(Scope::Gpu);
  for (u32 m = mask; m != 0; m &= m - 1) {
    GlobalMemory::instance().words().use(place[std::countr_zero(m)], news, [&](Word& word) {
      release_into(word, state, home(w.cta->rank), access);
    });
  }
  return released;
}

void GlobalSide::value(const Warp& w, SyncState& state, u32 mask, const Access& access,
                       const u64* place) {
  for (u32 m = mask; m != 0; m &= m - 1) {
    GlobalMemory::instance().words().use(place[std::countr_zero(m)], false, [&](const Word& word) {
      acquire_from(word, state, home(w.cta->rank), access, refused_);
    });
  }
}

void GlobalSide::async(const Warp& w, Epoch agent, const SyncState& issuer, u32 pc,
                       const std::vector<Footprint>& footprint, bool generic, bool strong) {
  const GlobalTouch made{record_.get(),
                         agent.agent,
                         agent.clock,
                         pc,
                         static_cast<u16>(w.index),
                         static_cast<u8>(w.cta->rank),
                         strong ? Scope::Gpu : Scope::None,
                         strong,
                         !generic};
  for_each_box(footprint, [&](AccessKind kind, const Box& box) { touch(kind, made, box, issuer); });
}

// A map in global memory that this grid, or one that may still run, has edited: the edit must be
// published by a release fence of the tensormap proxy and an acquire fence must name the map, both
// before the use. Maps that lie in parameters or come from grids that are over need nothing.
void GlobalSide::tensor_map(const Warp& w, const SyncState& state, u32 pc, u64 map) {
  Region* r = region(map);
  if (r == nullptr) return;
  const Asker asker{*record_, state.knowledge, refused_};
  for (u64 at = map; at < map + kMapBytes; at += 8) {
    const GlobalTouch edit = r->last_write(at);
    if (edit.who == nullptr || grid_is_over(asker, edit)) continue;
    bool published = false, acquired = false;
    {
      const std::lock_guard lock(edit.who->mutex);
      published = edit.who->maps_published.of(edit.agent) >= edit.clock;
    }
    const auto it = acquired_maps_.find(map);
    if (it != acquired_maps_.end()) {
      for (const MapAcquire& a : it->second) {
        acquired |= state.knowledge.happened.knows(a.when) &&
                    knows({*record_, a.knowledge, refused_}, edit);
      }
    }
    if (published && acquired) continue;
    const std::string what =
        published ? "no fence.proxy.tensormap::generic.acquire of the map lies between"
                  : "no fence.proxy.tensormap::generic.release follows the edit";
    throw HazardError({make_hazard(
        w, pc, w.active_lanes(), "stale-tensor-map",
        "uses the tensor map at " + place_text(map) + ", which " + who(edit) + " wrote: " + what)});
  }
}

void GlobalSide::map_fence(const Warp&, Epoch agent, const SyncState& state, bool release,
                           u64 map) {
  if (release) {
    const std::lock_guard lock(record_->mutex);
    record_->maps_published.join(state.knowledge.happened);
    return;
  }
  auto& acquires = acquired_maps_[map];
  if (acquires.size() == kAcquiresKept) acquires.erase(acquires.begin());
  acquires.push_back({agent, state.knowledge});
}

std::string GlobalSide::who(const GlobalTouch& touch) const {
  const GridRecord& grid = *touch.who->grid;
  const InstInfo& info = grid.program->info[touch.pc];
  const Dim3& block = touch.who->blocks[touch.rank];
  std::string text;
  if (touch.who != record_.get()) {
    if (&grid != record_->grid.get()) {
      text += "'" + grid.program->name + "' ";
      if (grid.device != record_->home.device) {
        text += "on device " + std::to_string(grid.device) + " ";
      }
    }
    text += "block (" + std::to_string(block.x) + "," + std::to_string(block.y) + "," +
            std::to_string(block.z) + ") ";
  }
  text += "warp " + std::to_string(touch.warp);
  if (touch.async) text += "'s " + grid.program->texts[info.text];
  text += " (PTX line " + std::to_string(info.ptx_line);
  if (info.source.line) text += ", source line " + std::to_string(info.source.line);
  return text + ")";
}

std::string GlobalSide::describe(u64 address, u32 bytes) const {
  std::string text = place_text(address);
  if (AddressCache cache; global_pointer_or_null(cache, address, bytes) != nullptr) {
    u64 value = 0;
    std::memcpy(&value, reinterpret_cast<const void*>(address), std::min<u32>(bytes, 8));
    text += " (holds " + std::to_string(value) + ")";
  }
  const auto region = GlobalMemory::instance().region(address);
  const GlobalTouch last = region ? region->last_write(address) : GlobalTouch{};
  return text + ", last written by " + (last.who ? who(last) : std::string("nobody on a device"));
}

bool GlobalSide::only_stores_meet() const {
  for (const GlobalFinding& f : findings_) {
    if (f.conflict != GlobalConflict::Race || !f.earlier_wrote || f.earlier.async) return false;
    if (f.earlier.who != record_.get()) return false;
  }
  return !findings_.empty();
}

void GlobalSide::report(const Warp& w, u32 pc, u32 lanes, AccessKind kind,
                        const std::string& what) {
  if (findings_.empty()) return;
  std::vector<Hazard> found = errors(w, pc, lanes, kind, what);
  if (!found.empty()) throw HazardError(std::move(found));
}

std::vector<Hazard> GlobalSide::errors(const Warp& w, u32 pc, u32 lanes, AccessKind kind,
                                       const std::string& what) {
  std::vector<Hazard> errors;
  for (const GlobalFinding& f : findings_) {
    std::string message = (what.empty() ? "" : what + " ") +
                          std::string(kind == AccessKind::Read ? "reads " : "writes ") +
                          place_text(f.address);
    const bool formal =
        f.conflict == GlobalConflict::UnfencedRead || f.conflict == GlobalConflict::Uninitialized;
    if (formal && !formal_.emplace(std::pair{pc, f.earlier.pc}, true).second) continue;
    if (f.conflict == GlobalConflict::Uninitialized) {
      message += ", which nobody has written since it was allocated";
    } else {
      message += ", which " + who(f.earlier) + (f.earlier_wrote ? " wrote" : " read") +
                 explain(f.conflict);
    }
    Hazard hazard = make_hazard(w, pc, lanes, kind_of(f.conflict), message);
    if (!formal) {
      errors.push_back(std::move(hazard));
      continue;
    }
    note_formal(*cluster_.grid, std::move(hazard));
  }
  findings_.clear();
  return errors;
}

}  // namespace dsk::emu::check
