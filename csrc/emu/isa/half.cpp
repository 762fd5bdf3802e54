// f16, bf16 and their packed pairs.
#include <cmath>

#include "emu/isa/approx_mode.hpp"
#include "emu/isa/common.hpp"
#include "emu/num/convert.hpp"

namespace dsk::emu {
namespace {

enum Op : u8 { kAdd, kSub, kMul, kFma, kMin, kMax, kNeg, kAbs, kEx2, kTanh };
constexpr u8 kBf16 = 1, kPacked = 2, kRelu = 4, kSat = 8, kNanWins = 16, kFtz = 32, kXorSign = 64;

u16 canonical_nan() { return 0x7fff; }

u16 flush_f16(u16 x) { return (x & 0x7c00) == 0 ? x & 0x8000 : x; }

float widen(bool bf, u16 x) { return bf ? num::bf16_to_f32(x) : num::f16_to_f32(x); }

// a * b + c rounded once: the product is exact in double, the sum is rounded to odd so that the
// second rounding sees a tie only where there is one.
u16 fused(bool bf, u16 a, u16 b, u16 c) {
  const double p = double{widen(bf, a)} * double{widen(bf, b)};
  const double z = double{widen(bf, c)};
  double s = p + z;
  if (std::isfinite(s)) {
    const double t = s - p;
    const double error = (p - (s - t)) + (z - t);
    if (error != 0 && (std::bit_cast<u64>(s) & 1) == 0) {
      s = std::nextafter(s, error > 0 ? HUGE_VAL : -HUGE_VAL);
    }
  }
  return static_cast<u16>(num::encode(bf ? num::Format::bf16 : num::Format::f16, s));
}

u16 extreme(bool bf, bool max, u8 flags, u16 a, u16 b) {
  if (flags & kFtz && !bf) a = flush_f16(a), b = flush_f16(b);
  const u16 sign = flags & kXorSign ? (a ^ b) & 0x8000 : 0;
  if (flags & kXorSign) a &= 0x7fff, b &= 0x7fff;
  const float x = widen(bf, a), y = widen(bf, b);
  const bool nan_a = x != x, nan_b = y != y;
  if ((flags & kNanWins) && (nan_a || nan_b)) return canonical_nan();
  if (nan_a && nan_b) return canonical_nan();
  if (nan_a) return b | sign;
  if (nan_b) return a | sign;
  if (x == y) return (((a & 0x8000) != 0) == max ? b : a) | sign;
  return ((x > y) == max ? a : b) | sign;
}

u16 round(bool bf, float x) {
  if (x != x) return canonical_nan();
  return bf ? num::f32_to_bf16(x) : num::f32_to_f16(x);
}

u16 apply(Op op, u8 flags, u16 a, u16 b, u16 c, const num::ApproxCtx& context) {
  const bool bf = flags & kBf16;
  const bool ftz = (flags & kFtz) && !bf;
  if (ftz) a = flush_f16(a), b = flush_f16(b), c = flush_f16(c);
  u16 r;
  switch (op) {
    case kAdd:
      r = round(bf, widen(bf, a) + widen(bf, b));
      break;
    case kSub:
      r = round(bf, widen(bf, a) - widen(bf, b));
      break;
    case kMul:
      r = round(bf, widen(bf, a) * widen(bf, b));
      break;
    case kFma:
      r = fused(bf, a, b, c);
      break;
    case kMin:
      return extreme(bf, false, flags, a, b);
    case kMax:
      return extreme(bf, true, flags, a, b);
    case kNeg:
      return a ^ 0x8000;
    case kAbs:
      return a & 0x7fff;
    case kEx2:
      return bf ? num::approx_bf16(num::ApproxFn::ex2, a, true, context)
                : num::approx_f16(num::ApproxFn::ex2, a, ftz, context);
    default:
      return bf ? num::approx_bf16(num::ApproxFn::tanh, a, false, context)
                : num::approx_f16(num::ApproxFn::tanh, a, false, context);
  }
  if (ftz) r = flush_f16(r);
  const bool nan = widen(bf, r) != widen(bf, r);
  if (flags & kSat) {
    const u16 one = bf ? 0x3f80 : 0x3c00;
    if (nan || (r & 0x8000)) return 0;
    return r > one ? one : r;
  }
  if ((flags & kRelu) && !nan && (r & 0x8000)) return 0;
  return r;
}

void arith(Warp& w, const Inst& i, u32 mask) {
  const Op op = static_cast<Op>(i.op);
  const num::ApproxCtx context = approx_context(w);
  const u32 b_reg = i.b == kNoReg ? i.a : i.b, c_reg = i.c == kNoReg ? i.a : i.c;
  if (i.sub & kPacked) {
    const u32 *a = w.reg<u32>(i.a), *b = w.reg<u32>(b_reg), *c = w.reg<u32>(c_reg);
    u32* d = w.reg<u32>(i.d);
    each_lane(mask, [&](int l) {
      const u16 lo = apply(op, i.sub, static_cast<u16>(a[l]), static_cast<u16>(b[l]),
                           static_cast<u16>(c[l]), context);
      const u16 hi = apply(op, i.sub, static_cast<u16>(a[l] >> 16), static_cast<u16>(b[l] >> 16),
                           static_cast<u16>(c[l] >> 16), context);
      d[l] = lo | u32{hi} << 16;
    });
    return;
  }
  const u16 *a = w.reg<u16>(i.a), *b = w.reg<u16>(b_reg), *c = w.reg<u16>(c_reg);
  u16* d = w.reg<u16>(i.d);
  each_lane(mask, [&](int l) { d[l] = apply(op, i.sub, a[l], b[l], c[l], context); });
}

template <Op O, int Sources>
void bind(Decoder& d, Inst& i) {
  const Type t = d.type();
  const bool packed = t == Type::F16x2 || t == Type::BF16x2;
  const int bytes = packed ? 4 : 2;
  d.arity(Sources + 1);
  i.d = d.dst(0, bytes);
  i.a = d.src(1, bytes);
  if (Sources > 1) i.b = d.src(2, bytes);
  if (Sources > 2) i.c = d.src(3, bytes);
  i.op = O;
  i.sub = static_cast<u8>((t == Type::BF16 || t == Type::BF16x2 ? kBf16 : 0) |
                          (packed ? kPacked : 0) | (d.has("relu") ? kRelu : 0) |
                          (d.has("sat") ? kSat : 0) | (d.has("NaN") ? kNanWins : 0) |
                          (d.has("ftz") ? kFtz : 0) | (d.has("xorsign") ? kXorSign : 0));
  i.fn = arith;
}

// --- comparison
bool compare(int c, float a, float b) {
  switch (c) {
    case 0:
      return a == b;
    case 1:
      return a < b || a > b;
    case 2:
      return a < b;
    case 3:
      return a <= b;
    case 4:
      return a > b;
    case 5:
      return a >= b;
    case 6:
      return !(a < b || a > b);
    case 7:
      return a != b;
    case 8:
      return !(a >= b);
    case 9:
      return !(a > b);
    case 10:
      return !(a <= b);
    case 11:
      return !(a < b);
    case 12:
      return a == a && b == b;
    default:
      return a != a || b != b;
  }
}

void setp(Warp& w, const Inst& i, u32 mask) {
  const bool bf = i.op & kBf16, packed = i.op & kPacked, ftz = (i.op & kFtz) && !bf;
  u32 low = 0, high = 0;
  const auto test = [&](u16 a, u16 b) {
    if (ftz) a = flush_f16(a), b = flush_f16(b);
    return compare(i.sub, widen(bf, a), widen(bf, b));
  };
  each_lane(mask, [&](int l) {
    if (packed) {
      const u32 a = w.reg<u32>(i.a)[l], b = w.reg<u32>(i.b)[l];
      low |= static_cast<u32>(test(static_cast<u16>(a), static_cast<u16>(b))) << l;
      high |= static_cast<u32>(test(static_cast<u16>(a >> 16), static_cast<u16>(b >> 16))) << l;
    } else {
      low |= static_cast<u32>(test(w.reg<u16>(i.a)[l], w.reg<u16>(i.b)[l])) << l;
    }
  });
  if (!packed) high = ~low;
  const i64 combine = i.imm & 3;
  if (combine != 0) {
    const u32 c = w.pred(i.c) ^ (i.imm & 4 ? kFullMask : 0);
    low = combine == 1 ? low & c : combine == 2 ? low | c : low ^ c;
    high = combine == 1 ? high & c : combine == 2 ? high | c : high ^ c;
  }
  set_pred(w, i.d, mask, low);
  set_pred(w, i.e, mask, high);
}

void bind_setp(Decoder& d, Inst& i) {
  static constexpr const char* kNames[] = {"eq",  "ne",  "lt",  "le",  "gt",  "ge",  "equ",
                                           "neu", "ltu", "leu", "gtu", "geu", "num", "nan"};
  const Type t = d.type();
  const bool packed = t == Type::F16x2 || t == Type::BF16x2;
  i.imm = d.has("and") ? 1 : d.has("or") ? 2 : d.has("xor") ? 3 : 0;
  d.arity(i.imm != 0 ? 4 : 3);
  i.d = d.dst(d.operand(0), 0);
  i.e = d.second_dst(0, 0);
  i.a = d.src(1, packed ? 4 : 2);
  i.b = d.src(2, packed ? 4 : 2);
  if (i.imm != 0) {
    i.c = d.src(3, 0);
    if (d.operand(3).negated) i.imm |= 4;
  }
  while (d.in().modifiers[0] != kNames[i.sub]) {
    if (++i.sub == 14) d.fail("unsupported comparison");
  }
  i.op = static_cast<u8>((t == Type::BF16 || t == Type::BF16x2 ? kBf16 : 0) |
                         (packed ? kPacked : 0) | (d.has("ftz") ? kFtz : 0));
  i.fn = setp;
}

#define DSK_F16 "f16|f16x2"
#define DSK_BF16 "bf16|bf16x2"
#define DSK_HALF DSK_F16 "|" DSK_BF16
constexpr Entry kEntries[] = {
    {"add.rn?.ftz?.sat?." DSK_F16, bind<kAdd, 2>, "half addition"},
    {"sub.rn?.ftz?.sat?." DSK_F16, bind<kSub, 2>, "half subtraction"},
    {"mul.rn?.ftz?.sat?." DSK_F16, bind<kMul, 2>, "half product"},
    {"add.rn?." DSK_BF16, bind<kAdd, 2>, "bfloat addition", 90},
    {"sub.rn?." DSK_BF16, bind<kSub, 2>, "bfloat subtraction", 90},
    {"mul.rn?." DSK_BF16, bind<kMul, 2>, "bfloat product", 90},
    {"fma.rn.ftz?.sat?." DSK_F16, bind<kFma, 3>, "half a * b + c, rounded once"},
    {"fma.rn.ftz?.relu." DSK_F16, bind<kFma, 3>, "the same, at least 0", 80},
    {"fma.rn.relu?." DSK_BF16, bind<kFma, 3>, "bfloat a * b + c, rounded once", 80},
    {"min.ftz?.NaN?.xorsign?.abs?." DSK_F16, bind<kMin, 2>, "smaller half", 80},
    {"max.ftz?.NaN?.xorsign?.abs?." DSK_F16, bind<kMax, 2>, "larger half", 80},
    {"min.NaN?.xorsign?.abs?." DSK_BF16, bind<kMin, 2>, "smaller bfloat", 80},
    {"max.NaN?.xorsign?.abs?." DSK_BF16, bind<kMax, 2>, "larger bfloat", 80},
    {"neg.ftz?." DSK_HALF, bind<kNeg, 1>, "-a"},
    {"abs.ftz?." DSK_HALF, bind<kAbs, 1>, "|a|"},
    {"ex2.approx.ftz?." DSK_HALF, bind<kEx2, 1>, "2 to the a", 75},
    {"tanh.approx." DSK_HALF, bind<kTanh, 1>, "tanh", 75},
    {"setp.{cmp}.ftz?." DSK_HALF, bind_setp, "half comparison; pairs set two predicates"},
    {"setp.{cmp}.and|or|xor.ftz?." DSK_HALF, bind_setp, "the same, combined"},
};

}  // namespace

std::span<const Entry> half_entries() { return kEntries; }

}  // namespace dsk::emu
