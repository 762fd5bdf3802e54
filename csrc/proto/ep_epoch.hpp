// Epochs and counters of the expert-parallel protocol. Standard library only: kernels, CPU code and
// transports share it.
//
// Every rank owns one row of counters per kind, one counter per source rank. A source raises its
// counter at a peer to the number of the call ("epoch") once everything it owes the peer in that
// phase is visible there; counters only grow, so a repeated or late notification does no harm.
//
// Why no buffer of the normal mode needs a second copy: a rank leaves dispatch n only when every
// peer has raised kSent to n, which a peer does after it has read all notices of epoch n; so the
// notice of n + 1 overwrites nothing that is still wanted. Combine alike: kRead (pull) or kReady
// (push) of epoch n comes after the peer's last read of that epoch's notice. Receive regions are
// chosen by their owner and named in the notice, so nobody writes where the owner did not ask.
//
// The low-latency mode has fixed slots, and its receive half may run later (a hook). It keeps
// kLowLatencyDepth copies, and a rank must finish receiving call n - kLowLatencyDepth + 1 before it
// sends call n: a peer that sends n + kLowLatencyDepth - 1 has then seen my send of
// n + kLowLatencyDepth - 2, hence my receipt of n - 1 is done before its copy is written again.
// The way back is bound by the same rule, on its own count: sums of n - kLowLatencyDepth + 1 before
// results of n.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define DSK_HD __host__ __device__
#else
#define DSK_HD
#endif

namespace dsk::proto {

constexpr int kMaxRanks = 64;  // alive masks are one 64-bit word
constexpr int kMaxTopk = 16;
constexpr int kLowLatencyDepth = 2;

enum Counter : uint32_t {
  kNotified,     // dispatch: my counts and the place of my receive region are at the peer
  kSent,         // dispatch: my rows are at the peer
  kAnnounced,    // combine by push: the place of my return region is at the peer
  kReady,        // combine: my results can be read (pull), or are at the peer (push)
  kRead,         // combine by pull: I have read all of the peer's results
  kLowSent,      // low-latency dispatch: my rows and counts are at the peer
  kLowReturned,  // low-latency combine: my results are at the peer
  kForwarded,    // dispatch over nodes: my rows for the peer's node are at the peer
  kPartial,      // combine over nodes: my node's sums for the peer's tokens are at the peer
  kNumCounters
};

constexpr const char* kCounterNames[kNumCounters] = {"notice",
                                                     "rows",
                                                     "return region",
                                                     "results",
                                                     "reading done",
                                                     "low-latency rows",
                                                     "low-latency results",
                                                     "rows to forward",
                                                     "sums of a node"};

DSK_HD constexpr uint32_t counter_index(Counter kind, int source) {
  return static_cast<uint32_t>(kind) * kMaxRanks + static_cast<uint32_t>(source);
}
constexpr uint32_t kCounterSlots = static_cast<uint32_t>(kNumCounters) * kMaxRanks;

// Which copy of the low-latency slots call n uses; the first call is 1.
DSK_HD constexpr int low_latency_copy(uint64_t call) {
  return static_cast<int>(call % kLowLatencyDepth);
}
// The call whose receipt must be complete before `call` may be sent; 0: none.
DSK_HD constexpr uint64_t must_be_received(uint64_t call) {
  return call < kLowLatencyDepth ? 0 : call - kLowLatencyDepth + 1;
}

// Sets of ranks are masks. No set has a bit behind the group's last rank, so a number that is none
// of its ranks is in no set: who asks for membership need not ask for the bounds.
DSK_HD constexpr bool has_rank(uint64_t ranks, int rank) {
  return rank >= 0 && rank < kMaxRanks && (ranks >> rank & 1) != 0;
}
DSK_HD constexpr bool is_alive(uint64_t alive, int rank) { return has_rank(alive, rank); }

DSK_HD inline int lowest_rank(uint64_t ranks) {
#if defined(__CUDA_ARCH__)
  return __ffsll(static_cast<long long>(ranks)) - 1;
#else
  return __builtin_ctzll(ranks);
#endif
}
// Calls body(rank) for each rank of a set, lowest first.
template <typename Body>
DSK_HD void each_rank(uint64_t ranks, Body&& body) {
  for (; ranks != 0; ranks &= ranks - 1) body(lowest_rank(ranks));
}

}  // namespace dsk::proto
