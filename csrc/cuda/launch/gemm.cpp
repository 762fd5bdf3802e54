#include "cuda/launch/gemm.hpp"

#include <cstring>
#include <optional>

namespace dsk::launch {
namespace {

namespace cu = device::cu;

// A row-major matrix seen by TMA: [rows, columns], one box of [box_rows, box_columns].
TensorMapBytes encode(Context& context, cu::TensorMapDataType type, const void* address,
                      uint64_t columns, uint64_t rows, uint64_t row_bytes, uint32_t box_columns,
                      uint32_t box_rows, cu::TensorMapSwizzle swizzle) {
  device::TensorMapSpec spec;
  spec.type = type;
  spec.rank = 2;
  spec.address = reinterpret_cast<cu::DevicePtr>(address);
  spec.dims[0] = columns;
  spec.dims[1] = rows;
  spec.strides[0] = row_bytes;
  spec.box[0] = box_columns;
  spec.box[1] = box_rows;
  spec.swizzle = swizzle;
  const cu::TensorMap map = context.device().encode(spec);
  TensorMapBytes bytes;
  static_assert(sizeof(bytes) == sizeof(map));
  std::memcpy(&bytes, &map, sizeof(map));
  return bytes;
}

int64_t k_blocks(const GemmFp8Args& args) { return (args.k + 127) / 128; }
int64_t planes(const GemmFp8Args& args) {  // groups with rows of their own
  return args.kind == GemmKind::kMasked ? args.num_groups : 1;
}

size_t bytes_of(ElementType type) { return type == ElementType::kFloat32 ? 4 : 2; }

// D, C and bias, and the memory that the kernel may touch for them.
class ResultLoan {
 public:
  ResultLoan(Context& context, const GemmTensor& d, const GemmTensor& c, const GemmTensor& bias,
             size_t rows, size_t n, size_t num_groups)
      : d_(context, d.address, rows * n * bytes_of(d.type), false) {
    if (c.address && c.address != d.address)
      c_.emplace(context, c.address, rows * n * bytes_of(c.type), true);
    if (bias.address)
      bias_.emplace(context, bias.address, num_groups * n * bytes_of(bias.type), true);
  }

 private:
  HostLoan d_;
  std::optional<HostLoan> c_, bias_;
};

GemmResult make_result(Context& context, const GemmTensor& d, const GemmTensor& c,
                       const GemmTensor& bias, uint64_t rows, uint64_t n) {
  GemmResult result{};
  if (d.type == ElementType::kBfloat16) {
    result.map =
        encode(context, cu::kBfloat16, d.address, n, rows, n * 2, 64, 64, cu::kSwizzle128B);
  }
  result.d = d.address;
  result.c = c.address;
  result.bias = bias.address;
  result.d_type = d.type;
  result.c_type = c.type;
  result.bias_type = bias.type;
  return result;
}

GemmFp8Params make_params(Context& context, const GemmFp8Args& args, const GemmConfig& config) {
  GemmFp8Params params{};
  const uint64_t rows = uint64_t(args.m) * planes(args);
  params.a = encode(context, cu::kUint8, args.a, args.k, rows, args.lda, 128, config.block_m,
                    cu::kSwizzle128B);
  params.b = encode(context, cu::kUint8, args.b, args.k, uint64_t(args.n) * args.num_groups,
                    args.ldb, 128, config.block_n, cu::kSwizzle128B);
  params.sfa = encode(context, cu::kFloat32, args.sfa, args.m, k_blocks(args) * planes(args),
                      args.ld_sfa * sizeof(float), config.block_m, 1, cu::kSwizzleNone);
  params.result = make_result(context, args.d, args.c, args.bias, rows, args.n);
  params.sfb = args.sfb;
  params.extent.group_rows = args.group_rows;
  params.extent.m = args.m;
  params.extent.n = args.n;
  params.extent.k = args.k;
  params.extent.num_groups = args.num_groups;
  params.extent.raster = 16;
  return params;
}

}  // namespace

void gemm_fp8(Context& context, const GemmFp8Args& args, cu::Stream stream) {
  if (args.m == 0 || args.n == 0 || args.num_groups == 0) return;
  GemmProblem problem{args.kind, args.m, args.n, args.k, args.num_groups, args.num_sms};
  if (args.kind == GemmKind::kMasked && args.expected_m > 0) problem.m = args.expected_m;
  if (problem.num_sms <= 0) problem.num_sms = context.device().num_sms();
  const GemmChoice choice = choose_gemm(problem);

  const size_t rows = size_t(args.m) * planes(args);
  HostLoan a(context, args.a, (rows - 1) * args.lda + args.k, true);
  HostLoan sfa(context, args.sfa,
               ((k_blocks(args) * planes(args) - 1) * args.ld_sfa + args.m) * sizeof(float), true);
  const size_t b_rows = size_t(args.n) * args.num_groups;
  HostLoan b(context, args.b, (b_rows - 1) * args.ldb + args.k, true);
  HostLoan sfb(context, args.sfb,
               size_t(args.num_groups) * ((args.n + 127) / 128) * k_blocks(args) * sizeof(float),
               true);
  ResultLoan result(context, args.d, args.c, args.bias, rows, args.n, args.num_groups);
  HostLoan counts(context, args.group_rows, args.group_rows ? args.num_groups * sizeof(int32_t) : 0,
                  true);

  GemmFp8Params params = make_params(context, args, choice.config);
  device::LaunchShape shape;
  shape.grid.x = unsigned(choice.num_ctas);
  shape.block.x = unsigned(choice.config.threads);
  shape.shared_bytes = unsigned(choice.config.shared_bytes);
  void* arguments[] = {&params};
  context.device().launch(context.kernel(choice.config.kernel), shape, arguments, stream);
  if (context.emulated()) context.device().synchronize(stream);
}

}  // namespace dsk::launch
