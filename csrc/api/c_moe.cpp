// C ABI: the moe stem.
#include <algorithm>
#include <type_traits>
#include <vector>

#include "api/tensor_check.hpp"
#include "cpu/kernels.hpp"
#include "cpu/packed.hpp"
#include "cpu/threads.hpp"

using namespace dsk;
using namespace dsk::api;

namespace {

int64_t blocks(int64_t size) { return (size + cpu::kScaleBlock - 1) / cpu::kScaleBlock; }

PackedExperts experts(const Arg& data, const Arg& marks, const Arg& scale, int64_t e, int64_t n,
                      int64_t k) {
  data.shape({e, dsk_packed_bytes(n, k)}).contiguous().bytes();
  marks.shape({e, dsk_packed_marks(n, k)}).contiguous().bytes();
  scale.shape({e, blocks(n), blocks(k)}).type({Type::kF32});
  return {data.data<const uint8_t>(),
          marks.data<const uint8_t>(),
          scale.data<const float>(),
          scale.stride(0),
          scale.stride(1),
          scale.stride(2)};
}

}  // namespace

extern "C" int dsk_moe_experts(const DLTensor* x, const DLTensor* w13, const DLTensor* marks13,
                               const DLTensor* scale13, const DLTensor* w2, const DLTensor* marks2,
                               const DLTensor* scale2, const DLTensor* topk_idx,
                               const DLTensor* topk_weights, int64_t intermediate, int quantize,
                               const DLTensor* out, int num_threads) {
  return guarded([&] {
    const Arg input("x", x), first("w13", w13), idx("topk_idx", topk_idx);
    MoeParams p;
    p.x = input.shape({-1, -1}).matrix({Type::kF32, Type::kBF16, Type::kF16});
    p.t = input.size(0);
    p.d = input.size(1);
    p.i = intermediate;
    DSK_CHECK(p.i >= 0 && p.i % cpu::kPanel == 0, "intermediate: expected a multiple of ",
              cpu::kPanel, ", got ", p.i);
    first.shape({-1, -1});
    p.e = first.size(0);
    p.w13 = experts(first, Arg("marks13", marks13), Arg("scale13", scale13), p.e, 2 * p.i, p.d);
    p.w2 = experts(Arg("w2", w2), Arg("marks2", marks2), Arg("scale2", scale2), p.e, p.d, p.i);
    p.topk_idx = idx.shape({p.t, -1}).contiguous().integers<int64_t>();
    p.k = idx.size(1);
    for (int64_t j = 0; j < p.t * p.k; ++j) {
      DSK_CHECK(p.topk_idx[j] >= -1 && p.topk_idx[j] < p.e, "topk_idx[", j / p.k, ", ", j % p.k,
                "]: expected -1 .. ", p.e - 1, ", got ", p.topk_idx[j]);
    }
    const Arg weights("topk_weights", topk_weights);
    weights.shape({p.t, p.k}).contiguous().type({Type::kF32});
    p.topk_weights = weights.data<const float>();
    p.quantize = quantize != 0;
    p.out = Arg("out", out).shape({p.t, p.d}).output({p.x.type});
    p.threads = cpu::resolve_threads(num_threads);
    if (p.t > 0 && p.d > 0) cpu::kernels().moe_experts(p);
  });
}

namespace {

constexpr std::initializer_list<Type> kFloats = {Type::kF32, Type::kBF16, Type::kF16};

const float* floats(const char* name, const DLTensor* tensor,
                    std::initializer_list<int64_t> shape) {
  if (tensor == nullptr) return nullptr;
  const Arg arg(name, tensor);
  arg.shape(shape).contiguous().type({Type::kF32});
  return arg.data<const float>();
}

template <typename T>
T* written(const char* name, const DLTensor* tensor, std::initializer_list<int64_t> shape) {
  const Arg arg(name, tensor);
  arg.shape(shape).contiguous().writable();
  if constexpr (std::is_same_v<T, float>) {
    arg.type({Type::kF32});
  } else {
    (void)arg.integers<T>();
  }
  return arg.data<T>();
}

// row_map or topk_idx [t, k]: values in [-1, limit).
const int64_t* indices(const Arg& arg, const char* name, int64_t t, int64_t limit) {
  const int64_t* at = arg.shape({t, -1}).contiguous().integers<int64_t>();
  const int64_t k = arg.size(1);
  for (int64_t j = 0; j < t * k; ++j) {
    DSK_CHECK(at[j] >= -1 && at[j] < limit, name, "[", j / k, ", ", j % k, "]: expected -1 .. ",
              limit - 1, ", got ", at[j]);
  }
  return at;
}

// What both directions of unpermute read; `result` [t, d] is its output or the gradient of that.
UnpermuteParams unpermute_params(const DLTensor* y, const DLTensor* row_map,
                                 const DLTensor* topk_weights, const Arg& result, int num_threads) {
  const Arg input("y", y), map("row_map", row_map);
  UnpermuteParams p;
  p.y = input.shape({-1, -1}).matrix(kFloats);
  p.d = input.size(1);
  p.t = result.shape({-1, p.d}).size(0);
  p.row_map = indices(map, "row_map", p.t, input.size(0));
  p.k = map.size(1);
  p.weights = floats("topk_weights", topk_weights, {p.t, p.k});
  p.threads = cpu::resolve_threads(num_threads);
  return p;
}

}  // namespace

extern "C" int dsk_moe_gate(const DLTensor* x, const DLTensor* weight, const DLTensor* bias,
                            int64_t num_groups, int64_t topk_group, double scale, int softmax,
                            int group_by_sum, int renormalize, const DLTensor* topk_idx,
                            const DLTensor* topk_weights, const DLTensor* scores, int num_threads) {
  return guarded([&] {
    const Arg input("x", x), router("weight", weight);
    GateParams p;
    p.x = input.shape({-1, -1}).matrix(kFloats);
    p.t = input.size(0);
    p.d = input.size(1);
    p.weight = router.shape({-1, p.d}).matrix(kFloats);
    p.e = router.size(0);
    p.bias = floats("bias", bias, {p.e});
    DSK_CHECK(num_groups >= 1 && p.e % num_groups == 0, "num_groups: expected a divisor of ", p.e,
              " experts, got ", num_groups);
    DSK_CHECK(topk_group >= 1 && topk_group <= num_groups, "topk_group: expected 1 .. ", num_groups,
              ", got ", topk_group);
    p.groups = num_groups;
    p.top_groups = topk_group;
    const Arg idx("topk_idx", topk_idx);
    p.k = idx.shape({p.t, -1}).size(1);
    const int64_t reachable = p.e / num_groups * topk_group;
    DSK_CHECK(p.k >= 1 && p.k <= reachable, "topk_idx: expected 1 .. ", reachable, " columns, got ",
              p.k);
    p.topk_idx = written<int64_t>("topk_idx", topk_idx, {p.t, p.k});
    p.topk_weights = written<float>("topk_weights", topk_weights, {p.t, p.k});
    p.scores = written<float>("scores", scores, {p.t, p.e});
    p.sigmoid = softmax == 0;
    p.by_sum = group_by_sum != 0;
    p.renormalize = renormalize != 0;
    p.scale = static_cast<float>(scale);
    p.threads = cpu::resolve_threads(num_threads);
    if (p.t > 0) cpu::kernels().moe_gate(p);
  });
}

extern "C" int dsk_moe_gate_backward(const DLTensor* grad_weights, const DLTensor* grad_scores,
                                     const DLTensor* x, const DLTensor* weight,
                                     const DLTensor* topk_idx, const DLTensor* scores, double scale,
                                     int softmax, int renormalize, const DLTensor* dx,
                                     const DLTensor* dweight, int num_threads) {
  return guarded([&] {
    const Arg input("x", x), router("weight", weight), idx("topk_idx", topk_idx);
    GateBackwardParams p;
    p.x = input.shape({-1, -1}).matrix(kFloats);
    p.t = input.size(0);
    p.d = input.size(1);
    p.weight = router.shape({-1, p.d}).matrix(kFloats);
    p.e = router.size(0);
    p.topk_idx = indices(idx, "topk_idx", p.t, p.e);
    p.k = idx.size(1);
    for (int64_t j = 0; j < p.t * p.k; ++j) {
      DSK_CHECK(p.topk_idx[j] >= 0, "topk_idx[", j / p.k, ", ", j % p.k, "]: expected 0 .. ",
                p.e - 1, ", got ", p.topk_idx[j]);
    }
    const Arg all("scores", scores), chosen("grad_weights", grad_weights);
    const Arg rest("grad_scores", grad_scores);
    for (const Arg* arg : {&all, &rest}) arg->shape({p.t, p.e}).contiguous().type({Type::kF32});
    chosen.shape({p.t, p.k}).contiguous().type({Type::kF32});
    p.scores = all.data<const float>();
    p.grad_weights = chosen.data<const float>();
    p.grad_scores = rest.data<const float>();
    p.sigmoid = softmax == 0;
    p.renormalize = renormalize != 0;
    p.scale = static_cast<float>(scale);
    p.dx = Arg("dx", dx).shape({p.t, p.d}).output({p.x.type});
    p.dweight = Arg("dweight", dweight).shape({p.e, p.d}).output({p.weight.type});
    p.threads = cpu::resolve_threads(num_threads);
    cpu::kernels().moe_gate_backward(p);
  });
}

extern "C" int dsk_moe_layout(const DLTensor* topk_idx, int64_t alignment, const DLTensor* counts,
                              const DLTensor* group_sizes, const DLTensor* row_map) {
  return guarded([&] {
    const Arg sizes_arg("group_sizes", group_sizes), idx("topk_idx", topk_idx);
    const int64_t experts = sizes_arg.shape({-1}).size(0);
    DSK_CHECK(alignment >= 1, "alignment: expected at least 1, got ", alignment);
    const int64_t t = idx.shape({-1, -1}).size(0), k = idx.size(1);
    const int64_t* chosen = indices(idx, "topk_idx", t, experts);
    int64_t* count = written<int64_t>("counts", counts, {experts});
    int64_t* size = written<int64_t>("group_sizes", group_sizes, {experts});
    int64_t* row = written<int64_t>("row_map", row_map, {t, k});
    std::fill(count, count + experts, 0);
    for (int64_t j = 0; j < t * k; ++j) {
      if (chosen[j] >= 0) ++count[chosen[j]];
    }
    std::vector<int64_t> next(static_cast<size_t>(experts));
    int64_t start = 0;
    for (int64_t e = 0; e < experts; ++e) {
      next[static_cast<size_t>(e)] = start;
      size[e] = (count[e] + alignment - 1) / alignment * alignment;
      start += size[e];
    }
    for (int64_t j = 0; j < t * k; ++j) {
      row[j] = chosen[j] < 0 ? -1 : next[static_cast<size_t>(chosen[j])]++;
    }
  });
}

extern "C" int dsk_moe_permute(const DLTensor* x, const DLTensor* row_map, const DLTensor* counts,
                               const DLTensor* group_sizes, const DLTensor* out, int num_threads) {
  return guarded([&] {
    const Arg input("x", x), map("row_map", row_map), result("out", out);
    PermuteParams p;
    const Matrix rows = input.shape({-1, -1}).matrix(kFloats);
    const int64_t element = rows.type == Type::kF32 ? 4 : 2;
    p.t = input.size(0);
    p.row_bytes = input.size(1) * element;
    p.x = static_cast<const char*>(rows.data);
    p.x_row = rows.stride * element;
    result.shape({-1, input.size(1)}).contiguous().output({rows.type});
    p.row_map = indices(map, "row_map", p.t, result.size(0));
    p.k = map.size(1);
    const Arg count("counts", counts), sizes("group_sizes", group_sizes);
    p.e = sizes.shape({-1}).size(0);
    p.group_sizes = sizes.contiguous().integers<int64_t>();
    p.counts = count.shape({p.e}).contiguous().integers<int64_t>();
    int64_t total = 0;
    for (int64_t e = 0; e < p.e; ++e) {
      DSK_CHECK(p.counts[e] >= 0 && p.counts[e] <= p.group_sizes[e], "counts[", e,
                "]: expected 0 .. ", p.group_sizes[e], ", got ", p.counts[e]);
      total += p.group_sizes[e];
    }
    DSK_CHECK(total == result.size(0), "out: expected ", total, " rows, got ", result.size(0));
    p.out = result.data<char>();
    p.threads = cpu::resolve_threads(num_threads);
    if (p.row_bytes > 0) cpu::kernels().moe_permute(p);
  });
}

extern "C" int dsk_moe_unpermute(const DLTensor* y, const DLTensor* row_map,
                                 const DLTensor* topk_weights, const DLTensor* out,
                                 int num_threads) {
  return guarded([&] {
    const Arg result("out", out);
    UnpermuteParams p = unpermute_params(y, row_map, topk_weights, result, num_threads);
    p.out = result.output({p.y.type});
    if (p.t > 0 && p.d > 0) cpu::kernels().moe_unpermute(p);
  });
}

extern "C" int dsk_moe_unpermute_backward(const DLTensor* grad, const DLTensor* y,
                                          const DLTensor* row_map, const DLTensor* topk_weights,
                                          const DLTensor* dy, const DLTensor* dweights,
                                          int num_threads) {
  return guarded([&] {
    const Arg result("grad", grad);
    UnpermuteParams p = unpermute_params(y, row_map, topk_weights, result, num_threads);
    p.grad = result.matrix({p.y.type});
    p.dy = Arg("dy", dy).shape({Arg("y", y).size(0), p.d}).output({p.y.type});
    p.dweights = written<float>("dweights", dweights, {p.t, p.k});
    if (p.t > 0) cpu::kernels().moe_unpermute_backward(p);
  });
}
