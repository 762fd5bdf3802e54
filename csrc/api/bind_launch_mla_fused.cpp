// The launchers of csrc/cuda/launch/mla_fused.hpp, for Python. `on` is (machine, ordinal, stream,
// num_sms); a tensor is its address, where needed with a stride in elements or its type.
#include "cuda/launch/mla_fused.hpp"

#include <pybind11/stl.h>

#include "api/bind_launch.hpp"

namespace py = pybind11;

namespace dsk::api {
namespace {

using Strided = std::pair<Address, int64_t>;
using Typed = std::pair<Address, bool>;  // whether it is fp32 instead of bf16

WideType type_of(const Typed& tensor) {
  return tensor.second ? WideType::kFloat32 : WideType::kBfloat16;
}

void mla_latents(const On& on, const Strided& q, const Strided& latent, const Strided& k_rope,
                 const Typed& q_weight, const Typed& latent_weight, Address cosines, Address sines,
                 Address slots, Address q_out, Address cache, size_t cache_bytes, int64_t ld_page,
                 int64_t ld_token, int t, int pages, int page, bool fp8, bool interleaved,
                 float eps) {
  MlaLatentsParams p{};
  p.q = pointer<void>(q.first);
  p.latent = pointer<void>(latent.first);
  p.k_rope = pointer<void>(k_rope.first);
  p.q_weight = pointer<void>(q_weight.first);
  p.latent_weight = pointer<void>(latent_weight.first);
  p.cos = pointer<float>(cosines);
  p.sin = pointer<float>(sines);
  p.slots = pointer<int64_t>(slots);
  p.q_out = pointer<void>(q_out);
  p.cache = pointer<uint8_t>(cache);
  p.ld_q = q.second;
  p.ld_latent = latent.second;
  p.ld_rope = k_rope.second;
  p.ld_page = ld_page;
  p.ld_token = ld_token;
  p.num_slots = int64_t(pages) * page;
  p.t = t;
  p.page = page;
  p.fp8 = fp8;
  p.interleaved = interleaved;
  p.eps = eps;
  p.q_weight_type = type_of(q_weight);
  p.latent_weight_type = type_of(latent_weight);
  launch::mla_latents(launch_on(on), p, cache_bytes);
}

launch::MlaAbsorbArgs absorb_args(Address x, Address w, Address y, int t, int h, int w_rows) {
  launch::MlaAbsorbArgs args;
  args.x = pointer<void>(x);
  args.w = pointer<void>(w);
  args.y = pointer<void>(y);
  args.t = t;
  args.h = h;
  args.w_rows = w_rows;
  return args;
}

void mla_absorb_queries(const On& on, Address q, Address w, Address y, Address cosines,
                        Address sines, int t, int h, int w_rows, bool interleaved) {
  launch::MlaAbsorbArgs args = absorb_args(q, w, y, t, h, w_rows);
  args.cos = pointer<float>(cosines);
  args.sin = pointer<float>(sines);
  args.interleaved = interleaved;
  launch::mla_absorb_queries(launch_on(on), args);
}

void mla_absorb_output(const On& on, Address o, Address w, Address y, int t, int h, int w_rows) {
  launch::mla_absorb_output(launch_on(on), absorb_args(o, w, y, t, h, w_rows));
}

}  // namespace

void bind_launch_mla_fused(py::module_& launch) {
  using namespace py::literals;
  const auto release = py::call_guard<py::gil_scoped_release>();
  launch.def("mla_latents", &mla_latents, "on"_a, py::kw_only(), "q"_a, "latent"_a, "k_rope"_a,
             "q_weight"_a, "latent_weight"_a, "cos"_a, "sin"_a, "slots"_a, "q_out"_a, "cache"_a,
             "cache_bytes"_a, "ld_page"_a, "ld_token"_a, "t"_a, "pages"_a, "page"_a, "fp8"_a,
             "interleaved"_a, "eps"_a, release);
  launch.def("mla_absorb_queries", &mla_absorb_queries, "on"_a, py::kw_only(), "q"_a, "w"_a, "y"_a,
             "cos"_a, "sin"_a, "t"_a, "h"_a, "w_rows"_a, "interleaved"_a, release);
  launch.def("mla_absorb_output", &mla_absorb_output, "on"_a, py::kw_only(), "o"_a, "w"_a, "y"_a,
             "t"_a, "h"_a, "w_rows"_a, release);
}

}  // namespace dsk::api
