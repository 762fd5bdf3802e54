// How a warp's knowledge travels through words of memory: release and acquire accesses, and fences
// with relaxed accesses around them.
#pragma once

#include "emu/check/words.hpp"
#include "emu/observer.hpp"

namespace dsk::emu::check {

inline constexpr int kScopes = static_cast<int>(Scope::Sys) + 1;

struct SyncState {
  Knowledge knowledge;
  // As Knowledge has it for wider scopes, for .cta and .cluster: these do not travel.
  ForeignPtr flushed_narrow[2], seen_narrow[2];

  // What a strong store after a fence of that scope or a wider one releases.
  ForeignPtr& flushed(Scope s) { return pick(flushed_narrow, knowledge.flushed, s); }
  const ForeignPtr& flushed(Scope s) const { return const_cast<SyncState*>(this)->flushed(s); }
  // What strong loads of that scope saw, which a later fence acquires.
  ForeignPtr& seen(Scope s) { return pick(seen_narrow, knowledge.seen, s); }

 private:
  static ForeignPtr& pick(ForeignPtr* narrow, ForeignPtr* wide, Scope s) {
    return s < Scope::Gpu ? narrow[s != Scope::Cta] : wide[s != Scope::Gpu];
  }
};

inline bool is_strong(const Access& a) { return a.atomic || a.semantics != Semantics::Weak; }
// PTX's defaults: atomics .gpu, volatile accesses as relaxed.sys.
Scope scope_of(const Access& access);

// Before a strong access writes, and after one has read. `refused` collects what a wider scope
// would have brought.
void release_into(Word& word, const SyncState& state, const Home& home, const Access& access);
void acquire_from(const Word& word, SyncState& state, const Home& home, const Access& access,
                  ForeignPtr& refused);
bool releases(const Access& access);
void fence(SyncState& state, const Home& home, Scope scope, ForeignPtr& refused);

}  // namespace dsk::emu::check
