// The launchers of csrc/cuda/launch/moe.hpp, for Python. `on` is (machine, ordinal, stream,
// num_sms).
#include "cuda/launch/moe.hpp"

#include <pybind11/stl.h>

#include <tuple>

#include "api/bind_launch.hpp"

namespace py = pybind11;

namespace dsk::api {
namespace {

WideType wide(bool is_bf16) { return is_bf16 ? WideType::kBfloat16 : WideType::kFloat32; }

void gate(const On& on, Address x, bool x_is_bf16, Address weight, bool weight_is_bf16,
          Address bias, Address topk_idx, Address topk_weights, Address scores, Address finished,
          Address counts, Address affinity, int64_t ld_x, int tokens, int depth, int experts,
          int num_groups, int topk_group, int topk, bool softmax, bool top2, bool renormalize,
          int sequence, float scale) {
  MoeGateParams p{};
  p.x = pointer<void>(x);
  p.weight = pointer<void>(weight);
  p.bias = pointer<float>(bias);
  p.topk_idx = pointer<int64_t>(topk_idx);
  p.topk_weights = pointer<float>(topk_weights);
  p.scores = pointer<float>(scores);
  p.finished = pointer<int32_t>(finished);
  p.counts = pointer<int64_t>(counts);
  p.affinity = pointer<int64_t>(affinity);
  p.ld_x = ld_x;
  p.tokens = tokens;
  p.depth = depth;
  p.experts = experts;
  p.num_groups = num_groups;
  p.topk_group = topk_group;
  p.topk = topk;
  p.softmax = softmax;
  p.top2 = top2;
  p.renormalize = renormalize;
  p.sequence = sequence;
  p.scale = scale;
  p.x_type = wide(x_is_bf16);
  p.weight_type = wide(weight_is_bf16);
  launch::moe_gate(launch_on(on), p);
}

void layout(const On& on, Address topk_idx, Address expert_map, Address chosen, Address first_row,
            Address group_sizes, Address group_sizes_i32, Address finished, int slots, int topk,
            int shared, int replicas, int experts, int alignment, int capacity, int64_t mapped) {
  MoeLayoutParams p{};
  p.topk_idx = pointer<int64_t>(topk_idx);
  p.expert_map = pointer<int64_t>(expert_map);
  p.chosen = pointer<int64_t>(chosen);
  p.first_row = pointer<int32_t>(first_row);
  p.group_sizes = pointer<int64_t>(group_sizes);
  p.group_sizes_i32 = pointer<int32_t>(group_sizes_i32);
  p.finished = pointer<int32_t>(finished);
  p.slots = slots;
  p.topk = topk;
  p.shared = shared;
  p.replicas = replicas;
  p.experts = experts;
  p.alignment = alignment;
  p.capacity = capacity;
  launch::moe_layout(launch_on(on), p, mapped);
}

// (chosen, first_row, row_map, slot_of_row, slots, topk, experts)
using Place = std::tuple<Address, Address, Address, Address, int, int, int>;

MoePlaceParams place_params(const Place& place) {
  const auto& [chosen, first_row, row_map, slot_of_row, slots, topk, experts] = place;
  return {pointer<int64_t>(chosen),
          pointer<int32_t>(first_row),
          pointer<int64_t>(row_map),
          pointer<int32_t>(slot_of_row),
          slots,
          topk,
          experts};
}

void permute(const On& on, const Place& place, Address x, Address x_perm, int64_t ld_x,
             int64_t row_bytes, int64_t rows) {
  const MoePermuteParams p{place_params(place), pointer<void>(x), pointer<void>(x_perm), ld_x,
                           row_bytes};
  launch::moe_permute(launch_on(on), p, rows);
}

void permute_quantize(const On& on, const Place& place, Address x, bool is_bf16, Address data,
                      Address scale, int64_t ld_x, int64_t ld_scale, int depth, int plane_rows,
                      bool ue8m0, int64_t rows) {
  const MoePermuteQuantizeParams p{place_params(place),
                                   pointer<void>(x),
                                   pointer<uint8_t>(data),
                                   pointer<float>(scale),
                                   ld_x,
                                   ld_scale,
                                   depth,
                                   plane_rows,
                                   wide(is_bf16),
                                   ue8m0 ? ScaleFormat::kUe8m0 : ScaleFormat::kFp32};
  launch::moe_permute_quantize(launch_on(on), p, rows);
}

void unpermute(const On& on, Address y, bool is_bf16, Address row_map, Address weights, Address out,
               int tokens, int topk, int shared, int depth, int64_t rows) {
  const MoeUnpermuteParams p{pointer<void>(y),
                             pointer<int64_t>(row_map),
                             pointer<float>(weights),
                             pointer<void>(out),
                             tokens,
                             topk,
                             shared,
                             depth,
                             wide(is_bf16)};
  launch::moe_unpermute(launch_on(on), p, rows);
}

void unpermute_backward(const On& on, Address grad, Address y, bool is_bf16, Address row_map,
                        Address weights, Address dy, Address dweights, int tokens, int topk,
                        int depth, int64_t rows) {
  const MoeUnpermuteBackwardParams p{pointer<void>(grad),
                                     pointer<void>(y),
                                     pointer<int64_t>(row_map),
                                     pointer<float>(weights),
                                     pointer<void>(dy),
                                     pointer<float>(dweights),
                                     tokens,
                                     topk,
                                     depth,
                                     wide(is_bf16)};
  launch::moe_unpermute_backward(launch_on(on), p, rows);
}

void hidden_backward(const On& on, Address h, Address back, Address row_map, Address weights,
                     Address dh, Address act, Address dweights, int64_t slots, int width,
                     int64_t rows) {
  const MoeHiddenBackwardParams p{pointer<void>(h),
                                  pointer<void>(back),
                                  pointer<int64_t>(row_map),
                                  pointer<float>(weights),
                                  pointer<void>(dh),
                                  pointer<void>(act),
                                  pointer<float>(dweights),
                                  slots,
                                  width};
  launch::moe_hidden_backward(launch_on(on), p, rows);
}

void hidden_quantize(const On& on, Address h, Address back, Address slot_of_row, Address weights,
                     Address dh, Address dh_scale, Address dh_t, Address dh_t_scale, Address act_t,
                     Address act_t_scale, Address dot, Address dweights, Address finished,
                     int64_t slots, int rows, int width, bool transposed) {
  MoeHiddenQuantizeParams p{};
  p.h = pointer<void>(h);
  p.back = pointer<void>(back);
  p.slot_of_row = pointer<int32_t>(slot_of_row);
  p.weights = pointer<float>(weights);
  p.dh = pointer<uint8_t>(dh);
  p.dh_scale = pointer<float>(dh_scale);
  p.dh_t = pointer<uint8_t>(dh_t);
  p.dh_t_scale = pointer<float>(dh_t_scale);
  p.act_t = pointer<uint8_t>(act_t);
  p.act_t_scale = pointer<float>(act_t_scale);
  p.dot = pointer<float>(dot);
  p.dweights = pointer<float>(dweights);
  p.finished = pointer<int32_t>(finished);
  p.rows = rows;
  p.width = width;
  p.transposed = transposed;
  launch::moe_hidden_quantize(launch_on(on), p, slots);
}

void gate_backward(const On& on, Address grad_weights, Address grad_scores, Address scores,
                   Address topk_idx, Address dlogits, int tokens, int experts, int topk,
                   bool softmax, bool renormalize, float scale) {
  const MoeGateBackwardParams p{pointer<float>(grad_weights),
                                pointer<float>(grad_scores),
                                pointer<float>(scores),
                                pointer<int64_t>(topk_idx),
                                pointer<float>(dlogits),
                                tokens,
                                experts,
                                topk,
                                softmax,
                                renormalize,
                                scale};
  launch::moe_gate_backward(launch_on(on), p);
}

void gate_product(const On& on, Address a, bool a_transposed, Address b, bool b_is_bf16,
                  Address out, bool out_is_bf16, int64_t ld_b, int m, int n, int k) {
  const MoeGateProductParams p{
      pointer<float>(a), pointer<void>(b), pointer<void>(out), ld_b, m, n, k,
      a_transposed,      wide(b_is_bf16),  wide(out_is_bf16)};
  launch::moe_gate_product(launch_on(on), p);
}

}  // namespace

void bind_launch_moe(py::module_& launch) {
  using namespace py::literals;
  const auto release = py::call_guard<py::gil_scoped_release>();
  launch.attr("kMoeMaxExperts") = int(kMoeMaxExperts);
  launch.attr("kMoeMaxGroups") = int(kMoeMaxGroups);
  launch.def("moe_chunks", &launch::moe_chunks, "slots"_a);
  launch.def("moe_gate", &gate, "on"_a, py::kw_only(), "x"_a, "x_is_bf16"_a, "weight"_a,
             "weight_is_bf16"_a, "bias"_a, "topk_idx"_a, "topk_weights"_a, "scores"_a, "finished"_a,
             "counts"_a, "affinity"_a, "ld_x"_a, "tokens"_a, "depth"_a, "experts"_a, "num_groups"_a,
             "topk_group"_a, "topk"_a, "softmax"_a, "top2"_a, "renormalize"_a, "sequence"_a,
             "scale"_a, release);
  launch.attr("kGateCluster") = int(kGateCluster);
  launch.def("moe_gate_groups", &launch::gate_groups, "tokens"_a);
  launch.def("moe_layout", &layout, "on"_a, py::kw_only(), "topk_idx"_a, "expert_map"_a, "chosen"_a,
             "first_row"_a, "group_sizes"_a, "group_sizes_i32"_a, "finished"_a, "slots"_a, "topk"_a,
             "shared"_a, "replicas"_a, "experts"_a, "alignment"_a, "capacity"_a, "mapped"_a,
             release);
  launch.def("moe_permute", &permute, "on"_a, py::kw_only(), "place"_a, "x"_a, "x_perm"_a, "ld_x"_a,
             "row_bytes"_a, "rows"_a, release);
  launch.def("moe_permute_quantize", &permute_quantize, "on"_a, py::kw_only(), "place"_a, "x"_a,
             "is_bf16"_a, "data"_a, "scale"_a, "ld_x"_a, "ld_scale"_a, "depth"_a, "plane_rows"_a,
             "ue8m0"_a, "rows"_a, release);
  launch.def("moe_unpermute", &unpermute, "on"_a, py::kw_only(), "y"_a, "is_bf16"_a, "row_map"_a,
             "weights"_a, "out"_a, "tokens"_a, "topk"_a, "shared"_a, "depth"_a, "rows"_a, release);
  launch.def("moe_unpermute_backward", &unpermute_backward, "on"_a, py::kw_only(), "grad"_a, "y"_a,
             "is_bf16"_a, "row_map"_a, "weights"_a, "dy"_a, "dweights"_a, "tokens"_a, "topk"_a,
             "depth"_a, "rows"_a, release);
  launch.def("moe_hidden_backward", &hidden_backward, "on"_a, py::kw_only(), "h"_a, "back"_a,
             "row_map"_a, "weights"_a, "dh"_a, "act"_a, "dweights"_a, "slots"_a, "width"_a,
             "rows"_a, release);
  launch.def("moe_hidden_quantize", &hidden_quantize, "on"_a, py::kw_only(), "h"_a, "back"_a,
             "slot_of_row"_a, "weights"_a, "dh"_a, "dh_scale"_a, "dh_t"_a, "dh_t_scale"_a,
             "act_t"_a, "act_t_scale"_a, "dot"_a, "dweights"_a, "finished"_a, "slots"_a, "rows"_a,
             "width"_a, "transposed"_a, release);
  launch.def("moe_gate_backward", &gate_backward, "on"_a, py::kw_only(), "grad_weights"_a,
             "grad_scores"_a, "scores"_a, "topk_idx"_a, "dlogits"_a, "tokens"_a, "experts"_a,
             "topk"_a, "softmax"_a, "renormalize"_a, "scale"_a, release);
  launch.def("moe_gate_product", &gate_product, "on"_a, py::kw_only(), "a"_a, "a_transposed"_a,
             "b"_a, "b_is_bf16"_a, "out"_a, "out_is_bf16"_a, "ld_b"_a, "m"_a, "n"_a, "k"_a,
             release);
}

}  // namespace dsk::api
