// Dense FP8 block-scaled GEMM: W8A8 and W8A16 on packed weights.
#include "cpu/kernels/gemm_core.hpp"
#include "cpu/kernels/table.hpp"

namespace dsk::cpu::DSK_CPU_NS {
namespace {

// Rows of a task: its fp32 sums, two panels wide, are half of a 2 MiB L2 at most.
constexpr int64_t kTaskRows = 768;
static_assert(kTaskRows % kRowStep == 0);

template <Type kType>
DSK_INLINE F32 addend(const Matrix& matrix, int64_t row, int64_t n, int64_t left) {
  using Storage = typename Element<kType>::Storage;
  const auto* from = static_cast<const Storage*>(matrix.data) + row * matrix.stride + n;
  return load_upto<kType>(from, left);
}

DSK_INLINE F32 addend(const Matrix& matrix, int64_t row, int64_t n, int64_t left) {
  switch (matrix.type) {
    case Type::kBF16:
      return addend<Type::kBF16>(matrix, row, n, left);
    case Type::kF16:
      return addend<Type::kF16>(matrix, row, n, left);
    default:
      return addend<Type::kF32>(matrix, row, n, left);
  }
}

// Columns [n0, n0 + 64) of rows [m0, m1): c and bias, then the output's rounding.
template <Type kType>
void write_panel(const GemmParams& p, int64_t m0, int64_t m1, int64_t n0, const float* sums) {
  using Storage = typename Element<kType>::Storage;
  const int64_t columns = min_of(kPanel, p.n - n0);
  for (int64_t m = m0; m < m1; ++m) {
    Storage* y = static_cast<Storage*>(p.y.data) + m * p.y.stride + n0;
    for (int64_t n = 0; n < columns; n += kLanes) {
      const int64_t left = columns - n;
      F32 value = load(sums + (m - m0) * kPanel + n);
      if (p.c.data != nullptr) value = add(value, addend(p.c, m, n0 + n, left));
      if (p.bias.data != nullptr) value = add(value, addend(p.bias, 0, n0 + n, left));
      store_upto<kType>(y + n, value, left);
    }
  }
}

void write_panel(const GemmParams& p, int64_t m0, int64_t m1, int64_t n0, const float* sums) {
  switch (p.y.type) {
    case Type::kBF16:
      return write_panel<Type::kBF16>(p, m0, m1, n0, sums);
    case Type::kF16:
      return write_panel<Type::kF16>(p, m0, m1, n0, sums);
    default:
      return write_panel<Type::kF32>(p, m0, m1, n0, sums);
  }
}

// Scales of a panel whose columns have their own: [blocks][64], zeros behind n.
const float* gather_scales(const GemmParams& p, int64_t panel, int64_t blocks, float* to) {
  const int64_t columns = min_of(kPanel, p.n - panel * kPanel);
  const float* from = p.scale_w.data + panel * kPanel * p.scale_w.stride_m;
  for (int64_t block = 0; block < blocks; ++block) {
    for (int64_t n = 0; n < kPanel; ++n) {
      const int64_t at = n * p.scale_w.stride_m + block * p.scale_w.stride_k;
      to[block * kPanel + n] = n < columns ? from[at] : 0.0f;
    }
  }
  return to;
}

}  // namespace

void gemm(const GemmParams& p) {
  const PackedShape shape{p.n, p.k};
  PackedRows rows = plan_rows({p.x, p.scale_x, nullptr, p.m, p.k, p.column_scales});
  place_rows(rows, scratch(0, packed_bytes(rows)));
  // Below this the hand-over to other threads costs more than the packing.
  const int packers = p.m * p.k < 65536 ? 1 : p.threads;
  parallel_for(ceil_div(p.m, kRowStep), packers, [&](int64_t task, int) {
    pack_rows(rows, task * kRowStep, min_of(p.m, (task + 1) * kRowStep));
  });

  const int64_t row_tasks = ceil_div(p.m, kTaskRows);
  // Two panels share one pass over the activations where that leaves enough tasks.
  const int wide = p.m > 32 && shape.panels() * row_tasks >= 8 * p.threads ? 2 : 1;
  const int64_t column_tasks = ceil_div(shape.panels(), wide);
  parallel_for(row_tasks * column_tasks, p.threads, [&](int64_t task, int) {
    const int64_t m0 = task / column_tasks * kTaskRows, m1 = min_of(p.m, m0 + kTaskRows);
    const int64_t first = task % column_tasks * wide;
    const int count = static_cast<int>(min_of<int64_t>(wide, shape.panels() - first));
    const int64_t size = round_up(m1 - m0, 32) * kPanel;
    const int64_t scales = p.column_scales ? shape.blocks() * kPanel : 0;
    const uint64_t floats = static_cast<uint64_t>((size + scales) * wide);
    float* sums = static_cast<float*>(scratch(1, floats * 4));
    Panel panels[2];
    float* c[2];
    for (int i = 0; i < count; ++i) {
      const int64_t panel = first + i;
      panels[i] = {p.weights + panel * shape.panel_bytes(), p.nan_blocks + panel * shape.blocks(),
                   p.scale_w.data + panel / 2 * p.scale_w.stride_m, p.scale_w.stride_k};
      if (p.column_scales) {
        float* to = sums + size * wide + i * scales;
        panels[i].column_scale = gather_scales(p, panel, shape.blocks(), to);
      }
      c[i] = sums + i * size;
    }
    panel_product(rows, m0, m1, panels, count, c);
    for (int i = 0; i < count; ++i) write_panel(p, m0, m1, (first + i) * kPanel, c[i]);
  });
}

}  // namespace dsk::cpu::DSK_CPU_NS
