#include "emu/check/sync_state.hpp"

namespace dsk::emu::check {
namespace {

constexpr int kNarrowest = static_cast<int>(Scope::Cta);

bool acquires(const Access& a) {
  return a.semantics == Semantics::Acquire || a.semantics == Semantics::AcqRel ||
         a.semantics == Semantics::Sc;
}

}  // namespace

Scope scope_of(const Access& access) {
  if (access.scope != Scope::None) return access.scope;
  return access.atomic ? Scope::Gpu : Scope::Sys;
}

bool releases(const Access& a) {
  return a.kind != AccessKind::Read &&
         (a.semantics == Semantics::Release || a.semantics == Semantics::AcqRel ||
          a.semantics == Semantics::Sc);
}

void release_into(Word& word, const SyncState& state, const Home& home, const Access& access) {
  // A plain overwrite ends the release sequence; an atomic continues it.
  if (access.kind == AccessKind::Write) word.clear();
  const Scope scope = scope_of(access);
  if (releases(access)) {
    word.publish(scope, home, publish(home.cluster, state.knowledge));
    return;
  }
  const ForeignPtr* wider = nullptr;
  for (int s = static_cast<int>(scope); s >= kNarrowest; --s) {
    const ForeignPtr& flushed = state.flushed(static_cast<Scope>(s));
    if (wider == nullptr || flushed != *wider) {
      word.publish(static_cast<Scope>(s), home, flushed);
    }
    wider = &flushed;
  }
}

void acquire_from(const Word& word, SyncState& state, const Home& home, const Access& access,
                  ForeignPtr& refused) {
  const Scope scope = scope_of(access);
  if (acquires(access)) {
    absorb(state.knowledge, home.cluster, word.acquire(scope, home, refused));
    return;
  }
  for (int s = static_cast<int>(scope); s >= kNarrowest; --s) {
    ForeignPtr unseen;
    join_foreign(state.seen(static_cast<Scope>(s)),
                 word.acquire(static_cast<Scope>(s), home, unseen));
    if (s == static_cast<int>(scope)) join_foreign(refused, unseen);
  }
}

void fence(SyncState& state, const Home& home, Scope scope, ForeignPtr& refused) {
  const int widest = scope == Scope::None ? kScopes - 1 : static_cast<int>(scope);
  for (int s = kNarrowest; s < kScopes; ++s) {
    if (s <= widest)
      absorb(state.knowledge, home.cluster, state.seen(static_cast<Scope>(s)));
    else
      join_foreign(refused, state.seen(static_cast<Scope>(s)));
  }
  const ForeignPtr known = publish(home.cluster, state.knowledge);
  for (int s = kNarrowest; s <= widest; ++s) state.flushed(static_cast<Scope>(s)) = known;
}

}  // namespace dsk::emu::check
