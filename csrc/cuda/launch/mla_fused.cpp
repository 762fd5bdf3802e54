#include "cuda/launch/mla_fused.hpp"

#include <algorithm>

#include "cuda/gemm_shape.hpp"
#include "cuda/launch/gemm_tensors.hpp"
#include "cuda/mla_shape.hpp"

namespace dsk::launch {
namespace {

namespace cu = device::cu;

constexpr int kLatentsThreads = 288;  // as in instances/mla.def
constexpr int kLatentsPerSm = 7;      // CTAs of so many threads
constexpr int kAbsorbThreads = 256;
constexpr int kBlockM = 64, kBlockN = 128, kBlockK = 64, kStages = 8;  // AbsorbShape

size_t bytes_of(WideType type) { return type == WideType::kBfloat16 ? 2 : 4; }

size_t span(int64_t rows, int64_t ld, int64_t columns) {
  return size_t((rows - 1) * ld + columns) * 2;
}

template <class Params>
void launch(const LaunchOn& on, const char* kernel, Params& params, int64_t ctas, int ctas_per_sm,
            int threads, int shared_bytes) {
  const int sms = on.num_sms > 0 ? on.num_sms : on.context.device().num_sms();
  device::LaunchShape shape;
  shape.grid.x = unsigned(std::min<int64_t>(ctas, int64_t(sms) * ctas_per_sm));
  shape.block.x = unsigned(threads);
  shape.shared_bytes = unsigned(shared_bytes);
  void* arguments[] = {&params};
  on.context.device().launch(on.context.kernel(kernel), shape, arguments, on.stream);
  if (on.context.emulated()) on.context.device().synchronize(on.stream);
}

// What differs between the two products.
struct Product {
  const char* kernel;
  int n, k;
  int x_columns, y_columns;  // of a head
  int w_used;                // rows of the weight that a head uses
  uint32_t w_box;            // rows of a load
};

void absorb(const LaunchOn& on, const MlaAbsorbArgs& args, const Product& product) {
  if (args.t == 0 || args.h == 0) return;
  const int64_t x_row = int64_t(args.h) * product.x_columns;
  const int64_t y_row = int64_t(args.h) * product.y_columns;
  const int64_t w_rows = int64_t(args.h - 1) * args.w_rows + product.w_used;
  const bool rotates = args.cos != nullptr;
  HostLoan x(on.context, args.x, size_t(args.t) * x_row * 2, true);
  HostLoan w(on.context, args.w, size_t(w_rows) * kMlaLatent * 2, true);
  HostLoan y(on.context, args.y, size_t(args.t) * y_row * 2, false);
  const size_t angles = rotates ? size_t(args.t) * kMlaRope / 2 * sizeof(float) : 0;
  HostLoan cosines(on.context, args.cos, angles, true);
  HostLoan sines(on.context, args.sin, angles, true);

  MlaAbsorbParams params{};
  params.x = encode_matrix(on.context, cu::kBfloat16, args.x, x_row, args.t, x_row * 2, kBlockK,
                           kBlockM, cu::kSwizzle128B);
  params.w = encode_matrix(on.context, cu::kBfloat16, args.w, kMlaLatent, w_rows, kMlaLatent * 2,
                           64, product.w_box, cu::kSwizzle128B);
  params.y = make_result(on.context, {args.y, ElementType::kBfloat16}, {}, {}, args.t, y_row, 64);
  if (rotates) {
    params.rope_in = static_cast<const uint16_t*>(args.x) + kMlaNope;
    params.rope_out = static_cast<uint16_t*>(args.y) + kMlaLatent;
    params.ld_in = x_row;
    params.ld_in_head = product.x_columns;
  }
  params.cos = args.cos;
  params.sin = args.sin;
  params.t = args.t;
  params.h = args.h;
  params.n = product.n;
  params.k = product.k;
  params.x_columns = product.x_columns;
  params.y_columns = product.y_columns;
  params.w_rows = args.w_rows;
  params.interleaved = args.interleaved;
  const int64_t tiles = int64_t((args.t + kBlockM - 1) / kBlockM) * (product.n / kBlockN) * args.h;
  launch(on, product.kernel, params, tiles, 1, kAbsorbThreads,
         gemm_bf16_shared_bytes(kBlockM, kBlockN, kStages));
}

}  // namespace

void mla_latents(const LaunchOn& on, const MlaLatentsParams& p, size_t cache_bytes) {
  if (p.t == 0) return;
  HostLoan q(on.context, p.q, p.q ? span(p.t, p.ld_q, kMlaQueryLatent) : 0, true);
  // latent and k_rope may be columns of one tensor: two loans of overlapping rows.
  HostLoan latent(on.context, p.latent, span(p.t, p.ld_latent, kMlaLatent), true);
  HostLoan k_rope(on.context, p.k_rope, span(p.t, p.ld_rope, kMlaRope), true);
  HostLoan q_weight(on.context, p.q_weight,
                    p.q_weight ? kMlaQueryLatent * bytes_of(p.q_weight_type) : 0, true);
  HostLoan latent_weight(on.context, p.latent_weight,
                         p.latent_weight ? kMlaLatent * bytes_of(p.latent_weight_type) : 0, true);
  const size_t angles = p.cos ? size_t(p.t) * kMlaRope / 2 * sizeof(float) : 0;
  HostLoan cosines(on.context, p.cos, angles, true);
  HostLoan sines(on.context, p.sin, angles, true);
  HostLoan slots(on.context, p.slots, size_t(p.t) * sizeof(int64_t), true);
  HostLoan q_out(on.context, p.q_out, p.q ? size_t(p.t) * kMlaQueryLatent * 2 : 0, false);
  HostLoan cache(on.context, p.cache, cache_bytes, false);
  MlaLatentsParams params = p;
  launch(on, "mla_latents", params, p.t, kLatentsPerSm, kLatentsThreads, 0);
}

void mla_absorb_queries(const LaunchOn& on, const MlaAbsorbArgs& args) {
  absorb(on, args,
         {"mla_absorb_queries", kMlaLatent, kMlaNope, kMlaNope + kMlaRope, kMlaWidth, kMlaNope,
          kBlockK});
}

void mla_absorb_output(const LaunchOn& on, const MlaAbsorbArgs& args) {
  absorb(
      on, args,
      {"mla_absorb_output", kMlaValues, kMlaLatent, kMlaLatent, kMlaValues, kMlaValues, kBlockN});
}

}  // namespace dsk::launch
