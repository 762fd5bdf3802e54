// Copies and sums of rows at memory speed. The instruction set is chosen at run time.
#pragma once

#include <array>
#include <cstdint>

namespace dsk::comm {

// Copies past the caches: for rows that another core reads next. Not ordered with other stores
// until stream_fence().
void stream_copy(void* to, const void* from, uint64_t bytes);
void stream_fence();
const char* copy_isa();  // "avx512", "avx2" or "portable"

enum class Element : int { kF32, kBF16, kF16 };
uint64_t element_bytes(Element type);

// Rows that are summed first, apart from the others: bit r of `last` ends a group at row r (rows
// behind the last such bit belong to none), and bit r of `rounded` has its sum rounded to the type.
struct RowGroups {
  uint64_t last = 0, rounded = 0;
};

using Bias = std::array<const void*, 2>;

// to[i] = sum over rows of weight * row[i], in order, in fp32: every product and every sum is
// rounded (no fused multiply-add), the result once to `type`. weights null: plain sums.
// Up to two rows of bias, of the same type, are added last; null: none. The sum, and that of a
// group, starts from +0.
void sum_rows(Element type, void* to, const void* const* rows, const float* weights, int num_rows,
              const Bias& bias, int64_t elements, RowGroups groups = {});

}  // namespace dsk::comm
