// The launchers of csrc/cuda/launch/mla_prefill{,_backward}.hpp, for Python.
#include "cuda/launch/mla_prefill.hpp"

#include "api/bind_launch.hpp"
#include "cuda/launch/mla_prefill_backward.hpp"

namespace py = pybind11;

namespace dsk::api {
namespace {

void mla_prefill(const std::string& machine, int ordinal, uint64_t stream, uint64_t q, uint64_t k,
                 uint64_t v, uint64_t cu_seqlens_q, uint64_t cu_seqlens_k, uint64_t out,
                 uint64_t lse, int t, int keys, int h, int b, bool causal, float softmax_scale) {
  launch::MlaPrefillArgs args;
  args.q = pointer<void>(q);
  args.k = pointer<void>(k);
  args.v = pointer<void>(v);
  args.cu_seqlens_q = pointer<int32_t>(cu_seqlens_q);
  args.cu_seqlens_k = pointer<int32_t>(cu_seqlens_k);
  args.out = pointer<void>(out);
  args.lse = pointer<float>(lse);
  args.t = t;
  args.keys = keys;
  args.h = h;
  args.b = b;
  args.causal = causal;
  args.softmax_scale = softmax_scale;
  launch::mla_prefill(context_of(machine, ordinal), args, stream_of(stream));
}

void mla_prefill_backward(const std::string& machine, int ordinal, uint64_t stream, uint64_t grad,
                          uint64_t grad_lse, uint64_t q, uint64_t k, uint64_t v, uint64_t out,
                          uint64_t lse, uint64_t cu_seqlens_q, uint64_t cu_seqlens_k,
                          uint64_t statistics, uint64_t dq, uint64_t dk, uint64_t dv, int t,
                          int keys, int h, int b, bool causal, float softmax_scale) {
  launch::MlaPrefillBackwardArgs args;
  launch::MlaPrefillArgs& forward = args.forward;
  forward.q = pointer<void>(q);
  forward.k = pointer<void>(k);
  forward.v = pointer<void>(v);
  forward.cu_seqlens_q = pointer<int32_t>(cu_seqlens_q);
  forward.cu_seqlens_k = pointer<int32_t>(cu_seqlens_k);
  forward.out = pointer<void>(out);
  forward.lse = pointer<float>(lse);
  forward.t = t;
  forward.keys = keys;
  forward.h = h;
  forward.b = b;
  forward.causal = causal;
  forward.softmax_scale = softmax_scale;
  args.grad = pointer<void>(grad);
  args.grad_lse = pointer<float>(grad_lse);
  args.statistics = pointer<void>(statistics);
  args.dq = pointer<void>(dq);
  args.dk = pointer<void>(dk);
  args.dv = pointer<void>(dv);
  launch::mla_prefill_backward(context_of(machine, ordinal), args, stream_of(stream));
}

}  // namespace

void bind_launch_mla_prefill(py::module_& launch) {
  using namespace py::literals;
  launch.def("mla_prefill", &mla_prefill, py::kw_only(), "machine"_a, "ordinal"_a, "stream"_a,
             "q"_a, "k"_a, "v"_a, "cu_seqlens_q"_a, "cu_seqlens_k"_a, "out"_a, "lse"_a, "t"_a,
             "keys"_a, "h"_a, "b"_a, "causal"_a, "softmax_scale"_a,
             py::call_guard<py::gil_scoped_release>());
  launch.def("mla_prefill_backward", &mla_prefill_backward, py::kw_only(), "machine"_a, "ordinal"_a,
             "stream"_a, "grad"_a, "grad_lse"_a, "q"_a, "k"_a, "v"_a, "out"_a, "lse"_a,
             "cu_seqlens_q"_a, "cu_seqlens_k"_a, "statistics"_a, "dq"_a, "dk"_a, "dv"_a, "t"_a,
             "keys"_a, "h"_a, "b"_a, "causal"_a, "softmax_scale"_a,
             py::call_guard<py::gil_scoped_release>());
  launch.def("mla_prefill_backward_workspace", &launch::mla_prefill_backward_workspace, "t"_a,
             "b"_a, "h"_a, "Bytes of mla_prefill_backward's statistics.");
}

}  // namespace dsk::api
