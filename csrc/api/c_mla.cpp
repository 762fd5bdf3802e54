// C ABI: the mla stem.
#include "api/tensor_check.hpp"
#include "cpu/kernels.hpp"
#include "cpu/threads.hpp"

using namespace dsk;
using namespace dsk::api;

namespace {

constexpr int64_t kMaxWidth = 1024;  // of a cached row: what one row's buffer holds
constexpr int64_t kLatentTile = 128;

int64_t bytes_of(Type type) { return type == Type::kF32 ? 4 : 2; }

CacheKind kind_of(Type type) {
  return type == Type::kBF16  ? CacheKind::kBF16
         : type == Type::kF16 ? CacheKind::kF16
                              : CacheKind::kF32;
}

KeyValues latent_cache(const Arg& cache, int64_t width, int64_t dv) {
  KeyValues kv;
  int64_t bytes = 1;
  if (cache.is_bytes()) {
    const int64_t row = dv + 4 * ((dv + kLatentTile - 1) / kLatentTile) + 2 * (width - dv);
    cache.shape({-1, -1, row}).contiguous_last();
    kv.kind = CacheKind::kFP8Rows;
  } else {
    cache.shape({-1, -1, width}).contiguous_last();
    const Type type = cache.type({Type::kBF16, Type::kF16, Type::kF32});
    kv.kind = kind_of(type);
    bytes = bytes_of(type);
  }
  kv.keys = kv.values = cache.data<const char>();
  kv.key_page = kv.value_page = cache.stride(0) * bytes;
  kv.key_row = kv.value_row = cache.stride(1) * bytes;
  kv.page = cache.size(1);
  kv.dk = width;
  kv.dv = dv;
  return kv;
}

// Entries behind the end of a request are never looked at.
void check_table(const DecodeParams& p, int64_t max_pages, int64_t pages) {
  for (int64_t b = 0; b < p.b; ++b) {
    const int64_t length = p.seq_lens[b];
    DSK_CHECK(length >= 0 && length <= max_pages * p.cache.page, "seq_lens[", b,
              "]: expected 0 .. ", max_pages * p.cache.page, ", got ", length);
    for (int64_t i = 0; i * p.cache.page < length; ++i) {
      const int64_t page = p.block_table[b * p.table_stride + i];
      DSK_CHECK(page >= 0 && page < pages, "block_table[", b, ", ", i, "]: expected 0 .. ",
                pages - 1, ", got ", page);
    }
  }
}

// cu_seqlens: non-decreasing from 0 to at most `limit`.
const int32_t* check_ends(const Arg& ends, const char* name, int64_t count, int64_t limit) {
  ends.shape({count}).contiguous_last();
  const int32_t* values = ends.integers<int32_t>();
  DSK_CHECK(count >= 1 && values[0] == 0, name, ": expected to start with 0");
  for (int64_t i = 1; i < count; ++i) {
    DSK_CHECK(values[i] >= values[i - 1], name, ": expected non-decreasing values, got ",
              values[i - 1], " before ", values[i]);
  }
  DSK_CHECK(values[count - 1] <= limit, name, ": expected values of at most ", limit, ", got ",
            values[count - 1]);
  return values;
}

constexpr std::initializer_list<Type> kFloats = {Type::kF32, Type::kBF16, Type::kF16};

PrefillParams prefill_params(const DLTensor* q, const DLTensor* k, const DLTensor* v,
                             const DLTensor* cu_seqlens_q, const DLTensor* cu_seqlens_k,
                             double softmax_scale, int causal, const DLTensor* out,
                             const DLTensor* lse, int num_threads) {
  const Arg query("q", q), key("k", k), value("v", v), output("out", out), sums("lse", lse);
  const Arg ends_q("cu_seqlens_q", cu_seqlens_q), ends_k("cu_seqlens_k", cu_seqlens_k);
  PrefillParams p;
  p.type = query.shape({-1, -1, -1}).contiguous_last().type(kFloats);
  const int64_t t = query.size(0), element = bytes_of(p.type);
  p.h = query.size(1);
  const int64_t dk = query.size(2);
  key.shape({-1, p.h, dk}).contiguous_last().type({p.type});
  value.shape({key.size(0), p.h, -1}).contiguous_last().type({p.type});
  const int64_t dv = value.size(2);
  DSK_CHECK(dk >= 1 && dk <= kMaxWidth && dv >= 1 && dv <= kMaxWidth,
            "q, v: expected widths of 1 .. ", kMaxWidth, ", got ", dk, " and ", dv);
  output.shape({t, p.h, dv}).contiguous().type({p.type});
  sums.shape({p.h, t}).contiguous_last().type({Type::kF32});
  DSK_CHECK(ends_q.dims() == 1, "cu_seqlens_q: expected 1 dimension, got ", ends_q.dims());
  p.requests = ends_q.size(0) - 1;
  p.starts_q = check_ends(ends_q, "cu_seqlens_q", p.requests + 1, t);
  p.starts_k = check_ends(ends_k, "cu_seqlens_k", p.requests + 1, key.size(0));
  p.q = query.data<const char>();
  p.q_token = query.stride(0) * element;
  p.q_head = query.stride(1) * element;
  p.kv.kind = kind_of(p.type);
  p.kv.keys = key.data<const char>();
  p.kv.values = value.data<const char>();
  p.kv.key_row = key.stride(0) * element;
  p.kv.value_row = value.stride(0) * element;
  p.key_head = key.stride(1) * element;
  p.value_head = value.stride(1) * element;
  p.kv.dk = dk;
  p.kv.dv = dv;
  p.out = output.data<void>();
  p.lse = sums.data<float>();
  p.lse_head = sums.stride(0);
  p.scale = static_cast<float>(softmax_scale);
  p.causal = causal != 0;
  p.threads = cpu::resolve_threads(num_threads);
  return p;
}

}  // namespace

extern "C" {

int dsk_mla_decode(const DLTensor* q, const DLTensor* cache, const DLTensor* block_table,
                   const DLTensor* seq_lens, double softmax_scale, int causal, const DLTensor* out,
                   const DLTensor* lse, int num_threads) {
  return guarded([&] {
    const Arg query("q", q), kv("kv_cache", cache), table("block_table", block_table);
    const Arg lengths("seq_lens", seq_lens), output("out", out), sums("lse", lse);
    DecodeParams p;
    p.type = query.shape({-1, -1, -1, -1}).contiguous().type(kFloats);
    p.b = query.size(0);
    p.s = query.size(1);
    p.h = query.size(2);
    const int64_t width = query.size(3);
    output.shape({p.b, p.s, p.h, -1}).contiguous().type({p.type});
    const int64_t dv = output.size(3);
    DSK_CHECK(dv >= 1 && dv <= width && width <= kMaxWidth, "out: expected 1 .. ", width,
              " values of q's at most ", kMaxWidth, ", got ", dv);
    sums.shape({p.b, p.h, p.s}).contiguous().type({Type::kF32});
    p.cache = latent_cache(kv, width, dv);
    table.shape({p.b, -1}).contiguous_last();
    p.block_table = table.integers<int32_t>();
    p.table_stride = table.stride(0);
    p.seq_lens = lengths.shape({p.b}).contiguous_last().integers<int32_t>();
    check_table(p, p.cache.page > 0 ? table.size(1) : 0, kv.size(0));
    p.q = query.data<const void>();
    p.out = output.data<void>();
    p.lse = sums.data<float>();
    p.scale = static_cast<float>(softmax_scale);
    p.causal = causal != 0;
    p.threads = cpu::resolve_threads(num_threads);
    if (!output.empty()) cpu::kernels().mla_decode(p);
  });
}

int dsk_mla_prefill(const DLTensor* q, const DLTensor* k, const DLTensor* v,
                    const DLTensor* cu_seqlens_q, const DLTensor* cu_seqlens_k,
                    double softmax_scale, int causal, const DLTensor* out, const DLTensor* lse,
                    int num_threads) {
  return guarded([&] {
    const PrefillParams p = prefill_params(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale,
                                           causal, out, lse, num_threads);
    if (p.requests > 0 && p.h > 0) cpu::kernels().mla_prefill(p);
  });
}

int dsk_mla_prefill_backward(const DLTensor* grad, const DLTensor* grad_lse, const DLTensor* q,
                             const DLTensor* k, const DLTensor* v, const DLTensor* out,
                             const DLTensor* lse, const DLTensor* cu_seqlens_q,
                             const DLTensor* cu_seqlens_k, double softmax_scale, int causal,
                             const DLTensor* dq, const DLTensor* dk, const DLTensor* dv,
                             int num_threads) {
  return guarded([&] {
    PrefillBackwardParams p;
    p.forward = prefill_params(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal, out, lse,
                               num_threads);
    const Type type = p.forward.type;
    const Arg query("q", q), key("k", k), value("v", v), back("grad", grad);
    const int64_t t = query.size(0), h = p.forward.h, tokens = key.size(0);
    const int64_t width = query.size(2), dv_width = value.size(2);
    back.shape({t, h, dv_width}).contiguous_last().type({type});
    p.grad = back.data<const char>();
    p.grad_token = back.stride(0) * bytes_of(type);
    p.grad_head = back.stride(1) * bytes_of(type);
    if (grad_lse != nullptr) {
      const Arg back_lse("grad_lse", grad_lse);
      back_lse.shape({h, t}).contiguous_last().type({Type::kF32});
      p.grad_lse = back_lse.data<const float>();
      p.grad_lse_head = back_lse.stride(0);
    }
    auto result = [&](const char* name, const DLTensor* tensor, int64_t rows, int64_t columns) {
      const Arg arg(name, tensor);
      arg.shape({rows, h, columns}).contiguous().writable().type({type});
      return arg.data<void>();
    };
    p.dq = result("dq", dq, t, width);
    p.dk = result("dk", dk, tokens, width);
    p.dv = result("dv", dv, tokens, dv_width);
    if (p.forward.requests > 0 && h > 0) cpu::kernels().mla_prefill_backward(p);
  });
}

int dsk_mla_cache_append(const DLTensor* cache, const DLTensor* latent, const DLTensor* k_rope,
                         const DLTensor* slots, int num_threads) {
  return guarded([&] {
    const Arg kv("kv_cache", cache), latents("latent", latent), ropes("k_rope", k_rope);
    const Arg places("slots", slots);
    AppendParams p;
    p.latent = latents.shape({-1, -1}).matrix(kFloats);
    p.t = latents.size(0);
    p.dl = latents.size(1);
    p.rope = ropes.shape({p.t, -1}).matrix(kFloats);
    p.r = ropes.size(1);
    kv.writable();
    const KeyValues rows = latent_cache(kv, p.dl + p.r, p.dl);
    p.cache = const_cast<char*>(rows.keys);
    p.kind = rows.kind;
    p.page = rows.page;
    p.page_bytes = rows.key_page;
    p.row_bytes = rows.key_row;
    p.slots = places.shape({p.t}).contiguous_last().integers<int64_t>();
    const int64_t limit = kv.size(0) * kv.size(1);
    for (int64_t i = 0; i < p.t; ++i) {
      DSK_CHECK(p.slots[i] >= -1 && p.slots[i] < limit, "slots[", i, "]: expected -1 .. ",
                limit - 1, ", got ", p.slots[i]);
    }
    p.threads = cpu::resolve_threads(num_threads);
    if (p.t > 0) cpu::kernels().mla_cache_append(p);
  });
}

}  // extern "C"
