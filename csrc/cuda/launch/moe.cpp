#include "cuda/launch/moe.hpp"

#include <algorithm>

namespace dsk::launch {
namespace {

constexpr int kThreads = 256;  // as in instances/moe.def
constexpr int kWarps = kThreads / 32;
constexpr int kCtasPerSm = 8;  // of the kernels that loop over tokens or slots
constexpr int kProductRows = 64, kProductColumns = 128;  // as in kernels/moe_gate_backward.cuh

size_t bytes_of(WideType type) { return type == WideType::kBfloat16 ? 2 : 4; }

template <class Params>
void launch(const LaunchOn& on, const char* kernel, Params params, int ctas, int cluster = 1,
            int shared_bytes = 0, int ctas_y = 1, int threads = kThreads) {
  device::LaunchShape shape;
  shape.grid.x = unsigned(ctas);
  shape.grid.y = unsigned(ctas_y);
  shape.block.x = unsigned(threads);
  shape.cluster.x = unsigned(cluster);
  shape.shared_bytes = unsigned(shared_bytes);
  void* arguments[] = {&params};
  on.context.device().launch(on.context.kernel(kernel), shape, arguments, on.stream);
  if (on.context.emulated()) on.context.device().synchronize(on.stream);
}

// CTAs of a kernel that loops over `count` pieces of work, `each` of them a CTA at a time.
int looping_ctas(const LaunchOn& on, size_t count, size_t each, int per_sm = kCtasPerSm) {
  const int sms = on.num_sms > 0 ? on.num_sms : on.context.device().num_sms();
  return int(std::min((count + each - 1) / each, size_t(sms) * per_sm));
}

void check_experts(const char* op, int experts, int most) {
  if (experts < 1 || experts > most) {
    throw device::DeviceError(std::string(op) + ": experts: expected 1 .. " + std::to_string(most) +
                              ", got " + std::to_string(experts));
  }
}

// CTAs that share out a chunk's work: so many an SM over all chunks, at most `most`.
int sharing_ctas(const LaunchOn& on, int slots, int per_sm, int most) {
  const int sms = on.num_sms > 0 ? on.num_sms : on.context.device().num_sms();
  return std::clamp(per_sm * sms / moe_chunks(slots), 1, most);
}

struct PlaceLoans {
  PlaceLoans(const Context& c, const MoePlaceParams& p, int64_t rows)
      : chosen(c, p.chosen, p.slots * sizeof(int64_t), true),
        first_row(c, p.first_row, size_t(moe_chunks(p.slots)) * p.experts * sizeof(int32_t), true),
        row_map(c, p.row_map, p.slots * sizeof(int64_t), false),
        slot_of_row(c, p.slot_of_row, p.slot_of_row ? rows * sizeof(int32_t) : 0, false) {}

  HostLoan chosen, first_row, row_map, slot_of_row;
};

}  // namespace

void moe_gate(const LaunchOn& on, const MoeGateParams& p) {
  check_experts("moe_gate", p.experts, kMoeMaxExperts);
  if (p.tokens == 0) return;
  const Context& c = on.context;
  const size_t tokens = size_t(p.tokens), chosen = tokens * p.topk;
  const size_t x_bytes = p.depth ? ((tokens - 1) * p.ld_x + p.depth) * bytes_of(p.x_type) : 0;
  HostLoan x(c, p.x, x_bytes, true);
  HostLoan weight(c, p.weight, size_t(p.experts) * p.depth * bytes_of(p.weight_type), true);
  HostLoan bias(c, p.bias, p.bias ? p.experts * sizeof(float) : 0, true);
  HostLoan topk_idx(c, p.topk_idx, chosen * sizeof(int64_t), false);
  HostLoan topk_weights(c, p.topk_weights, chosen * sizeof(float), false);
  HostLoan scores(c, p.scores, tokens * p.experts * sizeof(float), false);
  const int groups = gate_groups(p.tokens);
  HostLoan finished(c, p.finished, size_t(groups) * kGateCluster * sizeof(int32_t), false);
  const size_t sequences = p.counts ? tokens / p.sequence : 0;
  HostLoan counts(c, p.counts, sequences * p.experts * sizeof(int64_t), false);
  HostLoan affinity(c, p.affinity, sequences * (p.experts + 1) * sizeof(int64_t), false);
  const int slices = (p.experts + kGateExperts - 1) / kGateExperts;
  launch(on, "moe_gate", p, groups * slices * kGateCluster, kGateCluster, kGateSharedBytes);
}

void moe_layout(const LaunchOn& on, const MoeLayoutParams& p, int64_t mapped) {
  check_experts("moe_permute", p.experts, kMoeMaxGroups);
  if (p.slots == 0) return;
  const Context& c = on.context;
  const size_t chunks = moe_chunks(p.slots);
  const size_t tokens = size_t(p.slots / (p.topk + p.shared));
  HostLoan topk_idx(c, p.topk_idx, tokens * p.topk * sizeof(int64_t), true);
  HostLoan expert_map(c, p.expert_map, size_t(mapped) * p.replicas * sizeof(int64_t), true);
  HostLoan chosen(c, p.chosen, p.chosen ? p.slots * sizeof(int64_t) : 0, false);
  HostLoan first_row(c, p.first_row, chunks * p.experts * sizeof(int32_t), false);
  HostLoan sizes(c, p.group_sizes, p.experts * sizeof(int64_t), false);
  HostLoan sizes_i32(c, p.group_sizes_i32, p.group_sizes_i32 ? p.experts * sizeof(int32_t) : 0,
                     false);
  HostLoan finished(c, p.finished, sizeof(int32_t), false);
  launch(on, "moe_layout", p, int(chunks));
}

void moe_permute(const LaunchOn& on, const MoePermuteParams& p, int64_t rows) {
  check_experts("moe_permute", p.place.experts, kMoeMaxGroups);
  if (p.place.slots == 0) return;
  const Context& c = on.context;
  const PlaceLoans place(c, p.place, rows);
  const size_t tokens = size_t(p.place.slots / p.place.topk);
  HostLoan x(c, p.x, p.row_bytes ? (tokens - 1) * p.ld_x + p.row_bytes : 0, true);
  HostLoan x_perm(c, p.x_perm, size_t(rows) * p.row_bytes, false);
  // Enough CTAs to keep loads in flight on every SM; 32 have one row a warp.
  const int sharing = sharing_ctas(on, p.place.slots, 2, kMoeChunk / kWarps);
  launch(on, "moe_permute", p, moe_chunks(p.place.slots), 1, 0, sharing);
}

void moe_permute_quantize(const LaunchOn& on, const MoePermuteQuantizeParams& p, int64_t rows) {
  check_experts("moe_permute_quantize", p.place.experts, kMoeMaxGroups);
  if (p.place.slots == 0 || p.depth == 0) return;
  const Context& c = on.context;
  const PlaceLoans place(c, p.place, rows);
  const size_t tokens = size_t(p.place.slots / p.place.topk), element = bytes_of(p.type);
  const size_t groups = (size_t(p.depth) + 127) / 128, planes = size_t(rows / p.plane_rows);
  HostLoan x(c, p.x, ((tokens - 1) * p.ld_x + p.depth) * element, true);
  HostLoan data(c, p.data, size_t(rows) * p.depth, false);
  HostLoan scale(c, p.scale, ((planes * groups - 1) * p.ld_scale + p.plane_rows) * sizeof(float),
                 false);
  // A warp has no more than 256 bytes on their way, which asks for many; but each CTA sorts the
  // chunk again, so not for all that fit.
  const int pieces = int((kMoeChunk / p.place.topk + 1) * groups + kWarps - 1) / kWarps;
  const int sharing = sharing_ctas(on, p.place.slots, 4, pieces);
  launch(on, "moe_permute_quantize", p, moe_chunks(p.place.slots), 1, 0, sharing);
}

void moe_unpermute(const LaunchOn& on, const MoeUnpermuteParams& p, int64_t rows) {
  if (p.tokens == 0 || p.depth == 0) return;
  const Context& c = on.context;
  const size_t slots = size_t(p.tokens) * p.topk, element = bytes_of(p.type);
  HostLoan y(c, p.y, size_t(rows) * p.depth * element, true);
  HostLoan row_map(c, p.row_map, slots * sizeof(int64_t), true);
  const size_t weighted = size_t(p.tokens) * (p.topk - p.shared);
  HostLoan weights(c, p.weights, p.weights ? weighted * sizeof(float) : 0, true);
  HostLoan out(c, p.out, size_t(p.tokens) * p.depth * element, false);
  const size_t pieces = (size_t(p.depth) + 4 * kThreads - 1) / (4 * kThreads);
  // 8 rows of every thread are 32 KB on their way to an SM; its registers have room for 3 CTAs.
  launch(on, "moe_unpermute", p, looping_ctas(on, size_t(p.tokens) * pieces, 1, 2));
}

void moe_unpermute_backward(const LaunchOn& on, const MoeUnpermuteBackwardParams& p, int64_t rows) {
  const size_t slots = size_t(p.tokens) * p.topk, element = bytes_of(p.type);
  if (slots == 0 || p.depth == 0) return;
  const Context& c = on.context;
  HostLoan grad(c, p.grad, size_t(p.tokens) * p.depth * element, true);
  HostLoan y(c, p.y, size_t(rows) * p.depth * element, true);
  HostLoan row_map(c, p.row_map, slots * sizeof(int64_t), true);
  HostLoan weights(c, p.weights, p.weights ? slots * sizeof(float) : 0, true);
  HostLoan dy(c, p.dy, size_t(rows) * p.depth * element, false);
  HostLoan dweights(c, p.dweights, slots * sizeof(float), false);
  launch(on, "moe_unpermute_backward", p, looping_ctas(on, slots, kWarps));
}

void moe_hidden_backward(const LaunchOn& on, const MoeHiddenBackwardParams& p, int64_t rows) {
  if (p.slots == 0 || p.width == 0) return;
  const Context& c = on.context;
  const size_t slots = size_t(p.slots), row = size_t(p.width) * 2;  // bytes
  HostLoan h(c, p.h, size_t(rows) * 2 * row, true);
  HostLoan back(c, p.back, size_t(rows) * row, true);
  HostLoan row_map(c, p.row_map, slots * sizeof(int64_t), true);
  HostLoan weights(c, p.weights, slots * sizeof(float), true);
  HostLoan dh(c, p.dh, size_t(rows) * 2 * row, false);
  HostLoan act(c, p.act, size_t(rows) * row, false);
  HostLoan dweights(c, p.dweights, slots * sizeof(float), false);
  launch(on, "moe_hidden_backward", p, looping_ctas(on, slots, kWarps));
}

void moe_hidden_quantize(const LaunchOn& on, const MoeHiddenQuantizeParams& p, int64_t slots) {
  const Context& c = on.context;
  const size_t rows = size_t(p.rows), width = size_t(p.width), values = rows * width;
  const size_t row_blocks = rows / 128, column_blocks = width / 128;
  if (values == 0) return;
  HostLoan h(c, p.h, 2 * values * 2, true);
  HostLoan back(c, p.back, values * 2, true);
  HostLoan slot_of_row(c, p.slot_of_row, rows * sizeof(int32_t), true);
  HostLoan weights(c, p.weights, size_t(slots) * sizeof(float), true);
  HostLoan dh(c, p.dh, 2 * values, false);
  HostLoan dh_scale(c, p.dh_scale, 2 * column_blocks * rows * sizeof(float), false);
  HostLoan dh_t(c, p.dh_t, 2 * values, false);
  HostLoan dh_t_scale(c, p.dh_t_scale, row_blocks * 2 * width * sizeof(float), false);
  HostLoan act_t(c, p.act_t, values, false);
  HostLoan act_t_scale(c, p.act_t_scale, row_blocks * width * sizeof(float), false);
  HostLoan dot(c, p.dot, column_blocks * rows * sizeof(float), false);
  HostLoan dweights(c, p.dweights, size_t(slots) * sizeof(float), false);
  HostLoan finished(c, p.finished, row_blocks * sizeof(int32_t), false);
  launch(on, "moe_hidden_quantize", p, int(column_blocks), 1, kHiddenSharedBytes, int(row_blocks),
         kHiddenThreads);
}

void moe_gate_backward(const LaunchOn& on, const MoeGateBackwardParams& p) {
  check_experts("moe_gate_backward", p.experts, kMoeMaxExperts);
  if (p.tokens == 0) return;
  const Context& c = on.context;
  const size_t tokens = size_t(p.tokens), chosen = tokens * p.topk;
  const size_t all = tokens * p.experts * sizeof(float);
  HostLoan grad_weights(c, p.grad_weights, chosen * sizeof(float), true);
  HostLoan grad_scores(c, p.grad_scores, all, true);
  HostLoan scores(c, p.scores, all, true);
  HostLoan topk_idx(c, p.topk_idx, chosen * sizeof(int64_t), true);
  HostLoan dlogits(c, p.dlogits, all, false);
  launch(on, "moe_gate_backward", p, looping_ctas(on, tokens, kWarps));
}

void moe_gate_product(const LaunchOn& on, const MoeGateProductParams& p) {
  if (p.m == 0 || p.n == 0) return;
  const Context& c = on.context;
  HostLoan a(c, p.a, size_t(p.m) * p.k * sizeof(float), true);
  const size_t elements = p.k ? size_t(p.k - 1) * p.ld_b + p.n : 0;
  HostLoan b(c, p.b, elements * bytes_of(p.b_type), true);
  HostLoan out(c, p.out, size_t(p.m) * p.n * bytes_of(p.out_type), false);
  launch(on, "moe_gate_product", p, (p.n + kProductColumns - 1) / kProductColumns, 1, 0,
         (p.m + kProductRows - 1) / kProductRows);
}

}  // namespace dsk::launch
