// cvt between integers, floats and the small formats; cvt.pack.
#include <cfenv>

#include "emu/isa/lane.hpp"
#include "emu/num/convert.hpp"

namespace dsk::emu::DSK_EMU_LEVEL {
namespace {

// Straight truncation or extension: From read out of a register of S, written to one of D.
template <class From, class S, class D>
void int_to_int(Warp& w, const Inst& i, u32 mask) {
  const S* a = w.reg<S>(i.a);
  map_lanes(w.reg<D>(i.d), mask, [&](int l) { return static_cast<D>(static_cast<From>(a[l])); });
}

template <class From, class S>
Handler pick_width(int bytes) {
  return bytes == 2   ? int_to_int<From, S, u16>
         : bytes == 4 ? int_to_int<From, S, u32>
                      : int_to_int<From, S, u64>;
}

// Nullptr for the combinations that only the general handler knows.
Handler pick_int_to_int(Type from, int from_bytes, int to_bytes) {
  if (type_size(from) == 1 && from_bytes == 2) {
    return from == Type::U8 ? pick_width<u8, u16>(to_bytes) : pick_width<i8, u16>(to_bytes);
  }
  if (type_size(from) == 1 && from_bytes == 4) {
    return from == Type::U8 ? pick_width<u8, u32>(to_bytes) : pick_width<i8, u32>(to_bytes);
  }
  if (type_size(from) != from_bytes) return nullptr;
  switch (from) {
    case Type::U16:
      return pick_width<u16, u16>(to_bytes);
    case Type::S16:
      return pick_width<i16, u16>(to_bytes);
    case Type::U32:
      return pick_width<u32, u32>(to_bytes);
    case Type::S32:
      return pick_width<i32, u32>(to_bytes);
    case Type::U64:
    case Type::S64:
      return pick_width<u64, u64>(to_bytes);
    default:
      return nullptr;
  }
}

u64 extend(u64 raw, Type t) {
  const int shift = 64 - 8 * type_size(t);
  return is_signed(t) ? static_cast<u64>(static_cast<i64>(raw << shift) >> shift)
                      : raw << shift >> shift;
}

u64 read_raw(Warp& w, u32 reg, i64 bytes, int l) {
  return bytes == 2 ? w.reg<u16>(reg)[l] : bytes == 4 ? w.reg<u32>(reg)[l] : w.reg<u64>(reg)[l];
}
void write_raw(Warp& w, u32 reg, i64 bytes, int l, u64 value) {
  if (bytes == 2)
    w.reg<u16>(reg)[l] = static_cast<u16>(value);
  else if (bytes == 4)
    w.reg<u32>(reg)[l] = static_cast<u32>(value);
  else
    w.reg<u64>(reg)[l] = value;
}

// v: 0 source register bytes, 1 destination register bytes, 2 saturate. PTX lets cvt use registers
// wider than its types; a wider destination is extended by the destination type's sign.
void int_to_int_general(Warp& w, const Inst& i, u32 mask) {
  const Ext& x = *i.ext;
  const int to_bits = 8 * type_size(x.type2);
  const __int128 one = 1;
  const __int128 lo = is_signed(x.type2) ? -(one << (to_bits - 1)) : 0;
  const __int128 hi = (is_signed(x.type2) ? one << (to_bits - 1) : one << to_bits) - 1;
  for (u32 m = mask; m != 0; m &= m - 1) {
    const int l = std::countr_zero(m);
    u64 v = extend(read_raw(w, i.a, x.v[0], l), x.type);
    if (x.v[2]) {
      const __int128 wide = is_signed(x.type) ? __int128{static_cast<i64>(v)} : __int128{v};
      v = static_cast<u64>(wide < lo ? lo : wide > hi ? hi : wide);
    }
    write_raw(w, i.d, x.v[1], l, extend(v, x.type2));
  }
}

int rounding_mode(const Decoder& d) {
  return d.has("rz") || d.has("rzi")   ? FE_TOWARDZERO
         : d.has("rm") || d.has("rmi") ? FE_DOWNWARD
         : d.has("rp") || d.has("rpi") ? FE_UPWARD
                                       : FE_TONEAREST;
}

class RoundingScope {
 public:
  explicit RoundingScope(int mode) : saved_(std::fegetround()) { std::fesetround(mode); }
  ~RoundingScope() { std::fesetround(saved_); }
  RoundingScope(const RoundingScope&) = delete;
  RoundingScope& operator=(const RoundingScope&) = delete;

 private:
  int saved_;
};

// The fast and frequent ones: i32/u32 -> f32, round to nearest.
template <class T>
void int_to_f32(Warp& w, const Inst& i, u32 mask) {
  const T* a = w.reg<T>(i.a);
  map_lanes(w.reg<float>(i.d), mask, [&](int l) { return static_cast<float>(a[l]); });
}

void int_to_float(Warp& w, const Inst& i, u32 mask) {
  const Ext& x = *i.ext;
  const RoundingScope scope(static_cast<int>(x.v[1]));
  for (u32 m = mask; m != 0; m &= m - 1) {
    const int l = std::countr_zero(m);
    const bool is_signed_source = is_signed(x.type);
    volatile i64 v = static_cast<i64>(extend(read_raw(w, i.a, x.v[0], l), x.type));
    const u64 unsigned_v = static_cast<u64>(v);
    if (x.type2 == Type::F64) {
      volatile double r =
          is_signed_source ? static_cast<double>(v) : static_cast<double>(unsigned_v);
      w.reg<double>(i.d)[l] = r;
    } else if (x.type2 == Type::F32) {
      volatile float r = is_signed_source ? static_cast<float>(v) : static_cast<float>(unsigned_v);
      w.reg<float>(i.d)[l] = r;
    } else {
      // Exactly representable in double up to 2^53; beyond, f16 and bf16 cannot tell the difference
      // except through a tie, which round-to-odd below keeps apart.
      u64 magnitude = is_signed_source && v < 0 ? 0 - unsigned_v : unsigned_v;
      if (magnitude >> 53) magnitude = (magnitude >> 11 << 11) | ((magnitude & 2047) != 0) << 11;
      const double value = is_signed_source && v < 0 ? -static_cast<double>(magnitude)
                                                     : static_cast<double>(magnitude);
      const num::Round mode = x.v[1] == FE_TONEAREST    ? num::Round::rn
                              : x.v[1] == FE_TOWARDZERO ? num::Round::rz
                              : x.v[1] == FE_DOWNWARD   ? num::Round::rm
                                                        : num::Round::rp;
      const num::Format f = x.type2 == Type::F16 ? num::Format::f16 : num::Format::bf16;
      w.reg<u16>(i.d)[l] = static_cast<u16>(num::encode(f, value, {mode, false, false}));
    }
  }
}

double read_float(Warp& w, const Inst& i, int l, Type t, bool ftz) {
  double v;
  switch (t) {
    case Type::F64:
      return w.reg<double>(i.a)[l];
    case Type::F32:
      v = static_cast<double>(w.reg<float>(i.a)[l]);
      break;
    case Type::F16:
      v = static_cast<double>(num::f16_to_f32(w.reg<u16>(i.a)[l]));
      break;
    default:
      v = static_cast<double>(num::bf16_to_f32(w.reg<u16>(i.a)[l]));
      break;
  }
  if (ftz && t == Type::F32 && std::fabs(v) < 1.17549435082228750797e-38) v = std::copysign(0.0, v);
  return v;
}

double round_integral(double v, int mode) {
  switch (mode) {
    case FE_TOWARDZERO:
      return std::trunc(v);
    case FE_DOWNWARD:
      return std::floor(v);
    case FE_UPWARD:
      return std::ceil(v);
    default:
      return std::nearbyint(v);
  }
}

// Out-of-range values clamp to the destination type; NaN gives 0 (the most negative number for
// 64-bit destinations of f32/f64 sources on hardware is documented as 0x8000...: PTX says "NaN
// yields 0" for .u8-.u32 and .s8-.s32, and the integer indefinite for 64-bit ones).
template <class To>
u64 float_to_integer(double v, int mode) {
  if (v != v) return sizeof(To) == 8 ? u64{1} << 63 : 0;
  v = round_integral(v, mode);
  const double lo = static_cast<double>(std::numeric_limits<To>::min());
  const double hi = static_cast<double>(std::numeric_limits<To>::max());
  if (v <= lo) return static_cast<u64>(std::numeric_limits<To>::min());
  if (v >= hi) return static_cast<u64>(std::numeric_limits<To>::max());
  return static_cast<u64>(static_cast<To>(v));
}

void float_to_int(Warp& w, const Inst& i, u32 mask) {
  const Ext& x = *i.ext;
  for (u32 m = mask; m != 0; m &= m - 1) {
    const int l = std::countr_zero(m);
    const double v = read_float(w, i, l, x.type, x.v[2] != 0);
    const int mode = static_cast<int>(x.v[1]);
    u64 r = 0;
    switch (x.type2) {
      case Type::U8:
        r = float_to_integer<u8>(v, mode);
        break;
      case Type::S8:
        r = float_to_integer<i8>(v, mode);
        break;
      case Type::U16:
        r = float_to_integer<u16>(v, mode);
        break;
      case Type::S16:
        r = float_to_integer<i16>(v, mode);
        break;
      case Type::U32:
        r = float_to_integer<u32>(v, mode);
        break;
      case Type::S32:
        r = float_to_integer<i32>(v, mode);
        break;
      case Type::U64:
        r = float_to_integer<u64>(v, mode);
        break;
      default:
        r = float_to_integer<i64>(v, mode);
        break;
    }
    write_raw(w, i.d, x.v[0], l, r);
  }
}

// float -> float, every mode. v: 1 rounding, 2 ftz, 3 to an integral value, 4 sat, 5 relu,
// 6 satfinite.
void float_to_float(Warp& w, const Inst& i, u32 mask) {
  const Ext& x = *i.ext;
  const RoundingScope scope(static_cast<int>(x.v[1]));
  for (u32 m = mask; m != 0; m &= m - 1) {
    const int l = std::countr_zero(m);
    volatile double v = read_float(w, i, l, x.type, x.v[2] != 0);
    if (x.v[3]) v = round_integral(v, static_cast<int>(x.v[1]));
    if (x.v[4]) v = v > 0 ? (v < 1 ? v : 1.0) : 0.0;
    if (x.type2 == Type::F64) {
      w.reg<double>(i.d)[l] = v != v ? std::bit_cast<double>(0x7fffffffffffffffull) : v;
    } else if (x.type2 == Type::F32) {
      volatile float r = static_cast<float>(v);
      float f = r != r ? std::bit_cast<float>(0x7fffffffu) : r;
      if (x.v[2] && std::fabs(f) < 1.17549435e-38f) f = std::copysign(0.0f, f);
      if (x.v[5] && f < 0) f = 0;
      w.reg<float>(i.d)[l] = f;
    } else {
      const num::Round mode = x.v[1] == FE_TONEAREST    ? num::Round::rn
                              : x.v[1] == FE_TOWARDZERO ? num::Round::rz
                              : x.v[1] == FE_DOWNWARD   ? num::Round::rm
                                                        : num::Round::rp;
      const num::Format f = x.type2 == Type::F16 ? num::Format::f16 : num::Format::bf16;
      w.reg<u16>(i.d)[l] = static_cast<u16>(num::encode(f, v, {mode, x.v[6] != 0, x.v[5] != 0}));
    }
  }
}

// --- the hot conversions of mixed-precision kernels, 32 lanes at a time
template <class Out, class In, void (*F)(const In*, Out*, int)>
void by_array(Warp& w, const Inst& i, u32 mask) {
  alignas(64) Out r[kLanes];
  F(w.reg<In>(i.a), r, kLanes);
  map_lanes(w.reg<Out>(i.d), mask, [&](int l) { return r[l]; });
}
template <class Out, void (*F)(const float*, const float*, Out*, int)>
void pair_by_array(Warp& w, const Inst& i, u32 mask) {
  alignas(64) Out r[kLanes];
  F(w.reg<float>(i.a), w.reg<float>(i.b), r, kLanes);
  map_lanes(w.reg<Out>(i.d), mask, [&](int l) { return r[l]; });
}

// Packed pairs of any formats. v: 0 from, 1 to, 2 source elements packed in one register,
// type/type2 for widths, sub rounding, op 1 satfinite 2 relu.
void convert_pair(Warp& w, const Inst& i, u32 mask) {
  const Ext& x = *i.ext;
  const auto from = static_cast<num::Format>(x.v[0]);
  const auto to = static_cast<num::Format>(x.v[1]);
  const num::CvtMode mode{static_cast<num::Round>(i.sub), (i.op & 1) != 0, (i.op & 2) != 0};
  const int to_bits = static_cast<int>(x.v[3]), from_bits = static_cast<int>(x.v[2]);
  for (u32 m = mask; m != 0; m &= m - 1) {
    const int l = std::countr_zero(m);
    u32 low, high;
    if (i.b != kNoReg) {  // two f32 sources: the first goes to the upper half
      low = w.reg<u32>(i.b)[l], high = w.reg<u32>(i.a)[l];
    } else {
      const u32 packed = from_bits == 16  ? w.reg<u32>(i.a)[l]
                         : from_bits == 8 ? w.reg<u16>(i.a)[l]
                                          : w.reg<u16>(i.a)[l] & 0xff;
      low = packed & ((1u << from_bits) - 1), high = packed >> from_bits;
    }
    const u32 r = num::encode(to, num::decode(from, low), mode) |
                  num::encode(to, num::decode(from, high), mode) << to_bits;
    if (to_bits == 16)
      w.reg<u32>(i.d)[l] = r;
    else
      w.reg<u16>(i.d)[l] = static_cast<u16>(r);
  }
}

num::Format pair_format(Type t) {
  switch (t) {
    case Type::F16x2:
      return num::Format::f16;
    case Type::BF16x2:
      return num::Format::bf16;
    case Type::E4M3x2:
      return num::Format::e4m3;
    case Type::E5M2x2:
      return num::Format::e5m2;
    default:
      return num::Format::f32;
  }
}

u8 pair_rounding(const Decoder& d) {
  return static_cast<u8>(d.has("rz") ? num::Round::rz : num::Round::rn);
}

// d = {a, b}: two f32 into one packed register.
void bind_pack_f32(Decoder& d, Inst& i) {
  const Type to = d.type(0);
  d.arity(3);
  i.d = d.dst(0, type_size(to));
  i.a = d.src(1, 4);
  i.b = d.src(2, 4);
  i.sub = pair_rounding(d);
  i.op = static_cast<u8>(d.has("satfinite") | d.has("relu") << 1);
  const bool plain = i.sub == 0 && !d.has("relu");
  if (plain && to == Type::F16x2 && i.op == 0) {
    i.fn = pair_by_array<u32, num::f32_to_f16x2>;
  } else if (plain && to == Type::BF16x2 && i.op == 0) {
    i.fn = pair_by_array<u32, num::f32_to_bf16x2>;
  } else if (plain && to == Type::E4M3x2) {
    i.fn = pair_by_array<u16, num::f32_to_e4m3x2>;
  } else if (plain && to == Type::E5M2x2) {
    i.fn = pair_by_array<u16, num::f32_to_e5m2x2>;
  } else {
    Ext& x = d.ext(i);
    x.v[0] = static_cast<i64>(num::Format::f32);
    x.v[1] = static_cast<i64>(pair_format(to));
    x.v[3] = 4 * type_size(to);
    i.fn = convert_pair;
  }
}

// One packed register into another.
void bind_repack(Decoder& d, Inst& i) {
  const Type to = d.type(0), from = d.type(1);
  d.arity(2);
  i.d = d.dst(0, type_size(to));
  i.a = d.src(1, type_size(from));
  i.sub = pair_rounding(d);
  i.op = static_cast<u8>(d.has("satfinite") | d.has("relu") << 1);
  if (to == Type::F16x2 && from == Type::E4M3x2 && i.op == 0) {
    i.fn = by_array<u32, u16, num::e4m3x2_to_f16x2>;
    return;
  }
  if (to == Type::F16x2 && from == Type::E5M2x2 && i.op == 0) {
    i.fn = by_array<u32, u16, num::e5m2x2_to_f16x2>;
    return;
  }
  Ext& x = d.ext(i);
  x.v[0] = static_cast<i64>(pair_format(from));
  x.v[1] = static_cast<i64>(pair_format(to));
  x.v[2] = 4 * type_size(from);
  x.v[3] = 4 * type_size(to);
  i.fn = convert_pair;
}

void tf32(Warp& w, const Inst& i, u32 mask) {
  const u32* a = w.reg<u32>(i.a);
  const num::CvtMode mode{static_cast<num::Round>(i.sub), (i.op & 1) != 0, (i.op & 2) != 0};
  map_lanes(w.reg<u32>(i.d), mask, [&](int l) {
    return num::encode(num::Format::tf32, num::decode(num::Format::f32, a[l]), mode);
  });
}
void bind_tf32(Decoder& d, Inst& i) {
  d.arity(2);
  i.d = d.dst(0, 4);
  i.a = d.src(1, 4);
  i.sub = static_cast<u8>(d.has("rna")  ? num::Round::rna
                          : d.has("rz") ? num::Round::rz
                                        : num::Round::rn);
  i.op = static_cast<u8>(d.has("satfinite") | d.has("relu") << 1);
  i.fn = tf32;
}

int register_width(Decoder& d, std::size_t k, Type t) {
  const int have = d.register_bytes(d.operand(k));
  return have > type_size(t) ? have : std::max(type_size(t), 2);
}

void bind_int(Decoder& d, Inst& i) {
  const Type to = d.type(0), from = d.type(1);
  d.arity(2);
  const int to_bytes = register_width(d, 0, to), from_bytes = register_width(d, 1, from);
  i.d = d.dst(0, to_bytes);
  i.a = d.src(1, from_bytes);
  const bool straight = !d.has("sat") && type_size(to) == to_bytes;
  i.fn = straight ? pick_int_to_int(from, from_bytes, to_bytes) : nullptr;
  if (i.fn != nullptr) return;
  Ext& x = d.ext(i);
  x.type = from, x.type2 = to;
  x.v[0] = from_bytes, x.v[1] = to_bytes, x.v[2] = d.has("sat");
  i.fn = int_to_int_general;
}

void bind_int_to_float(Decoder& d, Inst& i) {
  const Type to = d.type(0), from = d.type(1);
  d.arity(2);
  const int from_bytes = register_width(d, 1, from);
  i.d = d.dst(0, type_size(to));
  i.a = d.src(1, from_bytes);
  if (to == Type::F32 && from_bytes == 4 && type_size(from) == 4 &&
      rounding_mode(d) == FE_TONEAREST) {
    i.fn = from == Type::S32 ? int_to_f32<i32> : int_to_f32<u32>;
    return;
  }
  Ext& x = d.ext(i);
  x.type = from, x.type2 = to;
  x.v[0] = from_bytes;
  x.v[1] = rounding_mode(d);
  i.fn = int_to_float;
}

void bind_float_to_int(Decoder& d, Inst& i) {
  const Type to = d.type(0), from = d.type(1);
  d.arity(2);
  Ext& x = d.ext(i);
  x.type = from, x.type2 = to;
  x.v[0] = register_width(d, 0, to);
  x.v[1] = rounding_mode(d);
  x.v[2] = d.has("ftz");
  i.d = d.dst(0, static_cast<int>(x.v[0]));
  i.a = d.src(1, type_size(from));
  i.fn = float_to_int;
}

void bind_float(Decoder& d, Inst& i) {
  const Type to = d.type(0), from = d.type(1);
  d.arity(2);
  i.d = d.dst(0, type_size(to));
  i.a = d.src(1, type_size(from));
  const bool plain = !d.has("ftz") && !d.has("sat") && !d.has("relu") && !d.has("satfinite");
  if (plain && to == Type::F32 && from == Type::BF16) {
    i.fn = by_array<float, u16, num::bf16_to_f32>;
    return;
  }
  if (plain && to == Type::F32 && from == Type::F16) {
    i.fn = by_array<float, u16, num::f16_to_f32>;
    return;
  }
  if (plain && d.has("rn") && to == Type::BF16 && from == Type::F32) {
    i.fn = by_array<u16, float, num::f32_to_bf16>;
    return;
  }
  if (plain && d.has("rn") && to == Type::F16 && from == Type::F32) {
    i.fn = by_array<u16, float, num::f32_to_f16>;
    return;
  }
  Ext& x = d.ext(i);
  x.type = from, x.type2 = to;
  x.v[1] = rounding_mode(d);
  x.v[2] = d.has("ftz");
  x.v[3] = d.has("rni") || d.has("rzi") || d.has("rmi") || d.has("rpi");
  x.v[4] = d.has("sat");
  x.v[5] = d.has("relu");
  x.v[6] = d.has("satfinite");
  i.fn = float_to_float;
}

// cvt.pack.sat: two s32 clamped into the low halves (or bytes) of a register.
void cvt_pack(Warp& w, const Inst& i, u32 mask) {
  const i32 *a = w.reg<i32>(i.a), *b = w.reg<i32>(i.b);
  const u32* c = i.c == kNoReg ? nullptr : w.reg<u32>(i.c);
  const int bits = i.size;
  const bool is_signed_result = i.op != 0;
  const i32 lo = is_signed_result ? -(1 << (bits - 1)) : 0;
  const i32 hi = is_signed_result ? (1 << (bits - 1)) - 1 : (1 << bits) - 1;
  const u32 keep = (1u << bits) - 1;
  map_lanes(w.reg<u32>(i.d), mask, [&](int l) {
    const i32 x = a[l] < lo ? lo : a[l] > hi ? hi : a[l];
    const i32 y = b[l] < lo ? lo : b[l] > hi ? hi : b[l];
    const u32 pair = (static_cast<u32>(x) & keep) << bits | (static_cast<u32>(y) & keep);
    return bits == 16 || c == nullptr ? pair : pair | c[l] << (2 * bits);
  });
}
void bind_pack(Decoder& d, Inst& i) {
  const Type to = d.type(0);
  const bool with_c = type_size(to) == 1;
  d.arity(with_c ? 4 : 3);
  i.d = d.dst(0, 4);
  i.a = d.src(1, 4);
  i.b = d.src(2, 4);
  if (with_c) i.c = d.src(3, 4);
  i.size = static_cast<u8>(8 * type_size(to));
  i.op = is_signed(to);
  i.fn = cvt_pack;
}

#define DSK_INTS "u8|s8|u16|s16|u32|s32|u64|s64"
constexpr Entry kEntries[] = {
    {"cvt.sat?." DSK_INTS "." DSK_INTS, bind_int, "integer to integer, truncating or clamping"},
    {"cvt.rn|rz|rm|rp.f32|f64|f16|bf16." DSK_INTS, bind_int_to_float, "integer to float"},
    {"cvt.rni|rzi|rmi|rpi.ftz?.sat?." DSK_INTS ".f32|f64|f16|bf16", bind_float_to_int,
     "float to integer, clamping"},
    {"cvt.rn|rz|rm|rp|rni|rzi|rmi|rpi?.ftz?.sat?.f32|f64|f16|bf16.f32|f64|f16|bf16", bind_float,
     "float to float, or to an integral value"},
    {"cvt.rn|rz.relu?.satfinite?.f16|bf16.f32", bind_float, "float to half, with relu", 80},
    {"cvt.rn|rz.satfinite.relu?.f16|bf16.f32", bind_float, "float to half, clamped", 80},
    {"cvt.rn|rz.relu?.satfinite?.f16x2|bf16x2.f32", bind_pack_f32, "two floats to packed halves",
     80},
    {"cvt.rn.satfinite.relu?.e4m3x2|e5m2x2.f32", bind_pack_f32, "two floats to packed FP8", 89},
    {"cvt.rn.satfinite.relu?.e4m3x2|e5m2x2.f16x2", bind_repack, "packed halves to FP8", 89},
    {"cvt.rn.relu?.f16x2.e4m3x2|e5m2x2", bind_repack, "packed FP8 to halves", 89},
    {"cvt.rna.satfinite?.tf32.f32", bind_tf32, "float to tf32, ties away", 80},
    {"cvt.rn|rz.relu?.satfinite?.tf32.f32", bind_tf32, "float to tf32", 90},
    {"cvt.pack.sat.u16|s16.s32", bind_pack, "two integers, clamped, packed", 72},
    {"cvt.pack.sat.u8|s8.s32.b32", bind_pack, "two integers, clamped, before c's halves", 72},
};

}  // namespace

std::span<const Entry> convert_entries() { return kEntries; }

}  // namespace dsk::emu::DSK_EMU_LEVEL
