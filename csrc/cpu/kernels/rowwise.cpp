// Row-wise kernels: block quantisation, RMSNorm, SwiGLU, RoPE. Each reads its row once from memory:
// what is read again (the quotients of a block, the normalised row) is still in L1.
#include "cpu/kernels/quantize_row.hpp"
#include "cpu/kernels/table.hpp"
#include "cpu/parallel.hpp"

namespace dsk::cpu::DSK_CPU_NS {
namespace {

// The blocks of one row of blocks: rows [m0, m1).
template <Type kType>
DSK_INLINE void quantize_rows(const RowwiseParams& p, int64_t m0, int64_t m1) {
  for (int64_t k0 = 0; k0 < p.k; k0 += p.block_k) {
    const int64_t n = min_of(p.block_k, p.k - k0);
    float amax = 0;
    for (int64_t m = m0; m < m1; ++m) {
      amax = max_of(amax, row_amax<kType>(row_of<kType>(p.x, m) + k0, n));
    }
    const float scale = block_scale(amax, p.pow2);
    p.scale.data[m0 / p.block_m * p.scale.stride_m + k0 / p.block_k * p.scale.stride_k] = scale;
    for (int64_t m = m0; m < m1; ++m) {
      row_cast<kType>(row_of<kType>(p.x, m) + k0, scale, p.data + m * p.data_stride + k0, n);
    }
  }
}

// One finished fp32 row to wherever the op wants it: quantised, or stored in y's type.
DSK_INLINE void emit_row(const RowwiseParams& p, int64_t m, const float* row) {
  if (p.data == nullptr) {
    with_type(p.y.type, [&]<Type kType>() {
      for (int64_t i = 0; i < p.k; i += kLanes) {
        store_upto<kType>(row_of<kType>(p.y, m) + i, load_upto<Type::kF32>(row + i, p.k - i),
                          p.k - i);
      }
    });
    return;
  }
  for (int64_t k0 = 0; k0 < p.k; k0 += p.block_k) {
    const int64_t n = min_of(p.block_k, p.k - k0);
    const float scale = block_scale(row_amax<Type::kF32>(row + k0, n), p.pow2);
    p.scale.data[m * p.scale.stride_m + k0 / p.block_k * p.scale.stride_k] = scale;
    row_cast<Type::kF32>(row + k0, scale, p.data + m * p.data_stride + k0, n);
  }
}

// Rows that fit into about a quarter of L2 are worth a hand-over to another thread.
int64_t row_grain(int64_t k) { return max_of<int64_t>(1, 16384 / max_of<int64_t>(k, 1)); }

template <Type kType>
DSK_INLINE void norm_row(const RowwiseParams& p, int64_t m, float* row) {
  F32 squares = zero();
  for (int64_t i = 0; i < p.k; i += kLanes) {
    const int64_t left = p.k - i;
    F32 value = load_upto<kType>(row_of<kType>(p.x, m) + i, left);
    if (p.residual.data != nullptr) {
      value = add(value, load_upto<kType>(row_of<kType>(p.residual, m) + i, left));
      StorageOf<kType>* sum = row_of<kType>(p.sum, m) + i;
      store_upto<kType>(sum, value, left);
      value = load_upto<kType>(sum, left);  // what is normalised is the rounded sum
    }
    squares = fma(value, value, squares);
    store_upto<Type::kF32>(row + i, value, left);
  }
  const float mean = reduce_add(squares) / static_cast<float>(p.k);
  const F32 inverse = div(set1(1.0f), sqrt(set1(mean + p.eps)));
  with_type(p.weight.type, [&]<Type kWeight>() {
    for (int64_t i = 0; i < p.k; i += kLanes) {
      const int64_t left = p.k - i;
      const F32 weight = load_upto<kWeight>(row_of<kWeight>(p.weight, 0) + i, left);
      const F32 value = load_upto<Type::kF32>(row + i, left);
      store_upto<Type::kF32>(row + i, mul(mul(value, inverse), weight), left);
    }
  });
}

template <Type kType>
DSK_INLINE void swiglu_row(const RowwiseParams& p, int64_t m, float* row) {
  const StorageOf<kType>* gate = row_of<kType>(p.x, m);
  for (int64_t i = 0; i < p.k; i += kLanes) {
    const int64_t left = p.k - i;
    const F32 up = load_upto<kType>(gate + p.k + i, left);
    store_upto<Type::kF32>(row + i, mul(silu(load_upto<kType>(gate + i, left)), up), left);
  }
}

template <Type kType>
DSK_INLINE void rope_row(const RopeParams& p, const StorageOf<kType>* x, const float* cos,
                         const float* sin, StorageOf<kType>* y) {
  constexpr int64_t kChunk = 64;  // pairs at a time: the row may be of any width
  const int64_t half = p.r / 2;
  const float sign = p.inverse ? -1.0f : 1.0f;
  float in[2 * kChunk], out[2 * kChunk];
  for (int64_t p0 = 0; p0 < half; p0 += kChunk) {
    const int64_t n = min_of(kChunk, half - p0);
    // Pair i is in[a * i], in[a * i + b]: neighbours, or the two halves side by side.
    const int64_t a = p.interleaved ? 2 : 1, b = p.interleaved ? 1 : kChunk;
    const int64_t runs = p.interleaved ? 1 : 2, length = p.interleaved ? 2 * n : n;
    for (int64_t run = 0; run < runs; ++run) {
      const StorageOf<kType>* from = x + (p.interleaved ? 2 * p0 : run * half + p0);
      for (int64_t i = 0; i < length; i += kLanes) {
        store_upto<Type::kF32>(in + run * kChunk + i, load_upto<kType>(from + i, length - i),
                               length - i);
      }
    }
    for (int64_t i = 0; i < n; ++i) {
      const float c = cos[p0 + i], s = sign * sin[p0 + i], u = in[a * i], v = in[a * i + b];
      out[a * i] = u * c - v * s;
      out[a * i + b] = v * c + u * s;
    }
    for (int64_t run = 0; run < runs; ++run) {
      StorageOf<kType>* to = y + (p.interleaved ? 2 * p0 : run * half + p0);
      for (int64_t i = 0; i < length; i += kLanes) {
        store_upto<kType>(to + i, load_upto<Type::kF32>(out + run * kChunk + i, length - i),
                          length - i);
      }
    }
  }
}

}  // namespace

void quantize(const RowwiseParams& p) {
  const int64_t rows = ceil_div(p.m, p.block_m);
  parallel_ranges(rows, row_grain(p.k * p.block_m), p.threads, [&](int64_t r0, int64_t r1, int) {
    with_type(p.x.type, [&]<Type kType>() {
      for (int64_t r = r0; r < r1; ++r) {
        quantize_rows<kType>(p, r * p.block_m, min_of(p.m, (r + 1) * p.block_m));
      }
    });
  });
}

void rms_norm(const RowwiseParams& p) {
  parallel_ranges(p.m, row_grain(p.k), p.threads, [&](int64_t m0, int64_t m1, int) {
    float* row = static_cast<float*>(scratch(0, static_cast<uint64_t>(p.k) * 4));
    with_type(p.x.type, [&]<Type kType>() {
      for (int64_t m = m0; m < m1; ++m) {
        norm_row<kType>(p, m, row);
        emit_row(p, m, row);
      }
    });
  });
}

void swiglu(const RowwiseParams& p) {
  parallel_ranges(p.m, row_grain(p.k), p.threads, [&](int64_t m0, int64_t m1, int) {
    float* row = static_cast<float*>(scratch(0, static_cast<uint64_t>(p.k) * 4));
    with_type(p.x.type, [&]<Type kType>() {
      for (int64_t m = m0; m < m1; ++m) {
        swiglu_row<kType>(p, m, row);
        emit_row(p, m, row);
      }
    });
  });
}

void rope(const RopeParams& p) {
  parallel_ranges(p.t, row_grain(p.h * p.r), p.threads, [&](int64_t t0, int64_t t1, int) {
    with_type(p.type, [&]<Type kType>() {
      for (int64_t t = t0; t < t1; ++t) {
        for (int64_t h = 0; h < p.h; ++h) {
          const auto* x = static_cast<const StorageOf<kType>*>(p.x) + t * p.x_t + h * p.x_h;
          auto* y = static_cast<StorageOf<kType>*>(p.y) + t * p.y_t + h * p.y_h;
          rope_row<kType>(p, x, p.cos + t * p.angle_t, p.sin + t * p.angle_t, y);
        }
      }
    });
  });
}

}  // namespace dsk::cpu::DSK_CPU_NS
