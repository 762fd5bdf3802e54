// What the race checker keeps of each agent: warps, asynchronous operations, barriers.
#pragma once

#include <algorithm>
#include <cstring>
#include <deque>
#include <map>
#include <vector>

#include "emu/check/shadow.hpp"
#include "emu/check/sync_state.hpp"
#include "emu/error.hpp"

namespace dsk::emu::check {

// An asynchronous operation as an agent. A slot is used again only by an issuer who knows that the
// previous operation is over, so that knowing the later clock implies knowing the earlier one.
struct Slot {
  u32 clock = 0;
  bool busy = false;
  AsyncKind kind = AsyncKind::BulkLoad;
  const Warp* warp = nullptr;
  u32 pc = 0;
};

// Operations issued but not yet waited for, in the groups that their issuer commits.
struct PendingGroups {
  std::vector<Epoch> open;
  std::deque<std::vector<Epoch>> committed;

  void commit() {
    committed.push_back(std::move(open));
    open.clear();
  }
};

struct WarpState : SyncState {
  // A bulk store's two halves: the source is read when wait_group.read says so, the destination
  // written when wait_group does.
  PendingGroups bulk, bulk_writes, cp_async;
  std::vector<Epoch> wgmma;  // issued, not committed
  Epoch writer;              // all bulk stores' writes to global memory; clock 0: none yet
  u64 wgmma_over = 0;        // groups
  u64 looked_at = 0;         // the last global address read: what a polling warp polls
  u32 looked_bytes = 0;
  u32 last_barrier = 0;  // the warp's own clock then

  // The warp comes to a barrier of its CTA: what it wrote before the one before that has drained.
  void drain(Agent self) {
    if (last_barrier != 0) knowledge.drained.set(self, last_barrier);
    last_barrier = knowledge.happened.of(self);
  }
};

inline constexpr u32 kWarpsPerGroup = 4;

struct WgmmaGroup {
  Knowledge done;
  u32 waits = 0;  // of its warps
};

struct BarrierState {
  Knowledge gathering;
  std::map<u64, Knowledge> phases;  // the last few complete ones
};

// A store that may be harmless, and the bytes that it overwrites.
struct HeldStore {
  std::vector<Hazard> hazards;
  std::vector<std::pair<const u8*, std::vector<u8>>> pieces;

  void keep(const u8* at, u32 bytes) { pieces.emplace_back(at, std::vector<u8>(at, at + bytes)); }
  bool changed() const {
    return std::any_of(pieces.begin(), pieces.end(), [](const auto& piece) {
      return std::memcmp(piece.first, piece.second.data(), piece.second.size()) != 0;
    });
  }
};

const char* name_of(AsyncKind kind);
// A finding's kind, and the end of the sentence that reports it.
const char* kind_of(Conflict conflict);
const char* explain(Conflict conflict);

}  // namespace dsk::emu::check
