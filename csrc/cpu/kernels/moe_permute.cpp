// Copies of tokens to their experts' rows and back: each byte is read and written once, tokens are
// shared out over threads. The sums back are pinned to the bit: a product and an addition, no fma.
#include "cpu/kernels/quantize_row.hpp"
#include "cpu/kernels/table.hpp"
#include "cpu/parallel.hpp"

namespace dsk::cpu::DSK_CPU_NS {
void moe_permute(const PermuteParams& p) {
  const size_t bytes = static_cast<size_t>(p.row_bytes);
  parallel_ranges(p.t, 4, p.threads, [&](int64_t t0, int64_t t1, int) {
    for (int64_t t = t0; t < t1; ++t) {
      for (int64_t k = 0; k < p.k; ++k) {
        const int64_t row = p.row_map[t * p.k + k];
        if (row >= 0) std::memcpy(p.out + row * p.row_bytes, p.x + t * p.x_row, bytes);
      }
    }
  });
  int64_t start = 0;
  for (int64_t e = 0; e < p.e; ++e) {
    const int64_t padding = p.group_sizes[e] - p.counts[e];
    if (padding > 0) {
      char* behind = p.out + (start + p.counts[e]) * p.row_bytes;
      std::memset(behind, 0, static_cast<size_t>(padding * p.row_bytes));
    }
    start += p.group_sizes[e];
  }
}

void moe_unpermute(const UnpermuteParams& p) {
  parallel_ranges(p.t, 1, p.threads, [&](int64_t t0, int64_t t1, int) {
    with_type(p.y.type, [&]<Type kType>() {
      for (int64_t t = t0; t < t1; ++t) {
        auto* out = row_of<kType>(p.out, t);
        for (int64_t d = 0; d < p.d; d += kLanes) {
          F32 sum = zero();
          for (int64_t k = 0; k < p.k; ++k) {
            const int64_t row = p.row_map[t * p.k + k];
            if (row < 0) continue;
            F32 term = load_upto<kType>(row_of<kType>(p.y, row) + d, p.d - d);
            if (p.weights != nullptr) term = mul(term, set1(p.weights[t * p.k + k]));
            sum = add(sum, term);
          }
          store_upto<kType>(out + d, sum, p.d - d);
        }
      }
    });
  });
}

void moe_unpermute_backward(const UnpermuteParams& p) {
  parallel_ranges(p.t, 1, p.threads, [&](int64_t t0, int64_t t1, int) {
    with_type(p.y.type, [&]<Type kType>() {
      for (int64_t t = t0; t < t1; ++t) {
        const auto* grad = row_of<kType>(p.grad, t);
        for (int64_t k = 0; k < p.k; ++k) {
          const int64_t slot = t * p.k + k, row = p.row_map[slot];
          p.dweights[slot] = 0;
          if (row < 0) continue;
          const F32 weight = set1(p.weights != nullptr ? p.weights[slot] : 1.0f);
          F32 dot = zero();
          for (int64_t d = 0; d < p.d; d += kLanes) {
            const F32 g = load_upto<kType>(grad + d, p.d - d);
            dot = fma(g, load_upto<kType>(row_of<kType>(p.y, row) + d, p.d - d), dot);
            store_upto<kType>(row_of<kType>(p.dy, row) + d, mul(g, weight), p.d - d);
          }
          p.dweights[slot] = reduce_add(dot);
        }
      }
    });
  });
}

}  // namespace dsk::cpu::DSK_CPU_NS
