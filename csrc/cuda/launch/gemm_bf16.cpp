#include "cuda/launch/gemm_bf16.hpp"

#include <algorithm>
#include <stdexcept>

#include "cuda/gemm_shape.hpp"
#include "cuda/launch/gemm_tensors.hpp"

namespace dsk::launch {
namespace {

namespace cu = device::cu;

constexpr int kBlockK = 64;  // bf16 values of a swizzled row of 128 bytes

constexpr GemmConfig make(const char* kernel, int block_m, int block_n, int num_stages) {
  GemmConfig config;
  config.kernel = kernel;
  config.block_m = block_m;
  config.block_n = block_n;
  config.num_stages = num_stages;
  config.threads = (block_m / 64 + 1) * 128;  // a warpgroup for each 64 rows, and the producer's
  config.shared_bytes = gemm_bf16_shared_bytes(block_m, block_n, num_stages);
  return config;
}

constexpr GemmConfig kConfigs[] = {
    make("gemm_bf16_64x128", 64, 128, 8),
    make("gemm_bf16_128x256", 128, 256, 3),
};

long long ceil_div(long long a, long long b) { return (a + b - 1) / b; }

long long count_tiles(const GemmProblem& problem, const GemmConfig& config) {
  const bool planes = problem.kind == GemmKind::kMasked || problem.kind == GemmKind::kAlongK;
  long long m_blocks = ceil_div(problem.m, config.block_m);
  if (planes) m_blocks *= problem.num_groups;
  // Each group's last block is partly empty: half a block a group, on average.
  if (problem.kind == GemmKind::kContiguous) m_blocks += problem.num_groups / 2;
  return m_blocks * ceil_div(problem.n, config.block_n);
}

// A tile's k block takes the tensor core N / 2 cycles for each of its 4 wgmma of 64 rows, and L2
// about 64 bytes a cycle; filling the pipeline and storing the result come on top.
double tile_cycles(const GemmProblem& problem, const GemmConfig& config) {
  constexpr double kL2BytesPerCycle = 64, kFillAndStore = 1500, kStoreBytes = 32;
  double k_blocks = double(ceil_div(problem.k, kBlockK));
  if (problem.kind == GemmKind::kAlongK) k_blocks /= std::max(1, problem.num_groups);
  const double tensor = config.block_m / 64 * 4 * (config.block_n / 2.0);
  const double operands = (config.block_m + config.block_n) * 128 / kL2BytesPerCycle;
  const double result = config.block_m * config.block_n * 2 / kStoreBytes;
  return k_blocks * std::max(tensor, operands) + kFillAndStore + result;
}

int64_t planes_of_a(const GemmBf16Args& args) {
  return args.kind == GemmKind::kMasked ? args.num_groups : 1;
}
int64_t planes_of_b(const GemmBf16Args& args) {
  return args.kind == GemmKind::kAlongK ? 1 : args.num_groups;
}
int64_t planes_of_d(const GemmBf16Args& args) {
  return args.kind == GemmKind::kAlongK ? args.num_groups : planes_of_a(args);
}

GemmBf16Params make_params(Context& context, const GemmBf16Args& args, const GemmChoice& choice) {
  GemmBf16Params params{};
  params.a = encode_matrix(context, cu::kBfloat16, args.a, args.k, args.m * planes_of_a(args),
                           args.lda * 2, kBlockK, choice.config.block_m, cu::kSwizzle128B);
  params.b = encode_matrix(context, cu::kBfloat16, args.b, args.k, args.n * planes_of_b(args),
                           args.ldb * 2, kBlockK, choice.config.block_n, cu::kSwizzle128B);
  params.result =
      make_result(context, args.d, args.c, args.bias, args.m * planes_of_d(args), args.n, 64);
  params.extent.group_rows = args.group_rows;
  params.extent.runs = args.runs;
  params.extent.m = args.m;
  params.extent.n = args.n;
  params.extent.k = args.k;
  params.extent.num_groups = args.num_groups;
  params.extent.kind = group_kind(args.kind);
  params.extent.cluster = ClusterUse::kNone;
  params.extent.raster = choice.raster;
  params.extent.skip_empty = args.c.address == args.d.address && args.c.type == args.d.type;
  return params;
}

}  // namespace

GemmChoice choose_gemm_bf16(const GemmProblem& problem, const std::string& kernel) {
  GemmChoice best;
  for (const GemmConfig& config : kConfigs) {
    if (!kernel.empty() && config.kernel != kernel) continue;
    const long long tiles = count_tiles(problem, config);
    const long long waves = std::max(1LL, ceil_div(tiles, problem.num_sms));
    const double cycles = double(waves) * tile_cycles(problem, config);
    if (best.config.kernel && cycles >= best.modelled_cycles) continue;
    best.config = config;
    best.tiles = tiles;
    best.modelled_cycles = cycles;
  }
  if (!best.config.kernel) {
    throw std::invalid_argument("kernel: expected a gemm_bf16 instance, got " + kernel);
  }
  best.raster = 8;
  // Groups may need more tiles than were guessed: take every SM.
  best.num_ctas = problem.kind == GemmKind::kDense
                      ? int(std::clamp<long long>(best.tiles, 1, problem.num_sms))
                      : problem.num_sms;
  best.reason = std::to_string(best.tiles) + " tiles of " + std::to_string(best.config.block_m) +
                "x" + std::to_string(best.config.block_n) + " on " +
                std::to_string(problem.num_sms) + " SMs";
  return best;
}

void gemm_bf16(Context& context, const GemmBf16Args& args, cu::Stream stream) {
  if (args.m == 0 || args.n == 0 || args.num_groups == 0) return;
  GemmProblem problem;
  problem.kind = args.kind;
  problem.m = args.kind == GemmKind::kMasked && args.expected_m > 0 ? args.expected_m : args.m;
  problem.n = args.n;
  problem.k = args.k;
  problem.num_groups = args.num_groups;
  problem.num_sms = args.num_sms > 0 ? args.num_sms : context.device().num_sms();
  const GemmChoice choice = choose_gemm_bf16(problem, args.kernel);

  const size_t a_rows = args.m * planes_of_a(args), b_rows = args.n * planes_of_b(args);
  HostLoan a(context, args.a, ((a_rows - 1) * args.lda + args.k) * 2, true);
  HostLoan b(context, args.b, ((b_rows - 1) * args.ldb + args.k) * 2, true);
  HostLoan counts(context, args.group_rows, args.group_rows ? args.num_groups * sizeof(int32_t) : 0,
                  true);
  HostLoan runs(context, args.runs, args.runs ? (1 + 3 * size_t(args.m)) * sizeof(int32_t) : 0,
                true);
  ResultLoan result(context, args.d, args.c, args.bias, size_t(args.m) * planes_of_d(args), args.n,
                    args.num_groups);
  GemmBf16Params params = make_params(context, args, choice);
  device::LaunchShape shape;
  shape.grid.x = unsigned(choice.num_ctas);
  shape.block.x = unsigned(choice.config.threads);
  shape.shared_bytes = unsigned(choice.config.shared_bytes);
  void* arguments[] = {&params};
  context.device().launch(context.kernel(choice.config.kernel), shape, arguments, stream);
  if (context.emulated()) context.device().synchronize(stream);
}

}  // namespace dsk::launch
