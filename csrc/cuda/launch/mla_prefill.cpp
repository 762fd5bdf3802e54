#include "cuda/launch/mla_prefill.hpp"

#include <cmath>
#include <cstring>

#include "cuda/params/mla_prefill.hpp"

namespace dsk::launch {
namespace {

namespace cu = device::cu;

constexpr int kThreads = 384;  // as in instances/mla.def

}  // namespace

TensorMapBytes encode_heads(const Context& context, const void* address, int rows, int heads,
                            int width, int box_rows) {
  device::TensorMapSpec spec;
  spec.type = cu::kBfloat16;
  spec.rank = 3;
  spec.address = reinterpret_cast<cu::DevicePtr>(address);
  spec.dims[0] = uint64_t(width);
  spec.dims[1] = uint64_t(rows);
  spec.dims[2] = uint64_t(heads);
  spec.strides[0] = uint64_t(heads) * width * 2;
  spec.strides[1] = uint64_t(width) * 2;
  spec.box[0] = 64;
  spec.box[1] = uint32_t(box_rows);
  spec.box[2] = 1;
  spec.swizzle = cu::kSwizzle128B;
  const cu::TensorMap map = context.device().encode(spec);
  TensorMapBytes bytes;
  static_assert(sizeof(bytes) == sizeof(map));
  std::memcpy(&bytes, &map, sizeof(map));
  return bytes;
}

void mla_prefill(Context& context, const MlaPrefillArgs& args, cu::Stream stream) {
  if (args.t == 0 || args.h == 0) return;
  const size_t q_rows = size_t(args.t) * args.h, k_rows = size_t(args.keys) * args.h;
  HostLoan q(context, args.q, q_rows * kPrefillWidth * 2, true);
  HostLoan k(context, args.k, k_rows * kPrefillWidth * 2, true);
  HostLoan v(context, args.v, k_rows * kPrefillValues * 2, true);
  HostLoan ends_q(context, args.cu_seqlens_q, size_t(args.b + 1) * sizeof(int32_t), true);
  HostLoan ends_k(context, args.cu_seqlens_k, size_t(args.b + 1) * sizeof(int32_t), true);
  HostLoan out(context, args.out, q_rows * kPrefillValues * 2, false);
  HostLoan lse(context, args.lse, q_rows * sizeof(float), false);

  MlaPrefillParams params{};
  params.q = encode_heads(context, args.q, args.t, args.h, kPrefillWidth, kPrefillRows / 2);
  params.k = encode_heads(context, args.k, args.keys, args.h, kPrefillWidth, kPrefillBlock);
  params.v = encode_heads(context, args.v, args.keys, args.h, kPrefillValues, kPrefillBlock);
  params.cu_seqlens_q = args.cu_seqlens_q;
  params.cu_seqlens_k = args.cu_seqlens_k;
  params.out = args.out;
  params.lse = args.lse;
  params.b = args.b;
  params.h = args.h;
  params.t = args.t;
  params.causal = args.causal;
  params.scale_log2 = float(double(args.softmax_scale) * M_LOG2E);

  device::LaunchShape shape;
  // Each request, and the rows behind the last one, may end in a partly filled block.
  shape.grid.x = unsigned(args.t / kPrefillRows + args.b + 1);
  shape.grid.y = unsigned(args.h);
  shape.block.x = kThreads;
  shape.shared_bytes = unsigned(mla_prefill_shared_bytes());
  void* arguments[] = {&params};
  context.device().launch(context.kernel("mla_prefill"), shape, arguments, stream);
  if (context.emulated()) context.device().synchronize(stream);
}

}  // namespace dsk::launch
