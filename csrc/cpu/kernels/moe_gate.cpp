// The router. Two passes over tokens:
//
//   logits   x times weight^T in fp32 (bf16 operands on the bf16 unit, where there is one): a tile
//   of
//            kTokens x kExperts dot products at a time, each summed in the same order whatever the
//            batch around it
//   choose   scores, then the best k, one token after the other. Keys lie in chunks of one vector
//            with the maximum of each at hand: taking the best costs a scan of the maxima and of
//            one chunk, and ties go to the lowest index without further ado
//
// What follows from the scores is pinned to the bit by the reference (choose_experts): no fma here.
#include "cpu/kernels/table.hpp"
#include "cpu/parallel.hpp"

namespace dsk::cpu::DSK_CPU_NS {
namespace {

// Accumulators of a tile, as the register file allows.
#if defined(__AVX512F__)
constexpr int64_t kTokens = 3, kExperts = 8;
#else
constexpr int64_t kTokens = 2, kExperts = 4;
#endif

// What a tile is made of: vectors of two operands, and a sum of their products.
template <Type kWeight>
struct WideUnit {
  using X = float;
  using W = typename Element<kWeight>::Storage;
  using Vector = F32;
  static constexpr int64_t kStep = kLanes;
  DSK_INLINE Vector load_x(const X* x, int64_t left) { return load_upto<Type::kF32>(x, left); }
  DSK_INLINE Vector load_w(const W* w, int64_t left) { return load_upto<kWeight>(w, left); }
  DSK_INLINE F32 add_product(Vector x, Vector w, F32 sum) { return fma(x, w, sum); }
};

#if defined(__AVX512BF16__)
// Subnormal products count as zeros: far below what a logit can show.
struct PairUnit {
  using X = uint16_t;
  using W = uint16_t;
  using Vector = __m512bh;
  static constexpr int64_t kStep = 2 * kLanes;
  DSK_INLINE Vector load_x(const X* x, int64_t left) {
    if (left >= kStep) return reinterpret_cast<__m512bh>(_mm512_loadu_si512(x));
    const __mmask32 mask = (1u << left) - 1;
    return reinterpret_cast<__m512bh>(_mm512_maskz_loadu_epi16(mask, x));
  }
  DSK_INLINE Vector load_w(const W* w, int64_t left) { return load_x(w, left); }
  DSK_INLINE F32 add_product(Vector x, Vector w, F32 sum) { return _mm512_dpbf16_ps(sum, x, w); }
};
#endif

// sums [kRows][kExperts] += x [kRows][d] times weights [kColumns][d] transposed, a lane per k
// modulo a vector. kPacked: weights are vectors [steps][kExperts], else rows with a stride.
template <typename Unit, int kRows, int kColumns, bool kPacked>
DSK_INLINE void dot_tile(const typename Unit::X* x, int64_t x_stride, int64_t d,
                         const typename Unit::W* weight, int64_t stride, F32* sums) {
  F32 sum[kRows][kColumns];
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kColumns; ++j) sum[i][j] = sums[i * kExperts + j];
  }
  const auto* packed = reinterpret_cast<const typename Unit::Vector*>(weight);
  for (int64_t k = 0; k < d; k += Unit::kStep) {
    const int64_t left = d - k;
    typename Unit::Vector rows[kRows];
    for (int i = 0; i < kRows; ++i) rows[i] = Unit::load_x(x + i * x_stride + k, left);
    for (int j = 0; j < kColumns; ++j) {
      const auto w = kPacked ? packed[k / Unit::kStep * kExperts + j]
                             : Unit::load_w(weight + j * stride + k, left);
      for (int i = 0; i < kRows; ++i) sum[i][j] = Unit::add_product(rows[i], w, sum[i][j]);
    }
  }
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kColumns; ++j) sums[i * kExperts + j] = sum[i][j];
  }
}

// One to kTokens tokens against weights as they lie: each is read once or twice.
template <typename Unit>
void dot_few(const GateParams& p, const typename Unit::X* x, int64_t x_stride,
             const typename Unit::W* weight, int64_t columns, float* logits) {
  const int64_t stride = p.weight.stride;
  for (int64_t t = 0; t < p.t; ++t) {
    F32 sums[kExperts];
    for (F32& sum : sums) sum = zero();
    if (columns == kExperts) {
      dot_tile<Unit, 1, kExperts, false>(x + t * x_stride, x_stride, p.d, weight, stride, sums);
    } else {
      for (int64_t j = 0; j < columns; ++j) {
        const auto* row = weight + j * stride;
        dot_tile<Unit, 1, 1, false>(x + t * x_stride, x_stride, p.d, row, stride, sums + j);
      }
    }
    for (int64_t j = 0; j < columns; ++j) logits[t * p.e + j] = reduce_add(sums[j]);
  }
}

// Many tokens: a stretch of the weights is copied to L1 first (rows that lie a multiple of 4 KiB
// apart would push each other out), tokens pass by it, their sums wait in L2.
template <typename Unit>
void dot_many(const GateParams& p, const typename Unit::X* x, int64_t x_stride,
              const typename Unit::W* weight, int64_t columns, float* logits) {
  constexpr int64_t kStretch = 16 * Unit::kStep, kWave = 96;
  static_assert(kWave % kTokens == 0);
  alignas(64) typename Unit::Vector packed[kStretch / Unit::kStep * kExperts];
  F32* sums = static_cast<F32*>(scratch(1, kWave * kExperts * sizeof(F32)));
  for (int64_t t0 = 0; t0 < p.t; t0 += kWave) {
    const int64_t count = min_of(kWave, p.t - t0);
    for (int64_t i = 0; i < count * kExperts; ++i) sums[i] = zero();
    for (int64_t k0 = 0; k0 < p.d; k0 += kStretch) {
      const int64_t depth = min_of(kStretch, p.d - k0);
      for (int64_t k = 0; k < depth; k += Unit::kStep) {
        for (int64_t j = 0; j < kExperts; ++j) {
          const auto* row = weight + min_of(j, columns - 1) * p.weight.stride + k0 + k;
          packed[k / Unit::kStep * kExperts + j] = Unit::load_w(row, depth - k);
        }
      }
      const auto* operand = reinterpret_cast<const typename Unit::W*>(packed);
      for (int64_t t = 0; t < count;) {
        const auto* rows = x + (t0 + t) * x_stride + k0;
        F32* to = sums + t * kExperts;
        if (count - t >= kTokens) {
          dot_tile<Unit, kTokens, kExperts, true>(rows, x_stride, depth, operand, 0, to);
          t += kTokens;
        } else {
          dot_tile<Unit, 1, kExperts, true>(rows, x_stride, depth, operand, 0, to);
          t += 1;
        }
      }
    }
    for (int64_t t = 0; t < count; ++t) {
      for (int64_t j = 0; j < columns; ++j) {
        logits[(t0 + t) * p.e + j] = reduce_add(sums[t * kExperts + j]);
      }
    }
  }
}

template <typename Unit>
void dot_all(const GateParams& p, const typename Unit::X* x, int64_t x_stride) {
  parallel_for(ceil_div(p.e, kExperts), p.threads, [&](int64_t task, int) {
    const int64_t e0 = task * kExperts, columns = min_of(kExperts, p.e - e0);
    const auto* weight = static_cast<const typename Unit::W*>(p.weight.data) + e0 * p.weight.stride;
    if (p.t <= kTokens) {
      dot_few<Unit>(p, x, x_stride, weight, columns, p.scores + e0);
    } else {
      dot_many<Unit>(p, x, x_stride, weight, columns, p.scores + e0);
    }
  });
}

// x [t, d] as fp32.
const float* widened(const GateParams& p) {
  float* x = static_cast<float*>(scratch(0, static_cast<uint64_t>(p.t * p.d) * 4 + 64));
  auto widen = [&]<Type kType>() {
    parallel_ranges(p.t, 4, p.threads, [&](int64_t t0, int64_t t1, int) {
      for (int64_t t = t0; t < t1; ++t) {
        const auto* from =
            static_cast<const typename Element<kType>::Storage*>(p.x.data) + t * p.x.stride;
        for (int64_t k = 0; k < p.d; k += kLanes) {
          store_upto<Type::kF32>(x + t * p.d + k, load_upto<kType>(from + k, p.d - k), p.d - k);
        }
      }
    });
  };
  if (p.x.type == Type::kBF16) {
    widen.template operator()<Type::kBF16>();
  } else if (p.x.type == Type::kF16) {
    widen.template operator()<Type::kF16>();
  } else {
    widen.template operator()<Type::kF32>();
  }
  return x;
}

void logits(const GateParams& p) {
#if defined(__AVX512BF16__)
  if (p.x.type == Type::kBF16 && p.weight.type == Type::kBF16) {
    return dot_all<PairUnit>(p, static_cast<const uint16_t*>(p.x.data), p.x.stride);
  }
#endif
  const float* x = widened(p);
  switch (p.weight.type) {
    case Type::kBF16:
      return dot_all<WideUnit<Type::kBF16>>(p, x, p.d);
    case Type::kF16:
      return dot_all<WideUnit<Type::kF16>>(p, x, p.d);
    default:
      return dot_all<WideUnit<Type::kF32>>(p, x, p.d);
  }
}

// ---- from scores on ----

// scores of one token, in place of its logits.
void score_row(const GateParams& p, float* row) {
  if (p.sigmoid) {
    for (int64_t j = 0; j < p.e; j += kLanes) {
      const F32 value = sigmoid(load_upto<Type::kF32>(row + j, p.e - j));
      store_upto<Type::kF32>(row + j, value, p.e - j);
    }
    return;
  }
  float top = -INFINITY;
  for (int64_t j = 0; j < p.e; ++j) top = row[j] > top ? row[j] : top;
  float total = 0;
  for (int64_t j = 0; j < p.e; j += kLanes) {
    const F32 value = exp(sub(load_upto<Type::kF32>(row + j, p.e - j), set1(top)));
    store_upto<Type::kF32>(row + j, value, p.e - j);
    for (int64_t i = j; i < min_of(p.e, j + kLanes); ++i) total += row[i];
  }
  for (int64_t j = 0; j < p.e; ++j) row[j] /= total;
}

// What experts are ranked by: NaN and infinities become the outermost finite numbers.
DSK_INLINE float key_of(float biased) {
  constexpr float kMost = 3.402823466e+38f;
  return biased != biased || biased < -kMost ? -kMost : biased > kMost ? kMost : biased;
}

// Experts outside the best groups get a key of -inf.
void limit_groups(const GateParams& p, float* keys, float* rank) {
  const int64_t size = p.e / p.groups;
  for (int64_t g = 0; g < p.groups; ++g) {
    const float* group = keys + g * size;
    float best = -INFINITY, second = -INFINITY;
    for (int64_t j = 0; j < size; ++j) {
      second = group[j] > best ? best : group[j] > second ? group[j] : second;
      best = group[j] > best ? group[j] : best;
    }
    rank[g] = p.by_sum && size > 1 ? best + second : best;
  }
  bool* allowed = reinterpret_cast<bool*>(rank + p.groups);
  for (int64_t g = 0; g < p.groups; ++g) allowed[g] = false;
  for (int64_t choice = 0; choice < p.top_groups; ++choice) {
    int64_t best = -1;
    for (int64_t g = 0; g < p.groups; ++g) {
      if (!allowed[g] && (best < 0 || rank[g] > rank[best])) best = g;
    }
    allowed[best] = true;
  }
  for (int64_t g = 0; g < p.groups; ++g) {
    if (allowed[g]) continue;
    for (int64_t j = 0; j < size; ++j) keys[g * size + j] = -INFINITY;
  }
}

// keys [chunks][kLanes], chunk maxima in peaks: the best key's index, which is taken out.
DSK_INLINE int64_t take_best(float* keys, float* peaks, int64_t chunks) {
  int64_t chunk = 0;
  for (int64_t c = 1; c < chunks; ++c) {
    if (peaks[c] > peaks[chunk]) chunk = c;
  }
  float* at = keys + chunk * kLanes;
  int64_t lane = 0;
  while (at[lane] != peaks[chunk]) ++lane;
  at[lane] = -INFINITY;
  peaks[chunk] = reduce_max(load(at));
  return chunk * kLanes + lane;
}

void choose_row(const GateParams& p, int64_t t, float* keys) {
  const float* scores = p.scores + t * p.e;
  const int64_t chunks = ceil_div(p.e, kLanes);
  float* peaks = keys + chunks * kLanes;
  for (int64_t j = 0; j < p.e; ++j) {
    keys[j] = key_of(p.bias != nullptr ? scores[j] + p.bias[j] : scores[j]);
  }
  for (int64_t j = p.e; j < chunks * kLanes; ++j) keys[j] = -INFINITY;
  if (p.groups > 1) limit_groups(p, keys, peaks + chunks);
  for (int64_t c = 0; c < chunks; ++c) peaks[c] = reduce_max(load(keys + c * kLanes));
  int64_t* idx = p.topk_idx + t * p.k;
  float* weights = p.topk_weights + t * p.k;
  float total = 0;
  for (int64_t choice = 0; choice < p.k; ++choice) {
    idx[choice] = take_best(keys, peaks, chunks);
    weights[choice] = scores[idx[choice]];
    total += weights[choice];
  }
  for (int64_t choice = 0; choice < p.k; ++choice) {
    if (p.renormalize) weights[choice] /= total + 1e-20f;
    weights[choice] *= p.scale;
  }
}

}  // namespace

void moe_gate(const GateParams& p) {
  logits(p);
  parallel_ranges(p.t, 8, p.threads, [&](int64_t t0, int64_t t1, int) {
    const int64_t floats = 3 * (p.e + kLanes) + 2 * p.groups;
    float* keys = static_cast<float*>(scratch(1, static_cast<uint64_t>(floats) * 4));
    for (int64_t t = t0; t < t1; ++t) {
      score_row(p, p.scores + t * p.e);
      choose_row(p, t, keys);
    }
  });
}

}  // namespace dsk::cpu::DSK_CPU_NS
