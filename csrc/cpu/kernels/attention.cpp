// The running softmax, on fp32 FMA; with bf16 queries on a bf16 unit (attention_pairs.hpp).
#include "cpu/kernels/attention.hpp"

#include "cpu/kernels/attention_drive.hpp"
#include "cpu/kernels/gemm_wide.hpp"

namespace dsk::cpu::DSK_CPU_NS {
namespace {

constexpr int64_t kLatentTile = 128;  // latents per scale of an FP8 row

template <Type kType>
DSK_INLINE void load_plain(const char* row, int64_t width, float* out) {
  const auto* x = reinterpret_cast<const typename Element<kType>::Storage*>(row);
  for (int64_t i = 0; i < width; i += kLanes) {
    store_upto<Type::kF32>(out + i, load_upto<kType>(x + i, width - i), width - i);
  }
}

// dl e4m3 | ceil(dl / 128) fp32 scales | bf16: dl is kv.dv for a latent cache.
void load_fp8_row(const KeyValues& kv, const char* row, int64_t width, float* out) {
  const char* scales = row + kv.dv;
  for (int64_t d0 = 0; d0 < kv.dv; d0 += kLatentTile) {
    float scale;
    std::memcpy(&scale, scales + d0 / kLatentTile * 4, 4);
    const int64_t n = min_of(kLatentTile, kv.dv - d0);
    const auto* x = reinterpret_cast<const uint8_t*>(row) + d0;
    for (int64_t i = 0; i < n; i += kLanes) {
      const F32 value = mul(load_upto<Type::kE4M3>(x + i, n - i), set1(scale));
      store_upto<Type::kF32>(out + d0 + i, value, n - i);
    }
  }
  if (width > kv.dv) {
    const char* rope = scales + ceil_div(kv.dv, kLatentTile) * 4;
    load_plain<Type::kBF16>(rope, width - kv.dv, out + kv.dv);
  }
}

// ---- the fp32 path ----

constexpr int64_t kBlock = 64;  // keys at a time: what gemm_wide.hpp multiplies

struct WideBuffers {
  float* q;       // [rows][dk]
  float* keys;    // [dk][64]
  float* values;  // [dv / 64][64 keys][64]
  float* row;     // [dk]
};

// Softmax of scores [64] of one row against its running maximum; returns what the sums so far must
// be multiplied with.
DSK_INLINE float soften(float* scores, int64_t visible, float& peak, float& total) {
  for (int64_t i = max_of<int64_t>(visible, 0); i < kBlock; ++i) scores[i] = -INFINITY;
  F32 top = set1(-INFINITY);
  for (int64_t i = 0; i < kBlock; i += kLanes) top = max(load(scores + i), top);
  const float next = max_of(peak, reduce_max(top));
  const float base = next == -INFINITY ? 0.0f : next;
  float correction[kLanes];
  store(correction, exp(set1(peak - base)));
  F32 sum = zero();
  for (int64_t i = 0; i < kBlock; i += kLanes) {
    const F32 weight = exp(sub(load(scores + i), set1(base)));
    sum = add(sum, weight);
    store(scores + i, weight);
  }
  peak = next;
  total = total * correction[0] + reduce_add(sum);
  return correction[0];
}

void gather_block(const AttentionTask& t, int64_t k0, int64_t n, const WideBuffers& w) {
  const int64_t width = AttentionState::width(t.kv.dv);
  const bool latent = t.kv.keys == t.kv.values;
  for (int64_t i = 0; i < kBlock; ++i) {
    float* value = w.values + i * kBlock;
    if (i >= n) {
      for (int64_t d = 0; d < t.kv.dk; ++d) w.keys[d * kBlock + i] = 0;
      for (int64_t d = 0; d < width; ++d) value[d / 64 * kBlock * 64 + d % 64] = 0;
      continue;
    }
    load_row(t.kv, t.key(k0 + i), t.kv.dk, w.row);
    for (int64_t d = 0; d < t.kv.dk; ++d) w.keys[d * kBlock + i] = w.row[d];
    if (!latent) load_row(t.kv, t.value(k0 + i), t.kv.dv, w.row);
    for (int64_t d = 0; d < width; ++d) {
      value[d / 64 * kBlock * 64 + d % 64] = d < t.kv.dv ? w.row[d] : 0.0f;
    }
  }
}

void wide_block(const AttentionTask& t, const AttentionState& s, int64_t k0, const WideBuffers& w) {
  alignas(64) float scores[kWideRows * kBlock], ones[kBlock], sums[kWideRows * kBlock];
  alignas(64) float scale[kBlock];
  const int64_t width = AttentionState::width(t.kv.dv);
  for (float& one : ones) one = 1.0f;
  for (float& value : scale) value = t.scale;
  for (int64_t r0 = 0; r0 < t.rows; r0 += kWideRows) {
    const int64_t count = min_of<int64_t>(kWideRows, t.rows - r0);
    std::memset(scores, 0, sizeof(scores));
    wide_rows(w.q + r0 * t.kv.dk, t.kv.dk, count, w.keys, t.kv.dk, ones, scale, scores);
    float correction[kWideRows];
    for (int64_t i = 0; i < count; ++i) {
      const int64_t limit = min_of(t.end, t.first_limit + (r0 + i) / t.per_limit);
      correction[i] =
          soften(scores + i * kBlock, min_of(kBlock, limit - k0), s.peak[r0 + i], s.total[r0 + i]);
    }
    for (int64_t d0 = 0; d0 < width; d0 += 64) {
      std::memset(sums, 0, sizeof(sums));
      wide_rows(scores, kBlock, count, w.values + d0 * kBlock, kBlock, ones, ones, sums);
      for (int64_t i = 0; i < count; ++i) {
        float* out = s.out + (r0 + i) * width + d0;
        for (int64_t d = 0; d < 64; d += kLanes) {
          store(out + d, fma(load(out + d), set1(correction[i]), load(sums + i * kBlock + d)));
        }
      }
    }
  }
}

void attend_wide(const AttentionTask& t, const AttentionState& s) {
  const int64_t width = AttentionState::width(t.kv.dv), wider = max_of(t.kv.dk, width) + kLanes;
  const int64_t floats = t.rows * t.kv.dk + t.kv.dk * kBlock + width * kBlock + wider;
  float* memory = static_cast<float*>(scratch(2, static_cast<uint64_t>(floats) * 4 + 256));
  // The widened blocks are read by whole vectors: they come first, aligned.
  WideBuffers w;
  w.keys = memory;
  w.values = w.keys + t.kv.dk * kBlock;
  w.q = w.values + width * kBlock;
  w.row = w.q + t.rows * t.kv.dk;
  const CacheKind kind = t.type == Type::kBF16  ? CacheKind::kBF16
                         : t.type == Type::kF16 ? CacheKind::kF16
                                                : CacheKind::kF32;
  const KeyValues queries{.kind = kind};
  for (int64_t r = 0; r < t.rows; ++r) {
    load_row(queries, t.q + r * t.q_row, t.kv.dk, w.q + r * t.kv.dk);
  }
  for (int64_t k0 = t.begin; k0 < t.end; k0 += kBlock) {
    gather_block(t, k0, min_of(kBlock, t.end - k0), w);
    wide_block(t, s, k0, w);
  }
}

}  // namespace

void load_row(const KeyValues& kv, const char* row, int64_t width, float* out) {
  switch (kv.kind) {
    case CacheKind::kBF16:
      return load_plain<Type::kBF16>(row, width, out);
    case CacheKind::kF16:
      return load_plain<Type::kF16>(row, width, out);
    case CacheKind::kF32:
      return load_plain<Type::kF32>(row, width, out);
    case CacheKind::kFP8Rows:
      return load_fp8_row(kv, row, width, out);
  }
}

void attend(const AttentionTask& task, const AttentionState& state) {
  const int64_t padded = round_up(task.rows, 32);
  for (int64_t r = 0; r < padded; ++r) {
    state.peak[r] = -INFINITY;
    state.total[r] = 0;
  }
  std::memset(state.out, 0,
              static_cast<size_t>(padded * AttentionState::width(task.kv.dv)) * sizeof(float));
#if defined(__AMX_BF16__) || defined(__AVX512BF16__)
  if (suits_pairs(task)) return attend_pairs(task, state);
#endif
  attend_wide(task, state);
}

}  // namespace dsk::cpu::DSK_CPU_NS
