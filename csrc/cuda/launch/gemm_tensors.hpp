// What the GEMM launchers share: tensor maps, results, and the memory a kernel may touch for them.
#pragma once

#include <optional>

#include "cuda/launch/gemm.hpp"

namespace dsk::launch {

// A row-major matrix seen by TMA: [rows, columns], one box of [box_rows, box_columns].
TensorMapBytes encode_matrix(Context& context, device::cu::TensorMapDataType type,
                             const void* address, uint64_t columns, uint64_t rows,
                             uint64_t row_bytes, uint32_t box_columns, uint32_t box_rows,
                             device::cu::TensorMapSwizzle swizzle);

GroupKind group_kind(GemmKind kind);
ClusterUse cluster_use(const GemmCluster& cluster);

// D, C and bias, and the memory that the kernel may touch for them.
class ResultLoan {
 public:
  ResultLoan(Context& context, const GemmTensor& d, const GemmTensor& c, const GemmTensor& bias,
             size_t rows, size_t n, size_t num_groups, size_t scale_rows = 0);

 private:
  HostLoan d_, scale_;
  std::optional<HostLoan> c_, bias_;
};

// A box of D is 128 bytes of `box_rows` rows.
GemmResult make_result(Context& context, const GemmTensor& d, const GemmTensor& c,
                       const GemmTensor& bias, uint64_t rows, uint64_t n, uint32_t box_rows,
                       uint32_t box_columns = 64);

}  // namespace dsk::launch
