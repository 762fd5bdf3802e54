#include "emu/check/words.hpp"

namespace dsk::emu::check {
namespace {

bool same_group(Scope scope, const Home& a, const Home& b) {
  if (scope == Scope::Cta) return a.cluster == b.cluster && a.rank == b.rank;
  if (scope == Scope::Cluster) return a.cluster == b.cluster;
  return a.device == b.device;
}

// The part of a snapshot about the cluster of `who`: all that a narrow acquire may learn from a
// release that many clusters share.
ForeignPtr own_part(const ForeignPtr& known, const Home& who) {
  for (const auto& entry : *known) {
    if (entry.first == who.cluster) return std::make_shared<Foreign>(1, entry);
  }
  return nullptr;
}

}  // namespace

void Word::publish(Scope scope, const Home& from, const ForeignPtr& known) {
  if (!known) return;
  for (Release& r : releases_) {
    if (r.scope == scope && same_group(scope, r.from, from)) {
      join_foreign(r.known, known);
      return;
    }
  }
  releases_.push_back({scope, from, known});
}

ForeignPtr Word::acquire(Scope scope, const Home& who, ForeignPtr& refused) const {
  ForeignPtr learnt;
  const bool narrow = scope == Scope::Cta || scope == Scope::Cluster;
  for (const Release& r : releases_) {
    if (narrow && r.scope > Scope::Cluster) {
      join_foreign(learnt, own_part(r.known, who));
      join_foreign(refused, r.known);
    } else if (includes(r.scope, r.from, who) && includes(scope, who, r.from)) {
      join_foreign(learnt, r.known);
    } else {
      join_foreign(refused, r.known);
    }
  }
  return learnt;
}

}  // namespace dsk::emu::check
