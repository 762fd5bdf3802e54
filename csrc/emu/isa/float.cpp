// Floating-point arithmetic in f32 and f64, and the packed halves.
#include <cfenv>

#include "emu/isa/approx_mode.hpp"
#include "emu/isa/lane.hpp"
#include "emu/num/approx.hpp"
#include "emu/num/convert.hpp"

namespace dsk::emu::DSK_EMU_LEVEL {
namespace {

// Inst::op of float instructions.
constexpr u8 kFtz = 1, kSat = 2, kRelu = 4, kNanWins = 8, kXorSign = 16;
// Inst::sub: rounding, in the order of this list.
constexpr int kRounding[] = {FE_TONEAREST, FE_TOWARDZERO, FE_DOWNWARD, FE_UPWARD};

// The canonical NaN that every arithmetic result is replaced by.
DSK_LANE_INLINE float canonical(float r) { return r != r ? std::bit_cast<float>(0x7fffffffu) : r; }
DSK_LANE_INLINE double canonical(double r) {
  return r != r ? std::bit_cast<double>(0x7fffffffffffffffull) : r;
}
DSK_LANE_INLINE float flush(float x) {
  return std::fabs(x) < 1.17549435e-38f ? std::copysign(0.0f, x) : x;
}
DSK_LANE_INLINE double flush(double x) { return x; }
template <class T>
DSK_LANE_INLINE T saturate(T x) {
  return x > T(0) ? (x < T(1) ? x : T(1)) : T(0);  // NaN gives +0
}

DSK_LANE_INLINE float fused(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
DSK_LANE_INLINE double fused(double a, double b, double c) { return __builtin_fma(a, b, c); }

struct Add {
  template <class T>
  static T f(T a, T b, T) {
    return a + b;
  }
};
struct Sub {
  template <class T>
  static T f(T a, T b, T) {
    return a - b;
  }
};
struct Mul {
  template <class T>
  static T f(T a, T b, T) {
    return a * b;
  }
};
struct Div {
  template <class T>
  static T f(T a, T b, T) {
    return a / b;
  }
};
struct Fma {
  template <class T>
  static T f(T a, T b, T c) {
    return fused(a, b, c);
  }
};
struct Rcp {
  template <class T>
  static T f(T a, T, T) {
    return T(1) / a;
  }
};
struct Sqrt {
  template <class T>
  static T f(T a, T, T) {
    return std::sqrt(a);
  }
};

template <class T>
struct Sources {
  const T *a, *b, *c;
  Sources(Warp& w, const Inst& i)
      : a(w.reg<T>(i.a)),
        b(i.b == kNoReg ? a : w.reg<T>(i.b)),
        c(i.c == kNoReg ? a : w.reg<T>(i.c)) {}
};

template <class Op, class T>
void nearest(Warp& w, const Inst& i, u32 mask) {
  const Sources<T> s(w, i);
  map_lanes(w.reg<T>(i.d), mask,
            [&](int l) { return canonical(Op::template f<T>(s.a[l], s.b[l], s.c[l])); });
}
template <class Op, class T>
void nearest_ftz(Warp& w, const Inst& i, u32 mask) {
  const Sources<T> s(w, i);
  map_lanes(w.reg<T>(i.d), mask, [&](int l) {
    return flush(canonical(Op::template f<T>(flush(s.a[l]), flush(s.b[l]), flush(s.c[l]))));
  });
}

// Directed rounding and saturation: rare, so one slow path. The volatile operands keep the compiler
// from moving the arithmetic out from between the two changes of rounding mode.
template <class Op, class T>
void directed(Warp& w, const Inst& i, u32 mask) {
  const Sources<T> s(w, i);
  T* d = w.reg<T>(i.d);
  const int saved = std::fegetround();
  std::fesetround(kRounding[i.sub]);
  for (u32 m = mask; m != 0; m &= m - 1) {
    const int l = std::countr_zero(m);
    const bool ftz = i.op & kFtz;
    volatile T a = ftz ? flush(s.a[l]) : s.a[l];
    volatile T b = ftz ? flush(s.b[l]) : s.b[l];
    volatile T c = ftz ? flush(s.c[l]) : s.c[l];
    volatile T r = Op::template f<T>(a, b, c);
    T result = canonical(static_cast<T>(r));
    if (ftz) result = flush(result);
    d[l] = i.op & kSat ? saturate(result) : result;
  }
  std::fesetround(saved);
}

u8 rounding(const Decoder& d) { return d.has("rz") ? 1 : d.has("rm") ? 2 : d.has("rp") ? 3 : 0; }

template <class Op, int Sources>
void bind_arith(Decoder& d, Inst& i) {
  const bool single = d.type() == Type::F32;
  bind_same(d, i, single ? 4 : 8, Sources);
  i.sub = rounding(d);
  i.op = static_cast<u8>((d.has("ftz") ? kFtz : 0) | (d.has("sat") ? kSat : 0));
  if (i.sub != 0 || (i.op & kSat)) {
    i.fn = single ? directed<Op, float> : directed<Op, double>;
  } else if (i.op & kFtz) {
    i.fn = nearest_ftz<Op, float>;
  } else {
    i.fn = single ? nearest<Op, float> : nearest<Op, double>;
  }
}

// --- sign, minimum, maximum
template <class T, bool Ftz>
void negate(Warp& w, const Inst& i, u32 mask) {
  const T* a = w.reg<T>(i.a);
  map_lanes(w.reg<T>(i.d), mask, [&](int l) { return Ftz ? -flush(a[l]) : -a[l]; });
}
template <class T, bool Ftz>
void absolute(Warp& w, const Inst& i, u32 mask) {
  const T* a = w.reg<T>(i.a);
  map_lanes(w.reg<T>(i.d), mask, [&](int l) { return std::fabs(Ftz ? flush(a[l]) : a[l]); });
}
void bind_neg(Decoder& d, Inst& i) {
  const bool single = d.type() == Type::F32;
  bind_same(d, i, single ? 4 : 8, 1);
  i.fn = !single        ? negate<double, false>
         : d.has("ftz") ? negate<float, true>
                        : negate<float, false>;
}
void bind_abs(Decoder& d, Inst& i) {
  const bool single = d.type() == Type::F32;
  bind_same(d, i, single ? 4 : 8, 1);
  i.fn = !single        ? absolute<double, false>
         : d.has("ftz") ? absolute<float, true>
                        : absolute<float, false>;
}

// A NaN loses against a number unless .NaN; -0 is less than +0.
template <bool IsMax, class T>
DSK_LANE_INLINE T pick_extreme(T a, T b) {
  const T zeros = IsMax ? (std::signbit(a) ? b : a) : (std::signbit(a) ? a : b);
  const T ordered = IsMax ? (a > b ? a : b) : (a < b ? a : b);
  const T number = a == b ? zeros : ordered;
  return a != a ? (b != b ? canonical(a) : b) : (b != b ? a : number);
}
template <bool IsMax, class T>
void extreme(Warp& w, const Inst& i, u32 mask) {
  const T *a = w.reg<T>(i.a), *b = w.reg<T>(i.b);
  map_lanes(w.reg<T>(i.d), mask, [&](int l) { return pick_extreme<IsMax>(a[l], b[l]); });
}
template <bool IsMax>
void extreme_modified(Warp& w, const Inst& i, u32 mask) {
  const float *a = w.reg<float>(i.a), *b = w.reg<float>(i.b);
  const u8 op = i.op;
  map_lanes(w.reg<float>(i.d), mask, [&](int l) {
    float x = a[l], y = b[l];
    if (op & kFtz) x = flush(x), y = flush(y);
    const bool sign = (op & kXorSign) && (std::signbit(x) != std::signbit(y));
    if (op & kXorSign) x = std::fabs(x), y = std::fabs(y);
    if ((op & kNanWins) && (x != x || y != y)) return canonical(x + y);
    const float r = pick_extreme<IsMax>(x, y);
    return sign && r == r ? -r : r;
  });
}
template <bool IsMax>
void bind_extreme(Decoder& d, Inst& i) {
  const bool single = d.type() == Type::F32;
  bind_same(d, i, single ? 4 : 8, 2);
  i.op = static_cast<u8>((d.has("ftz") ? kFtz : 0) | (d.has("NaN") ? kNanWins : 0) |
                         (d.has("xorsign") ? kXorSign : 0));
  i.fn = !single     ? extreme<IsMax, double>
         : i.op != 0 ? extreme_modified<IsMax>
                     : extreme<IsMax, float>;
}

template <class T>
void copy_sign(Warp& w, const Inst& i, u32 mask) {
  const T *a = w.reg<T>(i.a), *b = w.reg<T>(i.b);
  map_lanes(w.reg<T>(i.d), mask, [&](int l) { return std::copysign(b[l], a[l]); });
}
void bind_copysign(Decoder& d, Inst& i) {
  bind_same(d, i, type_size(d.type()), 2);
  i.fn = d.type() == Type::F32 ? copy_sign<float> : copy_sign<double>;
}

template <class T>
void test_property(Warp& w, const Inst& i, u32 mask) {
  const T* a = w.reg<T>(i.a);
  u32 hit = 0;
  for (u32 m = mask; m != 0; m &= m - 1) {
    const int l = std::countr_zero(m);
    const int c = std::fpclassify(a[l]);
    bool yes = false;
    switch (i.op) {
      case 0:
        yes = c != FP_NAN && c != FP_INFINITE;
        break;
      case 1:
        yes = c == FP_INFINITE;
        break;
      case 2:
        yes = c != FP_NAN;
        break;
      case 3:
        yes = c == FP_NAN;
        break;
      case 4:
        yes = c == FP_NORMAL;
        break;
      default:
        yes = c == FP_SUBNORMAL;
        break;
    }
    hit |= static_cast<u32>(yes) << l;
  }
  write_pred(w, i.d, mask, hit);
}
void bind_testp(Decoder& d, Inst& i) {
  static constexpr const char* kNames[] = {"finite",     "infinite", "number",
                                           "notanumber", "normal",   "subnormal"};
  d.arity(2);
  i.d = d.dst(0, 0);
  i.a = d.src(1, type_size(d.type()));
  while (d.in().modifiers[0] != kNames[i.op]) ++i.op;
  i.fn = d.type() == Type::F32 ? test_property<float> : test_property<double>;
}

// --- approximations: the arrays come from num/approx, within the documented error
template <num::ApproxFn Fn>
void approximate(Warp& w, const Inst& i, u32 mask) {
  const float* a = w.reg<float>(i.a);
  float* d = w.reg<float>(i.d);
  const num::ApproxCtx context = approx_context(w);
  if (mask == kFullMask) {
    alignas(64) float r[kLanes];
    num::approx_f32(Fn, a, r, kLanes, i.op & kFtz, context);
    std::memcpy(d, r, sizeof r);
    return;
  }
  for (u32 m = mask; m != 0; m &= m - 1) {
    const int l = std::countr_zero(m);
    d[l] = num::approx_f32(Fn, a[l], i.op & kFtz, context);
  }
}
template <num::ApproxFn Fn>
void bind_approx(Decoder& d, Inst& i) {
  bind_same(d, i, 4, 1);
  i.op = d.has("ftz") ? kFtz : 0;
  i.fn = approximate<Fn>;
}
template <bool Full>
void divide_approx(Warp& w, const Inst& i, u32 mask) {
  const float *a = w.reg<float>(i.a), *b = w.reg<float>(i.b);
  float* d = w.reg<float>(i.d);
  const num::ApproxCtx context = approx_context(w);
  for (u32 m = mask; m != 0; m &= m - 1) {
    const int l = std::countr_zero(m);
    d[l] = Full ? num::full_div(a[l], b[l], i.op & kFtz, context)
                : num::approx_div(a[l], b[l], i.op & kFtz, context);
  }
}
void bind_div_approx(Decoder& d, Inst& i) {
  bind_same(d, i, 4, 2);
  i.op = d.has("ftz") ? kFtz : 0;
  i.fn = d.has("full") ? divide_approx<true> : divide_approx<false>;
}
template <double (*F)(double)>
void approximate_f64(Warp& w, const Inst& i, u32 mask) {
  const double* a = w.reg<double>(i.a);
  map_lanes(w.reg<double>(i.d), mask, [&](int l) { return F(a[l]); });
}
void bind_approx_f64(Decoder& d, Inst& i) {
  bind_same(d, i, 8, 1);
  i.fn = d.in().opcode == "rcp" ? approximate_f64<num::approx_rcp_f64>
                                : approximate_f64<num::approx_rsqrt_f64>;
}
void rsqrt_f64(Warp& w, const Inst& i, u32 mask) {
  const double* a = w.reg<double>(i.a);
  map_lanes(w.reg<double>(i.d), mask, [&](int l) { return canonical(1.0 / std::sqrt(a[l])); });
}
void bind_rsqrt_f64(Decoder& d, Inst& i) {
  bind_same(d, i, 8, 1);
  i.fn = rsqrt_f64;
}

constexpr Entry kEntries[] = {
    {"add.rn|rz|rm|rp?.ftz?.sat?.f32", bind_arith<Add, 2>, "a + b"},
    {"add.rn|rz|rm|rp?.f64", bind_arith<Add, 2>, "a + b"},
    {"sub.rn|rz|rm|rp?.ftz?.sat?.f32", bind_arith<Sub, 2>, "a - b"},
    {"sub.rn|rz|rm|rp?.f64", bind_arith<Sub, 2>, "a - b"},
    {"mul.rn|rz|rm|rp?.ftz?.sat?.f32", bind_arith<Mul, 2>, "a * b"},
    {"mul.rn|rz|rm|rp?.f64", bind_arith<Mul, 2>, "a * b"},
    {"fma.rn|rz|rm|rp.ftz?.sat?.f32", bind_arith<Fma, 3>, "a * b + c, rounded once"},
    {"fma.rn|rz|rm|rp.f64", bind_arith<Fma, 3>, "a * b + c, rounded once"},
    {"mad.rn|rz|rm|rp.ftz?.sat?.f32", bind_arith<Fma, 3>, "the same as fma"},
    {"mad.rn|rz|rm|rp.f64", bind_arith<Fma, 3>, "the same as fma"},
    {"div.rn|rz|rm|rp.ftz?.f32", bind_arith<Div, 2>, "a / b, correctly rounded"},
    {"div.rn|rz|rm|rp.f64", bind_arith<Div, 2>, "a / b, correctly rounded"},
    {"div.approx|full.ftz?.f32", bind_div_approx, "a / b within 2 ulp"},
    {"rcp.rn|rz|rm|rp.ftz?.f32", bind_arith<Rcp, 1>, "1 / a, correctly rounded"},
    {"rcp.rn|rz|rm|rp.f64", bind_arith<Rcp, 1>, "1 / a, correctly rounded"},
    {"rcp.approx.ftz?.f32", bind_approx<num::ApproxFn::rcp>, "1 / a within 1 ulp"},
    {"rcp.approx.ftz.f64", bind_approx_f64, "1 / a, upper 32 bits"},
    {"sqrt.rn|rz|rm|rp.ftz?.f32", bind_arith<Sqrt, 1>, "square root, correctly rounded"},
    {"sqrt.rn|rz|rm|rp.f64", bind_arith<Sqrt, 1>, "square root, correctly rounded"},
    {"sqrt.approx.ftz?.f32", bind_approx<num::ApproxFn::sqrt>, "square root, approximate"},
    {"rsqrt.approx.ftz?.f32", bind_approx<num::ApproxFn::rsqrt>, "1 / sqrt(a), approximate"},
    {"rsqrt.approx.f64", bind_rsqrt_f64, "1 / sqrt(a)"},
    {"rsqrt.approx.ftz.f64", bind_approx_f64, "1 / sqrt(a), upper 32 bits"},
    {"ex2.approx.ftz?.f32", bind_approx<num::ApproxFn::ex2>, "2 to the a, approximate"},
    {"lg2.approx.ftz?.f32", bind_approx<num::ApproxFn::lg2>, "log2 a, approximate"},
    {"sin.approx.ftz?.f32", bind_approx<num::ApproxFn::sin>, "sine, approximate"},
    {"cos.approx.ftz?.f32", bind_approx<num::ApproxFn::cos>, "cosine, approximate"},
    {"tanh.approx.f32", bind_approx<num::ApproxFn::tanh>, "tanh, approximate", 75},
    {"neg.ftz?.f32", bind_neg, "-a"},
    {"neg.f64", bind_neg, "-a"},
    {"abs.ftz?.f32", bind_abs, "|a|"},
    {"abs.f64", bind_abs, "|a|"},
    {"min.ftz?.NaN?.f32", bind_extreme<false>, "smaller of a, b"},
    {"max.ftz?.NaN?.f32", bind_extreme<true>, "larger of a, b"},
    {"min.ftz?.NaN?.xorsign.abs.f32", bind_extreme<false>, "smaller magnitude, xor of signs", 86},
    {"max.ftz?.NaN?.xorsign.abs.f32", bind_extreme<true>, "larger magnitude, xor of signs", 86},
    {"min.f64", bind_extreme<false>, "smaller of a, b"},
    {"max.f64", bind_extreme<true>, "larger of a, b"},
    {"copysign.f32|f64", bind_copysign, "b with the sign of a"},
    {"testp.finite|infinite|number|notanumber|normal|subnormal.f32|f64", bind_testp,
     "classifies a"},
};

}  // namespace

std::span<const Entry> float_entries() { return kEntries; }

}  // namespace dsk::emu::DSK_EMU_LEVEL
