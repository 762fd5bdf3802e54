// The launcher of csrc/cuda/launch/mla_prefill.hpp, for Python.
#include "cuda/launch/mla_prefill.hpp"

#include "api/bind_launch.hpp"

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

}  // namespace

void bind_launch_mla_prefill(py::module_& launch) {
  using namespace py::literals;
  launch.def("mla_prefill", &mla_prefill, py::kw_only(), "machine"_a, "ordinal"_a, "stream"_a,
             "q"_a, "k"_a, "v"_a, "cu_seqlens_q"_a, "cu_seqlens_k"_a, "out"_a, "lse"_a, "t"_a,
             "keys"_a, "h"_a, "b"_a, "causal"_a, "softmax_scale"_a,
             py::call_guard<py::gil_scoped_release>());
}

}  // namespace dsk::api
