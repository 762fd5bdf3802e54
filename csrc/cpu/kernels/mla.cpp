// MLA decode and prefill: how the work is cut for threads, and the end of the softmax.
#include "cpu/kernels/attention.hpp"
#include "cpu/kernels/table.hpp"
#include "cpu/packed.hpp"

namespace dsk::cpu::DSK_CPU_NS {
namespace {

// A split costs a pass over its sums: not worth it for fewer keys than this.
constexpr int64_t kSplitTokens = 512;
// Query rows of a prefill task: their packed queries and sums stay in L2 beside the keys.
constexpr int64_t kPrefillRows = 128;

template <typename Write>
DSK_INLINE void write_row(Type type, void* out, int64_t offset, int64_t dv, Write&& value) {
  auto run = [&]<Type kType>() {
    auto* to = static_cast<typename Element<kType>::Storage*>(out) + offset;
    for (int64_t d = 0; d < dv; d += kLanes) store_upto<kType>(to + d, value(d), dv - d);
  };
  switch (type) {
    case Type::kBF16:
      return run.template operator()<Type::kBF16>();
    case Type::kF16:
      return run.template operator()<Type::kF16>();
    default:
      return run.template operator()<Type::kF32>();
  }
}

// The splits of one row, merged: out = sum of weight * sums / total.
void merge_row(const AttentionState* splits, int64_t count, int64_t row, int64_t dv, Type type,
               void* out, int64_t offset, float* lse) {
  float peak = -INFINITY, total = 0;
  for (int64_t i = 0; i < count; ++i) peak = max_of(peak, splits[i].peak[row]);
  const float base = peak == -INFINITY ? 0.0f : peak;
  float weight[64];
  for (int64_t i = 0; i < count; ++i) {
    weight[i] = std::exp(splits[i].peak[row] - base);
    total += weight[i] * splits[i].total[row];
  }
  const bool nothing = total == 0;
  *lse = nothing ? INFINITY : std::log(total) + base;
  const float inverse = nothing ? 0.0f : 1.0f / total;
  const int64_t width = AttentionState::width(dv);
  write_row(type, out, offset, dv, [&](int64_t d) {
    F32 sum = zero();
    if (nothing) return sum;
    for (int64_t i = 0; i < count; ++i) {
      sum = fma(load(splits[i].out + row * width + d), set1(weight[i] * inverse), sum);
    }
    return sum;
  });
}

}  // namespace

void mla_decode(const DecodeParams& p) {
  const int64_t rows = p.s * p.h, dv = p.cache.dv;
  int64_t longest = 0;
  for (int64_t b = 0; b < p.b; ++b) longest = max_of<int64_t>(longest, p.seq_lens[b]);
  // Enough splits for every thread to have about two, of whole blocks of keys.
  const int64_t wanted = min_of<int64_t>(64, ceil_div(2 * p.threads, p.b));
  const int64_t splits =
      p.threads == 1 ? 1 : max_of<int64_t>(1, min_of(wanted, ceil_div(longest, kSplitTokens)));
  const int64_t floats = round_up(AttentionState::floats(rows, dv), 16);
  float* memory = static_cast<float*>(scratch(0, static_cast<uint64_t>(p.b * splits * floats) * 4));
  const int64_t element = p.type == Type::kF32 ? 4 : 2;

  parallel_for(p.b * splits, p.threads, [&](int64_t task, int) {
    const int64_t b = task / splits, split = task % splits, length = p.seq_lens[b];
    const int64_t share = round_up(ceil_div(length, splits), kTokens);
    AttentionTask t;
    t.q = static_cast<const char*>(p.q) + b * rows * p.cache.dk * element;
    t.q_row = p.cache.dk * element;
    t.type = p.type;
    t.rows = rows;
    t.first_limit = p.causal ? length - p.s + 1 : length;
    t.per_limit = p.causal ? p.h : rows + 1;
    t.kv = p.cache;
    t.pages = p.block_table + b * p.table_stride;
    t.begin = min_of(length, split * share);
    t.end = min_of(length, (split + 1) * share);
    t.scale = p.scale;
    attend(t, AttentionState::at(memory + task * floats, rows, dv));
  });

  parallel_ranges(p.b * rows, 8, p.threads, [&](int64_t r0, int64_t r1, int) {
    AttentionState states[64];
    for (int64_t r = r0; r < r1; ++r) {
      const int64_t b = r / rows, row = r % rows, s = row / p.h, h = row % p.h;
      for (int64_t i = 0; i < splits; ++i) {
        states[i] = AttentionState::at(memory + (b * splits + i) * floats, rows, dv);
      }
      merge_row(states, splits, row, dv, p.type, p.out, r * dv, p.lse + (b * p.h + h) * p.s + s);
    }
  });
}

void mla_prefill(const PrefillParams& p) {
  const int64_t dv = p.kv.dv;
  int64_t longest = 0;
  for (int64_t i = 0; i < p.requests; ++i) {
    longest = max_of<int64_t>(longest, p.starts_q[i + 1] - p.starts_q[i]);
  }
  const int64_t pieces = ceil_div(longest, kPrefillRows);
  parallel_for(p.requests * pieces * p.h, p.threads, [&](int64_t task, int) {
    // The last rows of a causal request see the most keys: they go first.
    const int64_t request = task / (pieces * p.h), h = task % p.h;
    const int64_t piece = pieces - 1 - task / p.h % pieces;
    const int64_t start = p.starts_q[request], length = p.starts_q[request + 1] - start;
    const int64_t first = piece * kPrefillRows;
    if (first >= length) return;
    const int64_t start_k = p.starts_k[request], keys = p.starts_k[request + 1] - start_k;
    AttentionTask t;
    t.q = p.q + (start + first) * p.q_token + h * p.q_head;
    t.q_row = p.q_token;
    t.type = p.type;
    t.rows = min_of(kPrefillRows, length - first);
    t.first_limit = p.causal ? keys - length + first + 1 : keys;
    t.per_limit = p.causal ? 1 : t.rows + 1;
    t.kv = p.kv;
    t.kv.keys += start_k * p.kv.key_row + h * p.key_head;
    t.kv.values += start_k * p.kv.value_row + h * p.value_head;
    t.end = p.causal ? min_of(keys, max_of<int64_t>(0, t.first_limit + t.rows - 1)) : keys;
    t.scale = p.scale;
    const int64_t floats = AttentionState::floats(t.rows, dv);
    const AttentionState state = AttentionState::at(
        static_cast<float*>(scratch(3, static_cast<uint64_t>(floats) * 4)), t.rows, dv);
    attend(t, state);
    for (int64_t r = 0; r < t.rows; ++r) {
      const int64_t token = start + first + r;
      merge_row(&state, 1, r, dv, p.type, p.out, (token * p.h + h) * dv,
                p.lse + h * p.lse_head + token);
    }
  });
}

}  // namespace dsk::cpu::DSK_CPU_NS
