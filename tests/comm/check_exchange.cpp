// Dispatch, combine and the low-latency mode over both transports, every rank a thread, for the
// sanitizers: built and run by tests/test_ep_sanitized.py. Prints "ok" or says what differs.
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "comm/exchange.hpp"
#include "comm/fake.hpp"
#include "comm/shm.hpp"

using namespace dsk;
using namespace dsk::comm;

namespace {

constexpr int kRanks = 3, kTopk = 2, kTokens = 20, kElements = 40, kCalls = 6;
constexpr proto::GroupShape kShape{kRanks, kTopk, 2, 3, kTokens, kElements * 4, 0};
constexpr proto::RowShape kRow{kElements * 4, 0, kTopk, 0};

Deadline soon() { return Clock::now() + std::chrono::seconds(60); }

[[noreturn]] void differ(const char* what, int rank) {
  std::printf("rank %d: %s\n", rank, what);
  std::fflush(stdout);
  std::_Exit(1);
}

// x[t] = 100 * rank + t in every element, so a sum says where its parts came from.
struct Tokens {
  std::vector<float> x;
  std::vector<int64_t> idx;
  Tokens(int rank, int call) : x(kTokens * kElements), idx(kTokens * kTopk) {
    std::mt19937 random(static_cast<unsigned>(rank * 1000 + call));
    for (int t = 0; t < kTokens; ++t) {
      for (int e = 0; e < kElements; ++e) x[t * kElements + e] = float(100 * rank + t);
      idx[t * kTopk] = static_cast<int64_t>(random() % 6);
      idx[t * kTopk + 1] = random() % 3 == 0 ? -1 : (idx[t * kTopk] + 1 + random() % 5) % 6;
    }
  }
  int ranks_of(int t) const {
    const int64_t a = idx[t * kTopk] / 2, b = idx[t * kTopk + 1];
    return b >= 0 && b / 2 != a ? 2 : 1;
  }
};

void normal_call(Exchange& exchange, int rank, int call) {
  const Tokens mine(rank, call);
  DispatchInput in{};
  in.tokens = kTokens;
  in.shape = kRow;
  in.x = {mine.x.data(), kElements * 4};
  in.topk_idx = mine.idx.data();
  const Handle handle = exchange.dispatch(in, soon());
  CombineInput back{};
  std::vector<float> out(kTokens * kElements, -1.f);
  back.type = Element::kF32;
  back.elements = kElements;
  back.y = {exchange.region(handle.region), kElements * 4};
  back.out = out.data();
  exchange.combine(handle, back, soon());
  exchange.release(handle.region);
  for (int t = 0; t < kTokens; ++t) {
    const float want = float(mine.ranks_of(t)) * float(100 * rank + t);
    for (int e = 0; e < kElements; ++e) {
      if (out[t * kElements + e] != want) differ("a combined row differs", rank);
    }
  }
}

void low_latency_call(Exchange& exchange, int rank, int call) {
  const Tokens mine(rank, call);
  LowLatencyInput in{};
  in.tokens = kTokens;
  in.shape = kRow;
  in.x = {mine.x.data(), kElements * 4};
  in.topk_idx = mine.idx.data();
  LowLatencyHandle handle = exchange.low_latency_send(in, soon());
  const int64_t slots = kRanks * kTokens;
  std::vector<float> x(2 * slots * kElements), out(kTokens * kElements);
  std::vector<int32_t> count(2);
  std::vector<int64_t> source(2 * slots), range(2 * kRanks);
  LowLatencyOutput to{};
  to.x = reinterpret_cast<std::byte*>(x.data());
  to.count = count.data(), to.source = source.data(), to.layout_range = range.data();
  exchange.low_latency_receive(handle, kRow, to, soon());
  const uint64_t number = exchange.low_latency_return(
      handle, Element::kF32, kElements, {x.data(), kElements * 4}, slots * kElements * 4, soon());
  const std::vector<float> weights(kTokens * kTopk, 0.5f);
  exchange.low_latency_reduce(handle, number, Element::kF32, kElements, weights.data(), out.data(),
                              soon());
  for (int t = 0; t < kTokens; ++t) {
    const float want = (mine.idx[t * kTopk + 1] < 0 ? 0.5f : 1.f) * float(100 * rank + t);
    if (out[t * kElements + 7] != want) differ("a low-latency row differs", rank);
  }
}

void run_ranks(const std::function<Transport&(int)>& transport, bool pull) {
  proto::Experts experts{kRanks, 6, {0, 2, 4, 6}};
  std::vector<std::thread> threads;
  for (int r = 0; r < kRanks; ++r) {
    threads.emplace_back([&, r] {
      Exchange exchange(transport(r), kShape, experts, pull);
      for (int call = 0; call < kCalls; ++call) {
        normal_call(exchange, r, call);
        low_latency_call(exchange, r, call);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

}  // namespace

int main() {
  const uint64_t bytes = proto::WindowLayout::of(kShape).bytes;
  for (uint64_t seed = 0; seed < 4; ++seed) {
    FakeFaults faults;
    faults.seed = seed;
    FakeNetwork network(kRanks, bytes, faults);
    run_ranks([&](int r) -> Transport& { return network.endpoint(r); }, false);
  }
  std::vector<std::unique_ptr<ShmTransport>> ranks;
  std::vector<ShmHandle> handles;
  for (int r = 0; r < kRanks; ++r) {
    ranks.push_back(std::make_unique<ShmTransport>(r, kRanks, bytes));
    handles.push_back(ranks.back()->handle());
  }
  for (auto& rank : ranks) rank->connect(handles, 7);
  for (const bool pull : {true, false}) {
    run_ranks([&](int r) -> Transport& { return *ranks[static_cast<size_t>(r)]; }, pull);
    // A new Exchange counts from 1 again: so must the counters, on fresh memory.
    std::vector<std::thread> threads;
    for (auto& rank : ranks) threads.emplace_back([&] { rank->recover(7, soon()); });
    for (std::thread& thread : threads) thread.join();
  }
  std::printf("ok\n");
  return 0;
}
