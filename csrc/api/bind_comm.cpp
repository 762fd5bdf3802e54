// Python face of the expert-parallel exchange: `_C.comm`; see dskernels.ep. Waits release the GIL.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>

#include "api/bindings.hpp"
#include "api/dlpack.hpp"
#include "api/tensor_check.hpp"
#include "comm/exchange.hpp"
#include "comm/fake.hpp"
#include "comm/shm.hpp"

namespace dsk::api {
namespace {

using namespace dsk::comm;
using HandleTuple = std::tuple<int, int, uint64_t, uint64_t>;

Deadline after(double seconds) {
  return Clock::now() + std::chrono::duration_cast<Clock::duration>(
                            std::chrono::duration<double>(std::min(seconds, 1e9)));
}

py::dict report_dict(const WaitReport& report) {
  py::list silent;
  for (const SilentPeer& peer : report.silent) {
    py::dict entry;
    entry["rank"] = peer.rank;
    entry["state"] = state_name(peer.state);
    entry["have"] = peer.have;
    entry["want"] = peer.want;
    if (peer.waits.counter < proto::kCounterSlots) {
      entry["waits_for"] = proto::kCounterNames[peer.waits.counter / proto::kMaxRanks];
      entry["waits_on"] = peer.waits_on;
      entry["waits_seconds"] = peer.waits.seconds;
    }
    silent.append(entry);
  }
  py::dict counters;
  for (size_t kind = 0; kind < report.counters.size(); ++kind) {
    counters[proto::kCounterNames[kind]] = report.counters[kind];
  }
  py::dict result;
  result["rank"] = report.rank;
  result["reason"] = report.reason;
  result["phase"] = report.phase;
  result["epoch"] = report.epoch;
  result["waited_seconds"] = report.waited_seconds;
  result["silent"] = silent;
  result["counters"] = counters;
  return result;
}

// Runs a call without the GIL; a failed wait becomes dskernels.ep.PeerSilent.
template <typename Call>
auto waiting(Call&& call) {
  try {
    py::gil_scoped_release release;
    return call();
  } catch (const WaitFailed& failed) {
    const py::object type = py::module_::import("dskernels.ep.errors").attr("PeerSilent");
    const py::dict report = report_dict(failed.report);
    PyErr_SetObject(type.ptr(), report.ptr());
    throw py::error_already_set();
  }
}

// A transport with whatever keeps its memory alive.
struct Endpoint {
  std::shared_ptr<Transport> transport;
  std::shared_ptr<void> memory() const {
    if (auto* shm = dynamic_cast<ShmTransport*>(transport.get())) return shm->memory();
    return transport;
  }
  ShmTransport& shm() const {
    auto* shm = dynamic_cast<ShmTransport*>(transport.get());
    DSK_CHECK(shm != nullptr, "transport: expected shared memory, got another kind");
    return *shm;
  }
};

ShmHandle from_tuple(const HandleTuple& t) {
  return {std::get<0>(t), std::get<1>(t), std::get<2>(t), std::get<3>(t)};
}

// A receive region as a buffer: torch.frombuffer views keep it, and it keeps the memory. Dropping
// the last view frees the region for the next call.
class Region {
 public:
  Region(std::shared_ptr<void> memory, std::shared_ptr<std::atomic<bool>[]> taken, int index,
         std::byte* data, uint64_t bytes)
      : memory_(std::move(memory)),
        taken_(std::move(taken)),
        index_(index),
        data_(data),
        bytes_(bytes) {}
  ~Region() { taken_[index_] = false; }
  Region(const Region&) = delete;
  Region& operator=(const Region&) = delete;
  py::buffer_info buffer() const {
    return py::buffer_info(reinterpret_cast<uint8_t*>(data_), static_cast<py::ssize_t>(bytes_));
  }

 private:
  std::shared_ptr<void> memory_;
  std::shared_ptr<std::atomic<bool>[]> taken_;
  int index_;
  std::byte* data_;
  uint64_t bytes_;
};

int64_t element_size(Type type) { return type == Type::kF32 ? 4 : type == Type::kE4M3 ? 1 : 2; }

Element element_of(Type type) {
  return type == Type::kF32 ? Element::kF32 : type == Type::kBF16 ? Element::kBF16 : Element::kF16;
}

const int64_t* checked_idx(const Arg& idx, int64_t tokens, int experts) {
  idx.shape({tokens, -1}).contiguous();
  const int64_t* data = idx.integers<int64_t>();
  DSK_CHECK(idx.size(1) >= 1 && idx.size(1) <= proto::kMaxTopk, "topk_idx: expected 1 to ",
            proto::kMaxTopk, " slots a token, got ", idx.size(1));
  for (int64_t i = 0; i < tokens * idx.size(1); ++i) {
    DSK_CHECK(data[i] >= -1 && data[i] < experts, "topk_idx: expected values in [-1, ", experts,
              "), got ", data[i]);
  }
  return data;
}

struct TokenRows {
  Rows x, scale;
  int64_t tokens, row_bytes, scale_bytes, scale_element_stride;
};

TokenRows token_rows(const TensorArg& x, const TensorArg& scale) {
  const Arg arg("x", x.get());
  arg.shape({-1, -1});
  const Matrix m = arg.matrix({Type::kF32, Type::kBF16, Type::kF16, Type::kE4M3});
  const int64_t size = element_size(m.type);
  TokenRows rows{};
  rows.tokens = arg.size(0);
  rows.row_bytes = arg.size(1) * size;
  rows.x = {m.data, m.stride * size};
  if (scale.get() != nullptr) {
    const Arg s("scale", scale.get());
    s.shape({rows.tokens, -1});
    const Scales scales = s.scales();
    rows.scale = {scales.data, s.stride(0) * 4};
    rows.scale_element_stride = s.stride(1) * 4;
    rows.scale_bytes = s.size(1) * 4;
  }
  return rows;
}

class PyExchange {
 public:
  PyExchange(Endpoint endpoint, int64_t max_tokens, int64_t max_row_bytes, int64_t max_scale_bytes,
             int max_topk, const std::vector<int>& begin, int buffers, bool pull)
      : endpoint_(std::move(endpoint)),
        exchange_(*endpoint_.transport,
                  shape_of(max_tokens, max_row_bytes, max_scale_bytes, max_topk, begin, buffers),
                  experts_of(begin), pull) {}

  static proto::Experts experts_of(const std::vector<int>& begin) {
    proto::Experts experts{};
    experts.ranks = static_cast<int32_t>(begin.size()) - 1;
    experts.total = begin.back();
    std::copy(begin.begin(), begin.end(), experts.begin);
    return experts;
  }
  static proto::GroupShape shape_of(int64_t max_tokens, int64_t max_row_bytes,
                                    int64_t max_scale_bytes, int max_topk,
                                    const std::vector<int>& begin, int buffers) {
    const int ranks = static_cast<int>(begin.size()) - 1;
    DSK_CHECK(ranks >= 1 && ranks <= proto::kMaxRanks, "ranks: expected 1 to ", proto::kMaxRanks,
              ", got ", ranks);
    DSK_CHECK(max_topk >= 1 && max_topk <= proto::kMaxTopk, "topk: expected 1 to ", proto::kMaxTopk,
              ", got ", max_topk);
    DSK_CHECK(max_tokens >= 1 && max_row_bytes >= 1 && buffers >= 1,
              "max_tokens, hidden, buffers: "
              "expected positive numbers, got ",
              max_tokens, ", ", max_row_bytes, " bytes, ", buffers);
    int most = 1;
    for (int r = 0; r < ranks; ++r) {
      DSK_CHECK(begin[r + 1] >= begin[r], "num_experts: expected numbers >= 0 on every rank, got ",
                begin[r + 1] - begin[r], " on rank ", r);
      most = std::max(most, begin[r + 1] - begin[r]);
    }
    return {ranks, max_topk, most, buffers, max_tokens, max_row_bytes, max_scale_bytes};
  }
  static uint64_t window_bytes(int64_t max_tokens, int64_t max_row_bytes, int64_t max_scale_bytes,
                               int max_topk, const std::vector<int>& begin, int buffers) {
    return proto::WindowLayout::of(
               shape_of(max_tokens, max_row_bytes, max_scale_bytes, max_topk, begin, buffers))
        .bytes;
  }

  Exchange& exchange() { return exchange_; }

  std::unique_ptr<Region> region(int index) {
    return std::make_unique<Region>(endpoint_.memory(), exchange_.taken(), index,
                                    exchange_.region(index), exchange_.layout().region_bytes);
  }
  std::unique_ptr<Region> take_region() { return region(exchange_.take_region()); }

  // -> (handle, region, offsets: data, records, bytes of a record, and of its fields)
  py::tuple dispatch(py::handle x, py::handle scale, py::handle topk_idx, py::handle weights,
                     double seconds) {
    const TensorArg x_("x", x), scale_("scale", scale), idx_("topk_idx", topk_idx);
    const TensorArg weights_("topk_weights", weights);
    const TokenRows rows = token_rows(x_, scale_);
    const Arg idx("topk_idx", idx_.get());
    DispatchInput in{};
    in.tokens = rows.tokens;
    in.x = rows.x, in.scale = rows.scale, in.scale_element_stride = rows.scale_element_stride;
    in.topk_idx = checked_idx(idx, rows.tokens, exchange_.experts().total);
    in.shape = {rows.row_bytes, rows.scale_bytes, static_cast<int32_t>(idx.size(1)),
                weights_.get() != nullptr};
    if (weights_.get() != nullptr) {
      const Arg w("topk_weights", weights_.get());
      w.shape({rows.tokens, idx.size(1)}).contiguous().type({Type::kF32});
      in.topk_weights = w.data<const float>();
    }
    auto handle = std::make_shared<Handle>();
    waiting([&] {
      *handle = exchange_.dispatch(in, after(seconds));
      return 0;
    });
    const proto::GroupShape& shape = exchange_.shape();
    const auto fields = proto::RegionLayout::of(in.shape, shape.ranks * shape.max_tokens);
    return py::make_tuple(
        handle, region(handle->region),
        py::make_tuple(fields.x, fields.records, fields.record_bytes, fields.scale, fields.topk_idx,
                       fields.topk_weights, fields.source));
  }

  void combine(const Handle& handle, py::handle y, py::handle weights, py::handle bias,
               py::handle bias2, py::handle out, py::handle out_weights, int ranks_per_node,
               double seconds) {
    const TensorArg y_("y", y), weights_("topk_weights", weights);
    const TensorArg biases[2] = {{"bias", bias}, {"bias[1]", bias2}};
    const TensorArg out_("out", out, true), out_weights_("out_weights", out_weights, true);
    const Arg arg("y", y_.get());
    arg.shape({handle.rows, -1});
    const Matrix m = arg.matrix({Type::kF32, Type::kBF16, Type::kF16});
    CombineInput in{};
    in.type = element_of(m.type);
    in.elements = arg.size(1);
    in.ranks_per_node = ranks_per_node;
    in.y = {m.data, m.stride * element_size(m.type)};
    const Arg to("out", out_.get());
    to.shape({handle.tokens, in.elements}).contiguous().writable().type({m.type});
    in.out = to.data<void>();
    if (weights_.get() != nullptr) {
      const Arg w("topk_weights", weights_.get());
      w.shape({handle.rows, handle.shape.topk}).contiguous().type({Type::kF32});
      in.with_weights = true;
      in.weights = w.data<const float>();
      const Arg ow("out_weights", out_weights_.get());
      ow.shape({handle.tokens, handle.shape.topk}).contiguous().writable().type({Type::kF32});
      in.out_weights = ow.data<float>();
    }
    for (int i = 0; i < 2; ++i) {
      if (biases[i].get() == nullptr) continue;
      const Arg b(i == 0 ? "bias" : "bias[1]", biases[i].get());
      b.shape({handle.tokens, in.elements});
      const Matrix bm = b.matrix({m.type});
      in.bias[i] = {bm.data, bm.stride * element_size(m.type)};
    }
    waiting([&] {
      exchange_.combine(handle, in, after(seconds));
      return 0;
    });
  }

  std::shared_ptr<LowLatencyHandle> low_latency_send(py::handle x, py::handle scale,
                                                     py::handle topk_idx, double seconds) {
    const TensorArg x_("x", x), scale_("scale", scale), idx_("topk_idx", topk_idx);
    const TokenRows rows = token_rows(x_, scale_);
    const Arg idx("topk_idx", idx_.get());
    LowLatencyInput in{};
    in.tokens = rows.tokens;
    in.x = rows.x, in.scale = rows.scale, in.scale_element_stride = rows.scale_element_stride;
    in.topk_idx = checked_idx(idx, rows.tokens, exchange_.experts().total);
    in.shape = {rows.row_bytes, rows.scale_bytes, static_cast<int32_t>(idx.size(1)), 0};
    for (int64_t t = 0; t < in.tokens; ++t) {
      const int64_t* row = in.topk_idx + t * in.shape.topk;
      for (int k = 0; k < in.shape.topk; ++k) {
        for (int j = 0; j < k; ++j) {
          DSK_CHECK(row[k] < 0 || row[k] != row[j], "topk_idx[", t,
                    "]: expected distinct experts, got ", row[k], " twice");
        }
      }
    }
    auto handle = std::make_shared<LowLatencyHandle>();
    waiting([&] {
      *handle = exchange_.low_latency_send(in, after(seconds));
      return 0;
    });
    return handle;
  }

  void low_latency_receive(LowLatencyHandle& handle, py::handle x, py::handle scale,
                           py::handle count, py::handle source, py::handle layout_range,
                           double seconds) {
    const TensorArg x_("x", x, true), scale_("scale", scale, true), count_("count", count, true);
    const TensorArg source_("source", source, true), range_("layout_range", layout_range, true);
    const proto::GroupShape& g = exchange_.shape();
    const int64_t experts = exchange_.experts().count(endpoint_.transport->rank());
    const int64_t slots = g.ranks * g.max_tokens;
    const Arg xa("x", x_.get());
    xa.shape({experts, slots, -1}).contiguous().writable();
    const Type type = xa.type({Type::kF32, Type::kBF16, Type::kF16, Type::kE4M3});
    proto::RowShape shape{xa.size(2) * element_size(type), 0, handle.topk, 0};
    LowLatencyOutput out{};
    out.x = xa.data<std::byte>();
    if (scale_.get() != nullptr) {
      const Arg s("scale", scale_.get());
      s.shape({experts, slots, -1}).writable().type({Type::kF32});
      out.scale = s.data<float>();
      out.scale_expert_stride = s.stride(0), out.scale_row_stride = s.stride(1);
      out.scale_column_stride = s.stride(2);
      shape.scale_bytes = s.size(2) * 4;
    }
    const Arg c("count", count_.get()), src("source", source_.get());
    const Arg range("layout_range", range_.get());
    c.shape({experts}).contiguous(), src.shape({experts, slots}).contiguous();
    range.shape({experts, g.ranks}).contiguous();
    out.count = const_cast<int32_t*>(c.integers<int32_t>());
    out.source = const_cast<int64_t*>(src.integers<int64_t>());
    out.layout_range = const_cast<int64_t*>(range.integers<int64_t>());
    waiting([&] {
      exchange_.low_latency_receive(handle, shape, out, after(seconds));
      return 0;
    });
  }

  uint64_t low_latency_return(const LowLatencyHandle& handle, py::handle y, double seconds) {
    const TensorArg y_("y", y);
    const proto::GroupShape& g = exchange_.shape();
    const int64_t experts = exchange_.experts().count(endpoint_.transport->rank());
    const Arg arg("y", y_.get());
    arg.shape({experts, g.ranks * g.max_tokens, -1}).contiguous_last();
    const Type type = arg.type({Type::kF32, Type::kBF16, Type::kF16});
    const Rows rows{arg.data<const void>(), arg.stride(1) * element_size(type)};
    const int64_t expert_stride = arg.stride(0) * element_size(type);
    return waiting([&] {
      return exchange_.low_latency_return(handle, element_of(type), arg.size(2), rows,
                                          expert_stride, after(seconds));
    });
  }

  void low_latency_reduce(const LowLatencyHandle& handle, uint64_t call, py::handle topk_weights,
                          py::handle out, double seconds) {
    const TensorArg weights_("topk_weights", topk_weights), out_("out", out, true);
    const Arg w("topk_weights", weights_.get()), to("out", out_.get());
    w.shape({handle.tokens, handle.topk}).contiguous().type({Type::kF32});
    to.shape({handle.tokens, -1}).contiguous().writable();
    const Type type = to.type({Type::kF32, Type::kBF16, Type::kF16});
    waiting([&] {
      exchange_.low_latency_reduce(handle, call, element_of(type), to.size(1),
                                   w.data<const float>(), to.data<void>(), after(seconds));
      return 0;
    });
  }

 private:
  Endpoint endpoint_;
  Exchange exchange_;
};

struct PyNetwork {
  std::shared_ptr<FakeNetwork> network;
  Endpoint endpoint(int rank) const {
    return {std::shared_ptr<Transport>(network, &network->endpoint(rank))};
  }
};

}  // namespace
}  // namespace dsk::api

void dsk::api::bind_comm(pybind11::module_& m) {
  using namespace dsk::api;
  using namespace dsk::comm;
  py::module_ comm = m.def_submodule("comm", "Expert-parallel exchange; see dskernels.ep");
  comm.attr("max_ranks") = dsk::proto::kMaxRanks;
  comm.attr("max_topk") = dsk::proto::kMaxTopk;
  comm.attr("low_latency_depth") = dsk::proto::kLowLatencyDepth;
  comm.def("must_be_received", &dsk::proto::must_be_received);
  // Sets of ranks, as masks: for tests of what kernels and host share.
  comm.def("has_rank", &dsk::proto::has_rank);
  comm.def("rails_of", &dsk::proto::rails_of);
  comm.def("list_ranks", [](uint64_t ranks) {
    std::vector<int> list;
    dsk::proto::each_rank(ranks, [&](int rank) { list.push_back(rank); });
    return list;
  });
  comm.def("low_latency_copy", &dsk::proto::low_latency_copy);
  comm.def("copy_isa", &copy_isa);
  comm.def("window_bytes", &PyExchange::window_bytes);
  comm.def(
      "stream_copy",
      [](py::handle to, py::handle from) {
        const TensorArg to_("to", to, true), from_("from", from);
        const Arg a("to", to_.get()), b("from", from_.get());
        a.bytes().contiguous().shape({-1});
        b.bytes().contiguous().shape({a.size(0)});
        py::gil_scoped_release release;
        stream_copy(a.data<void>(), b.data<const void>(), static_cast<uint64_t>(a.size(0)));
        stream_fence();
      },
      "Copy uint8 tensors past the caches: the bandwidth the exchange is compared with.");

  py::class_<Endpoint>(comm, "Transport")
      .def_static("shm",
                  [](int rank, int ranks, uint64_t bytes) {
                    return Endpoint{std::make_shared<ShmTransport>(rank, ranks, bytes)};
                  })
      .def("handle",
           [](const Endpoint& e) {
             const ShmHandle h = e.shm().handle();
             return HandleTuple{h.pid, h.fd, h.bytes, h.nonce};
           })
      .def("connect",
           [](const Endpoint& e, const std::vector<HandleTuple>& tuples, uint64_t alive) {
             std::vector<ShmHandle> handles;
             for (const HandleTuple& t : tuples) handles.push_back(from_tuple(t));
             e.shm().connect(handles, alive);
           })
      .def("recover",
           [](const Endpoint& e, uint64_t alive, double seconds) {
             return waiting([&] { return e.shm().recover(alive, after(seconds)); });
           })
      .def("peer_state",
           [](const Endpoint& e, int rank) { return state_name(e.transport->peer_state(rank)); })
      .def("leave", [](const Endpoint& e) { e.transport->leave(); });

  py::class_<PyNetwork>(comm, "FakeNetwork")
      .def(py::init([](int ranks, uint64_t bytes, uint64_t seed, double repeat, int lost_source,
                       int lost_target, int dying_rank, uint64_t dying_after, bool forget_fences) {
             const FakeFaults faults{seed,       repeat,      lost_source,  lost_target,
                                     dying_rank, dying_after, forget_fences};
             return PyNetwork{std::make_shared<FakeNetwork>(ranks, bytes, faults)};
           }),
           py::arg("ranks"), py::arg("window_bytes"), py::kw_only(), py::arg("seed") = 0,
           py::arg("repeat") = 0.1, py::arg("lost_source") = -1, py::arg("lost_target") = -1,
           py::arg("dying_rank") = -1, py::arg("dying_after") = 0, py::arg("forget_fences") = false)
      .def("endpoint", &PyNetwork::endpoint);
  static py::exception<FakeDeath> death(comm, "FakeDeath");
  py::register_exception_translator([](std::exception_ptr p) {
    try {
      if (p) std::rethrow_exception(p);
    } catch (const FakeDeath&) {
      py::set_error(death, "this rank of the fake network has died");
    }
  });

  py::class_<Region>(comm, "Region", py::buffer_protocol()).def_buffer(&Region::buffer);
  py::class_<Handle, std::shared_ptr<Handle>>(comm, "Handle")
      .def_readonly("tokens", &Handle::tokens)
      .def_readonly("rows", &Handle::rows)
      .def_readonly("mentions", &Handle::mentions)
      .def_readonly("rows_from", &Handle::rows_from);
  py::class_<LowLatencyHandle, std::shared_ptr<LowLatencyHandle>>(comm, "LowLatencyHandle")
      .def_readonly("call", &LowLatencyHandle::call)
      .def_readonly("received", &LowLatencyHandle::received);
  py::class_<PyExchange>(comm, "Exchange")
      .def(py::init<Endpoint, int64_t, int64_t, int64_t, int, const std::vector<int>&, int, bool>())
      .def_property_readonly("alive", [](PyExchange& e) { return e.exchange().alive(); })
      .def_property_readonly("broken", [](PyExchange& e) { return e.exchange().broken(); })
      .def("restart", [](PyExchange& e, uint64_t alive) { e.exchange().restart(alive); })
      .def("take_region", &PyExchange::take_region)
      .def("dispatch", &PyExchange::dispatch)
      .def("combine", &PyExchange::combine)
      .def("low_latency_send", &PyExchange::low_latency_send)
      .def("low_latency_receive", &PyExchange::low_latency_receive)
      .def("low_latency_return", &PyExchange::low_latency_return)
      .def("low_latency_reduce", &PyExchange::low_latency_reduce);
}
