// Fused experts: from router output to the weighted sum in one call.
//
//   route     counting sort of the (token, slot) copies by expert, -1 dropped
//   first     per expert and 128 columns of the hidden layer: gate and up panels side by side,
//             SwiGLU, and (W8A8) quantisation, while the sums are in L2
//   second    per expert and 128 columns of the result
//   combine   fp32 sum in the order of k
//
// Tasks are (expert, columns) and are handed out one by one, so that any skew of the routing
// balances: a thread that met a crowded expert simply takes fewer tasks.
#include "cpu/kernels/gemm_core.hpp"
#include "cpu/kernels/quantize_row.hpp"
#include "cpu/kernels/table.hpp"
#include "cpu/list.hpp"

namespace dsk::cpu::DSK_CPU_NS {
namespace {

constexpr int64_t kTaskRows = 384;  // rows of a task: four panels of fp32 sums are 400 KiB
static_assert(kTaskRows % kRowStep == 0);

// The copies of one expert that are computed together.
struct Group {
  int64_t expert, start, count;  // rows start .. start + count of the sorted copies
};

// Everything is allocated by the calling thread before threads run.
struct Work {
  int64_t* tokens;  // [copies] token of a sorted copy
  int64_t* row_of;  // [t, k] sorted position of a copy, -1 for none
  List<Group> groups;
  List<PackedRows> rows;  // per group, of the product at hand
  MutableMatrix hidden;   // [copies, i]: e4m3, or x's type
  Scales hidden_scale;
  MutableMatrix y;  // [copies, d], x's type
};

int64_t route(const MoeParams& p, Work& w) {
  List<int64_t> next;  // of an expert: rows before it, then its next row
  for (int64_t e = 0; e <= p.e; ++e) next.push(0);
  const int64_t copies = p.t * p.k;
  for (int64_t j = 0; j < copies; ++j) {
    if (p.topk_idx[j] >= 0) ++next[p.topk_idx[j] + 1];
  }
  for (int64_t e = 0; e < p.e; ++e) next[e + 1] += next[e];
  for (int64_t e = 0; e < p.e; ++e) {
    for (int64_t start = next[e]; start < next[e + 1]; start += kTaskRows) {
      w.groups.push({e, start, min_of(kTaskRows, next[e + 1] - start)});
    }
  }
  const int64_t total = next[p.e];
  for (int64_t j = 0; j < copies; ++j) {
    const int64_t expert = p.topk_idx[j];
    w.row_of[j] = expert < 0 ? -1 : next[expert]++;
    if (expert >= 0) w.tokens[w.row_of[j]] = j / p.k;
  }
  return total;
}

// Plans and packs the activations of every group; source_of(group) says where its rows are.
template <typename Source>
void pack_groups(const MoeParams& p, Work& w, int slot, Source&& source_of) {
  w.rows.clear();
  uint64_t bytes = 0;
  struct Piece {
    int64_t group, row;
  };
  List<uint64_t> offsets;
  List<Piece> pieces;
  for (int64_t g = 0; g < w.groups.size(); ++g) {
    w.rows.push(plan_rows(source_of(w.groups[g])));
    offsets.push(bytes);
    bytes += (packed_bytes(w.rows[g]) + 63) / 64 * 64;
    for (int64_t m = 0; m < w.groups[g].count; m += kRowStep) pieces.push({g, m});
  }
  char* memory = static_cast<char*>(scratch(slot, bytes));
  for (int64_t g = 0; g < w.groups.size(); ++g) place_rows(w.rows[g], memory + offsets[g]);
  parallel_for(pieces.size(), p.threads, [&](int64_t task, int) {
    PackedRows& rows = w.rows[pieces[task].group];
    const int64_t m = pieces[task].row;
    pack_rows(rows, m, min_of(rows.m, m + kRowStep));
  });
}

Panel panel_of(const PackedExperts& experts, PackedShape shape, int64_t expert, int64_t panel) {
  const int64_t marks = shape.panels() * shape.blocks();
  return {experts.weights + expert * shape.bytes() + panel * shape.panel_bytes(),
          experts.nan_blocks + expert * marks + panel * shape.blocks(),
          experts.scale + expert * experts.scale_e + panel / 2 * experts.scale_n, experts.scale_k};
}

// silu(gate) * up of `columns` (64 or 128) hidden values, stored or quantised.
void finish_hidden(const MoeParams& p, const Work& w, int64_t row, int64_t i0, int64_t columns,
                   const float* const* sums, int half) {
  alignas(64) float h[128];
  F32 amax = zero();
  for (int64_t j = 0; j < columns; j += kLanes) {
    const float* gate = sums[j / kPanel] + j % kPanel;
    const float* up = sums[half + j / kPanel] + j % kPanel;
    const F32 value = mul(silu(load(gate)), load(up));
    amax = max(abs(value), amax);
    store(h + j, value);
  }
  if (!p.quantize) {
    with_type(p.x.type, [&]<Type kType>() {
      auto* to = static_cast<typename Element<kType>::Storage*>(w.hidden.data) +
                 row * w.hidden.stride + i0;
      for (int64_t j = 0; j < columns; j += kLanes) Element<kType>::store(to + j, load(h + j));
    });
    return;
  }
  const float scale = max_of(reduce_max(amax), 1e-4f) / 448.0f;  // as rowwise quantises
  w.hidden_scale.data[row * w.hidden_scale.stride_m + i0 / kScaleBlock] = scale;
  uint8_t* to = static_cast<uint8_t*>(w.hidden.data) + row * w.hidden.stride + i0;
  for (int64_t j = 0; j < columns; j += kLanes) {
    store_e4m3(to + j, div(load(h + j), set1(scale)));
  }
}

void first_product(const MoeParams& p, const Work& w) {
  const PackedShape shape{2 * p.i, p.d};
  const int64_t panels = p.i / kPanel, chunks = ceil_div(panels, 2);
  const int64_t groups = w.groups.size();
  parallel_for(groups * chunks, p.threads, [&](int64_t task, int) {
    const int64_t g = task / chunks, first = task % chunks * 2;
    const Group& group = w.groups[g];
    const int half = static_cast<int>(min_of<int64_t>(2, panels - first));
    const int64_t size = round_up(group.count, 32) * kPanel;
    float* memory = static_cast<float*>(scratch(1, static_cast<uint64_t>(4 * size) * 4));
    Panel use[kMaxPanels];
    float* c[kMaxPanels];
    for (int j = 0; j < 2 * half; ++j) {
      const int64_t panel = j < half ? first + j : panels + first + j - half;
      use[j] = panel_of(p.w13, shape, group.expert, panel);
      c[j] = memory + j * size;
    }
    panel_product(w.rows[g], 0, group.count, use, 2 * half, c);
    for (int64_t m = 0; m < group.count; ++m) {
      const float* sums[kMaxPanels];
      for (int j = 0; j < 2 * half; ++j) sums[j] = c[j] + m * kPanel;
      finish_hidden(p, w, group.start + m, first * kPanel, half * kPanel, sums, half);
    }
  });
}

void second_product(const MoeParams& p, const Work& w) {
  const PackedShape shape{p.d, p.i};
  const int64_t chunks = ceil_div(shape.panels(), 2);
  const int64_t groups = w.groups.size();
  parallel_for(groups * chunks, p.threads, [&](int64_t task, int) {
    const int64_t g = task / chunks, first = task % chunks * 2;
    const Group& group = w.groups[g];
    const int count = static_cast<int>(min_of<int64_t>(2, shape.panels() - first));
    const int64_t size = round_up(group.count, 32) * kPanel;
    float* memory = static_cast<float*>(scratch(1, static_cast<uint64_t>(2 * size) * 4));
    Panel use[2];
    float* c[2];
    for (int j = 0; j < count; ++j) {
      use[j] = panel_of(p.w2, shape, group.expert, first + j);
      c[j] = memory + j * size;
    }
    panel_product(w.rows[g], 0, group.count, use, count, c);
    with_type(p.x.type, [&]<Type kType>() {
      for (int64_t m = 0; m < group.count; ++m) {
        auto* y = static_cast<typename Element<kType>::Storage*>(w.y.data) +
                  (group.start + m) * w.y.stride;
        for (int64_t n = first * kPanel; n < min_of(p.d, (first + count) * kPanel); n += kLanes) {
          const float* from = c[n / kPanel - first] + m * kPanel + n % kPanel;
          store_upto<kType>(y + n, load(from), p.d - n);
        }
      }
    });
  });
}

void combine(const MoeParams& p, const Work& w) {
  parallel_ranges(p.t, 1, p.threads, [&](int64_t t0, int64_t t1, int) {
    with_type(p.x.type, [&]<Type kType>() {
      using Storage = typename Element<kType>::Storage;
      for (int64_t t = t0; t < t1; ++t) {
        Storage* out = static_cast<Storage*>(p.out.data) + t * p.out.stride;
        for (int64_t d = 0; d < p.d; d += kLanes) {
          F32 sum = zero();
          for (int64_t k = 0; k < p.k; ++k) {
            const int64_t row = w.row_of[t * p.k + k];
            if (row < 0) continue;
            const Storage* y = static_cast<const Storage*>(w.y.data) + row * w.y.stride + d;
            sum = fma(load_upto<kType>(y, p.d - d), set1(p.topk_weights[t * p.k + k]), sum);
          }
          store_upto<kType>(out + d, sum, p.d - d);
        }
      }
    });
  });
}

// Slots of the calling thread's scratch; threads use slot 1 for their sums.
constexpr int kRouting = 0, kRows = 2, kHidden = 3, kOutput = 4, kQuantized = 5;

// x as e4m3 with scales [t, blocks].
Activations quantized_input(const MoeParams& p) {
  const int64_t blocks = ceil_div(p.d, kScaleBlock);
  const uint64_t bytes = static_cast<uint64_t>(round_up(p.t * p.d, 64));
  char* memory =
      static_cast<char*>(scratch(kQuantized, bytes + static_cast<uint64_t>(p.t * blocks) * 4));
  RowwiseParams q;
  q.m = p.t;
  q.k = p.d;
  q.x = p.x;
  q.data = reinterpret_cast<uint8_t*>(memory);
  q.data_stride = p.d;
  q.scale = {reinterpret_cast<float*>(memory + bytes), blocks, 1};
  q.threads = p.threads;
  quantize(q);
  Activations a;
  a.x = {q.data, p.d, Type::kE4M3};
  a.scale = q.scale;
  return a;
}

}  // namespace

void moe_experts(const MoeParams& p) {
  Work w;
  const int64_t copies = p.t * p.k;
  w.tokens = static_cast<int64_t*>(scratch(kRouting, static_cast<uint64_t>(2 * copies + 1) * 8));
  w.row_of = w.tokens + copies;
  const int64_t rows = route(p, w);
  const int64_t element = p.x.type == Type::kF32 ? 4 : 2;

  Activations input;
  input.x = p.x;
  if (p.quantize) input = quantized_input(p);
  pack_groups(p, w, kRows, [&](const Group& group) {
    Activations a = input;
    a.rows = w.tokens + group.start;
    a.m = group.count;
    a.k = p.d;
    return a;
  });

  const int64_t blocks = ceil_div(p.i, kScaleBlock);
  const int64_t hidden_bytes = round_up(rows * p.i * (p.quantize ? 1 : element), 64);
  char* hidden = static_cast<char*>(
      scratch(kHidden, static_cast<uint64_t>(hidden_bytes + rows * blocks * 4 + 64)));
  w.hidden = {hidden, p.i, p.quantize ? Type::kE4M3 : p.x.type};
  w.hidden_scale = {reinterpret_cast<float*>(hidden + hidden_bytes), blocks, 1};
  first_product(p, w);

  pack_groups(p, w, kRows, [&](const Group& group) {
    Activations a;
    const int64_t size = p.quantize ? 1 : element;
    a.x = {hidden + group.start * p.i * size, p.i, w.hidden.type};
    if (p.quantize) a.scale = {w.hidden_scale.data + group.start * blocks, blocks, 1};
    a.m = group.count;
    a.k = p.i;
    return a;
  });
  w.y = {scratch(kOutput, static_cast<uint64_t>(rows * p.d * element + 64)), p.d, p.x.type};
  second_product(p, w);
  combine(p, w);
}

}  // namespace dsk::cpu::DSK_CPU_NS
