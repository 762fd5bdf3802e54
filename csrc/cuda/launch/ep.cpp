#include "cuda/launch/ep.hpp"

#include <algorithm>

namespace dsk::launch {
namespace {

constexpr int kThreads = 256, kLowThreads = 1024;  // of instances/ep.def

void require(bool condition, const std::string& message) {
  if (!condition) throw device::DeviceError("ep: " + message);
}

void check_rows(int64_t bytes, const void* first, const char* name) {
  require(bytes % 16 == 0 && reinterpret_cast<uintptr_t>(first) % 16 == 0,
          std::string(name) + ": expected 16-byte aligned rows of a multiple of 16 bytes, got " +
              std::to_string(bytes) + " bytes");
}

void check_group(const EpGroup& g) {
  require(g.shape.ranks <= kThreads, "ranks: expected at most " + std::to_string(kThreads) +
                                         ", got " + std::to_string(g.shape.ranks));
}

// Pieces of a row that a warp takes at a time: kEpChunk bytes of bf16, or kPartValues to be sent.
int64_t chunks_of(int64_t bytes) { return (bytes + 511) / 512; }
int64_t parts_of(int64_t elements) { return (elements + 511) / 512; }

void check_fits(const char* name, int64_t bytes, int64_t most) {
  require(bytes <= most, std::string(name) + ": expected at most " + std::to_string(most) +
                             ", as the group is made for, got " + std::to_string(bytes));
}

// One CTA an SM at most: CTA 0 has to run for the others to end, so all must fit at once.
template <class Params>
void launch(const LaunchOn& on, const char* kernel, Params params, int64_t ctas, int threads) {
  check_group(params.group);
  const int sms = on.num_sms > 0 ? on.num_sms : on.context.device().num_sms();
  device::LaunchShape shape;
  shape.grid.x = unsigned(std::clamp<int64_t>(ctas, 1, sms));
  shape.block.x = unsigned(threads);
  void* arguments[] = {&params};
  on.context.device().launch(on.context.kernel(kernel), shape, arguments, on.stream);
}

// Throughput: full CTAs, so that a launch takes no more SMs than it has work for.
template <class Params>
void launch_packed(const LaunchOn& on, const char* kernel, const Params& params,
                   int64_t warps_of_work) {
  constexpr int kWarps = kThreads / 32;
  launch(on, kernel, params, (warps_of_work + kWarps - 1) / kWarps, kThreads);
}

// Latency: an SM for each warp's work as long as there are SMs; the kernels number their warps
// across CTAs first.
template <class Params>
void launch_spread(const LaunchOn& on, const char* kernel, const Params& params,
                   int64_t warps_of_work) {
  launch(on, kernel, params, warps_of_work, kLowThreads);
}

}  // namespace

void ep_dispatch(const LaunchOn& on, const EpDispatchParams& p) {
  check_rows(p.row.row_bytes, p.x, "x");
  check_rows(p.ld_x, p.x, "x");
  check_fits("x: bytes of a row", p.row.row_bytes, p.group.shape.max_row_bytes);
  check_fits("topk", p.row.topk, p.group.shape.max_topk);
  check_fits("tokens", p.tokens, p.group.shape.max_tokens);
  launch_packed(on, "ep_dispatch", p, p.tokens);
}

void ep_combine(const LaunchOn& on, const EpCombineParams& p) {
  check_rows(int64_t(p.elements) * 2, p.out, "y");
  check_fits("y: bytes of a row", int64_t(p.elements) * 2, p.group.shape.max_row_bytes);
  check_fits("topk", p.topk, p.group.shape.max_topk);
  check_fits("tokens", p.tokens, p.group.shape.max_tokens);
  launch_packed(on, "ep_combine_bf16", p, p.tokens * chunks_of(int64_t(p.elements) * 2));
}

void ep_low_send(const LaunchOn& on, const EpLowSendParams& p) {
  check_rows(int64_t(p.elements) * 2, p.x, "x");
  check_rows(p.row.row_bytes, nullptr, "x");
  check_fits("x: bytes of a row", p.row.row_bytes, p.group.shape.max_row_bytes);
  check_fits("topk", p.row.topk, p.group.shape.max_topk);
  check_fits("tokens", p.tokens, p.group.shape.max_tokens);
  launch_spread(on, "ep_low_send", p, p.tokens * parts_of(p.elements));
}

void ep_low_receive(const LaunchOn& on, const EpLowReceiveParams& p) {
  const int64_t experts = std::max(1, p.group.experts.count(p.group.rank));
  check_rows(p.row.row_bytes, p.x, "x");
  // The same number of CTAs for each expert; they do not wait for each other.
  const int sms = on.num_sms > 0 ? on.num_sms : on.context.device().num_sms();
  const int64_t ctas = std::max<int64_t>(experts, sms / experts * experts);
  LaunchOn wide = on;
  wide.num_sms = int(ctas);
  launch(wide, "ep_low_receive", p, ctas, kEpReceiveThreads);
}

void ep_low_return(const LaunchOn& on, const EpLowReturnParams& p) {
  check_rows(p.row_bytes, p.y, "y");
  // How many rows there are, the device knows.
  const proto::GroupShape& shape = p.group.shape;
  launch_spread(on, "ep_low_return", p, shape.max_tokens * shape.ranks * shape.max_local_experts);
}

void ep_low_reduce(const LaunchOn& on, const EpLowReduceParams& p) {
  check_rows(int64_t(p.elements) * 2, p.out, "out");
  launch_spread(on, "ep_low_reduce_bf16", p, p.tokens * chunks_of(int64_t(p.elements) * 2));
}

}  // namespace dsk::launch
