// C ABI: the moe stem.
#include "api/tensor_check.hpp"
#include "cpu/kernels.hpp"
#include "cpu/packed.hpp"
#include "cpu/threads.hpp"

using namespace dsk;
using namespace dsk::api;

namespace {

int64_t blocks(int64_t size) { return (size + cpu::kScaleBlock - 1) / cpu::kScaleBlock; }

PackedExperts experts(const Arg& data, const Arg& marks, const Arg& scale, int64_t e, int64_t n,
                      int64_t k) {
  data.shape({e, dsk_packed_bytes(n, k)}).contiguous().bytes();
  marks.shape({e, dsk_packed_marks(n, k)}).contiguous().bytes();
  scale.shape({e, blocks(n), blocks(k)}).type({Type::kF32});
  return {data.data<const uint8_t>(),
          marks.data<const uint8_t>(),
          scale.data<const float>(),
          scale.stride(0),
          scale.stride(1),
          scale.stride(2)};
}

}  // namespace

extern "C" int dsk_moe_experts(const DLTensor* x, const DLTensor* w13, const DLTensor* marks13,
                               const DLTensor* scale13, const DLTensor* w2, const DLTensor* marks2,
                               const DLTensor* scale2, const DLTensor* topk_idx,
                               const DLTensor* topk_weights, int64_t intermediate, int quantize,
                               const DLTensor* out, int num_threads) {
  return guarded([&] {
    const Arg input("x", x), first("w13", w13), idx("topk_idx", topk_idx);
    MoeParams p;
    p.x = input.shape({-1, -1}).matrix({Type::kF32, Type::kBF16, Type::kF16});
    p.t = input.size(0);
    p.d = input.size(1);
    p.i = intermediate;
    DSK_CHECK(p.i >= 0 && p.i % cpu::kPanel == 0, "intermediate: expected a multiple of ",
              cpu::kPanel, ", got ", p.i);
    first.shape({-1, -1});
    p.e = first.size(0);
    p.w13 = experts(first, Arg("marks13", marks13), Arg("scale13", scale13), p.e, 2 * p.i, p.d);
    p.w2 = experts(Arg("w2", w2), Arg("marks2", marks2), Arg("scale2", scale2), p.e, p.d, p.i);
    p.topk_idx = idx.shape({p.t, -1}).contiguous().integers<int64_t>();
    p.k = idx.size(1);
    for (int64_t j = 0; j < p.t * p.k; ++j) {
      DSK_CHECK(p.topk_idx[j] >= -1 && p.topk_idx[j] < p.e, "topk_idx[", j / p.k, ", ", j % p.k,
                "]: expected -1 .. ", p.e - 1, ", got ", p.topk_idx[j]);
    }
    const Arg weights("topk_weights", topk_weights);
    weights.shape({p.t, p.k}).contiguous().type({Type::kF32});
    p.topk_weights = weights.data<const float>();
    p.quantize = quantize != 0;
    p.out = Arg("out", out).shape({p.t, p.d}).output({p.x.type});
    p.threads = cpu::resolve_threads(num_threads);
    if (p.t > 0 && p.d > 0) cpu::kernels().moe_experts(p);
  });
}
