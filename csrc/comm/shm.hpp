// The transport between processes of one host: a memfd per rank that all of them map, plain and
// streaming stores, futex waits in slices, and pidfds that tell when a peer has died.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <memory>
#include <vector>

#include "comm/transport.hpp"

namespace dsk::comm {

// How a peer finds a rank's memory: /proc/<pid>/fd/<fd>. The nonce proves that it is the right one.
struct ShmHandle {
  int32_t pid = -1, fd = -1;
  uint64_t bytes = 0, nonce = 0;
};

// One rank's memory, mapped: a header (counters, doorbell, notes), then the window. Views of the
// window hold it alive when the transport has moved on to new memory.
class ShmMemory {
 public:
  static std::shared_ptr<ShmMemory> create(uint64_t window_bytes);
  static std::shared_ptr<ShmMemory> open(const ShmHandle& handle, int rank);
  ~ShmMemory();
  ShmMemory(const ShmMemory&) = delete;
  ShmMemory& operator=(const ShmMemory&) = delete;

  struct Header;
  Header& header() const { return *reinterpret_cast<Header*>(base_); }
  std::byte* window() const;
  uint64_t window_bytes() const { return window_bytes_; }
  ShmHandle handle() const;

 private:
  ShmMemory(std::byte* base, uint64_t window_bytes, int fd)
      : base_(base), window_bytes_(window_bytes), fd_(fd) {}
  std::byte* base_;
  uint64_t window_bytes_;
  int fd_;  // of the owner; -1 in a peer
};

class ShmTransport final : public Transport {
 public:
  ShmTransport(int rank, int ranks, uint64_t window_bytes);
  ~ShmTransport() override;

  ShmHandle handle() const { return own_->handle(); }
  // Maps the windows of all ranks; handles[rank] is our own. Dead ranks (bit clear in `alive`) are
  // left out.
  void connect(const std::vector<ShmHandle>& handles, uint64_t alive);

  // Agree with the other survivors on who is dead, and move to fresh memory, so that a stopped
  // rank that wakes up later writes where nobody looks. All survivors must call it; whoever does
  // not answer by the deadline is taken for dead. Returns the mask of living ranks. Throws Error
  // if the others have given up on this rank.
  uint64_t recover(uint64_t alive, Deadline deadline);

  std::shared_ptr<ShmMemory> memory() const { return own_; }

  std::byte* window() override { return own_->window(); }
  uint64_t window_bytes() const override { return own_->window_bytes(); }
  std::byte* peer_window(int peer) override { return mapped(peer).window(); }
  void put(int peer, uint64_t offset, const void* source, uint64_t bytes) override;
  void fence(int peer) override;
  void notify(int peer, uint32_t counter, uint64_t value) override;
  uint64_t count(uint32_t counter) const override;
  Wait wait_count(uint32_t counter, uint64_t value, int peer, Deadline deadline) override;
  PeerState peer_state(int peer) override;
  WaitNote peer_waits(int peer) override;
  uint64_t peer_count(int peer, uint32_t counter) override;
  void abort(uint64_t epoch) override;
  int aborted_by() const override;
  void leave() override;

 private:
  struct Peer {
    std::shared_ptr<ShmMemory> memory;
    int pid = -1, pidfd = -1;
  };
  ShmMemory& mapped(int peer) const;
  void ring(ShmMemory::Header& header) const;
  template <typename Reached>
  Wait wait_until(int peer, Deadline deadline, bool heed_abort, Reached&& reached);
  void watch(int peer, int pid);
  bool died(int peer) const;

  std::shared_ptr<ShmMemory> own_;
  std::vector<Peer> peers_;
};

}  // namespace dsk::comm
