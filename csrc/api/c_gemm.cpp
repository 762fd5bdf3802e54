// C ABI: packed weights and the gemm stem.
#include "api/tensor_check.hpp"
#include "cpu/kernels.hpp"
#include "cpu/packed.hpp"
#include "cpu/threads.hpp"

using namespace dsk;
using namespace dsk::api;

namespace {

int64_t blocks(int64_t size) { return (size + cpu::kScaleBlock - 1) / cpu::kScaleBlock; }

}  // namespace

extern "C" {

int64_t dsk_packed_bytes(int64_t n, int64_t k) { return cpu::PackedShape{n, k}.bytes(); }

int64_t dsk_packed_marks(int64_t n, int64_t k) {
  const cpu::PackedShape shape{n, k};
  return shape.panels() * shape.blocks();
}

int dsk_pack(const DLTensor* b, const DLTensor* packed, const DLTensor* marks, int num_threads) {
  return guarded([&] {
    const Arg from("b", b), to("packed", packed), nans("marks", marks);
    from.shape({-1, -1, -1}).contiguous_last().type({Type::kE4M3});
    const cpu::PackedShape shape{from.size(1), from.size(2)};
    to.shape({from.size(0), shape.bytes()}).writable().contiguous_last().bytes();
    nans.shape({from.size(0), dsk_packed_marks(shape.n, shape.k)}).writable().contiguous_last();
    nans.bytes();
    for (int64_t g = 0; g < from.size(0); ++g) {
      cpu::pack(from.data<uint8_t>() + g * from.stride(0), from.stride(1), shape,
                to.data<uint8_t>() + g * to.stride(0), nans.data<uint8_t>() + g * nans.stride(0),
                cpu::resolve_threads(num_threads));
    }
  });
}

int dsk_unpack(const DLTensor* packed, const DLTensor* b, int num_threads) {
  return guarded([&] {
    const Arg from("packed", packed), to("b", b);
    to.shape({-1, -1, -1}).writable().contiguous_last().type({Type::kE4M3});
    const cpu::PackedShape shape{to.size(1), to.size(2)};
    from.shape({to.size(0), shape.bytes()}).contiguous_last().bytes();
    for (int64_t g = 0; g < to.size(0); ++g) {
      cpu::unpack(from.data<uint8_t>() + g * from.stride(0), shape,
                  to.data<uint8_t>() + g * to.stride(0), to.stride(1),
                  cpu::resolve_threads(num_threads));
    }
  });
}

int dsk_gemm(const DLTensor* x, const DLTensor* scale_x, const DLTensor* packed,
             const DLTensor* marks, const DLTensor* scale_b, const DLTensor* c,
             const DLTensor* bias, const DLTensor* y, int num_threads) {
  return guarded([&] {
    const Arg input("x", x), output("y", y), weights("packed", packed), nans("marks", marks);
    GemmParams p;
    p.x = input.shape({-1, -1}).matrix({Type::kE4M3, Type::kBF16, Type::kF16, Type::kF32});
    p.m = input.size(0);
    p.k = input.size(1);
    p.y = output.shape({p.m, -1}).output({Type::kBF16, Type::kF16, Type::kF32});
    p.n = output.size(1);
    DSK_CHECK((scale_x != nullptr) == (p.x.type == Type::kE4M3),
              "scale_x: expected for float8_e4m3fn x only, got ",
              scale_x != nullptr ? "one" : "none");
    if (scale_x != nullptr) {
      p.scale_x = Arg("scale_x", scale_x).shape({p.m, blocks(p.k)}).scales();
    }
    weights.shape({1, dsk_packed_bytes(p.n, p.k)}).contiguous_last().bytes();
    nans.shape({1, dsk_packed_marks(p.n, p.k)}).contiguous_last().bytes();
    p.weights = weights.data<const uint8_t>();
    p.nan_blocks = nans.data<const uint8_t>();
    const Arg scales("scale_b", scale_b);
    p.column_scales = scales.shape({-1, blocks(p.k)}).size(0) == p.n && p.n > 1;
    if (!p.column_scales) scales.shape({blocks(p.n), blocks(p.k)});
    p.scale_w = scales.scales();
    static constexpr std::initializer_list<Type> kFloats = {Type::kF32, Type::kBF16, Type::kF16};
    if (c != nullptr) p.c = Arg("c", c).shape({p.m, p.n}).matrix(kFloats);
    if (bias != nullptr) p.bias = Arg("bias", bias).shape({p.n}).matrix(kFloats);
    p.threads = cpu::resolve_threads(num_threads);
    if (p.m > 0 && p.n > 0) cpu::kernels().gemm(p);
  });
}

}  // extern "C"
