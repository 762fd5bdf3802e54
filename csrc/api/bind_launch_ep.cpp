// The launchers of csrc/cuda/launch/ep.hpp, for Python. `on` is (machine, ordinal, stream,
// num_sms); addresses come as integers. A call only queues its kernel.
#include "cuda/launch/ep.hpp"

#include <pybind11/stl.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "api/bind_launch.hpp"

namespace py = pybind11;

namespace dsk::api {
namespace {

using Row = std::tuple<int64_t, int64_t, int, bool>;  // bytes, bytes of scales, topk, weights

proto::RowShape row_shape(const Row& row) {
  const auto& [bytes, scale_bytes, topk, weights] = row;
  return {bytes, scale_bytes, topk, weights};
}

EpGroup group(int rank, const std::tuple<int64_t, int64_t, int64_t, int, int>& shape,
              const std::vector<int>& begin, const std::vector<Address>& windows,
              const std::vector<Address>& signals, Address status, Address control,
              uint32_t max_polls) {
  EpGroup g{};
  const auto& [max_tokens, max_row_bytes, max_scale_bytes, max_topk, buffers] = shape;
  const int ranks = int(begin.size()) - 1;
  if (ranks < 1 || ranks > proto::kMaxRanks || int(windows.size()) != ranks ||
      int(signals.size()) != ranks || rank < 0 || rank >= ranks) {
    throw std::invalid_argument("windows, signals: expected one each of 1 to " +
                                std::to_string(proto::kMaxRanks) + " ranks, got " +
                                std::to_string(windows.size()) + " and " +
                                std::to_string(signals.size()) + " for " + std::to_string(ranks));
  }
  int most = 1;
  for (int r = 0; r < ranks; ++r) most = std::max(most, begin[r + 1] - begin[r]);
  g.shape = {ranks, max_topk, most, buffers, max_tokens, max_row_bytes, max_scale_bytes};
  g.experts.ranks = ranks;
  g.experts.total = begin.back();
  std::copy(begin.begin(), begin.end(), g.experts.begin);
  g.rank = rank;
  g.max_polls = max_polls;
  for (int r = 0; r < ranks; ++r) {
    g.windows[r] = pointer<uint8_t>(windows[r]);
    g.signals[r] = pointer<uint64_t>(signals[r]);
  }
  g.status = pointer<EpStatus>(status);
  g.control = pointer<EpControl>(control);
  return g;
}

void dispatch(const On& on, const EpGroup& g, const Row& row, int tokens, Address x, int64_t ld_x,
              Address scale, int64_t scale_row, int64_t scale_column, Address topk_idx,
              Address topk_weights, uint64_t region, bool whole_region, int ranks_per_node,
              uint64_t forward, Address forward_of, Address forwarded, Address num_forwarded,
              Address row_of, Address place_of, Address rows_to, Address mentions,
              Address received) {
  const EpDispatchParams p{g,
                           row_shape(row),
                           tokens,
                           pointer<uint8_t>(x),
                           ld_x,
                           pointer<float>(scale),
                           scale_row,
                           scale_column,
                           pointer<int64_t>(topk_idx),
                           pointer<float>(topk_weights),
                           region,
                           whole_region,
                           ranks_per_node,
                           forward,
                           pointer<int32_t>(forward_of),
                           pointer<int32_t>(forwarded),
                           pointer<int32_t>(num_forwarded),
                           pointer<int32_t>(row_of),
                           pointer<int32_t>(place_of),
                           pointer<uint32_t>(rows_to),
                           pointer<uint32_t>(mentions),
                           pointer<int32_t>(received)};
  launch::ep_dispatch(launch_on(on), p);
}

void combine(const On& on, const EpGroup& g, int tokens, int topk, int elements, uint64_t results,
             uint64_t weights, bool with_weights, Address row_of, int ranks_per_node,
             uint64_t partial, Address forward_of, Address forwarded, Address num_forwarded,
             Address bias, Address out, Address out_weights) {
  const EpCombineParams p{g,
                          tokens,
                          topk,
                          elements,
                          with_weights,
                          results,
                          weights,
                          pointer<int32_t>(row_of),
                          ranks_per_node,
                          partial,
                          pointer<int32_t>(forward_of),
                          pointer<int32_t>(forwarded),
                          pointer<int32_t>(num_forwarded),
                          pointer<uint8_t>(bias),
                          pointer<uint8_t>(out),
                          pointer<float>(out_weights)};
  launch::ep_combine(launch_on(on), p);
}

void low_send(const On& on, const EpGroup& g, const Row& row, int tokens, int elements, bool ue8m0,
              Address x, Address topk_idx) {
  launch::ep_low_send(launch_on(on), {g, row_shape(row), tokens, elements, ue8m0,
                                      pointer<uint8_t>(x), pointer<int64_t>(topk_idx)});
}

void low_receive(const On& on, const EpGroup& g, const Row& row, Address x, Address scale,
                 int64_t ld_scale, Address count, Address source, Address layout_range,
                 Address words, Address arrived) {
  launch::ep_low_receive(launch_on(on), {g, row_shape(row), pointer<uint8_t>(x),
                                         pointer<float>(scale), ld_scale, pointer<int32_t>(count),
                                         pointer<int64_t>(source), pointer<int64_t>(layout_range),
                                         pointer<uint64_t>(words), pointer<int32_t>(arrived)});
}

void low_return(const On& on, const EpGroup& g, int64_t row_bytes, Address y, Address layout_range,
                Address words) {
  launch::ep_low_return(launch_on(on), {g, row_bytes, pointer<uint8_t>(y),
                                        pointer<int64_t>(layout_range), pointer<uint64_t>(words)});
}

void low_reduce(const On& on, const EpGroup& g, int tokens, int topk, int elements,
                Address topk_idx, Address topk_weights, Address out) {
  launch::ep_low_reduce(launch_on(on), {g, tokens, topk, elements, pointer<int64_t>(topk_idx),
                                        pointer<float>(topk_weights), pointer<uint8_t>(out)});
}

}  // namespace

void bind_launch_ep(py::module_& launch) {
  using namespace py::literals;
  py::class_<EpGroup>(launch, "EpGroup", "A group as one rank's kernels see it.")
      .def(py::init(&group), "rank"_a, "shape"_a, "begin"_a, "windows"_a, "signals"_a, "status"_a,
           "control"_a, "max_polls"_a)
      .def_property_readonly(
          "region_offset",
          [](const EpGroup& g) { return proto::WindowLayout::of(g.shape).regions; })
      .def_property_readonly(
          "region_bytes",
          [](const EpGroup& g) { return proto::WindowLayout::of(g.shape).region_bytes; })
      .def_property_readonly(
          "window_bytes", [](const EpGroup& g) { return proto::WindowLayout::of(g.shape).bytes; });
  launch.attr("kEpCounterSlots") = proto::kCounterSlots;
  launch.attr("kEpMaxRanks") = proto::kMaxRanks;
  static_assert(offsetof(EpControl, alive) == 0 && offsetof(EpControl, calls) == 8);
  launch.attr("kEpControlWords") = (sizeof(EpControl) + 7) / 8;  // int64: alive, calls, arrivals
  launch.attr("kEpKinds") = int(kEpKinds);
  launch.def(
      "ep_region_fields",
      [](const Row& row, int64_t capacity) {
        const auto f = proto::RegionLayout::of(row_shape(row), capacity);
        return py::make_tuple(f.x, f.records, f.record_bytes, f.scale, f.topk_idx, f.topk_weights,
                              f.source);
      },
      "row"_a, "capacity"_a);
  launch.def("ep_counter_name", [](uint32_t kind) {
    return kind < proto::kNumCounters ? proto::kCounterNames[kind] : "unknown";
  });
  launch.def("ep_dispatch", &dispatch, "on"_a, "group"_a, "row"_a, "tokens"_a, "x"_a, "ld_x"_a,
             "scale"_a, "scale_row"_a, "scale_column"_a, "topk_idx"_a, "topk_weights"_a, "region"_a,
             "whole_region"_a, "ranks_per_node"_a, "forward"_a, "forward_of"_a, "forwarded"_a,
             "num_forwarded"_a, "row_of"_a, "place_of"_a, "rows_to"_a, "mentions"_a, "received"_a);
  launch.def("ep_combine", &combine, "on"_a, "group"_a, "tokens"_a, "topk"_a, "elements"_a,
             "results"_a, "weights"_a, "with_weights"_a, "row_of"_a, "ranks_per_node"_a,
             "partial"_a, "forward_of"_a, "forwarded"_a, "num_forwarded"_a, "bias"_a, "out"_a,
             "out_weights"_a);
  launch.def("ep_low_send", &low_send, "on"_a, "group"_a, "row"_a, "tokens"_a, "elements"_a,
             "ue8m0"_a, "x"_a, "topk_idx"_a);
  launch.def("ep_low_receive", &low_receive, "on"_a, "group"_a, "row"_a, "x"_a, "scale"_a,
             "ld_scale"_a, "count"_a, "source"_a, "layout_range"_a, "words"_a, "arrived"_a = 0);
  launch.def("ep_low_return", &low_return, "on"_a, "group"_a, "row_bytes"_a, "y"_a,
             "layout_range"_a, "words"_a);
  launch.def("ep_low_reduce", &low_reduce, "on"_a, "group"_a, "tokens"_a, "topk"_a, "elements"_a,
             "topk_idx"_a, "topk_weights"_a, "out"_a);
}

}  // namespace dsk::api
