// A network in one process that does everything a fabric may do to a protocol: puts and
// notifications are delayed, reordered, repeated, lost, and ranks die. What it never does is break
// the contract of transport.hpp: fence() holds. Each rank is a thread of the test.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <random>
#include <vector>

#include "comm/transport.hpp"

namespace dsk::comm {

struct FakeFaults {
  uint64_t seed = 0;
  double repeat = 0.1;   // chance that a delivery happens once more, later
  int lost_source = -1;  // this rank's messages to lost_target vanish
  int lost_target = -1;
  int dying_rank = -1;  // dies at its dying_after-th put
  uint64_t dying_after = 0;
  bool forget_fences = false;  // planted fault: the tests must notice
};

class FakeTransport;

class FakeNetwork {
 public:
  FakeNetwork(int ranks, uint64_t window_bytes, const FakeFaults& faults);
  ~FakeNetwork();
  FakeTransport& endpoint(int rank) { return *endpoints_[rank]; }

 private:
  friend class FakeTransport;
  struct Message {
    int source, target;
    uint64_t number;  // of this path, in order of issue
    uint64_t after;   // deliverable once all earlier numbers of this path are: fence
    bool is_notify;
    uint64_t offset;  // put
    std::vector<std::byte> data;
    uint32_t counter;  // notify
    uint64_t value;
  };
  void send(Message message);
  bool deliver_one();  // with mutex_ held; false when nothing can be delivered
  void apply(const Message& message);

  int ranks_;
  FakeFaults faults_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::mt19937_64 random_;
  std::vector<Message> pending_;
  std::vector<uint64_t> issued_, fenced_;        // per path source * ranks + target
  std::vector<std::vector<uint64_t>> counters_;  // [rank][counter]
  std::vector<std::unique_ptr<std::byte[]>> windows_;
  std::vector<bool> dead_;
  std::vector<uint64_t> puts_;
  std::vector<bool> left_;
  int aborted_by_ = -1;
  std::vector<std::unique_ptr<FakeTransport>> endpoints_;
};

// Thrown in the thread of a rank that dies.
struct FakeDeath {};

class FakeTransport final : public Transport {
 public:
  FakeTransport(FakeNetwork& network, int rank, int ranks, uint64_t window_bytes)
      : Transport(rank, ranks), network_(network), window_bytes_(window_bytes) {}

  std::byte* window() override { return network_.windows_[rank()].get(); }
  uint64_t window_bytes() const override { return window_bytes_; }
  std::byte* peer_window(int peer) override { return peer == rank() ? window() : nullptr; }
  void put(int peer, uint64_t offset, const void* source, uint64_t bytes) override;
  void fence(int peer) override;
  void notify(int peer, uint32_t counter, uint64_t value) override;
  uint64_t count(uint32_t counter) const override;
  Wait wait_count(uint32_t counter, uint64_t value, int peer, Deadline deadline) override;
  PeerState peer_state(int peer) override;
  void abort(uint64_t epoch) override;
  int aborted_by() const override;
  void leave() override;

 private:
  FakeNetwork& network_;
  uint64_t window_bytes_;
};

}  // namespace dsk::comm
