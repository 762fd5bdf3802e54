#include "cuda/launch/moe.hpp"

#include <algorithm>

namespace dsk::launch {
namespace {

constexpr int kThreads = 256;  // as in instances/moe.def
constexpr int kUnpermuteCtasPerSm = 8;

size_t bytes_of(WideType type) { return type == WideType::kBfloat16 ? 2 : 4; }

template <class Params>
void launch(const MoeLaunch& on, const char* kernel, Params params, int ctas, int cluster = 1,
            int shared_bytes = 0) {
  device::LaunchShape shape;
  shape.grid.x = unsigned(ctas);
  shape.block.x = kThreads;
  shape.cluster.x = unsigned(cluster);
  shape.shared_bytes = unsigned(shared_bytes);
  void* arguments[] = {&params};
  on.context.device().launch(on.context.kernel(kernel), shape, arguments, on.stream);
  if (on.context.emulated()) on.context.device().synchronize(on.stream);
}

void check_experts(const char* op, int experts, int most) {
  if (experts < 1 || experts > most) {
    throw device::DeviceError(std::string(op) + ": experts: expected 1 .. " + std::to_string(most) +
                              ", got " + std::to_string(experts));
  }
}

}  // namespace

void moe_gate(const MoeLaunch& on, const MoeGateParams& p, bool x_is_bf16) {
  check_experts("moe_gate", p.experts, kMoeMaxExperts);
  if (p.tokens == 0) return;
  const Context& c = on.context;
  const size_t tokens = size_t(p.tokens), chosen = tokens * p.topk;
  const size_t x_bytes = p.depth ? ((tokens - 1) * p.ld_x + p.depth) * (x_is_bf16 ? 2 : 4) : 0;
  HostLoan x(c, p.x, x_bytes, true);
  HostLoan weight(c, p.weight, size_t(p.experts) * p.depth * bytes_of(p.weight_type), true);
  HostLoan bias(c, p.bias, p.bias ? p.experts * sizeof(float) : 0, true);
  HostLoan topk_idx(c, p.topk_idx, chosen * sizeof(int64_t), false);
  HostLoan topk_weights(c, p.topk_weights, chosen * sizeof(float), false);
  HostLoan scores(c, p.scores, tokens * p.experts * sizeof(float), false);
  HostLoan counts(c, p.counts, p.counts ? p.experts * sizeof(int32_t) : 0, false);
  const int clusters = (p.tokens + kGateTokens - 1) / kGateTokens;
  launch(on, x_is_bf16 ? "moe_gate_bf16" : "moe_gate_f32", p, clusters * kGateCluster, kGateCluster,
         kGateSharedBytes);
}

void moe_layout(const MoeLaunch& on, const MoeLayoutParams& p) {
  check_experts("moe_permute", p.experts, kMoeMaxGroups);
  if (p.slots == 0) return;
  const Context& c = on.context;
  const size_t chunks = moe_chunks(p.slots);
  HostLoan topk_idx(c, p.topk_idx, p.slots * sizeof(int64_t), true);
  HostLoan first_row(c, p.first_row, chunks * p.experts * sizeof(int32_t), false);
  HostLoan sizes(c, p.group_sizes, p.experts * sizeof(int64_t), false);
  HostLoan sizes_i32(c, p.group_sizes_i32, p.group_sizes_i32 ? p.experts * sizeof(int32_t) : 0,
                     false);
  HostLoan finished(c, p.finished, sizeof(int32_t), false);
  launch(on, "moe_layout", p, int(chunks));
}

void moe_permute(const MoeLaunch& on, const MoePermuteParams& p, int64_t rows) {
  check_experts("moe_permute", p.experts, kMoeMaxGroups);
  if (p.slots == 0) return;
  const Context& c = on.context;
  const size_t chunks = moe_chunks(p.slots), tokens = size_t(p.slots / p.topk);
  HostLoan topk_idx(c, p.topk_idx, p.slots * sizeof(int64_t), true);
  HostLoan first_row(c, p.first_row, chunks * p.experts * sizeof(int32_t), true);
  HostLoan row_map(c, p.row_map, p.slots * sizeof(int64_t), false);
  HostLoan x(c, p.x, p.row_bytes ? (tokens - 1) * p.ld_x + p.row_bytes : 0, true);
  HostLoan x_perm(c, p.x_perm, size_t(rows) * p.row_bytes, false);
  const size_t groups = p.scale && rows ? size_t(p.scale_groups) : 0;
  HostLoan scale(c, p.scale, groups ? ((groups - 1) * p.ld_scale + tokens) * sizeof(float) : 0,
                 true);
  HostLoan scale_perm(c, p.scale_perm,
                      groups ? ((groups - 1) * p.ld_scale_perm + rows) * sizeof(float) : 0, false);
  launch(on, "moe_permute", p, int(chunks));
}

void moe_unpermute(const MoeLaunch& on, const MoeUnpermuteParams& p, int64_t rows) {
  if (p.tokens == 0 || p.depth == 0) return;
  const Context& c = on.context;
  const size_t slots = size_t(p.tokens) * p.topk, element = bytes_of(p.type);
  HostLoan y(c, p.y, size_t(rows) * p.depth * element, true);
  HostLoan row_map(c, p.row_map, slots * sizeof(int64_t), true);
  HostLoan weights(c, p.weights, p.weights ? slots * sizeof(float) : 0, true);
  HostLoan out(c, p.out, size_t(p.tokens) * p.depth * element, false);
  const int sms = on.num_sms > 0 ? on.num_sms : c.device().num_sms();
  launch(on, "moe_unpermute", p, std::min(p.tokens, sms * kUnpermuteCtasPerSm));
}

void moe_unpermute_backward(const MoeLaunch& on, const MoeUnpermuteBackwardParams& p,
                            int64_t rows) {
  const size_t slots = size_t(p.tokens) * p.topk, element = bytes_of(p.type);
  if (slots == 0 || p.depth == 0) return;
  const Context& c = on.context;
  HostLoan grad(c, p.grad, size_t(p.tokens) * p.depth * element, true);
  HostLoan y(c, p.y, size_t(rows) * p.depth * element, true);
  HostLoan row_map(c, p.row_map, slots * sizeof(int64_t), true);
  HostLoan weights(c, p.weights, p.weights ? slots * sizeof(float) : 0, true);
  HostLoan dy(c, p.dy, size_t(rows) * p.depth * element, false);
  HostLoan dweights(c, p.dweights, slots * sizeof(float), false);
  const int sms = on.num_sms > 0 ? on.num_sms : c.device().num_sms();
  const size_t ctas = (slots + kThreads / 32 - 1) / (kThreads / 32);
  launch(on, "moe_unpermute_backward", p, int(std::min(ctas, size_t(sms) * kUnpermuteCtasPerSm)));
}

}  // namespace dsk::launch
