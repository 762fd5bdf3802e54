#include "emu/num/wgmma_desc.hpp"

#include <algorithm>
#include <cstring>
#include <map>
#include <stdexcept>
#include <string>
#include <tuple>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace dsk::emu::num {
namespace {

constexpr uint64_t kReserved =
    (uint64_t{3} << 14) | (uint64_t{3} << 30) | (uint64_t{7} << 46) | (uint64_t{0x3ff} << 52);
constexpr uint32_t kFieldMax = 0x3fff << 4;
constexpr int kRowBytes = 32;     // of every dense tile row
constexpr int kMnMajorRows = 16;  // k rows of an MN-major tile
// Swizzling repeats every 1024 bytes, so a plan made at start mod 1024 serves every such start.
constexpr uint32_t kPeriod = 1024;

uint32_t apply_swizzle(const SmemDesc& desc, uint32_t address) {
  const uint32_t mask = (1u << static_cast<uint32_t>(desc.swizzle)) - 1;
  return address ^ ((((address >> 7) - desc.base_offset) & mask) << 4);
}

struct Plan {
  std::vector<uint32_t> chunks;  // relative address of each 16-byte chunk, in gather order
  std::vector<ByteRange> ranges;
  uint32_t low = 0;
  uint32_t high = 0;  // one past the last byte
};

Plan make_plan(const SmemDesc& desc, Major major, int mn) {
  Plan plan;
  plan.chunks.reserve(static_cast<size_t>(2 * mn));
  if (major == Major::k) {
    for (int row = 0; row < mn; ++row) {
      for (uint32_t c = 0; c < 2; ++c) {
        plan.chunks.push_back(k_major_chunk(desc, static_cast<uint32_t>(row), c));
      }
    }
  } else {
    for (int mn8 = 0; mn8 < mn / 8; ++mn8) {
      for (uint32_t k = 0; k < kMnMajorRows; ++k) {
        plan.chunks.push_back(mn_major_chunk(desc, static_cast<uint32_t>(mn8), k));
      }
    }
  }
  std::vector<uint32_t> sorted = plan.chunks;
  std::sort(sorted.begin(), sorted.end());
  for (const uint32_t begin : sorted) {
    if (!plan.ranges.empty() && begin <= plan.ranges.back().begin + plan.ranges.back().bytes) {
      plan.ranges.back().bytes = begin + 16 - plan.ranges.back().begin;
    } else {
      plan.ranges.push_back({begin, 16});
    }
  }
  plan.low = sorted.front();
  plan.high = sorted.back() + 16;
  return plan;
}

using Key = std::tuple<uint32_t, uint32_t, uint32_t, uint8_t, Swizzle, Major, int>;

const Plan& plan_for(const SmemDesc& desc, Major major, int mn) {
  constexpr size_t kMaxPlans = 256;
  thread_local std::map<Key, Plan> plans;
  const Key key{desc.start, desc.lbo, desc.sbo, desc.base_offset, desc.swizzle, major, mn};
  const auto found = plans.find(key);
  if (found != plans.end()) return found->second;
  if (plans.size() >= kMaxPlans) plans.clear();
  return plans.emplace(key, make_plan(desc, major, mn)).first->second;
}

// Eight chunks of eight 16-bit elements, chunk k at src[k], to rows of one k column each.
void transpose_8x8(const uint8_t* const* src, uint8_t* dst, int pitch) {
#if defined(__SSE2__)
  __m128i r[8];
  for (int i = 0; i < 8; ++i) r[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(src[i]));
  __m128i a[8];
  for (int i = 0; i < 4; ++i) {
    a[2 * i] = _mm_unpacklo_epi16(r[2 * i], r[2 * i + 1]);
    a[2 * i + 1] = _mm_unpackhi_epi16(r[2 * i], r[2 * i + 1]);
  }
  __m128i b[8];
  for (int i = 0; i < 2; ++i) {
    b[4 * i] = _mm_unpacklo_epi32(a[4 * i], a[4 * i + 2]);
    b[4 * i + 1] = _mm_unpackhi_epi32(a[4 * i], a[4 * i + 2]);
    b[4 * i + 2] = _mm_unpacklo_epi32(a[4 * i + 1], a[4 * i + 3]);
    b[4 * i + 3] = _mm_unpackhi_epi32(a[4 * i + 1], a[4 * i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(dst + 2 * i * pitch),
                     _mm_unpacklo_epi64(b[i], b[i + 4]));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(dst + (2 * i + 1) * pitch),
                     _mm_unpackhi_epi64(b[i], b[i + 4]));
  }
#else
  for (int k = 0; k < 8; ++k) {
    for (int i = 0; i < 8; ++i) std::memcpy(dst + i * pitch + 2 * k, src[k] + 2 * i, 2);
  }
#endif
}

}  // namespace

SmemDesc decode_desc(uint64_t bits) {
  SmemDesc desc;
  desc.start = static_cast<uint32_t>(bits & 0x3fff) << 4;
  desc.lbo = static_cast<uint32_t>((bits >> 16) & 0x3fff) << 4;
  desc.sbo = static_cast<uint32_t>((bits >> 32) & 0x3fff) << 4;
  desc.base_offset = static_cast<uint8_t>((bits >> 49) & 7);
  const auto layout = static_cast<uint8_t>(bits >> 62);  // 0 none, 1 128B, 2 64B, 3 32B
  desc.swizzle = static_cast<Swizzle>(layout == 0 ? 0 : 4 - layout);
  desc.reserved_bits = (bits & kReserved) != 0;
  return desc;
}

uint64_t encode_desc(const SmemDesc& desc) {
  const auto field = [](const char* name, uint32_t value) {
    if (value % 16 != 0 || value > kFieldMax) {
      throw std::invalid_argument(std::string("wgmma descriptor: ") + name +
                                  ": expected a multiple of 16 up to 262128, got " +
                                  std::to_string(value));
    }
    return static_cast<uint64_t>(value >> 4);
  };
  if (desc.base_offset > 7 || desc.swizzle > Swizzle::b128) {
    throw std::invalid_argument("wgmma descriptor: base_offset or swizzle out of range");
  }
  const auto width = static_cast<uint64_t>(desc.swizzle);
  return field("start", desc.start) | (field("lbo", desc.lbo) << 16) |
         (field("sbo", desc.sbo) << 32) | (uint64_t{desc.base_offset} << 49) |
         ((width == 0 ? 0 : 4 - width) << 62);
}

uint32_t k_major_chunk(const SmemDesc& desc, uint32_t mn, uint32_t chunk) {
  const uint32_t group = desc.start + (mn / 8) * desc.sbo;
  if (desc.swizzle == Swizzle::none) return group + (mn % 8) * 16 + chunk * desc.lbo;
  const uint32_t width = 16u << static_cast<uint32_t>(desc.swizzle);
  return apply_swizzle(desc, group + (mn % 8) * width + chunk * 16);
}

uint32_t mn_major_chunk(const SmemDesc& desc, uint32_t mn8, uint32_t k) {
  if (desc.swizzle == Swizzle::none) {
    return desc.start + mn8 * desc.sbo + (k % 8) * 16 + (k / 8) * desc.lbo;
  }
  const uint32_t chunks = 1u << static_cast<uint32_t>(desc.swizzle);
  return apply_swizzle(desc, desc.start + (mn8 % chunks) * 16 + (mn8 / chunks) * desc.lbo +
                                 (k % 8) * chunks * 16 + (k / 8) * desc.sbo);
}

namespace {

TileRead locate(const Plan& plan, uint32_t base, uint32_t window_base, uint32_t window_size) {
  TileRead read;
  read.relative = &plan.ranges;
  read.base = base;
  const uint64_t window_end = uint64_t{window_base} + window_size;
  if (uint64_t{base} + plan.low >= window_base && uint64_t{base} + plan.high <= window_end) {
    return read;
  }
  read.ok = false;
  for (const ByteRange& r : plan.ranges) {
    const uint64_t begin = uint64_t{base} + r.begin;
    const uint64_t end = begin + r.bytes;
    if (begin >= window_base && end <= window_end) continue;
    const uint64_t bad = begin < window_base ? begin : std::max(begin, window_end);
    read.bad_address = static_cast<uint32_t>(bad);
    break;
  }
  return read;
}

const Plan& plan_of(const SmemDesc& desc, Major major, int mn) {
  if (mn < 8 || mn > 256 || mn % 8 != 0) {
    throw std::invalid_argument("wgmma tile: expected 8..256 rows in steps of 8, got " +
                                std::to_string(mn));
  }
  SmemDesc local = desc;
  local.start = desc.start % kPeriod;
  return plan_for(local, major, mn);
}

}  // namespace

TileRead locate_tile(const SmemDesc& desc, Major major, int mn, uint32_t window_base,
                     uint32_t window_size) {
  const Plan& plan = plan_of(desc, major, mn);
  return locate(plan, desc.start - desc.start % kPeriod, window_base, window_size);
}

TileRead gather_tile(const SmemDesc& desc, Major major, int mn, const uint8_t* smem,
                     uint32_t window_base, uint32_t window_size, uint8_t* dense) {
  const Plan& plan = plan_of(desc, major, mn);
  const uint32_t base = desc.start - desc.start % kPeriod;
  const TileRead read = locate(plan, base, window_base, window_size);
  if (!read.ok) return read;
  const uint8_t* origin = smem + (read.base - window_base);
  if (major == Major::k) {
    for (size_t i = 0; i < plan.chunks.size(); ++i) {
      std::memcpy(dense + 16 * i, origin + plan.chunks[i], 16);
    }
    return read;
  }
  const uint8_t* src[8];
  for (int mn8 = 0; mn8 < mn / 8; ++mn8) {
    for (int half = 0; half < 2; ++half) {
      const uint32_t* chunk = plan.chunks.data() + mn8 * kMnMajorRows + half * 8;
      for (int k = 0; k < 8; ++k) src[k] = origin + chunk[k];
      transpose_8x8(src, dense + mn8 * 8 * kRowBytes + half * 16, kRowBytes);
    }
  }
  return read;
}

}  // namespace dsk::emu::num
