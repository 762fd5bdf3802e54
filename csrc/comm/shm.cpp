#include "comm/shm.hpp"

#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <poll.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <random>

#include "check.hpp"
#include "comm/copy.hpp"

#ifndef MFD_CLOEXEC
#define MFD_CLOEXEC 1u
#endif

namespace dsk::comm {
namespace {

constexpr uint64_t kMagic = 0x64736b2d65702d31;  // "dsk-ep-1"
constexpr uint64_t kHeaderBytes = 64 * 1024;
constexpr int kSpins = 200;                  // before a wait sleeps
constexpr int64_t kSliceNanos = 10'000'000;  // how often a sleeper looks whether the peer lives

// One cache line each: counters of different sources are raised by different processes.
struct alignas(64) CounterLine {
  std::atomic<uint64_t> value;
};

// A survivor's word in an agreement round. Two copies: a rank may be one round ahead.
struct RecoveryWord {
  std::atomic<uint64_t> round;
  uint64_t alive;
  ShmHandle handle;
};

long futex(std::atomic<uint32_t>* word, int op, uint32_t value, const timespec* timeout) {
  return syscall(SYS_futex, word, op, value, timeout, nullptr, 0);
}

int64_t nanos_now() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now().time_since_epoch())
      .count();
}

void pause_cpu() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

std::string error_text() { return std::strerror(errno); }

}  // namespace

struct ShmMemory::Header {
  uint64_t magic, nonce;
  alignas(64) std::atomic<uint32_t> doorbell;  // counts notifications of any kind
  std::atomic<uint32_t> sleepers;              // owner waits in the kernel
  alignas(64) std::atomic<uint64_t> aborted;   // 1 + rank that aborted; 0: nobody
  std::atomic<uint64_t> left;                  // bit r: rank r has left the epoch's calls
  // What the owner waits for; written by the owner, read for reports.
  alignas(64) std::atomic<uint32_t> wait_counter;
  std::atomic<uint64_t> wait_value;
  std::atomic<int64_t> wait_since;
  RecoveryWord recovery[2][proto::kMaxRanks];
  CounterLine counters[proto::kCounterSlots];
};

std::byte* ShmMemory::window() const { return base_ + kHeaderBytes; }

std::shared_ptr<ShmMemory> ShmMemory::create(uint64_t window_bytes) {
  static_assert(sizeof(Header) <= kHeaderBytes);
  const int fd = static_cast<int>(syscall(SYS_memfd_create, "dskernels-ep", MFD_CLOEXEC));
  DSK_CHECK(fd >= 0, "shm: memfd_create failed: ", error_text());
  const uint64_t bytes = kHeaderBytes + window_bytes;
  if (ftruncate(fd, static_cast<off_t>(bytes)) != 0) {
    const std::string why = error_text();
    close(fd);
    fail("shm: expected room for ", bytes, " bytes of shared memory, got: ", why);
  }
  void* base = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, 0);
  if (base == MAP_FAILED) {
    const std::string why = error_text();
    close(fd);
    fail("shm: mapping ", bytes, " bytes failed: ", why);
  }
  madvise(base, bytes, MADV_HUGEPAGE);  // a wish; refused on many systems
  std::shared_ptr<ShmMemory> memory(new ShmMemory(static_cast<std::byte*>(base), window_bytes, fd));
  std::random_device random;
  Header& header = memory->header();
  header.nonce = static_cast<uint64_t>(random()) << 32 | random();
  header.wait_counter = UINT32_MAX;
  header.magic = kMagic;
  return memory;
}

std::shared_ptr<ShmMemory> ShmMemory::open(const ShmHandle& handle, int rank) {
  char path[64];
  std::snprintf(path, sizeof path, "/proc/%d/fd/%d", handle.pid, handle.fd);
  const int fd = ::open(path, O_RDWR | O_CLOEXEC);
  DSK_CHECK(fd >= 0, "shm: expected to open the window of rank ", rank, " at ", path,
            ", got: ", error_text(), " (ranks must share a host, a user and a PID namespace)");
  const uint64_t bytes = kHeaderBytes + handle.bytes;
  void* base = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, 0);
  const std::string why = error_text();
  close(fd);
  DSK_CHECK(base != MAP_FAILED, "shm: mapping the window of rank ", rank, " failed: ", why);
  madvise(base, bytes, MADV_HUGEPAGE);
  std::shared_ptr<ShmMemory> memory(new ShmMemory(static_cast<std::byte*>(base), handle.bytes, -1));
  DSK_CHECK(memory->header().magic == kMagic && memory->header().nonce == handle.nonce,
            "shm: expected the window of rank ", rank, " at ", path, ", got other memory");
  return memory;
}

ShmMemory::~ShmMemory() {
  munmap(base_, kHeaderBytes + window_bytes_);
  if (fd_ >= 0) close(fd_);
}

ShmHandle ShmMemory::handle() const { return {getpid(), fd_, window_bytes_, header().nonce}; }

ShmTransport::ShmTransport(int rank, int ranks, uint64_t window_bytes)
    : Transport(rank, ranks), own_(ShmMemory::create(window_bytes)), peers_(ranks) {}

ShmTransport::~ShmTransport() {
  for (Peer& peer : peers_) {
    if (peer.pidfd >= 0) close(peer.pidfd);
  }
}

void ShmTransport::connect(const std::vector<ShmHandle>& handles, uint64_t alive) {
  DSK_CHECK(static_cast<int>(handles.size()) == ranks(), "handles: expected ", ranks(), ", got ",
            handles.size());
  for (int r = 0; r < ranks(); ++r) {
    if (r == rank()) {
      peers_[r].memory = own_;
    } else if (proto::is_alive(alive, r)) {
      DSK_CHECK(handles[r].bytes == own_->window_bytes(), "handles: expected windows of ",
                own_->window_bytes(), " bytes on every rank, got ", handles[r].bytes, " on rank ",
                r, "; the ranks' groups differ");
      peers_[r].memory = ShmMemory::open(handles[r], r);
      watch(r, handles[r].pid);
    }
  }
}

void ShmTransport::watch(int peer, int pid) {
  Peer& p = peers_[peer];
  if (p.pid == pid) return;
  if (p.pidfd >= 0) close(p.pidfd);
  p.pid = pid;
  p.pidfd = pid == getpid() ? -1 : static_cast<int>(syscall(SYS_pidfd_open, pid, 0));
}

ShmMemory& ShmTransport::mapped(int peer) const {
  DSK_CHECK(peer >= 0 && peer < ranks() && peers_[peer].memory != nullptr,
            "peer: expected a rank "
            "of this group that is alive, got ",
            peer);
  return *peers_[peer].memory;
}

void ShmTransport::put(int peer, uint64_t offset, const void* source, uint64_t bytes) {
  stream_copy(peers_[peer].memory->window() + offset, source, bytes);
}

void ShmTransport::fence(int) { stream_fence(); }

void ShmTransport::ring(ShmMemory::Header& header) const {
  header.doorbell.fetch_add(1);
  if (header.sleepers.load() != 0) futex(&header.doorbell, FUTEX_WAKE, INT32_MAX, nullptr);
}

void ShmTransport::notify(int peer, uint32_t counter, uint64_t value) {
  ShmMemory::Header& header = mapped(peer).header();
  std::atomic<uint64_t>& line = header.counters[counter].value;
  // Only this rank writes this counter at this peer, so load and store need no exchange.
  if (line.load(std::memory_order_relaxed) < value) line.store(value, std::memory_order_release);
  ring(header);
}

uint64_t ShmTransport::count(uint32_t counter) const {
  return own_->header().counters[counter].value.load(std::memory_order_acquire);
}

template <typename Reached>
Wait ShmTransport::wait_until(int peer, Deadline deadline, bool heed_abort, Reached&& reached) {
  ShmMemory::Header& header = own_->header();
  for (int spin = 0; spin < kSpins; ++spin) {
    if (reached()) return Wait::kReached;
    pause_cpu();
  }
  while (true) {
    const uint32_t bell = header.doorbell.load();
    header.sleepers.store(1);
    // The bell was read first: what arrives from here on changes it, and the futex does not sleep.
    if (reached()) break;
    const bool aborted = heed_abort && header.aborted.load() != 0;
    const bool peer_left = heed_abort && proto::is_alive(header.left.load(), peer);
    if (aborted || peer_left) {
      header.sleepers.store(0);
      // A peer raises what it owes before it leaves, perhaps just after we looked.
      return reached() ? Wait::kReached : aborted ? Wait::kAborted : Wait::kPeerLeft;
    }
    const Deadline now = Clock::now();
    if (now >= deadline) {
      header.sleepers.store(0);
      return Wait::kTimeout;
    }
    const int64_t left =
        std::chrono::duration_cast<std::chrono::nanoseconds>(deadline - now).count();
    const timespec slice{0, static_cast<long>(std::clamp<int64_t>(left, 1000, kSliceNanos))};
    if (futex(&header.doorbell, FUTEX_WAIT, bell, &slice) != 0 && errno == ETIMEDOUT &&
        died(peer) && !reached()) {
      header.sleepers.store(0);
      return Wait::kPeerDead;
    }
  }
  header.sleepers.store(0);
  return Wait::kReached;
}

Wait ShmTransport::wait_count(uint32_t counter, uint64_t value, int peer, Deadline deadline) {
  ShmMemory::Header& header = own_->header();
  header.wait_value.store(value, std::memory_order_relaxed);
  header.wait_since.store(nanos_now(), std::memory_order_relaxed);
  header.wait_counter.store(counter, std::memory_order_release);
  const Wait result = wait_until(peer, deadline, true, [&] { return count(counter) >= value; });
  // A failed wait keeps its note: others want to know whom this rank was waiting for.
  if (result == Wait::kReached) header.wait_counter.store(UINT32_MAX, std::memory_order_release);
  return result;
}

bool ShmTransport::died(int peer) const {
  const Peer& p = peers_[peer];
  if (p.pidfd >= 0) {
    pollfd poll_for{p.pidfd, POLLIN, 0};
    return poll(&poll_for, 1, 0) > 0;
  }
  return p.pid > 0 && p.pid != getpid() && kill(p.pid, 0) != 0 && errno == ESRCH;
}

PeerState ShmTransport::peer_state(int peer) {
  if (peer == rank()) return PeerState::kAlive;
  if (peers_[peer].memory == nullptr) return PeerState::kUnknown;
  if (died(peer)) return PeerState::kDead;
  char path[64], text[512];
  std::snprintf(path, sizeof path, "/proc/%d/stat", peers_[peer].pid);
  const int fd = ::open(path, O_RDONLY | O_CLOEXEC);
  if (fd < 0) return PeerState::kDead;
  const ssize_t length = read(fd, text, sizeof text - 1);
  close(fd);
  if (length <= 0) return PeerState::kUnknown;
  text[length] = '\0';
  const char* name_end = std::strrchr(text, ')');  // the state follows the command's name
  if (name_end == nullptr || name_end[1] == '\0') return PeerState::kUnknown;
  const char state = name_end[2];
  if (state == 'T' || state == 't') return PeerState::kStopped;
  return state == 'Z' || state == 'X' ? PeerState::kDead : PeerState::kAlive;
}

WaitNote ShmTransport::peer_waits(int peer) {
  if (peers_[peer].memory == nullptr) return {};
  ShmMemory::Header& header = peers_[peer].memory->header();
  WaitNote note;
  note.counter = header.wait_counter.load(std::memory_order_acquire);
  note.value = header.wait_value.load(std::memory_order_relaxed);
  note.seconds =
      static_cast<double>(nanos_now() - header.wait_since.load(std::memory_order_relaxed)) * 1e-9;
  return note;
}

uint64_t ShmTransport::peer_count(int peer, uint32_t counter) {
  if (peers_[peer].memory == nullptr) return UINT64_MAX;
  return peers_[peer].memory->header().counters[counter].value.load(std::memory_order_acquire);
}

void ShmTransport::abort(uint64_t) {
  for (int r = 0; r < ranks(); ++r) {
    if (peers_[r].memory == nullptr) continue;
    ShmMemory::Header& header = peers_[r].memory->header();
    uint64_t nobody = 0;
    header.aborted.compare_exchange_strong(nobody, static_cast<uint64_t>(rank()) + 1);
    ring(header);
  }
}

void ShmTransport::leave() {
  for (const Peer& peer : peers_) {
    if (peer.memory == nullptr) continue;
    peer.memory->header().left.fetch_or(uint64_t{1} << rank());
    ring(peer.memory->header());
  }
}

int ShmTransport::aborted_by() const { return static_cast<int>(own_->header().aborted.load()) - 1; }

uint64_t ShmTransport::recover(uint64_t alive, Deadline deadline) {
  const std::shared_ptr<ShmMemory> fresh = ShmMemory::create(own_->window_bytes());
  std::vector<ShmHandle> handles(ranks());
  handles[rank()] = fresh->handle();
  const auto check_word = [&](const RecoveryWord& word, int from) {
    DSK_CHECK(proto::is_alive(word.alive, rank()), "recover: rank ", from,
              " has given up on this rank (", rank(), "), which was silent for too long");
  };
  // Words of ranks that are gone by now count, too: they may have gone on without us and ended.
  for (int r = 0; r < ranks(); ++r) {
    const RecoveryWord& word = own_->header().recovery[1][r];
    if (word.round.load(std::memory_order_acquire) != 0) check_word(word, r);
  }
  // Round by round, tell everybody whom I think alive, hear the same from them, and keep the
  // intersection; done when all of a round's words are equal. Each round but the last loses at
  // least one rank.
  for (uint64_t round = 1;; ++round) {
    for (int r = 0; r < ranks(); ++r) {
      if (peers_[r].memory == nullptr) continue;  // those given up on are told, too
      RecoveryWord& word = peers_[r].memory->header().recovery[round % 2][rank()];
      word.alive = alive;
      word.handle = handles[rank()];
      word.round.store(round, std::memory_order_release);
      ring(peers_[r].memory->header());
    }
    uint64_t common = alive;
    bool equal = true;
    for (int r = 0; r < ranks(); ++r) {
      if (r == rank() || !proto::is_alive(alive, r)) continue;
      RecoveryWord& word = own_->header().recovery[round % 2][r];
      const Wait got = wait_until(
          r, deadline, false, [&] { return word.round.load(std::memory_order_acquire) >= round; });
      if (got != Wait::kReached) {
        common &= ~(uint64_t{1} << r);
        equal = false;
        continue;
      }
      check_word(word, r);
      equal = equal && word.alive == alive;
      common &= word.alive;
      handles[r] = word.handle;
    }
    if (equal) break;
    // A silent rank used up the deadline: the rest of the agreement gets a short one of its own.
    alive = common;
    deadline = std::max(deadline, Clock::now() + std::chrono::seconds(1));
  }
  own_ = fresh;
  for (Peer& peer : peers_) peer.memory = nullptr;
  connect(handles, alive);
  return alive;
}

}  // namespace dsk::comm
