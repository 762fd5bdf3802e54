// Activations in the order of the unit that multiplies them: see gemm_core.hpp.
#include "cpu/kernels/gemm_core.hpp"
#include "cpu/kernels/gemm_dot.hpp"
#include "cpu/kernels/gemm_half.hpp"

namespace dsk::cpu::DSK_CPU_NS {
namespace {

// One block of a source row as fp32, zeros behind its end.
DSK_INLINE void load_block(const Activations& a, int64_t row, int64_t k0, int64_t n, float* out) {
  const int64_t from = a.rows != nullptr ? a.rows[row] : row;
  auto copy = [&]<Type kType>() {
    const auto* x =
        static_cast<const typename Element<kType>::Storage*>(a.x.data) + from * a.x.stride + k0;
    for (int64_t i = 0; i < n; i += kLanes) store(out + i, load_upto<kType>(x + i, n - i));
  };
  switch (a.x.type) {
    case Type::kE4M3:
      copy.template operator()<Type::kE4M3>();
      break;
    case Type::kBF16:
      copy.template operator()<Type::kBF16>();
      break;
    case Type::kF16:
      copy.template operator()<Type::kF16>();
      break;
    case Type::kF32:
      copy.template operator()<Type::kF32>();
      break;
  }
  for (int64_t i = round_up(n, kLanes); i < kScaleBlock; i += kLanes) store(out + i, zero());
}

DSK_INLINE float source_scale(const Activations& a, int64_t row, int64_t block) {
  if (a.x.type != Type::kE4M3) return 1.0f;
  const int64_t from = a.rows != nullptr ? a.rows[row] : row;
  return a.scale.data[from * a.scale.stride_m + block * a.scale.stride_k];
}

}  // namespace

float source_block(const Activations& a, int64_t row, int64_t block, float* values) {
  const int64_t k0 = block * kScaleBlock;
  load_block(a, row, k0, min_of(kScaleBlock, a.k - k0), values);
  return source_scale(a, row, block);
}

namespace {

void pack_block(PackedRows& r, int64_t m, int64_t block) {
  alignas(64) float values[kScaleBlock];
  const int64_t k0 = block * kScaleBlock;
  float scale = source_block(r.source, m, block, values);
  const int64_t n = min_of(kScaleBlock, r.depth - k0);
#if defined(__AVX512FP16__)
  if (r.format == Format::kHalf) {
    const HalfBlock half = to_half(values, n, r.source.x.type == Type::kE4M3);
    const int64_t group = m / kGroup;
    const int64_t width = group_width(r.m - group * kGroup);
    uint32_t* to = static_cast<uint32_t*>(r.data) + group * kGroup * r.depth + k0 * width;
    for (int64_t i = 0; i < n; ++i) to[i * width + m % kGroup] = half.pairs[i];
    r.refused[block * r.padded + m] = half.refused;
    scale *= half.unscale;
  }
#endif
#if defined(__AVX512BF16__)
  if (r.format == Format::kDot) {
    uint16_t* to = static_cast<uint16_t*>(r.data) + m * r.depth + k0;
    for (int64_t i = 0; i < n; i += kLanes) store_bf16(to + i, load(values + i));
    const bool wide = r.source.x.type != Type::kE4M3;
    r.refused[block * r.padded + m] = wide && too_small_for_dot(values, n);
  }
#endif
  if (r.format == Format::kTiles) {
    uint16_t* tile = static_cast<uint16_t*>(r.data) + k0 * r.padded + m / 16 * 16 * n + m % 16 * 32;
    for (int64_t i = 0; i < n; i += kLanes) {
      store_bf16(tile + i / 32 * 512 + i % 32, load(values + i));
    }
  } else if (r.format == Format::kWide) {
    float* to = static_cast<float*>(r.data) + m * r.depth + k0;
    for (int64_t i = 0; i < n; i += kLanes) store(to + i, load(values + i));
  }
  r.scale[block * r.padded + m] = scale;
}

// Bytes of an activation in its unit's format: fp16 values come in pairs.
int64_t element_bytes(Format format) {
  return format == Format::kTiles || format == Format::kDot ? 2 : 4;
}

}  // namespace

PackedRows plan_rows(const Activations& source) {
  PackedRows r;
  r.source = source;
  r.m = source.m;
  r.padded = round_up(source.m, 32);
  r.depth = round_up(source.k, kDepthStep);
  r.blocks = ceil_div(source.k, kScaleBlock);
#if defined(__AMX_BF16__)
  // Activations that bf16 cannot hold take the wide path; few rows leave tiles idle.
  const bool exact = source.x.type == Type::kE4M3 || source.x.type == Type::kBF16;
  r.format = !exact ? Format::kWide : source.m > kMaxHalfRows ? Format::kTiles : Format::kHalf;
  if (source.column_scales) r.format = Format::kWide;
#elif defined(__AVX512FP16__)
  const bool wide = source.x.type == Type::kF32 || source.column_scales;
  r.format = wide ? Format::kWide : Format::kHalf;
#elif defined(__AVX512BF16__)
  const bool exact = source.x.type == Type::kE4M3 || source.x.type == Type::kBF16;
  r.format = exact ? Format::kDot : Format::kWide;
#endif
  return r;
}

uint64_t packed_bytes(const PackedRows& r) {
  const int64_t rows = round_up(r.padded, kRowStep);
  return static_cast<uint64_t>(rows * r.depth * element_bytes(r.format) + r.blocks * r.padded * 5 +
                               3 * 64);
}

void place_rows(PackedRows& r, void* memory) {
  char* at = static_cast<char*>(memory);
  const int64_t rows = round_up(r.padded, kRowStep);
  r.data = at;
  at += round_up(rows * r.depth * element_bytes(r.format), 64);
  r.scale = reinterpret_cast<float*>(at);
  at += round_up(r.blocks * r.padded * 4, 64);
  r.refused = reinterpret_cast<uint8_t*>(at);
}

void pack_rows(PackedRows& r, int64_t m0, int64_t m1) {
  for (int64_t m = m0; m < m1; ++m) {
    for (int64_t block = 0; block < r.blocks; ++block) pack_block(r, m, block);
  }
  if (m1 < r.m) return;
  // The last caller finishes the ragged end.
  for (int64_t block = 0; block < r.blocks; ++block) {
    for (int64_t m = r.m; m < r.padded; ++m) {
      r.scale[block * r.padded + m] = 0;
      r.refused[block * r.padded + m] = 0;
    }
  }
  if (r.format == Format::kTiles) {
    uint16_t* data = static_cast<uint16_t*>(r.data);
    for (int64_t m = r.m; m < r.padded; ++m) {
      for (int64_t k0 = 0; k0 < r.depth; k0 += kScaleBlock) {
        const int64_t n = min_of(kScaleBlock, r.depth - k0);
        uint16_t* tile = data + k0 * r.padded + m / 16 * 16 * n + m % 16 * 32;
        for (int64_t step = 0; step < n / 32; ++step) std::memset(tile + step * 512, 0, 64);
      }
    }
  }
#if defined(__AVX512FP16__)
  if (r.format == Format::kHalf && r.m > 0) {
    const int64_t group = (r.m - 1) / kGroup, left = r.m - group * kGroup;
    const int64_t width = group_width(left);
    uint32_t* to = static_cast<uint32_t*>(r.data) + group * kGroup * r.depth;
    for (int64_t k = 0; k < r.depth; ++k) {
      for (int64_t m = left; m < width; ++m) to[k * width + m] = 0;
    }
  }
#endif
}

}  // namespace dsk::cpu::DSK_CPU_NS
