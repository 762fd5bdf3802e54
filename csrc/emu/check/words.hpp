// Words of memory through which knowledge travels: what was released into each, at which scope.
#pragma once

#include <mutex>
#include <unordered_map>
#include <vector>

#include "emu/check/foreign.hpp"

namespace dsk::emu::check {

// Where an agent lives, as scopes see it.
struct Home {
  ClusterId cluster = 0;
  u32 rank = 0;
  u32 device = 0;
};

// Whether `scope` of an operation made in `from` includes `other`.
inline bool includes(Scope scope, const Home& from, const Home& other) {
  switch (scope) {
    case Scope::Cta:
      return from.cluster == other.cluster && from.rank == other.rank;
    case Scope::Cluster:
      return from.cluster == other.cluster;
    case Scope::Gpu:
      return from.device == other.device;
    default:
      return true;
  }
}

class Word {
 public:
  // A plain store ends the release sequences of those before it.
  void clear() { releases_.clear(); }
  void publish(Scope scope, const Home& from, const ForeignPtr& known);
  // What an acquire by `who` at `scope` learns. What only wider scopes would have brought is added
  // to `refused`, for the report.
  ForeignPtr acquire(Scope scope, const Home& who, ForeignPtr& refused) const;

 private:
  struct Release {
    Scope scope;
    Home from;  // of one of those merged here: only what `scope` distinguishes is meant
    ForeignPtr known;
  };
  std::vector<Release> releases_;
};

// All such words, by address. Thread-safe.
class Words {
 public:
  template <class Use>
  void use(u64 address, bool create, Use use) {
    Stripe& stripe = stripes_[address / 8 % kStripes];
    const std::lock_guard lock(stripe.mutex);
    const auto it = stripe.words.find(address);
    if (it != stripe.words.end())
      use(it->second);
    else if (create)
      use(stripe.words[address]);
  }
  void clear() {
    for (Stripe& stripe : stripes_) {
      const std::lock_guard lock(stripe.mutex);
      stripe.words.clear();
    }
  }

 private:
  static constexpr std::size_t kStripes = 32;
  struct Stripe {
    std::mutex mutex;
    std::unordered_map<u64, Word> words;
  };
  Stripe stripes_[kStripes];
};

}  // namespace dsk::emu::check
