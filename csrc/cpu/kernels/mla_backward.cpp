// Gradients of prefill attention. With P = exp(scale q k^T - lse), D = sum(grad out) over dv:
//
//   dV = P^T grad,  dS = P (grad V^T - D + grad_lse),  dQ = scale dS K,  dK = scale dS^T Q
//
// Floor: 2 (3 dk + 2 dv) operations for a query and a key that it sees, on the unit that the
// forward runs on (bf16 pairs for bf16, else fp32 FMA); reads and writes are each tensor once.
//
// A task is one request and head: blocks of 64 keys, and for each the 64 query rows at a time that
// see any of them. Scores are made transposed, [keys][query rows]: lse and D then are vectors along
// the lanes, P and dS are left operands of dV and dK as they lie, and only dQ needs a
// transposition. Packed queries and dQ's sums of the whole request stay in the task's memory.
//
// Where there are too few requests and heads for the threads, a first pass takes blocks of keys
// (dK, dV) and a second one blocks of queries (dQ): 7 products instead of 5. Every sum has the same
// order in both, so results depend neither on threads nor on which one runs.
#include "cpu/kernels/block_units.hpp"
#include "cpu/kernels/table.hpp"

namespace dsk::cpu::DSK_CPU_NS {
namespace {

// One request and head. Rows count from the request's first.
struct Head {
  SourceRows q, k, v, grad, out;
  int64_t num_rows = 0, num_keys = 0;
  const float* lse = nullptr;
  const float* grad_lse = nullptr;
  SourceRows dq, dk, dv;  // written to
  float scale = 1;
  bool causal = true;

  // Query rows below this one do not see the key.
  int64_t first_row(int64_t key) const {
    return causal ? max_of<int64_t>(0, key + num_rows - num_keys) : 0;
  }
};

// Hands out aligned pieces; with a null start it only counts.
struct Arena {
  char* start = nullptr;
  uint64_t used = 0;

  template <typename T>
  void take(T*& to, int64_t count) {
    to = start == nullptr ? nullptr : reinterpret_cast<T*>(start + used);
    used += static_cast<uint64_t>(round_up(count * static_cast<int64_t>(sizeof(T)), 64));
  }
};

template <typename Value>
struct Buffers {
  int64_t depth_k, depth_v, width_k, width_v;  // dk and dv rounded up to 32 and to 64
  Value *keys, *values;                        // rows
  Value* key_panels;
  Value *spare, *left, *right, *turned;  // rows on their way to an order; operands P, dS, dS^T
  Value *queries, *grads;                // of every kept block of query rows: turned
  Value *query_panels, *grad_panels;     // the same in panels
  float *minus_lse, *delta;              // [kept][64]
  float *scores, *back;                  // [64 keys][64 rows]: S, then P; grad V^T, then dS
  float *sum_k, *sum_v;                  // [64][width]
  float* sum_q;                          // [rows rounded up to 64][width_k]

  Buffers(const Head& t) {
    depth_k = round_up(t.q.columns, 32), depth_v = round_up(t.v.columns, 32);
    width_k = round_up(t.q.columns, kSide), width_v = round_up(t.v.columns, kSide);
  }

  void place(Arena& arena, int64_t kept, int64_t rows) {
    arena.take(keys, kSide * width_k);
    arena.take(values, kSide * width_v);
    arena.take(key_panels, kSide * width_k);
    arena.take(spare, kSide * max_of(width_k, width_v));
    for (Value** block : {&left, &right, &turned}) arena.take(*block, kSide * kSide);
    arena.take(queries, kept * kSide * depth_k);
    arena.take(grads, kept * kSide * depth_v);
    arena.take(query_panels, kept * kSide * width_k);
    arena.take(grad_panels, kept * kSide * width_v);
    for (float** one : {&minus_lse, &delta}) arena.take(*one, kept * kSide);
    for (float** block : {&scores, &back}) arena.take(*block, kSide * kSide);
    arena.take(sum_k, kSide * width_k);
    arena.take(sum_v, kSide * width_v);
    arena.take(sum_q, rows * width_k);
  }
};

template <Type kType>
DSK_INLINE float dot(const char* a, const char* b, int64_t n) {
  using Storage = typename Element<kType>::Storage;
  const auto* x = reinterpret_cast<const Storage*>(a);
  const auto* y = reinterpret_cast<const Storage*>(b);
  F32 sum = zero();
  for (int64_t d = 0; d < n; d += kLanes) {
    sum = fma(load_upto<kType>(x + d, n - d), load_upto<kType>(y + d, n - d), sum);
  }
  return reduce_add(sum);
}

float dot(Type type, const char* a, const char* b, int64_t n) {
  switch (type) {
    case Type::kBF16:
      return dot<Type::kBF16>(a, b, n);
    case Type::kF16:
      return dot<Type::kF16>(a, b, n);
    default:
      return dot<Type::kF32>(a, b, n);
  }
}

// Query rows r0 .. as block `slot` of the kept ones. Rows behind the end weigh nothing.
template <typename Unit>
void pack_queries(const Head& t, const Buffers<typename Unit::Value>& b, int64_t r0, int64_t slot) {
  const int64_t n = min_of(kSide, t.num_rows - r0);
  Unit::load_rows(t.q, r0, n, b.width_k, b.spare);
  Unit::turn(b.spare, b.width_k, b.depth_k, b.queries + slot * kSide * b.depth_k);
  Unit::panels(b.spare, b.width_k, b.query_panels + slot * kSide * b.width_k);
  Unit::load_rows(t.grad, r0, n, b.width_v, b.spare);
  Unit::turn(b.spare, b.width_v, b.depth_v, b.grads + slot * kSide * b.depth_v);
  Unit::panels(b.spare, b.width_v, b.grad_panels + slot * kSide * b.width_v);
  for (int64_t i = 0; i < kSide; ++i) {
    float minus_lse = -INFINITY, delta = 0;
    if (i < n) {
      const int64_t r = r0 + i;
      minus_lse = -t.lse[r];
      delta = dot(t.grad.type, t.grad.row(r), t.out.row(r), t.v.columns);
      if (t.grad_lse != nullptr) delta -= t.grad_lse[r];
    }
    b.minus_lse[slot * kSide + i] = minus_lse;
    b.delta[slot * kSide + i] = delta;
  }
}

// Scores and grad V^T become P and dS, 0 where a row does not see a key.
template <typename Value>
void differentiate(const Head& t, const Buffers<Value>& b, int64_t r0, int64_t k0, int64_t slot) {
  const F32 scale = set1(t.scale);
  const float* minus_lse = b.minus_lse + slot * kSide;
  const float* delta = b.delta + slot * kSide;
  for (int64_t j = 0; j < kSide; ++j) {
    float* p = b.scores + j * kSide;
    float* ds = b.back + j * kSide;
    const bool exists = k0 + j < t.num_keys;
    const int64_t first = exists ? t.first_row(k0 + j) - r0 : kSide;
    const int64_t hidden = max_of<int64_t>(0, min_of(kSide, first));
    for (int64_t i = hidden / kLanes * kLanes; i < kSide; i += kLanes) {
      const F32 weight = exp(fma(load(p + i), scale, load(minus_lse + i)));
      store(p + i, weight);
      store(ds + i, mul(weight, sub(load(ds + i), load(delta + i))));
    }
    std::memset(p, 0, static_cast<size_t>(hidden) * sizeof(float));
    std::memset(ds, 0, static_cast<size_t>(hidden) * sizeof(float));
  }
}

template <typename Unit, bool kQueries, bool kKeys>
void block(const Head& t, const Buffers<typename Unit::Value>& b, int64_t r0, int64_t k0,
           int64_t slot, float* sum_q) {
  const int64_t rows = min_of(kSide, t.num_rows - r0), keys = min_of(kSide, t.num_keys - k0);
  constexpr int64_t kArea = kSide * kSide;
  std::memset(b.scores, 0, kArea * sizeof(float));
  std::memset(b.back, 0, kArea * sizeof(float));
  Unit::multiply(b.keys, b.width_k, keys, b.queries + slot * kSide * b.depth_k, b.depth_k, b.scores,
                 kSide);
  Unit::multiply(b.values, b.width_v, keys, b.grads + slot * kSide * b.depth_v, b.depth_v, b.back,
                 kSide);
  differentiate(t, b, r0, k0, slot);
  if constexpr (kKeys) {
    const auto* p = Unit::narrow(b.scores, b.left);
    const auto* grad_panels = b.grad_panels + slot * kSide * b.width_v;
    for (int64_t d = 0; d < b.width_v; d += kSide) {
      Unit::multiply(p, kSide, keys, grad_panels + d * kSide, kSide, b.sum_v + d, b.width_v);
    }
    const auto* ds = Unit::narrow(b.back, b.right);
    const auto* query_panels = b.query_panels + slot * kSide * b.width_k;
    for (int64_t d = 0; d < b.width_k; d += kSide) {
      Unit::multiply(ds, kSide, keys, query_panels + d * kSide, kSide, b.sum_k + d, b.width_k);
    }
  }
  if constexpr (kQueries) {
    Unit::narrow_turned(b.back, b.turned);
    for (int64_t d = 0; d < b.width_k; d += kSide) {
      Unit::multiply(b.turned, kSide, rows, b.key_panels + d * kSide, kSide, sum_q + d, b.width_k);
    }
  }
}

// Gradients of these queries and keys (ranges start at multiples of kSide) from one another.
template <typename Unit, bool kQueries, bool kKeys>
void differentiate_range(const Head& t, Range rows, Range keys) {
  using Value = typename Unit::Value;
  // Queries are packed once and kept where they are also an output; else there are too many.
  const int64_t blocks = ceil_div(rows.end - rows.begin, kSide), kept = kQueries ? blocks : 1;
  Buffers<Value> b(t);
  Arena arena;
  b.place(arena, kept, kQueries ? blocks * kSide : 0);
  arena = {static_cast<char*>(scratch(3, arena.used)), 0};
  b.place(arena, kept, kQueries ? blocks * kSide : 0);
  [[maybe_unused]] const typename Unit::Scope scope;
  if constexpr (kQueries) {
    std::memset(b.sum_q, 0, static_cast<size_t>(blocks * kSide * b.width_k) * sizeof(float));
    for (int64_t i = 0; i < blocks; ++i) pack_queries<Unit>(t, b, rows.begin + i * kSide, i);
  }
  for (int64_t k0 = keys.begin; k0 < keys.end; k0 += kSide) {
    const int64_t n = min_of(kSide, t.num_keys - k0), first = t.first_row(k0);
    if (!kKeys && first >= rows.end) break;  // later keys are seen by still fewer rows
    Unit::load_rows(t.k, k0, n, b.width_k, b.keys);
    Unit::load_rows(t.v, k0, n, b.width_v, b.values);
    if constexpr (kQueries) Unit::panels(b.keys, b.width_k, b.key_panels);
    if constexpr (kKeys) {
      std::memset(b.sum_k, 0, static_cast<size_t>(kSide * b.width_k) * sizeof(float));
      std::memset(b.sum_v, 0, static_cast<size_t>(kSide * b.width_v) * sizeof(float));
    }
    for (int64_t i = 0; i < blocks; ++i) {
      const int64_t r0 = rows.begin + i * kSide;
      if (r0 + kSide <= first) continue;
      if constexpr (!kQueries) pack_queries<Unit>(t, b, r0, 0);
      block<Unit, kQueries, kKeys>(t, b, r0, k0, kQueries ? i : 0,
                                   b.sum_q + (kQueries ? i * kSide * b.width_k : 0));
    }
    if constexpr (kKeys) {
      write_rows(t.dk, {k0, k0 + n}, b.sum_k, b.width_k, t.scale);
      write_rows(t.dv, {k0, k0 + n}, b.sum_v, b.width_v, 1.0f);
    }
  }
  if constexpr (kQueries) {
    write_rows(t.dq, {rows.begin, min_of(rows.end, t.num_rows)}, b.sum_q, b.width_k, t.scale);
  }
}

Head head_of(const PrefillBackwardParams& b, int64_t request, int64_t h) {
  const PrefillParams& p = b.forward;
  const int64_t q0 = p.starts_q[request], k0 = p.starts_k[request];
  const int64_t dk = p.kv.dk, dv = p.kv.dv, element = p.type == Type::kF32 ? 4 : 2;
  // Outputs of the forward and gradients are contiguous.
  auto contiguous = [&](const void* data, int64_t row, int64_t width) {
    const char* first = static_cast<const char*>(data) + (row * p.h + h) * width * element;
    return SourceRows{first, p.h * width * element, width, p.type};
  };
  Head t;
  t.num_rows = p.starts_q[request + 1] - q0;
  t.num_keys = p.starts_k[request + 1] - k0;
  t.q = {p.q + q0 * p.q_token + h * p.q_head, p.q_token, dk, p.type};
  t.k = {p.kv.keys + k0 * p.kv.key_row + h * p.key_head, p.kv.key_row, dk, p.type};
  t.v = {p.kv.values + k0 * p.kv.value_row + h * p.value_head, p.kv.value_row, dv, p.type};
  t.grad = {b.grad + q0 * b.grad_token + h * b.grad_head, b.grad_token, dv, p.type};
  t.out = contiguous(p.out, q0, dv);
  t.lse = p.lse + h * p.lse_head + q0;
  if (b.grad_lse != nullptr) t.grad_lse = b.grad_lse + h * b.grad_lse_head + q0;
  t.dq = contiguous(b.dq, q0, dk);
  t.dk = contiguous(b.dk, k0, dk);
  t.dv = contiguous(b.dv, k0, dv);
  t.scale = p.scale;
  t.causal = p.causal;
  return t;
}

template <typename Unit>
void run(const PrefillBackwardParams& b) {
  const PrefillParams& p = b.forward;
  const int64_t heads = p.requests * p.h, threads = p.threads;
  int64_t most_rows = 0, most_keys = 0;
  for (int64_t i = 0; i < p.requests; ++i) {
    most_rows = max_of<int64_t>(most_rows, p.starts_q[i + 1] - p.starts_q[i]);
    most_keys = max_of<int64_t>(most_keys, p.starts_k[i + 1] - p.starts_k[i]);
  }
  // One pass, unless threads would idle for longer than two more products take.
  if (ceil_div(heads, threads) * threads * 5 <= heads * 7) {
    return parallel_for(heads, p.threads, [&](int64_t task, int) {
      const Head t = head_of(b, task / p.h, task % p.h);
      differentiate_range<Unit, true, true>(t, {0, t.num_rows}, {0, t.num_keys});
    });
  }
  const int64_t key_blocks = ceil_div(most_keys, kSide), row_blocks = ceil_div(most_rows, kSide);
  parallel_for(heads * key_blocks, p.threads, [&](int64_t task, int) {
    const Head t = head_of(b, task / key_blocks / p.h, task / key_blocks % p.h);
    const int64_t k0 = task % key_blocks * kSide;
    if (k0 >= t.num_keys) return;
    differentiate_range<Unit, false, true>(t, {0, t.num_rows}, {k0, k0 + kSide});
  });
  parallel_for(heads * row_blocks, p.threads, [&](int64_t task, int) {
    const Head t = head_of(b, task / row_blocks / p.h, task / row_blocks % p.h);
    const int64_t r0 = (row_blocks - 1 - task % row_blocks) * kSide;  // the longest ones first
    if (r0 >= t.num_rows) return;
    differentiate_range<Unit, true, false>(t, {r0, r0 + kSide}, {0, t.num_keys});
  });
}

}  // namespace

void mla_prefill_backward(const PrefillBackwardParams& p) {
#if defined(__AMX_BF16__) || defined(__AVX512BF16__)
  if (PairBlocks::suits(p.forward.type)) return run<PairBlocks>(p);
#endif
  run<WideBlocks>(p);
}

}  // namespace dsk::cpu::DSK_CPU_NS
