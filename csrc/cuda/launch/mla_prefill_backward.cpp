#include "cuda/launch/mla_prefill_backward.hpp"

#include <cmath>

#include "cuda/params/mla_prefill_backward.hpp"

namespace dsk::launch {
namespace {

namespace cu = device::cu;

constexpr int kThreads = 384;  // as in instances/mla.def
constexpr int kStatisticsThreads = 256;

void launch_statistics(Context& context, const MlaPrefillBackwardArgs& args, cu::Stream stream) {
  const MlaPrefillArgs& forward = args.forward;
  PrefillStatisticsParams params{};
  params.out = forward.out;
  params.grad = args.grad;
  params.lse = forward.lse;
  params.grad_lse = args.grad_lse;
  params.cu_seqlens_q = forward.cu_seqlens_q;
  params.statistics = static_cast<PrefillStatistics*>(args.statistics);
  params.b = forward.b;
  params.h = forward.h;
  params.t = forward.t;

  device::LaunchShape shape;
  shape.grid.x = unsigned(prefill_statistics_rows(forward.t, forward.b) / kBackwardBlock);
  shape.grid.y = unsigned(forward.h);
  shape.block.x = kStatisticsThreads;
  if (shape.grid.x == 0) return;  // no requests
  void* arguments[] = {&params};
  context.device().launch(context.kernel("mla_prefill_backward_statistics"), shape, arguments,
                          stream);
}

PrefillBackwardParams params_of(const Context& context, const MlaPrefillBackwardArgs& args) {
  const MlaPrefillArgs& forward = args.forward;
  const int t = forward.t, keys = forward.keys, h = forward.h;
  PrefillBackwardParams params{};
  params.q = encode_heads(context, forward.q, t, h, kPrefillWidth, kBackwardBlock);
  params.k = encode_heads(context, forward.k, keys, h, kPrefillWidth, kBackwardBlock);
  params.v = encode_heads(context, forward.v, keys, h, kPrefillValues, kBackwardBlock);
  params.grad = encode_heads(context, args.grad, t, h, kPrefillValues, kBackwardBlock);
  params.statistics = static_cast<const PrefillStatistics*>(args.statistics);
  params.cu_seqlens_q = forward.cu_seqlens_q;
  params.cu_seqlens_k = forward.cu_seqlens_k;
  params.dq = args.dq;
  params.dk = args.dk;
  params.dv = args.dv;
  params.b = forward.b;
  params.h = h;
  params.t = t;
  params.keys = keys;
  params.causal = forward.causal;
  params.scale = forward.softmax_scale;
  params.scale_log2 = float(double(forward.softmax_scale) * M_LOG2E);
  return params;
}

}  // namespace

size_t mla_prefill_backward_workspace(int t, int b, int h) {
  return size_t(prefill_statistics_rows(t, b)) * h * sizeof(PrefillStatistics);
}

void mla_prefill_backward(Context& context, const MlaPrefillBackwardArgs& args, cu::Stream stream) {
  const MlaPrefillArgs& forward = args.forward;
  if (forward.h == 0) return;
  const int t = forward.t, keys = forward.keys, h = forward.h, b = forward.b;
  const size_t q_rows = size_t(t) * h, k_rows = size_t(keys) * h;
  constexpr size_t kWide = kPrefillWidth * 2, kNarrow = kPrefillValues * 2;
  HostLoan q(context, forward.q, q_rows * kWide, true);
  HostLoan k(context, forward.k, k_rows * kWide, true);
  HostLoan v(context, forward.v, k_rows * kNarrow, true);
  HostLoan ends_q(context, forward.cu_seqlens_q, size_t(b + 1) * sizeof(int32_t), true);
  HostLoan ends_k(context, forward.cu_seqlens_k, size_t(b + 1) * sizeof(int32_t), true);
  HostLoan out(context, forward.out, q_rows * kNarrow, true);
  HostLoan lse(context, forward.lse, q_rows * sizeof(float), true);
  HostLoan grad(context, args.grad, q_rows * kNarrow, true);
  HostLoan grad_lse(context, args.grad_lse, q_rows * sizeof(float), true);
  HostLoan statistics(context, args.statistics, mla_prefill_backward_workspace(t, b, h), false);
  HostLoan dq(context, args.dq, q_rows * kWide, false);
  HostLoan dk(context, args.dk, k_rows * kWide, false);
  HostLoan dv(context, args.dv, k_rows * kNarrow, false);

  launch_statistics(context, args, stream);
  PrefillBackwardParams params = params_of(context, args);
  void* arguments[] = {&params};
  device::LaunchShape shape;
  shape.grid.y = unsigned(h);
  shape.block.x = kThreads;
  shape.shared_bytes = unsigned(prefill_backward_shared_bytes());
  // Each request, and the rows behind the last one, may end in a partly filled job.
  shape.grid.x = unsigned(keys / kBackwardKept + b + 1);
  context.device().launch(context.kernel("mla_prefill_backward_keys"), shape, arguments, stream);
  shape.grid.x = unsigned(t / kBackwardKept + b + 1);
  context.device().launch(context.kernel("mla_prefill_backward_queries"), shape, arguments, stream);
  if (context.emulated()) context.device().synchronize(stream);
}

}  // namespace dsk::launch
