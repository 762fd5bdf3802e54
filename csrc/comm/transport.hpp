// What the exchange needs of a machine: a window of memory per rank that peers write into, counters
// that say when the writes are visible, and the truth about peers that stay silent.
//
// The contract is the least that every fabric offers. Puts are not ordered among each other.
// fence(peer) orders: what was put there before it is visible before any notification after it.
// notify() raises a counter at the peer (never lowers it: a repeated notification does no harm).
// Every wait has a deadline. Atomics on remote memory are not required. A backend whose peers'
// memory can be loaded and stored says so by peer_window().
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "proto/ep_epoch.hpp"

namespace dsk::comm {

using Clock = std::chrono::steady_clock;
using Deadline = Clock::time_point;

enum class PeerState { kAlive, kStopped, kDead, kUnknown };
enum class Wait { kReached, kTimeout, kPeerDead, kPeerLeft, kAborted };

inline const char* state_name(PeerState state) {
  static constexpr const char* kNames[] = {"alive", "stopped", "dead", "unknown"};
  return kNames[static_cast<int>(state)];
}

// What a rank says about its own wait, for the reports of others.
struct WaitNote {
  uint32_t counter = UINT32_MAX;  // UINT32_MAX: not waiting
  uint64_t value = 0;
  double seconds = 0;
};

class Transport {
 public:
  Transport(int rank, int ranks) : rank_(rank), ranks_(ranks) {}
  virtual ~Transport() = default;
  Transport(const Transport&) = delete;
  Transport& operator=(const Transport&) = delete;

  int rank() const { return rank_; }
  int ranks() const { return ranks_; }

  virtual std::byte* window() = 0;
  virtual uint64_t window_bytes() const = 0;
  // The peer's window for loads and stores, or null where only puts reach it.
  virtual std::byte* peer_window(int peer) = 0;

  virtual void put(int peer, uint64_t offset, const void* source, uint64_t bytes) = 0;
  virtual void fence(int peer) = 0;
  virtual void notify(int peer, uint32_t counter, uint64_t value) = 0;
  void put_notify(int peer, uint64_t offset, const void* source, uint64_t bytes, uint32_t counter,
                  uint64_t value) {
    put(peer, offset, source, bytes);
    fence(peer);
    notify(peer, counter, value);
  }

  virtual uint64_t count(uint32_t counter) const = 0;
  // Until count(counter) >= value. `peer` is who raises it.
  virtual Wait wait_count(uint32_t counter, uint64_t value, int peer, Deadline deadline) = 0;

  virtual PeerState peer_state(int peer) = 0;
  virtual WaitNote peer_waits(int) { return {}; }
  virtual uint64_t peer_count(int, uint32_t) { return UINT64_MAX; }  // unknown
  // Make every wait of every peer of this epoch, and of this rank, end with kAborted.
  virtual void abort(uint64_t epoch) = 0;
  virtual int aborted_by() const = 0;  // -1: nobody
  // Make waits for this rank end with kPeerLeft, unless it raised their counter before it left.
  // Waits for others go on: what this rank owed to calls that it has completed is there.
  virtual void leave() = 0;

 private:
  int rank_, ranks_;
};

}  // namespace dsk::comm
