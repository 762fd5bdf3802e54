#include "cuda/launch/gemm.hpp"

#include <optional>

#include "cuda/gemm_shape.hpp"
#include "cuda/launch/gemm_tensors.hpp"

namespace dsk::launch {
namespace {

namespace cu = device::cu;

int64_t k_blocks(const GemmFp8Args& args) { return (args.k + 127) / 128; }
// Groups with rows of A, B and D of their own.
int64_t planes_of_a(const GemmFp8Args& args) {
  return args.kind == GemmKind::kMasked ? args.num_groups : 1;
}
int64_t planes_of_b(const GemmFp8Args& args) {
  return args.kind == GemmKind::kAlongK ? 1 : args.num_groups;
}
int64_t planes_of_d(const GemmFp8Args& args) {
  return args.kind == GemmKind::kAlongK ? args.num_groups : planes_of_a(args);
}

int64_t columns_of_d(const GemmFp8Args& args) { return args.swiglu ? args.n / 2 : args.n; }

size_t scale_bytes(int64_t k_rows, int64_t ld, int64_t columns) {
  return ((k_rows - 1) * ld + columns) * sizeof(float);
}
size_t sfb_bytes(const GemmFp8Args& args) {
  if (args.kind == GemmKind::kAlongK) return scale_bytes(k_blocks(args), args.ld_sfb, args.n);
  return size_t(args.num_groups) * ((args.n + 127) / 128) * k_blocks(args) * sizeof(float);
}

GemmFp8Params make_params(Context& context, const GemmFp8Args& args, const GemmChoice& choice) {
  const GemmConfig& config = choice.config;
  GemmFp8Params params{};
  const uint64_t rows = uint64_t(args.m) * planes_of_a(args);
  const uint64_t b_rows = uint64_t(args.n) * planes_of_b(args);
  // Of a tile that a pair shares, each CTA loads half.
  params.a = encode_matrix(context, cu::kUint8, args.a, args.k, rows, args.lda, 128,
                           config.block_m / choice.cluster.pair_n, cu::kSwizzle128B);
  const int b_box = config.family == GemmFamily::kSwiglu ? 64 : config.block_n;
  params.b = encode_matrix(context, cu::kUint8, args.b, args.k, b_rows, args.ldb, 128,
                           b_box / choice.cluster.pair_m, cu::kSwizzle128B);
  params.sfa =
      encode_matrix(context, cu::kFloat32, args.sfa, args.m, k_blocks(args) * planes_of_a(args),
                    args.ld_sfa * sizeof(float), config.block_m, 1, cu::kSwizzleNone);
  if (args.kind == GemmKind::kAlongK) {
    params.sfb = encode_matrix(context, cu::kFloat32, args.sfb, args.n, k_blocks(args),
                               args.ld_sfb * sizeof(float), config.block_n, 1, cu::kSwizzleNone);
  } else {
    // TMA's addresses are multiples of 16 bytes.
    params.sfb_offset = int(reinterpret_cast<uintptr_t>(args.sfb) % 16 / sizeof(float));
    const uint64_t count = params.sfb_offset + sfb_bytes(args) / sizeof(float);
    params.sfb = encode_matrix(context, cu::kFloat32, args.sfb - params.sfb_offset, count, 1,
                               (count * sizeof(float) + 15) / 16 * 16, 4, 1, cu::kSwizzleNone);
  }
  params.result =
      make_result(context, args.d, args.c, args.bias, args.m * planes_of_d(args),
                  columns_of_d(args), config.family == GemmFamily::kSwapped ? config.block_m : 64,
                  gemm_panel_columns(config.block_n));
  params.extent.group_rows = args.group_rows;
  params.extent.runs = args.runs;
  params.extent.arrived = args.arrived;
  params.extent.m = args.m;
  params.extent.n = args.n;
  params.extent.k = args.k;
  params.extent.num_groups = args.num_groups;
  params.extent.kind = group_kind(args.kind);
  params.extent.cluster = cluster_use(choice.cluster);
  params.extent.raster = choice.raster;
  params.extent.k_share = int((k_blocks(args) + choice.cluster.split - 1) / choice.cluster.split);
  params.extent.skip_empty = args.c.address == args.d.address && args.c.type == args.d.type;
  return params;
}

// What the kernel may touch beside its result.
struct OperandLoans {
  OperandLoans(Context& context, const GemmFp8Args& args)
      : a(context, args.a, (args.m * planes_of_a(args) - 1) * args.lda + args.k, true),
        sfa(context, args.sfa, scale_bytes(k_blocks(args) * planes_of_a(args), args.ld_sfa, args.m),
            true),
        b(context, args.b, (args.n * planes_of_b(args) - 1) * args.ldb + args.k, true),
        sfb(context, args.sfb, sfb_bytes(args), true),
        counts(context, args.group_rows, args.group_rows ? args.num_groups * sizeof(int32_t) : 0,
               true),
        runs(context, args.runs, args.runs ? (1 + 3 * size_t(args.m)) * sizeof(int32_t) : 0, true) {
  }

  HostLoan a, sfa, b, sfb, counts, runs;
};

}  // namespace

void gemm_runs(Context& context, const GemmRunsParams& params, cu::Stream stream) {
  constexpr unsigned kThreads = 1024;  // as in instances/gemm.def
  HostLoan indices(context, params.m_indices, size_t(params.rows) * sizeof(int32_t), true);
  HostLoan runs(context, params.runs, (1 + 3 * size_t(params.rows)) * sizeof(int32_t), false);
  GemmRunsParams copy = params;
  device::LaunchShape shape;
  shape.block.x = kThreads;
  void* arguments[] = {&copy};
  context.device().launch(context.kernel("gemm_runs"), shape, arguments, stream);
  if (context.emulated()) context.device().synchronize(stream);
}

void gemm_fp8(Context& context, const GemmFp8Args& args, cu::Stream stream) {
  if (args.m == 0 || args.n == 0 || args.num_groups == 0) return;
  GemmProblem problem;
  problem.kind = args.kind;
  problem.m = args.m;
  problem.n = args.n;
  problem.k = args.k;
  problem.num_groups = args.num_groups;
  problem.num_sms = args.num_sms;
  problem.swiglu = args.swiglu;
  problem.deterministic = args.deterministic;
  if (args.kind == GemmKind::kMasked && args.expected_m > 0) problem.m = args.expected_m;
  if (problem.num_sms <= 0) problem.num_sms = context.device().num_sms();
  const GemmChoice choice = choose_gemm(problem, args.force);

  // A tile is loaded whole: its last rows must not be the next group's, which are being written.
  if (args.arrived && args.m % choice.config.block_m != 0) {
    throw device::DeviceError("a: expected groups of a multiple of " +
                              std::to_string(choice.config.block_m) + " rows, the tiles of " +
                              choice.config.kernel + ", got " + std::to_string(args.m));
  }
  std::optional<OperandLoans> operands;
  std::optional<ResultLoan> result;
  if (!args.arrived) {
    operands.emplace(context, args);
    result.emplace(context, args.d, args.c, args.bias, size_t(args.m) * planes_of_d(args),
                   columns_of_d(args), args.num_groups,
                   planes_of_a(args) * ((columns_of_d(args) + 127) / 128));
  }
  GemmFp8Params params = make_params(context, args, choice);
  device::LaunchShape shape;
  shape.grid.x = unsigned(choice.num_ctas);
  shape.block.x = unsigned(choice.config.threads);
  shape.cluster.x = unsigned(choice.cluster.size());
  shape.shared_bytes = unsigned(choice.config.shared_bytes);
  void* arguments[] = {&params};
  context.device().launch(context.kernel(choice.config.kernel), shape, arguments, stream);
  if (context.emulated() && !args.arrived) context.device().synchronize(stream);
}

}  // namespace dsk::launch
