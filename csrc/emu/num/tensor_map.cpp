#include "emu/num/tensor_map.hpp"

#include <algorithm>
#include <cstring>
#include <stdexcept>

namespace dsk::emu::num {
namespace {

constexpr uint32_t kMagic = 0x31544d44;  // "DMT1"
constexpr uint64_t kMaxDim = uint64_t{1} << 32;
constexpr uint64_t kMaxStride = uint64_t{1} << 40;
constexpr uint32_t kMaxBox = 256;
constexpr uint32_t kMaxElementStride = 8;
constexpr uint32_t kMaxRank = 5;
constexpr uint32_t kChunk = 16;  // swizzling moves whole chunks

// Byte offsets of the fields inside the 128 bytes.
enum Offset : int {
  kAtMagic = 0,
  kAtType = 4,
  kAtRank = 5,  // rank - 1, as tensormap.replace passes it
  kAtInterleave = 6,
  kAtSwizzle = 7,
  kAtAddress = 8,
  kAtDims = 16,            // u32 x 5, dim - 1, so that 2^32 fits
  kAtStrides = 40,         // u64 x 4
  kAtBox = 72,             // u16 x 5
  kAtElementStrides = 82,  // u8 x 5
  kAtFill = 87,
  kAtL2 = 88,
};

template <class T>
void put(uint8_t* bytes, int at, T value) {
  std::memcpy(bytes + at, &value, sizeof(T));
}

template <class T>
T get(const uint8_t* bytes, int at) {
  T value;
  std::memcpy(&value, bytes + at, sizeof(T));
  return value;
}

std::string refuse(const std::string& argument, const std::string& expected, uint64_t actual) {
  return "tensor map: " + argument + ": expected " + expected + ", got " + std::to_string(actual);
}

std::string indexed(const char* name, uint32_t i) {
  return std::string(name) + "[" + std::to_string(i) + "]";
}

bool is_float(TmaType t) { return t >= TmaType::f16; }

std::string check_enums(const TensorMapArgs& a) {
  if (a.type > TmaType::tf32_ftz) {
    return refuse("tensorDataType", "one of the 13 sm_90 types (0..12)",
                  static_cast<uint64_t>(a.type));
  }
  if (a.interleave > TmaInterleave::b32) {
    return refuse("interleave", "none 0, 16B 1 or 32B 2", static_cast<uint64_t>(a.interleave));
  }
  if (a.swizzle > Swizzle::b128) {
    return refuse("swizzle", "none 0, 32B 1, 64B 2 or 128B 3 (the sm_90 modes)",
                  static_cast<uint64_t>(a.swizzle));
  }
  if (a.fill > TmaFill::nan) return refuse("oobFill", "0 or 1", static_cast<uint64_t>(a.fill));
  if (a.l2_promotion > 3) return refuse("l2Promotion", "0..3", a.l2_promotion);
  if (a.fill == TmaFill::nan && !is_float(a.type)) {
    return refuse("oobFill", "0 for a type that is not floating point", 1);
  }
  const uint32_t least = a.interleave == TmaInterleave::none ? 1 : 3;
  if (a.rank < least || a.rank > kMaxRank) {
    return refuse("tensorRank", std::to_string(least) + "..5", a.rank);
  }
  if (a.interleave == TmaInterleave::b32 && a.swizzle != Swizzle::b32) {
    return refuse("swizzle", "32B (1) with interleave 32B", static_cast<uint64_t>(a.swizzle));
  }
  return "";
}

std::string check_global(const TensorMapArgs& a) {
  const uint64_t alignment = a.interleave == TmaInterleave::b32 ? 32 : 16;
  const std::string multiple = "a multiple of " + std::to_string(alignment);
  if (a.address % alignment != 0) return refuse("globalAddress", multiple, a.address);
  for (uint32_t i = 0; i < a.rank; ++i) {
    if (a.dims[i] == 0 || a.dims[i] > kMaxDim) {
      return refuse(indexed("globalDim", i), "1..2^32", a.dims[i]);
    }
  }
  for (uint32_t i = 0; i + 1 < a.rank; ++i) {
    if (a.strides[i] % alignment != 0) {
      return refuse(indexed("globalStrides", i), multiple, a.strides[i]);
    }
    if (a.strides[i] >= kMaxStride) {
      return refuse(indexed("globalStrides", i), "less than 2^40", a.strides[i]);
    }
  }
  return "";
}

std::string check_box(const TensorMapArgs& a) {
  for (uint32_t i = 0; i < a.rank; ++i) {
    if (a.box[i] == 0 || a.box[i] > kMaxBox) {
      return refuse(indexed("boxDim", i), "1..256", a.box[i]);
    }
    const bool ignored = i == 0 && a.interleave == TmaInterleave::none;
    if (!ignored && (a.element_strides[i] == 0 || a.element_strides[i] > kMaxElementStride)) {
      return refuse(indexed("elementStrides", i), "1..8", a.element_strides[i]);
    }
  }
  if (a.interleave != TmaInterleave::none) return "";
  const uint64_t inner = uint64_t{a.box[0]} * static_cast<uint64_t>(size_of(a.type));
  if (inner % 16 != 0) {
    return refuse("boxDim[0] * element size", "a multiple of 16 bytes", inner);
  }
  const uint64_t span = uint64_t{16} << static_cast<uint32_t>(a.swizzle);
  if (a.swizzle != Swizzle::none && inner > span) {
    return refuse("boxDim[0] * element size",
                  "at most the swizzle span of " + std::to_string(span) + " bytes", inner);
  }
  return "";
}

uint32_t steps(const TensorMapArgs& a, uint32_t dim) {
  const bool ignored = dim == 0 && a.interleave == TmaInterleave::none;
  const uint32_t stride = ignored ? 1 : a.element_strides[dim];
  return (a.box[dim] + stride - 1) / stride;
}

// Appends [linear, linear + bytes) of the box, cut at chunks when the swizzle moves them.
struct RunWriter {
  const TensorMapArgs& args;
  uint32_t base;
  std::vector<TmaRun>& runs;

  void add(uint64_t global, uint32_t linear, uint32_t bytes, bool fill) {
    if (args.swizzle == Swizzle::none) {
      if (bytes != 0) runs.push_back({global, linear, bytes, fill});
      return;
    }
    while (bytes != 0) {
      const uint32_t address = base + linear;
      const uint32_t piece = std::min(bytes, kChunk - address % kChunk);
      runs.push_back({global, swizzle_address(address, args.swizzle) - base, piece, fill});
      global += piece;
      linear += piece;
      bytes -= piece;
    }
  }
};

// Elements [first, last) of `count` elements starting at coordinate `start` that lie in [0, dim).
void clip(int64_t start, uint32_t count, uint64_t dim, uint32_t& first, uint32_t& last) {
  const auto size = static_cast<int64_t>(dim);
  const int64_t lo = std::clamp<int64_t>(-start, 0, count);
  const int64_t hi = std::clamp<int64_t>(size - start, 0, count);
  first = static_cast<uint32_t>(lo);
  last = static_cast<uint32_t>(std::max(lo, hi));
}

void walk_row(const TensorMapArgs& a, int64_t start, uint64_t row_address, bool outside,
              uint32_t linear, RunWriter& out) {
  const auto size = static_cast<uint32_t>(size_of(a.type));
  const uint32_t count = steps(a, 0);
  const uint32_t step = a.interleave == TmaInterleave::none ? 1 : a.element_strides[0];
  if (step != 1) {
    for (uint32_t i = 0; i < count; ++i) {
      const int64_t c = start + int64_t{i} * step;
      const bool fill = outside || c < 0 || static_cast<uint64_t>(c) >= a.dims[0];
      out.add(fill ? 0 : row_address + static_cast<uint64_t>(c) * size, linear + i * size, size,
              fill);
    }
    return;
  }
  uint32_t first = 0;
  uint32_t last = 0;
  if (!outside) clip(start, count, a.dims[0], first, last);
  out.add(0, linear, first * size, true);
  if (last > first) {
    const auto column = static_cast<uint64_t>(start + first);
    out.add(row_address + column * size, linear + first * size, (last - first) * size, false);
  }
  out.add(0, linear + last * size, (count - last) * size, true);
}

uint64_t nan_pattern(TmaType type) {
  switch (size_of(type)) {
    case 2:
      return 0x7fff;
    case 4:
      return 0x7fffffff;
    default:
      return 0x7fffffffffffffff;
  }
}

// PTX numbers the element types in another order than the driver: ftz variants follow their type.
constexpr TmaType kPtxTypes[] = {TmaType::u8,      TmaType::u16, TmaType::u32,  TmaType::s32,
                                 TmaType::u64,     TmaType::s64, TmaType::f16,  TmaType::f32,
                                 TmaType::f32_ftz, TmaType::f64, TmaType::bf16, TmaType::tf32,
                                 TmaType::tf32_ftz};

std::string replace_enum(uint8_t* bytes, int at, const char* name, uint64_t value,
                         uint64_t largest) {
  if (value > largest) {
    return refuse(std::string("tensormap.replace ") + name, "0.." + std::to_string(largest), value);
  }
  put<uint8_t>(bytes, at, static_cast<uint8_t>(value));
  return "";
}

}  // namespace

int size_of(TmaType type) {
  constexpr int kSizes[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4};
  return type <= TmaType::tf32_ftz ? kSizes[static_cast<int>(type)] : 1;
}

std::string check_tensor_map(const TensorMapArgs& args) {
  std::string why = check_enums(args);
  if (why.empty()) why = check_global(args);
  if (why.empty()) why = check_box(args);
  return why;
}

TensorMap encode_tensor_map(const TensorMapArgs& args) {
  const std::string why = check_tensor_map(args);
  if (!why.empty()) throw std::invalid_argument(why);
  TensorMap map;
  uint8_t* p = map.bytes.data();
  put(p, kAtMagic, kMagic);
  put(p, kAtType, static_cast<uint8_t>(args.type));
  put(p, kAtRank, static_cast<uint8_t>(args.rank - 1));
  put(p, kAtInterleave, static_cast<uint8_t>(args.interleave));
  put(p, kAtSwizzle, static_cast<uint8_t>(args.swizzle));
  put(p, kAtAddress, args.address);
  put(p, kAtFill, static_cast<uint8_t>(args.fill));
  put(p, kAtL2, args.l2_promotion);
  for (uint32_t i = 0; i < kMaxRank; ++i) {
    const bool used = i < args.rank;
    put(p, kAtDims + 4 * static_cast<int>(i), static_cast<uint32_t>(used ? args.dims[i] - 1 : 0));
    put(p, kAtBox + 2 * static_cast<int>(i), static_cast<uint16_t>(used ? args.box[i] : 1));
    // The driver ignores dimension 0's element stride without interleave: any value is accepted.
    const bool ignored = i == 0 && args.interleave == TmaInterleave::none;
    put(p, kAtElementStrides + static_cast<int>(i),
        static_cast<uint8_t>(used && !ignored ? args.element_strides[i] : 1));
    if (i + 1 < kMaxRank) {
      put(p, kAtStrides + 8 * static_cast<int>(i), i + 1 < args.rank ? args.strides[i] : 0);
    }
  }
  return map;
}

bool decode_tensor_map(const uint8_t* bytes, TensorMapArgs& args, std::string& error) {
  if (get<uint32_t>(bytes, kAtMagic) != kMagic) {
    error = "tensor map: these 128 bytes are not an encoded tensor map";
    return false;
  }
  args = TensorMapArgs{};
  args.type = static_cast<TmaType>(bytes[kAtType]);
  args.rank = uint32_t{bytes[kAtRank]} + 1;
  args.interleave = static_cast<TmaInterleave>(bytes[kAtInterleave]);
  args.swizzle = static_cast<Swizzle>(bytes[kAtSwizzle]);
  args.address = get<uint64_t>(bytes, kAtAddress);
  args.fill = static_cast<TmaFill>(bytes[kAtFill]);
  args.l2_promotion = bytes[kAtL2];
  for (uint32_t i = 0; i < kMaxRank; ++i) {
    const int k = static_cast<int>(i);
    args.dims[i] = uint64_t{get<uint32_t>(bytes, kAtDims + 4 * k)} + 1;
    args.box[i] = get<uint16_t>(bytes, kAtBox + 2 * k);
    args.element_strides[i] = bytes[kAtElementStrides + k];
    if (i + 1 < kMaxRank) args.strides[i] = get<uint64_t>(bytes, kAtStrides + 8 * k);
  }
  error = check_tensor_map(args);
  return error.empty();
}

std::string refuse_im2col() {
  return "tensor map: im2col mode (cuTensorMapEncodeIm2col, cp.async.bulk.tensor .im2col) is not "
         "emulated: expected tiled mode";
}

std::string replace_field(uint8_t* bytes, MapField field, uint32_t ordinal, uint64_t value) {
  // Kernels also build maps from scratch: 128 zero bytes, then every field replaced.
  const auto magic = get<uint32_t>(bytes, kAtMagic);
  if (magic == 0) {
    put(bytes, kAtMagic, kMagic);
  } else if (magic != kMagic) {
    return "tensormap.replace: these 128 bytes are neither an encoded tensor map nor zero";
  }
  const uint32_t last = field == MapField::global_stride ? 3 : 4;
  const bool has_ordinal = field >= MapField::box_dim && field <= MapField::element_stride;
  if (has_ordinal && ordinal > last) {
    return refuse("tensormap.replace ordinal", "0.." + std::to_string(last), ordinal);
  }
  const int i = static_cast<int>(ordinal);
  switch (field) {
    case MapField::global_address:
      put(bytes, kAtAddress, value);
      return "";
    case MapField::rank:
      return replace_enum(bytes, kAtRank, "rank (minus one)", value, 4);
    case MapField::box_dim:
      if (value == 0 || value > kMaxBox)
        return refuse("tensormap.replace box_dim", "1..256", value);
      put(bytes, kAtBox + 2 * i, static_cast<uint16_t>(value));
      return "";
    case MapField::global_dim:
      if (value == 0 || value > kMaxDim) {
        return refuse("tensormap.replace global_dim", "1..2^32", value);
      }
      put(bytes, kAtDims + 4 * i, static_cast<uint32_t>(value - 1));
      return "";
    case MapField::global_stride:
      put(bytes, kAtStrides + 8 * i, value);
      return "";
    case MapField::element_stride:
      if (value == 0 || value > kMaxElementStride) {
        return refuse("tensormap.replace element_stride", "1..8", value);
      }
      put(bytes, kAtElementStrides + i, static_cast<uint8_t>(value));
      return "";
    case MapField::elemtype:
      if (value > 12) return refuse("tensormap.replace elemtype", "0..12", value);
      put(bytes, kAtType, static_cast<uint8_t>(kPtxTypes[value]));
      return "";
    case MapField::interleave_layout:
      return replace_enum(bytes, kAtInterleave, "interleave_layout", value, 2);
    case MapField::swizzle_mode:
      return replace_enum(bytes, kAtSwizzle, "swizzle_mode", value, 3);
    case MapField::fill_mode:
      return replace_enum(bytes, kAtFill, "fill_mode", value, 1);
  }
  return "tensormap.replace: unknown field";
}

uint32_t box_bytes(const TensorMapArgs& args) {
  uint64_t bytes = static_cast<uint64_t>(size_of(args.type));
  for (uint32_t i = 0; i < args.rank; ++i) bytes *= steps(args, i);
  // 256^5 elements do not fit shared memory anyway; saturate rather than wrap.
  return static_cast<uint32_t>(std::min<uint64_t>(bytes, 0xffffffffu));
}

uint32_t shared_alignment(const TensorMapArgs& args) {
  return args.interleave == TmaInterleave::b32 ? 256 : 128;
}

void walk_box(const TensorMapArgs& args, const int32_t* coords, uint32_t shared,
              std::vector<TmaRun>& runs) {
  runs.clear();
  RunWriter out{args, shared, runs};
  const uint32_t row_bytes = steps(args, 0) * static_cast<uint32_t>(size_of(args.type));
  std::array<uint32_t, kMaxRank> index{};
  uint32_t linear = 0;
  for (;;) {
    bool outside = false;
    uint64_t address = args.address;
    for (uint32_t d = 1; d < args.rank; ++d) {
      const int64_t c = int64_t{coords[d]} + int64_t{index[d]} * args.element_strides[d];
      if (c < 0 || static_cast<uint64_t>(c) >= args.dims[d]) {
        outside = true;
      } else {
        address += static_cast<uint64_t>(c) * args.strides[d - 1];
      }
    }
    walk_row(args, coords[0], address, outside, linear, out);
    linear += row_bytes;
    uint32_t d = 1;
    while (d < args.rank && ++index[d] == steps(args, d)) index[d++] = 0;
    if (d >= args.rank) return;
  }
}

void write_fill(const TensorMapArgs& args, uint8_t* dst, uint32_t bytes) {
  if (args.fill == TmaFill::zero) {
    std::memset(dst, 0, bytes);
    return;
  }
  const uint64_t pattern = nan_pattern(args.type);
  const auto size = static_cast<uint32_t>(size_of(args.type));
  for (uint32_t i = 0; i < bytes; i += size) {
    std::memcpy(dst + i, &pattern, std::min(size, bytes - i));
  }
}

}  // namespace dsk::emu::num
