// Python face of the CPU kernels: `_C.cpu`. Objects become borrowed DLTensors, the C ABI does the
// rest, the GIL is released while kernels run.
#include <pybind11/pybind11.h>

#include "api/bindings.hpp"
#include "api/dlpack.hpp"
#include "cpu/kernels.hpp"
#include "cpu/threads.hpp"

namespace dsk::api {
namespace {

void raise_on(int status) {
  if (status != 0) throw py::value_error(dsk_last_error());
}

template <typename Call>
void without_gil(Call&& call) {
  int status;
  {
    py::gil_scoped_release release;
    status = call();
  }
  raise_on(status);
}

void quantize(py::handle x, py::handle data, py::handle scale, int64_t block_m, int64_t block_k,
              int scale_format, int threads) {
  const TensorArg x_("x", x), data_("data", data, true), scale_("scale", scale, true);
  without_gil([&] {
    return dsk_quantize(x_.get(), data_.get(), scale_.get(), block_m, block_k, scale_format,
                        threads);
  });
}

void rms_norm(py::handle x, py::handle weight, py::handle residual, double eps, py::handle y,
              py::handle sum, int threads) {
  const TensorArg x_("x", x), weight_("weight", weight), residual_("residual", residual);
  const TensorArg y_("y", y, true), sum_("sum", sum, true);
  without_gil([&] {
    return dsk_rms_norm(x_.get(), weight_.get(), residual_.get(), eps, y_.get(), sum_.get(),
                        threads);
  });
}

void rms_norm_quantize(py::handle x, py::handle weight, py::handle residual, double eps,
                       py::handle data, py::handle scale, py::handle sum, int scale_format,
                       int threads) {
  const TensorArg x_("x", x), weight_("weight", weight), residual_("residual", residual);
  const TensorArg data_("data", data, true), scale_("scale", scale, true), sum_("sum", sum, true);
  without_gil([&] {
    return dsk_rms_norm_quantize(x_.get(), weight_.get(), residual_.get(), eps, data_.get(),
                                 scale_.get(), sum_.get(), scale_format, threads);
  });
}

void swiglu(py::handle x, py::handle y, int threads) {
  const TensorArg x_("x", x), y_("y", y, true);
  without_gil([&] { return dsk_swiglu(x_.get(), y_.get(), threads); });
}

void swiglu_quantize(py::handle x, py::handle data, py::handle scale, int scale_format,
                     int threads) {
  const TensorArg x_("x", x), data_("data", data, true), scale_("scale", scale, true);
  without_gil([&] {
    return dsk_swiglu_quantize(x_.get(), data_.get(), scale_.get(), scale_format, threads);
  });
}

void rope(py::handle x, py::handle cos, py::handle sin, bool interleaved, bool inverse,
          py::handle y, int threads) {
  const TensorArg x_("x", x), cos_("cos", cos), sin_("sin", sin), y_("y", y, true);
  without_gil([&] {
    return dsk_rope(x_.get(), cos_.get(), sin_.get(), interleaved, inverse, y_.get(), threads);
  });
}

void pack(py::handle b, py::handle packed, py::handle marks, int threads) {
  const TensorArg b_("b", b), packed_("packed", packed, true), marks_("marks", marks, true);
  without_gil([&] { return dsk_pack(b_.get(), packed_.get(), marks_.get(), threads); });
}

void unpack(py::handle packed, py::handle b, int threads) {
  const TensorArg packed_("packed", packed), b_("b", b, true);
  without_gil([&] { return dsk_unpack(packed_.get(), b_.get(), threads); });
}

void gemm(py::handle x, py::handle scale_x, py::handle packed, py::handle marks, py::handle scale_b,
          py::handle c, py::handle bias, py::handle y, int threads) {
  const TensorArg x_("x", x), scale_x_("scale_x", scale_x), packed_("packed", packed);
  const TensorArg marks_("marks", marks), scale_b_("scale_b", scale_b), c_("c", c);
  const TensorArg bias_("bias", bias), y_("y", y, true);
  without_gil([&] {
    return dsk_gemm(x_.get(), scale_x_.get(), packed_.get(), marks_.get(), scale_b_.get(), c_.get(),
                    bias_.get(), y_.get(), threads);
  });
}

void mla_decode(py::handle q, py::handle cache, py::handle block_table, py::handle seq_lens,
                double scale, bool causal, py::handle out, py::handle lse, int threads) {
  const TensorArg q_("q", q), cache_("kv_cache", cache), table_("block_table", block_table);
  const TensorArg lens_("seq_lens", seq_lens), out_("out", out, true), lse_("lse", lse, true);
  without_gil([&] {
    return dsk_mla_decode(q_.get(), cache_.get(), table_.get(), lens_.get(), scale, causal,
                          out_.get(), lse_.get(), threads);
  });
}

void mla_prefill(py::handle q, py::handle k, py::handle v, py::handle cu_seqlens_q,
                 py::handle cu_seqlens_k, double scale, bool causal, py::handle out, py::handle lse,
                 int threads) {
  const TensorArg q_("q", q), k_("k", k), v_("v", v), ends_q("cu_seqlens_q", cu_seqlens_q);
  const TensorArg ends_k("cu_seqlens_k", cu_seqlens_k), out_("out", out, true);
  const TensorArg lse_("lse", lse, true);
  without_gil([&] {
    return dsk_mla_prefill(q_.get(), k_.get(), v_.get(), ends_q.get(), ends_k.get(), scale, causal,
                           out_.get(), lse_.get(), threads);
  });
}

void mla_prefill_backward(py::handle grad, py::handle grad_lse, py::handle q, py::handle k,
                          py::handle v, py::handle out, py::handle lse, py::handle cu_seqlens_q,
                          py::handle cu_seqlens_k, double scale, bool causal, py::handle dq,
                          py::handle dk, py::handle dv, int threads) {
  const TensorArg grad_("grad", grad), grad_lse_("grad_lse", grad_lse), q_("q", q), k_("k", k);
  const TensorArg v_("v", v), out_("out", out), lse_("lse", lse);
  const TensorArg ends_q("cu_seqlens_q", cu_seqlens_q), ends_k("cu_seqlens_k", cu_seqlens_k);
  const TensorArg dq_("dq", dq, true), dk_("dk", dk, true), dv_("dv", dv, true);
  without_gil([&] {
    return dsk_mla_prefill_backward(grad_.get(), grad_lse_.get(), q_.get(), k_.get(), v_.get(),
                                    out_.get(), lse_.get(), ends_q.get(), ends_k.get(), scale,
                                    causal, dq_.get(), dk_.get(), dv_.get(), threads);
  });
}

void mla_cache_append(py::handle cache, py::handle latent, py::handle k_rope, py::handle slots,
                      int threads) {
  const TensorArg cache_("kv_cache", cache, true), latent_("latent", latent);
  const TensorArg k_rope_("k_rope", k_rope), slots_("slots", slots);
  without_gil([&] {
    return dsk_mla_cache_append(cache_.get(), latent_.get(), k_rope_.get(), slots_.get(), threads);
  });
}

void moe_experts(py::handle x, py::handle w13, py::handle marks13, py::handle scale13,
                 py::handle w2, py::handle marks2, py::handle scale2, py::handle topk_idx,
                 py::handle topk_weights, int64_t intermediate, bool quantize, py::handle out,
                 int threads) {
  const TensorArg x_("x", x), w13_("w13", w13), marks13_("marks13", marks13);
  const TensorArg scale13_("scale13", scale13), w2_("w2", w2), marks2_("marks2", marks2);
  const TensorArg scale2_("scale2", scale2), idx_("topk_idx", topk_idx);
  const TensorArg weights_("topk_weights", topk_weights), out_("out", out, true);
  without_gil([&] {
    return dsk_moe_experts(x_.get(), w13_.get(), marks13_.get(), scale13_.get(), w2_.get(),
                           marks2_.get(), scale2_.get(), idx_.get(), weights_.get(), intermediate,
                           quantize, out_.get(), threads);
  });
}

void moe_gate(py::handle x, py::handle weight, py::handle bias, int64_t num_groups,
              int64_t topk_group, double scale, bool softmax, bool group_by_sum, bool renormalize,
              py::handle topk_idx, py::handle topk_weights, py::handle scores, int threads) {
  const TensorArg x_("x", x), weight_("weight", weight), bias_("bias", bias);
  const TensorArg idx_("topk_idx", topk_idx, true), weights_("topk_weights", topk_weights, true);
  const TensorArg scores_("scores", scores, true);
  without_gil([&] {
    return dsk_moe_gate(x_.get(), weight_.get(), bias_.get(), num_groups, topk_group, scale,
                        softmax, group_by_sum, renormalize, idx_.get(), weights_.get(),
                        scores_.get(), threads);
  });
}

void moe_gate_backward(py::handle grad_weights, py::handle grad_scores, py::handle x,
                       py::handle weight, py::handle topk_idx, py::handle scores, double scale,
                       bool softmax, bool renormalize, py::handle dx, py::handle dweight,
                       int threads) {
  const TensorArg grad_weights_("grad_weights", grad_weights), x_("x", x);
  const TensorArg grad_scores_("grad_scores", grad_scores), weight_("weight", weight);
  const TensorArg idx_("topk_idx", topk_idx), scores_("scores", scores);
  const TensorArg dx_("dx", dx, true), dweight_("dweight", dweight, true);
  without_gil([&] {
    return dsk_moe_gate_backward(grad_weights_.get(), grad_scores_.get(), x_.get(), weight_.get(),
                                 idx_.get(), scores_.get(), scale, softmax, renormalize, dx_.get(),
                                 dweight_.get(), threads);
  });
}

void moe_layout(py::handle topk_idx, int64_t alignment, py::handle counts, py::handle group_sizes,
                py::handle row_map) {
  const TensorArg idx_("topk_idx", topk_idx), counts_("counts", counts, true);
  const TensorArg sizes_("group_sizes", group_sizes, true), map_("row_map", row_map, true);
  without_gil([&] {
    return dsk_moe_layout(idx_.get(), alignment, counts_.get(), sizes_.get(), map_.get());
  });
}

void moe_permute(py::handle x, py::handle row_map, py::handle counts, py::handle group_sizes,
                 py::handle out, int threads) {
  const TensorArg x_("x", x), map_("row_map", row_map), counts_("counts", counts);
  const TensorArg sizes_("group_sizes", group_sizes), out_("out", out, true);
  without_gil([&] {
    return dsk_moe_permute(x_.get(), map_.get(), counts_.get(), sizes_.get(), out_.get(), threads);
  });
}

void moe_unpermute(py::handle y, py::handle row_map, py::handle topk_weights, py::handle out,
                   int threads) {
  const TensorArg y_("y", y), map_("row_map", row_map), weights_("topk_weights", topk_weights);
  const TensorArg out_("out", out, true);
  without_gil(
      [&] { return dsk_moe_unpermute(y_.get(), map_.get(), weights_.get(), out_.get(), threads); });
}

void moe_unpermute_backward(py::handle grad, py::handle y, py::handle row_map,
                            py::handle topk_weights, py::handle dy, py::handle dweights,
                            int threads) {
  const TensorArg grad_("grad", grad), y_("y", y), map_("row_map", row_map);
  const TensorArg weights_("topk_weights", topk_weights), dy_("dy", dy, true);
  const TensorArg dweights_("dweights", dweights, true);
  without_gil([&] {
    return dsk_moe_unpermute_backward(grad_.get(), y_.get(), map_.get(), weights_.get(), dy_.get(),
                                      dweights_.get(), threads);
  });
}

std::string text_or_raise(const char* text) {
  if (text == nullptr) throw py::value_error(dsk_last_error());
  return text;
}

}  // namespace
}  // namespace dsk::api

void dsk::api::bind_cpu(pybind11::module_& m) {
  using namespace dsk::api;
  py::module_ cpu = m.def_submodule("cpu", "CPU kernels; see dskernels.cpu");
  cpu.def("target", [] { return text_or_raise(dsk_cpu_target()); });
  cpu.def("target_reason", [] { return text_or_raise(dsk_cpu_target_reason()); });
  cpu.def("select_target", [](const std::string& name) { dsk::cpu::select_target(name.c_str()); });
  cpu.def("available_targets", [] {
    py::list names;
    for (const char* name : dsk::cpu::available_targets()) names.append(name);
    return names;
  });
  cpu.def("pool_size", &dsk::cpu::pool_size);
  cpu.def("quantize", &quantize);
  cpu.def("rms_norm", &rms_norm);
  cpu.def("rms_norm_quantize", &rms_norm_quantize);
  cpu.def("swiglu", &swiglu);
  cpu.def("swiglu_quantize", &swiglu_quantize);
  cpu.def("rope", &rope);
  cpu.def("packed_bytes", &dsk_packed_bytes);
  cpu.def("packed_marks", &dsk_packed_marks);
  cpu.def("pack", &pack);
  cpu.def("unpack", &unpack);
  cpu.def("gemm", &gemm);
  cpu.def("mla_decode", &mla_decode);
  cpu.def("mla_prefill", &mla_prefill);
  cpu.def("mla_prefill_backward", &mla_prefill_backward);
  cpu.def("mla_cache_append", &mla_cache_append);
  cpu.def("moe_gate", &moe_gate);
  cpu.def("moe_gate_backward", &moe_gate_backward);
  cpu.def("moe_layout", &moe_layout);
  cpu.def("moe_permute", &moe_permute);
  cpu.def("moe_unpermute", &moe_unpermute);
  cpu.def("moe_unpermute_backward", &moe_unpermute_backward);
  cpu.def("moe_experts", &moe_experts);
}
