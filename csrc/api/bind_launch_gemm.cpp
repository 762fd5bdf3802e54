// The launchers of csrc/cuda/launch/gemm.hpp, for Python.
#include "cuda/launch/gemm.hpp"

#include <pybind11/stl.h>

#include <tuple>
#include <vector>

#include "api/bind_launch.hpp"
#include "cuda/launch/gemm_bf16.hpp"

namespace py = pybind11;

namespace dsk::api {
namespace {

launch::GemmKind kind_of(const std::string& kind) {
  if (kind == "dense") return launch::GemmKind::kDense;
  if (kind == "contiguous") return launch::GemmKind::kContiguous;
  if (kind == "masked") return launch::GemmKind::kMasked;
  if (kind == "along_k") return launch::GemmKind::kAlongK;
  throw std::invalid_argument("kind: expected dense, contiguous, masked or along_k, got " + kind);
}

// (address, "bf16", "fp32" or "e4m3", address of scales, their row stride) of a result, an addend
// or a bias; address 0 is none.
using TensorArgument = std::tuple<uint64_t, std::string, uint64_t, int64_t>;

ElementType type_of(const std::string& name) {
  if (name == "bf16") return ElementType::kBfloat16;
  if (name == "fp32") return ElementType::kFloat32;
  if (name == "e4m3") return ElementType::kE4m3;
  throw std::invalid_argument("type: expected bf16, fp32 or e4m3, got " + name);
}

launch::GemmTensor tensor_of(const TensorArgument& argument) {
  const auto& [address, type, scale, ld_scale] = argument;
  return {pointer<void>(address), type_of(type), pointer<float>(scale), ld_scale};
}

// (kernel, pair_m, pair_n, split); an empty kernel leaves the choice to the launcher.
using ForceArgument = std::tuple<std::string, int, int, int>;

launch::GemmForce force_of(const ForceArgument& argument) {
  const auto& [kernel, pair_m, pair_n, split] = argument;
  return {kernel, {pair_m, pair_n, split}};
}

void gemm_fp8(const std::string& machine, int ordinal, uint64_t stream, const std::string& kind,
              uint64_t a, uint64_t sfa, uint64_t b, uint64_t sfb, const TensorArgument& d,
              const TensorArgument& c, const TensorArgument& bias, uint64_t group_rows,
              uint64_t runs, int m, int n, int k, int expected_m, int num_groups, int64_t lda,
              int64_t ldb, int64_t ld_sfa, int64_t ld_sfb, int num_sms, bool swiglu,
              bool deterministic, const ForceArgument& force, uint64_t arrived) {
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
  args.runs = pointer<int32_t>(runs);
  args.m = m;
  args.n = n;
  args.k = k;
  args.expected_m = expected_m;
  args.num_groups = num_groups;
  args.lda = lda;
  args.ldb = ldb;
  args.ld_sfa = ld_sfa;
  args.ld_sfb = ld_sfb;
  args.num_sms = num_sms;
  args.swiglu = swiglu;
  args.deterministic = deterministic;
  args.force = force_of(force);
  args.arrived = pointer<int32_t>(arrived);
  launch::gemm_fp8(context_of(machine, ordinal), args, stream_of(stream));
}

void gemm_bf16(const std::string& machine, int ordinal, uint64_t stream, const std::string& kind,
               uint64_t a, uint64_t b, const TensorArgument& d, const TensorArgument& c,
               const TensorArgument& bias, uint64_t group_rows, uint64_t runs, int m, int n, int k,
               int expected_m, int num_groups, int64_t lda, int64_t ldb, int num_sms,
               const std::string& kernel) {
  launch::GemmBf16Args args;
  args.kind = kind_of(kind);
  args.a = pointer<void>(a);
  args.b = pointer<void>(b);
  args.d = tensor_of(d);
  args.c = tensor_of(c);
  args.bias = tensor_of(bias);
  args.group_rows = pointer<int32_t>(group_rows);
  args.runs = pointer<int32_t>(runs);
  args.m = m;
  args.n = n;
  args.k = k;
  args.expected_m = expected_m;
  args.num_groups = num_groups;
  args.lda = lda;
  args.ldb = ldb;
  args.num_sms = num_sms;
  args.kernel = kernel;
  launch::gemm_bf16(context_of(machine, ordinal), args, stream_of(stream));
}

void gemm_runs(const std::string& machine, int ordinal, uint64_t stream, uint64_t m_indices,
               uint64_t runs, int rows) {
  launch::gemm_runs(context_of(machine, ordinal),
                    {pointer<int32_t>(m_indices), pointer<int32_t>(runs), rows}, stream_of(stream));
}

launch::GemmProblem problem_of(const std::string& kind, int m, int n, int k, int num_groups,
                               int num_sms) {
  launch::GemmProblem problem;
  problem.kind = kind_of(kind);
  problem.m = m;
  problem.n = n;
  problem.k = k;
  problem.num_groups = num_groups;
  problem.num_sms = num_sms;
  return problem;
}

py::dict gemm_config(const std::string& kind, int m, int n, int k, int num_groups, int num_sms,
                     bool swiglu, bool deterministic, const ForceArgument& force) {
  launch::GemmProblem problem = problem_of(kind, m, n, k, num_groups, num_sms);
  problem.swiglu = swiglu;
  problem.deterministic = deterministic;
  const launch::GemmChoice choice = launch::choose_gemm(problem, force_of(force));
  py::dict result;
  result["kernel"] = choice.config.kernel;
  result["block_m"] = choice.config.block_m;
  result["block_n"] = choice.config.block_n;
  result["num_stages"] = choice.config.num_stages;
  result["threads"] = choice.config.threads;
  result["shared_bytes"] = choice.config.shared_bytes;
  result["pair_m"] = choice.cluster.pair_m;
  result["pair_n"] = choice.cluster.pair_n;
  result["split"] = choice.cluster.split;
  result["raster"] = choice.raster;
  result["num_ctas"] = choice.num_ctas;
  result["tiles"] = choice.tiles;
  result["modelled_cycles"] = choice.modelled_cycles;
  result["reason"] = choice.reason;
  return result;
}

double gemm_cycles(const std::string& kind, int m, int n, int k, int num_groups, int num_sms,
                   int block_m, int block_n, bool swapped, int pair_m, int pair_n, int split) {
  launch::GemmConfig config;
  if (kind == "along_k") config.family = launch::GemmFamily::kColumns;
  if (swapped) config.family = launch::GemmFamily::kSwapped;
  config.block_m = block_m;
  config.block_n = block_n;
  return launch::gemm_cycles(problem_of(kind, m, n, k, num_groups, num_sms), config,
                             {pair_m, pair_n, split});
}

std::vector<std::string> gemm_kernels() {
  std::vector<std::string> names;
  for (const launch::GemmConfig& config : launch::gemm_configs()) names.push_back(config.kernel);
  return names;
}

}  // namespace

void bind_launch_gemm(py::module_& launch) {
  using namespace py::literals;
  const auto release = py::call_guard<py::gil_scoped_release>();
  launch.def("gemm_fp8", &gemm_fp8, "machine"_a, "ordinal"_a, "stream"_a, "kind"_a, "a"_a, "sfa"_a,
             "b"_a, "sfb"_a, "d"_a, "c"_a, "bias"_a, "group_rows"_a, "runs"_a, "m"_a, "n"_a, "k"_a,
             "expected_m"_a, "num_groups"_a, "lda"_a, "ldb"_a, "ld_sfa"_a, "ld_sfb"_a, "num_sms"_a,
             "swiglu"_a, "deterministic"_a, "force"_a, "arrived"_a = 0, release);
  launch.def("gemm_bf16", &gemm_bf16, "machine"_a, "ordinal"_a, "stream"_a, "kind"_a, "a"_a, "b"_a,
             "d"_a, "c"_a, "bias"_a, "group_rows"_a, "runs"_a, "m"_a, "n"_a, "k"_a, "expected_m"_a,
             "num_groups"_a, "lda"_a, "ldb"_a, "num_sms"_a, "kernel"_a, release);
  launch.def("gemm_runs", &gemm_runs, "machine"_a, "ordinal"_a, "stream"_a, "m_indices"_a, "runs"_a,
             "rows"_a, release);
  launch.def("gemm_config", &gemm_config, "kind"_a, "m"_a, "n"_a, "k"_a, "num_groups"_a = 1,
             "num_sms"_a = 132, "swiglu"_a = false, "deterministic"_a = false,
             "force"_a = ForceArgument{"", 1, 1, 1},
             "The launch configuration of a shape, and the reason for it.");
  launch.def("gemm_kernels", &gemm_kernels, "Names of the shipped FP8 instances.");
  launch.def("gemm_cycles", &gemm_cycles, "kind"_a, "m"_a, "n"_a, "k"_a, "num_groups"_a,
             "num_sms"_a, "block_m"_a, "block_n"_a, "swapped"_a = false, "pair_m"_a = 1,
             "pair_n"_a = 1, "split"_a = 1,
             "The estimate by which configurations are compared, for tiles of any size.");
}

}  // namespace dsk::api
