// The launchers of csrc/cuda/launch/gemm.hpp, for Python.
#include "cuda/launch/gemm.hpp"

#include <utility>

#include "api/bind_launch.hpp"

namespace py = pybind11;

namespace dsk::api {
namespace {

launch::GemmKind kind_of(const std::string& kind) {
  if (kind == "dense") return launch::GemmKind::kDense;
  if (kind == "contiguous") return launch::GemmKind::kContiguous;
  if (kind == "masked") return launch::GemmKind::kMasked;
  throw std::invalid_argument("kind: expected dense, contiguous or masked, got " + kind);
}

// (address, is fp32) of a result, an addend or a bias; address 0 is none.
using TensorArgument = std::pair<uint64_t, bool>;

launch::GemmTensor tensor_of(const TensorArgument& argument) {
  return {pointer<void>(argument.first),
          argument.second ? ElementType::kFloat32 : ElementType::kBfloat16};
}

void gemm_fp8(const std::string& machine, int ordinal, uint64_t stream, const std::string& kind,
              uint64_t a, uint64_t sfa, uint64_t b, uint64_t sfb, const TensorArgument& d,
              const TensorArgument& c, const TensorArgument& bias, uint64_t group_rows, int m,
              int n, int k, int expected_m, int num_groups, int64_t lda, int64_t ldb,
              int64_t ld_sfa, int num_sms) {
  launch::GemmFp8Args args;
  args.kind = kind_of(kind);
  args.a = pointer<void>(a);
  args.sfa = pointer<float>(sfa);
  args.b = pointer<void>(b);
  args.sfb = pointer<float>(sfb);
  args.d = tensor_of(d);
  args.c = tensor_of(c);
  args.bias = tensor_of(bias);
  args.group_rows = pointer<int32_t>(group_rows);
  args.m = m;
  args.n = n;
  args.k = k;
  args.expected_m = expected_m;
  args.num_groups = num_groups;
  args.lda = lda;
  args.ldb = ldb;
  args.ld_sfa = ld_sfa;
  args.num_sms = num_sms;
  launch::gemm_fp8(context_of(machine, ordinal), args, stream_of(stream));
}

py::dict gemm_config(const std::string& kind, int m, int n, int k, int num_groups, int num_sms) {
  const launch::GemmChoice choice =
      launch::choose_gemm({kind_of(kind), m, n, k, num_groups, num_sms});
  py::dict result;
  result["kernel"] = choice.config.kernel;
  result["block_m"] = choice.config.block_m;
  result["block_n"] = choice.config.block_n;
  result["num_stages"] = choice.config.num_stages;
  result["threads"] = choice.config.threads;
  result["shared_bytes"] = choice.config.shared_bytes;
  result["num_ctas"] = choice.num_ctas;
  result["tiles"] = choice.tiles;
  result["reason"] = choice.reason;
  return result;
}

}  // namespace

void bind_launch_gemm(py::module_& launch) {
  using namespace py::literals;
  const auto release = py::call_guard<py::gil_scoped_release>();
  launch.def("gemm_fp8", &gemm_fp8, "machine"_a, "ordinal"_a, "stream"_a, "kind"_a, "a"_a, "sfa"_a,
             "b"_a, "sfb"_a, "d"_a, "c"_a, "bias"_a, "group_rows"_a, "m"_a, "n"_a, "k"_a,
             "expected_m"_a, "num_groups"_a, "lda"_a, "ldb"_a, "ld_sfa"_a, "num_sms"_a, release);
  launch.def("gemm_config", &gemm_config, "kind"_a, "m"_a, "n"_a, "k"_a, "num_groups"_a = 1,
             "num_sms"_a = 132, "The launch configuration of a shape, and the reason for it.");
}

}  // namespace dsk::api
