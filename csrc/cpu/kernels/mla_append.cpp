// Tokens into the latent cache: each row is read once and written once, as it is or quantised.
#include "cpu/kernels/quantize_row.hpp"
#include "cpu/kernels/table.hpp"
#include "cpu/packed.hpp"
#include "cpu/parallel.hpp"

namespace dsk::cpu::DSK_CPU_NS {
namespace {

// To any address: behind an odd number of bytes in an FP8 row.
template <Type kTo>
DSK_INLINE void copy_as(const Matrix& from, int64_t row, int64_t n, char* to) {
  with_type(from.type, [&]<Type kFrom>() {
    const auto* x = row_of<kFrom>(from, row);
    for (int64_t i = 0; i < n; i += kLanes) {
      StorageOf<kTo> values[kLanes];
      Element<kTo>::store(values, load_upto<kFrom>(x + i, n - i));
      const int64_t count = min_of<int64_t>(kLanes, n - i);
      std::memcpy(to + i * static_cast<int64_t>(sizeof(values[0])), values,
                  static_cast<size_t>(count) * sizeof(values[0]));
    }
  });
}

template <Type kTo>
DSK_INLINE void plain_row(const AppendParams& p, int64_t token, char* to) {
  copy_as<kTo>(p.latent, token, p.dl, to);
  copy_as<kTo>(p.rope, token, p.r, to + p.dl * static_cast<int64_t>(sizeof(StorageOf<kTo>)));
}

// dl e4m3 | fp32 scales of 128 each | bf16. Scales lie at any address.
DSK_INLINE void fp8_row(const AppendParams& p, int64_t token, char* to) {
  char* scales = to + p.dl;
  with_type(p.latent.type, [&]<Type kType>() {
    const auto* x = row_of<kType>(p.latent, token);
    for (int64_t d = 0; d < p.dl; d += kScaleBlock, scales += sizeof(float)) {
      const int64_t n = min_of(kScaleBlock, p.dl - d);
      const float scale = block_scale(row_amax<kType>(x + d, n), false);
      std::memcpy(scales, &scale, sizeof(scale));
      row_cast<kType>(x + d, scale, reinterpret_cast<uint8_t*>(to) + d, n);
    }
  });
  copy_as<Type::kBF16>(p.rope, token, p.r, scales);
}

DSK_INLINE void append_row(const AppendParams& p, int64_t token) {
  const int64_t slot = p.slots[token];
  if (slot < 0) return;
  char* to = p.cache + slot / p.page * p.page_bytes + slot % p.page * p.row_bytes;
  switch (p.kind) {
    case CacheKind::kFP8Rows:
      return fp8_row(p, token, to);
    case CacheKind::kBF16:
      return plain_row<Type::kBF16>(p, token, to);
    case CacheKind::kF16:
      return plain_row<Type::kF16>(p, token, to);
    case CacheKind::kF32:
      return plain_row<Type::kF32>(p, token, to);
  }
}

// Two tokens of one slot: the later one must stay. Rising slots (a prompt, a batch of requests in
// order) cannot share any; others are written by one thread, in order.
bool rises(const AppendParams& p) {
  int64_t last = -1;
  for (int64_t i = 0; i < p.t; ++i) {
    if (p.slots[i] < 0) continue;
    if (p.slots[i] <= last) return false;
    last = p.slots[i];
  }
  return true;
}

}  // namespace

void mla_cache_append(const AppendParams& p) {
  constexpr int64_t kGrain = 16;  // tokens worth handing to another thread
  parallel_ranges(p.t, kGrain, rises(p) ? p.threads : 1, [&](int64_t t0, int64_t t1, int) {
    for (int64_t t = t0; t < t1; ++t) append_row(p, t);
  });
}

}  // namespace dsk::cpu::DSK_CPU_NS
