#include "cuda/launch/gemm_tensors.hpp"

#include <cstring>

namespace dsk::launch {
namespace {

namespace cu = device::cu;

size_t bytes_of(ElementType type) {
  switch (type) {
    case ElementType::kFloat32:
      return 4;
    case ElementType::kBfloat16:
      return 2;
    case ElementType::kE4m3:
      return 1;
  }
  return 0;
}

}  // namespace

TensorMapBytes encode_matrix(Context& context, cu::TensorMapDataType type, const void* address,
                             uint64_t columns, uint64_t rows, uint64_t row_bytes,
                             uint32_t box_columns, uint32_t box_rows,
                             cu::TensorMapSwizzle swizzle) {
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

GroupKind group_kind(GemmKind kind) {
  if (kind == GemmKind::kDense) return GroupKind::kDense;
  if (kind == GemmKind::kMasked) return GroupKind::kMasked;
  return kind == GemmKind::kAlongK ? GroupKind::kAlongK : GroupKind::kRows;
}

ClusterUse cluster_use(const GemmCluster& cluster) {
  if (cluster.split > 1) return ClusterUse::kSplitK;
  if (cluster.pair_m > 1) return ClusterUse::kSharedB;
  return cluster.pair_n > 1 ? ClusterUse::kSharedA : ClusterUse::kNone;
}

ResultLoan::ResultLoan(Context& context, const GemmTensor& d, const GemmTensor& c,
                       const GemmTensor& bias, size_t rows, size_t n, size_t num_groups,
                       size_t scale_rows)
    : d_(context, d.address, rows * n * bytes_of(d.type), false),
      scale_(context, d.scale, d.scale ? scale_rows * d.ld_scale * sizeof(float) : 0, false) {
  if (c.address && c.address != d.address)
    c_.emplace(context, c.address, rows * n * bytes_of(c.type), true);
  if (bias.address)
    bias_.emplace(context, bias.address, num_groups * n * bytes_of(bias.type), true);
}

GemmResult make_result(Context& context, const GemmTensor& d, const GemmTensor& c,
                       const GemmTensor& bias, uint64_t rows, uint64_t n, uint32_t box_rows,
                       uint32_t box_columns) {
  GemmResult result{};
  if (d.type == ElementType::kBfloat16) {
    result.map = encode_matrix(context, cu::kBfloat16, d.address, n, rows, n * 2, box_columns,
                               box_rows, box_columns == 64 ? cu::kSwizzle128B : cu::kSwizzle64B);
  } else if (d.type == ElementType::kE4m3) {
    result.map =
        encode_matrix(context, cu::kUint8, d.address, n, rows, n, 128, box_rows, cu::kSwizzle128B);
  }
  result.d = d.address;
  result.c = c.address;
  result.bias = bias.address;
  result.scale = d.scale;
  result.ld_scale = d.ld_scale;
  result.d_type = d.type;
  result.c_type = c.type;
  result.bias_type = bias.type;
  return result;
}

}  // namespace dsk::launch
