#include "comm/fake.hpp"

#include <algorithm>
#include <cstring>

#include "check.hpp"

namespace dsk::comm {

FakeNetwork::FakeNetwork(int ranks, uint64_t window_bytes, const FakeFaults& faults)
    : ranks_(ranks),
      faults_(faults),
      random_(faults.seed),
      issued_(ranks * ranks),
      fenced_(ranks * ranks),
      counters_(ranks, std::vector<uint64_t>(proto::kCounterSlots)),
      dead_(ranks),
      left_(ranks),
      puts_(ranks) {
  for (int r = 0; r < ranks; ++r) {
    windows_.push_back(std::make_unique<std::byte[]>(window_bytes));
    endpoints_.push_back(std::make_unique<FakeTransport>(*this, r, ranks, window_bytes));
  }
}

FakeNetwork::~FakeNetwork() = default;

void FakeNetwork::send(Message message) {
  const bool lost = message.source == faults_.lost_source && message.target == faults_.lost_target;
  if (!lost) pending_.push_back(std::move(message));
  changed_.notify_all();
}

void FakeNetwork::apply(const Message& m) {
  if (m.is_notify) {
    uint64_t& counter = counters_[m.target][m.counter];
    counter = std::max(counter, m.value);
  } else if (!m.data.empty()) {
    std::memcpy(windows_[m.target].get() + m.offset, m.data.data(), m.data.size());
  }
}

bool FakeNetwork::deliver_one() {
  if (pending_.empty()) return false;
  std::uniform_int_distribution<size_t> any(0, pending_.size() - 1);
  for (size_t start = any(random_), i = 0; i < pending_.size(); ++i) {
    const size_t at = (start + i) % pending_.size();
    const Message& m = pending_[at];
    const bool blocked = std::any_of(pending_.begin(), pending_.end(), [&](const Message& other) {
      return other.source == m.source && other.target == m.target && other.number < m.after;
    });
    if (blocked && !faults_.forget_fences) continue;
    apply(m);
    // Repeated: it stays for another delivery. A fence covers all deliveries of a put.
    if (std::uniform_real_distribution<>(0, 1)(random_) >= faults_.repeat) {
      pending_.erase(pending_.begin() + static_cast<std::ptrdiff_t>(at));
    }
    changed_.notify_all();
    return true;
  }
  return false;
}

void FakeTransport::put(int peer, uint64_t offset, const void* source, uint64_t bytes) {
  const std::lock_guard<std::mutex> lock(network_.mutex_);
  DSK_CHECK(offset + bytes <= window_bytes_, "put: expected to end within ", window_bytes_,
            " bytes, got ", offset + bytes);
  if (rank() == network_.faults_.dying_rank &&
      network_.puts_[rank()]++ >= network_.faults_.dying_after) {
    network_.dead_[rank()] = true;
    // What it has sent may be lost with it.
    std::erase_if(network_.pending_, [&](const auto& m) { return m.source == rank(); });
    network_.changed_.notify_all();
    throw FakeDeath{};
  }
  const size_t path = rank() * ranks() + peer;
  FakeNetwork::Message m{};
  m.source = rank(), m.target = peer, m.number = network_.issued_[path]++;
  m.offset = offset;  // after = 0: a put waits for nothing
  const auto* data = static_cast<const std::byte*>(source);
  m.data.assign(data, data + bytes);
  network_.send(std::move(m));
}

void FakeTransport::fence(int peer) {
  const std::lock_guard<std::mutex> lock(network_.mutex_);
  const size_t path = rank() * ranks() + peer;
  network_.fenced_[path] = network_.issued_[path];
}

void FakeTransport::notify(int peer, uint32_t counter, uint64_t value) {
  const std::lock_guard<std::mutex> lock(network_.mutex_);
  const size_t path = rank() * ranks() + peer;
  FakeNetwork::Message m{};
  m.source = rank(), m.target = peer, m.number = network_.issued_[path]++;
  m.after = network_.fenced_[path];
  m.is_notify = true, m.counter = counter, m.value = value;
  network_.send(std::move(m));
}

uint64_t FakeTransport::count(uint32_t counter) const {
  const std::lock_guard<std::mutex> lock(network_.mutex_);
  return network_.counters_[rank()][counter];
}

Wait FakeTransport::wait_count(uint32_t counter, uint64_t value, int peer, Deadline deadline) {
  std::unique_lock<std::mutex> lock(network_.mutex_);
  while (network_.counters_[rank()][counter] < value) {
    if (network_.aborted_by_ >= 0) return Wait::kAborted;
    // Who waits moves the network on, one delivery at a time.
    if (network_.deliver_one()) {
      lock.unlock();
      lock.lock();
      continue;
    }
    if (network_.dead_[peer]) return Wait::kPeerDead;
    if (network_.left_[peer]) return Wait::kPeerLeft;
    if (network_.changed_.wait_until(lock, deadline) == std::cv_status::timeout) {
      return Wait::kTimeout;
    }
  }
  return Wait::kReached;
}

PeerState FakeTransport::peer_state(int peer) {
  const std::lock_guard<std::mutex> lock(network_.mutex_);
  return network_.dead_[peer] ? PeerState::kDead : PeerState::kAlive;
}

void FakeTransport::abort(uint64_t) {
  const std::lock_guard<std::mutex> lock(network_.mutex_);
  if (network_.aborted_by_ < 0) network_.aborted_by_ = rank();
  network_.changed_.notify_all();
}

void FakeTransport::leave() {
  const std::lock_guard<std::mutex> lock(network_.mutex_);
  network_.left_[rank()] = true;
  network_.changed_.notify_all();
}

int FakeTransport::aborted_by() const {
  const std::lock_guard<std::mutex> lock(network_.mutex_);
  return network_.aborted_by_;
}

}  // namespace dsk::comm
