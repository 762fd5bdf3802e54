// C ABI: the rowwise stem, and the error and target queries.
#include "api/tensor_check.hpp"
#include "cpu/kernels.hpp"
#include "cpu/threads.hpp"

namespace dsk::api {
namespace {

thread_local std::string last_error;

constexpr std::initializer_list<Type> kFloats = {Type::kF32, Type::kBF16, Type::kF16};

// data, scale: where a quantised result of [m, k] goes.
void quantized_output(RowwiseParams& p, const DLTensor* data, const DLTensor* scale,
                      int scale_format) {
  const MutableMatrix out = Arg("data", data).shape({p.m, p.k}).output({Type::kE4M3});
  p.data = static_cast<uint8_t*>(out.data);
  p.data_stride = out.stride;
  const int64_t rows = (p.m + p.block_m - 1) / p.block_m;
  const int64_t columns = (p.k + p.block_k - 1) / p.block_k;
  p.scale = Arg("scale", scale).shape({rows, columns}).writable().scales();
  DSK_CHECK(scale_format == 0 || scale_format == 1,
            "scale_format: expected 0 (fp32) or 1 (power of two), got ", scale_format);
  p.pow2 = scale_format == 1;
}

RowwiseParams norm_params(const DLTensor* x, const DLTensor* weight, const DLTensor* residual,
                          double eps, const DLTensor* sum, int num_threads) {
  const Arg input("x", x);
  RowwiseParams p;
  p.x = input.shape({-1, -1}).matrix(kFloats);
  p.m = input.size(0);
  p.k = input.size(1);
  p.weight = Arg("weight", weight).shape({p.k}).matrix(kFloats);
  DSK_CHECK((residual == nullptr) == (sum == nullptr),
            "residual, sum: expected both or neither, got ", residual ? "residual" : "sum",
            " alone");
  if (residual != nullptr) {
    p.residual = Arg("residual", residual).shape({p.m, p.k}).matrix({p.x.type});
    p.sum = Arg("sum", sum).shape({p.m, p.k}).output({p.x.type});
  }
  p.eps = static_cast<float>(eps);
  p.threads = cpu::resolve_threads(num_threads);
  return p;
}

RowwiseParams swiglu_params(const DLTensor* x, int num_threads) {
  const Arg input("x", x);
  RowwiseParams p;
  p.x = input.shape({-1, -1}).matrix(kFloats);
  DSK_CHECK(input.size(1) % 2 == 0, "x: expected an even last dimension [gate; up], got ",
            input.size(1));
  p.m = input.size(0);
  p.k = input.size(1) / 2;
  p.threads = cpu::resolve_threads(num_threads);
  return p;
}

}  // namespace

void set_error(const char* message) { last_error = message; }

}  // namespace dsk::api

using namespace dsk;
using namespace dsk::api;

extern "C" {

const char* dsk_last_error(void) { return last_error.c_str(); }

const char* dsk_cpu_target(void) {
  const char* name = "";
  return guarded([&] { name = cpu::kernels().name; }) == 0 ? name : nullptr;
}

const char* dsk_cpu_target_reason(void) {
  const char* reason = "";
  return guarded([&] { reason = cpu::target_reason(); }) == 0 ? reason : nullptr;
}

int dsk_quantize(const DLTensor* x, const DLTensor* data, const DLTensor* scale, int64_t block_m,
                 int64_t block_k, int scale_format, int num_threads) {
  return guarded([&] {
    const Arg input("x", x);
    RowwiseParams p;
    p.x = input.shape({-1, -1}).matrix(kFloats);
    p.m = input.size(0);
    p.k = input.size(1);
    DSK_CHECK(block_m >= 1 && block_k >= 1, "block: expected two positive sizes, got (", block_m,
              ", ", block_k, ")");
    p.block_m = block_m;
    p.block_k = block_k;
    quantized_output(p, data, scale, scale_format);
    p.threads = cpu::resolve_threads(num_threads);
    cpu::kernels().quantize(p);
  });
}

int dsk_rms_norm(const DLTensor* x, const DLTensor* weight, const DLTensor* residual, double eps,
                 const DLTensor* y, const DLTensor* sum, int num_threads) {
  return guarded([&] {
    RowwiseParams p = norm_params(x, weight, residual, eps, sum, num_threads);
    p.y = Arg("y", y).shape({p.m, p.k}).output({p.x.type});
    cpu::kernels().rms_norm(p);
  });
}

int dsk_rms_norm_quantize(const DLTensor* x, const DLTensor* weight, const DLTensor* residual,
                          double eps, const DLTensor* data, const DLTensor* scale,
                          const DLTensor* sum, int scale_format, int num_threads) {
  return guarded([&] {
    RowwiseParams p = norm_params(x, weight, residual, eps, sum, num_threads);
    quantized_output(p, data, scale, scale_format);
    cpu::kernels().rms_norm(p);
  });
}

int dsk_swiglu(const DLTensor* x, const DLTensor* y, int num_threads) {
  return guarded([&] {
    RowwiseParams p = swiglu_params(x, num_threads);
    p.y = Arg("y", y).shape({p.m, p.k}).output({p.x.type});
    cpu::kernels().swiglu(p);
  });
}

int dsk_swiglu_quantize(const DLTensor* x, const DLTensor* data, const DLTensor* scale,
                        int scale_format, int num_threads) {
  return guarded([&] {
    RowwiseParams p = swiglu_params(x, num_threads);
    quantized_output(p, data, scale, scale_format);
    cpu::kernels().swiglu(p);
  });
}

int dsk_rope(const DLTensor* x, const DLTensor* cos, const DLTensor* sin, int interleaved,
             int inverse, const DLTensor* y, int num_threads) {
  return guarded([&] {
    const Arg input("x", x), output("y", y), angle("cos", cos), angle_sin("sin", sin);
    RopeParams p;
    p.type = input.shape({-1, -1, -1}).contiguous_last().type(kFloats);
    p.t = input.size(0);
    p.h = input.size(1);
    p.r = input.size(2);
    DSK_CHECK(p.r % 2 == 0, "x: expected an even last dimension, got ", p.r);
    angle.shape({p.t, p.r / 2}).contiguous_last().type({Type::kF32});
    angle_sin.shape({p.t, p.r / 2}).contiguous_last().type({Type::kF32});
    DSK_CHECK(angle.stride(0) == angle_sin.stride(0),
              "sin: expected the row stride of cos = ", angle.stride(0), ", got ",
              angle_sin.stride(0));
    output.shape({p.t, p.h, p.r}).writable().contiguous_last().type({p.type});
    p.x = input.data<const void>();
    p.x_t = input.stride(0);
    p.x_h = input.stride(1);
    p.cos = angle.data<const float>();
    p.sin = angle_sin.data<const float>();
    p.angle_t = angle.stride(0);
    p.y = output.data<void>();
    p.y_t = output.stride(0);
    p.y_h = output.stride(1);
    p.interleaved = interleaved != 0;
    p.inverse = inverse != 0;
    p.threads = cpu::resolve_threads(num_threads);
    cpu::kernels().rope(p);
  });
}

}  // extern "C"
