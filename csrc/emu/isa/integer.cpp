// Integer arithmetic.
#include "emu/isa/lane.hpp"

namespace dsk::emu::DSK_EMU_LEVEL {
namespace {

template <class T>
using Wide = std::conditional_t<
    sizeof(T) == 2, std::conditional_t<std::is_signed_v<T>, i32, u32>,
    std::conditional_t<sizeof(T) == 4, std::conditional_t<std::is_signed_v<T>, i64, u64>,
                       std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>>>;
template <class T>
using Bits = std::make_unsigned_t<T>;

// Products of u16 would be computed in (signed) int and overflow: widen first.
struct Add {
  template <class T>
  static T f(T a, T b) {
    return static_cast<T>(a + b);
  }
};
struct Sub {
  template <class T>
  static T f(T a, T b) {
    return static_cast<T>(a - b);
  }
};
struct Mul {
  template <class T>
  static T f(T a, T b) {
    return static_cast<T>(u64{a} * u64{b});
  }
};
struct MulHi {
  template <class T>
  static T f(T a, T b) {
    return static_cast<T>((Wide<T>(a) * Wide<T>(b)) >> (8 * sizeof(T)));
  }
};
struct MadLo {
  template <class T>
  static T f(T a, T b, T c) {
    return static_cast<T>(u64{a} * u64{b} + u64{c});
  }
};
struct MadHi {
  template <class T>
  static T f(T a, T b, T c) {
    return static_cast<T>(static_cast<Bits<T>>(MulHi::f<T>(a, b)) + static_cast<Bits<T>>(c));
  }
};
struct AddSat {
  template <class T>
  static T f(T a, T b) {
    const i64 s = i64{a} + i64{b};
    return s > 2147483647 ? 2147483647 : s < -2147483648ll ? -2147483648ll : static_cast<T>(s);
  }
};
struct SubSat {
  template <class T>
  static T f(T a, T b) {
    const i64 s = i64{a} - i64{b};
    return s > 2147483647 ? 2147483647 : s < -2147483648ll ? -2147483648ll : static_cast<T>(s);
  }
};
struct MadHiSat {
  template <class T>
  static T f(T a, T b, T c) {
    return AddSat::f<T>(MulHi::f<T>(a, b), c);
  }
};
// Division by zero and the overflowing quotient are unspecified in PTX; the machine gives all ones
// and the wrapped quotient, and must not trap itself.
struct Div {
  template <class T>
  static T f(T a, T b) {
    if (b == 0) return static_cast<T>(-1);
    if (std::is_signed_v<T> && b == static_cast<T>(-1)) {
      return static_cast<T>(Bits<T>(0) - static_cast<Bits<T>>(a));
    }
    return static_cast<T>(a / b);
  }
};
struct Rem {
  template <class T>
  static T f(T a, T b) {
    if (b == 0) return a;
    if (std::is_signed_v<T> && b == static_cast<T>(-1)) return 0;
    return static_cast<T>(a % b);
  }
};
struct Min {
  template <class T>
  static T f(T a, T b) {
    return a < b ? a : b;
  }
};
struct Max {
  template <class T>
  static T f(T a, T b) {
    return a > b ? a : b;
  }
};
struct MinRelu {
  template <class T>
  static T f(T a, T b) {
    return Max::f<T>(Min::f<T>(a, b), 0);
  }
};
struct MaxRelu {
  template <class T>
  static T f(T a, T b) {
    return Max::f<T>(Max::f<T>(a, b), 0);
  }
};
struct Neg {
  template <class T>
  static T f(T a) {
    return static_cast<T>(Bits<T>(0) - static_cast<Bits<T>>(a));
  }
};
struct Abs {
  template <class T>
  static T f(T a) {
    return a < 0 ? Neg::f<T>(a) : a;
  }
};
struct Sad {
  template <class T>
  static T f(T a, T b, T c) {
    const Bits<T> diff = a < b ? static_cast<Bits<T>>(b) - static_cast<Bits<T>>(a)
                               : static_cast<Bits<T>>(a) - static_cast<Bits<T>>(b);
    return static_cast<T>(static_cast<Bits<T>>(c) + diff);
  }
};

template <class T>
struct MulWide {
  static void run(Warp& w, const Inst& i, u32 mask) {
    const T* a = w.reg<T>(i.a);
    const T* b = w.reg<T>(i.b);
    map_lanes(w.reg<Wide<T>>(i.d), mask, [&](int l) { return Wide<T>(a[l]) * Wide<T>(b[l]); });
  }
};
template <class T>
struct MadWide {
  static void run(Warp& w, const Inst& i, u32 mask) {
    using U = std::make_unsigned_t<Wide<T>>;
    const T* a = w.reg<T>(i.a);
    const T* b = w.reg<T>(i.b);
    const U* c = w.reg<U>(i.c);
    map_lanes(w.reg<U>(i.d), mask,
              [&](int l) { return static_cast<U>(Wide<T>(a[l]) * Wide<T>(b[l])) + c[l]; });
  }
};

Handler pick_wide(Type t, bool mad) {
  switch (t) {
    case Type::S16:
      return mad ? MadWide<i16>::run : MulWide<i16>::run;
    case Type::U16:
      return mad ? MadWide<u16>::run : MulWide<u16>::run;
    case Type::S32:
      return mad ? MadWide<i32>::run : MulWide<i32>::run;
    case Type::U32:
      return mad ? MadWide<u32>::run : MulWide<u32>::run;
    default:
      return nullptr;
  }
}

// add.cc, addc, sub.cc, subc, mad.cc, madc: the carry is one bit per lane. sub leaves a borrow.
template <class T>
struct AddCarry {
  static void run(Warp& w, const Inst& i, u32 mask) {
    const T* a = w.reg<T>(i.a);
    const T* b = w.reg<T>(i.b);
    T* d = w.reg<T>(i.d);
    const bool subtract = i.op & 1, carry_in = i.op & 2, carry_out = i.op & 4;
    u32 carry = 0;
    for (u32 m = mask; m != 0; m &= m - 1) {
      const int l = std::countr_zero(m);
      const T in = carry_in ? w.carry >> l & 1 : 0;
      T r;
      bool out;
      if (subtract) {
        out = __builtin_sub_overflow(a[l], b[l], &r);
        out |= __builtin_sub_overflow(r, in, &r);
      } else {
        out = __builtin_add_overflow(a[l], b[l], &r);
        out |= __builtin_add_overflow(r, in, &r);
      }
      d[l] = r;
      carry |= static_cast<u32>(out) << l;
    }
    if (carry_out) w.carry = (w.carry & ~mask) | carry;
  }
};
template <class T>
struct MadCarry {
  static void run(Warp& w, const Inst& i, u32 mask) {
    using W = Wide<T>;
    const T* a = w.reg<T>(i.a);
    const T* b = w.reg<T>(i.b);
    const T* c = w.reg<T>(i.c);
    T* d = w.reg<T>(i.d);
    const bool high = i.op & 1, carry_in = i.op & 2, carry_out = i.op & 4;
    u32 carry = 0;
    for (u32 m = mask; m != 0; m &= m - 1) {
      const int l = std::countr_zero(m);
      const W product = W(a[l]) * W(b[l]);
      const T part = static_cast<T>(high ? product >> (8 * sizeof(T)) : product);
      const T in = carry_in ? w.carry >> l & 1 : 0;
      std::make_unsigned_t<T> r;
      bool out = __builtin_add_overflow(static_cast<std::make_unsigned_t<T>>(part),
                                        static_cast<std::make_unsigned_t<T>>(c[l]), &r);
      out |= __builtin_add_overflow(r, static_cast<std::make_unsigned_t<T>>(in), &r);
      d[l] = static_cast<T>(r);
      carry |= static_cast<u32>(out) << l;
    }
    if (carry_out) w.carry = (w.carry & ~mask) | carry;
  }
};

// Two 16-bit halves of a 32-bit register.
template <class Op, class T>
void packed16(Warp& w, const Inst& i, u32 mask) {
  const u32* a = w.reg<u32>(i.a);
  const u32* b = w.reg<u32>(i.b);
  map_lanes(w.reg<u32>(i.d), mask, [&](int l) {
    const T lo = Op::template f<T>(static_cast<T>(a[l]), static_cast<T>(b[l]));
    const T hi = Op::template f<T>(static_cast<T>(a[l] >> 16), static_cast<T>(b[l] >> 16));
    return u32{static_cast<u16>(lo)} | u32{static_cast<u16>(hi)} << 16;
  });
}

template <class Op>
void bind_binary(Decoder& d, Inst& i) {
  bind_same(d, i, type_size(d.type()), 2);
  use(d, i, pick_int<Binary<Op>::template On>(d.type()));
}
template <class Op>
void bind_binary_bits(Decoder& d, Inst& i) {
  bind_same(d, i, type_size(d.type()), 2);
  use(d, i, pick_bits<Binary<Op>::template On>(d.type()));
}
template <class Op>
void bind_unary(Decoder& d, Inst& i) {
  bind_same(d, i, type_size(d.type()), 1);
  use(d, i, pick_int<Unary<Op>::template On>(d.type()));
}
template <class Op>
void bind_packed(Decoder& d, Inst& i) {
  bind_same(d, i, 4, 2);
  i.fn = d.has("s16x2") ? packed16<Op, i16> : packed16<Op, u16>;
}
template <class Op>
void bind_saturating(Decoder& d, Inst& i) {
  bind_same(d, i, 4, 2);
  i.fn = Binary<Op>::template On<i32>::run;
}

void bind_mul_wide(Decoder& d, Inst& i) {
  const int bytes = type_size(d.type());
  d.arity(3);
  i.d = d.dst(0, 2 * bytes);
  i.a = d.src(1, bytes);
  i.b = d.src(2, bytes);
  use(d, i, pick_wide(d.type(), false));
}
void bind_mad_wide(Decoder& d, Inst& i) {
  const int bytes = type_size(d.type());
  d.arity(4);
  i.d = d.dst(0, 2 * bytes);
  i.a = d.src(1, bytes);
  i.b = d.src(2, bytes);
  i.c = d.src(3, 2 * bytes);
  use(d, i, pick_wide(d.type(), true));
}
void bind_mad_lo(Decoder& d, Inst& i) {
  bind_same(d, i, type_size(d.type()), 3);
  use(d, i, pick_bits<Ternary<MadLo>::On>(d.type()));
}
void bind_mad_hi(Decoder& d, Inst& i) {
  bind_same(d, i, type_size(d.type()), 3);
  use(d, i,
      d.has("sat") ? Ternary<MadHiSat>::On<i32>::run : pick_int<Ternary<MadHi>::On>(d.type()));
}
void bind_sad(Decoder& d, Inst& i) {
  bind_same(d, i, type_size(d.type()), 3);
  use(d, i, pick_int<Ternary<Sad>::On>(d.type()));
}

void bind_carry(Decoder& d, Inst& i) {
  const std::string& op = d.in().opcode;
  bind_same(d, i, type_size(d.type()), 2);
  const bool subtract = op[0] == 's', carry_in = op.back() == 'c';
  i.op = static_cast<u8>(subtract | carry_in << 1 | (d.has("cc") ? 4 : 0));
  i.fn = type_size(d.type()) == 4 ? AddCarry<u32>::run : AddCarry<u64>::run;
}
void bind_mad_carry(Decoder& d, Inst& i) {
  bind_same(d, i, type_size(d.type()), 3);
  i.op = static_cast<u8>(d.has("hi") | (d.in().opcode == "madc" ? 2 : 0) | (d.has("cc") ? 4 : 0));
  use(d, i, pick_int<MadCarry>(d.type()));
}

template <bool Signed>
void mul24(Warp& w, const Inst& i, u32 mask) {
  const u32* a = w.reg<u32>(i.a);
  const u32* b = w.reg<u32>(i.b);
  const u32* c = i.c == kNoReg ? nullptr : w.reg<u32>(i.c);
  map_lanes(w.reg<u32>(i.d), mask, [&](int l) {
    u64 product;
    if (Signed) {
      product = static_cast<u64>(i64{static_cast<i32>(a[l] << 8) >> 8} *
                                 i64{static_cast<i32>(b[l] << 8) >> 8});
    } else {
      product = u64{a[l] & 0xffffff} * u64{b[l] & 0xffffff};
    }
    const u32 part = static_cast<u32>(i.op ? product >> 16 : product);
    return part + (c == nullptr ? 0 : c[l]);
  });
}
void bind_mul24(Decoder& d, Inst& i) {
  bind_same(d, i, 4, d.in().opcode == "mad24" ? 3 : 2);
  i.op = d.has("hi");
  i.fn = d.type() == Type::S32 ? mul24<true> : mul24<false>;
}

// dp4a/dp2a: signs of a and b are independent.
i32 extend8(u32 v, int k, bool is_signed) {
  const u8 byte = static_cast<u8>(v >> (8 * k));
  return is_signed ? static_cast<i8>(byte) : byte;
}
i32 extend16(u32 v, int k, bool is_signed) {
  const u16 half = static_cast<u16>(v >> (16 * k));
  return is_signed ? static_cast<i16>(half) : half;
}
void dot4(Warp& w, const Inst& i, u32 mask) {
  const u32 *a = w.reg<u32>(i.a), *b = w.reg<u32>(i.b), *c = w.reg<u32>(i.c);
  map_lanes(w.reg<u32>(i.d), mask, [&](int l) {
    u32 sum = c[l];
    for (int k = 0; k < 4; ++k) {
      sum += static_cast<u32>(extend8(a[l], k, i.op & 1) * extend8(b[l], k, i.op & 2));
    }
    return sum;
  });
}
void dot2(Warp& w, const Inst& i, u32 mask) {
  const u32 *a = w.reg<u32>(i.a), *b = w.reg<u32>(i.b), *c = w.reg<u32>(i.c);
  const int first = i.op & 4 ? 2 : 0;
  map_lanes(w.reg<u32>(i.d), mask, [&](int l) {
    u32 sum = c[l];
    for (int k = 0; k < 2; ++k) {
      sum += static_cast<u32>(extend16(a[l], k, i.op & 1) * extend8(b[l], first + k, i.op & 2));
    }
    return sum;
  });
}
void bind_dot(Decoder& d, Inst& i) {
  bind_same(d, i, 4, 3);
  i.op = static_cast<u8>((d.type(0) == Type::S32) | (d.type(1) == Type::S32) << 1 |
                         (d.has("hi") ? 4 : 0));
  i.fn = d.in().opcode == "dp4a" ? dot4 : dot2;
}

constexpr Entry kEntries[] = {
    {"add.s16|u16|s32|u32|s64|u64", bind_binary_bits<Add>, "d = a + b, wrapping"},
    {"sub.s16|u16|s32|u32|s64|u64", bind_binary_bits<Sub>, "d = a - b, wrapping"},
    {"add.sat.s32", bind_saturating<AddSat>, "d = a + b, clamped"},
    {"sub.sat.s32", bind_saturating<SubSat>, "d = a - b, clamped"},
    {"add.u16x2|s16x2", bind_packed<Add>, "two 16-bit sums", 90},
    {"min.u16x2|s16x2", bind_packed<Min>, "two 16-bit minima", 90},
    {"max.u16x2|s16x2", bind_packed<Max>, "two 16-bit maxima", 90},
    {"min.relu.s16x2", bind_packed<MinRelu>, "two 16-bit minima, at least 0", 90},
    {"max.relu.s16x2", bind_packed<MaxRelu>, "two 16-bit maxima, at least 0", 90},
    {"min.relu.s32", bind_saturating<MinRelu>, "max(min(a, b), 0)", 90},
    {"max.relu.s32", bind_saturating<MaxRelu>, "max(max(a, b), 0)", 90},
    {"add.cc.s32|u32|s64|u64", bind_carry, "d = a + b, carry out"},
    {"addc.cc?.s32|u32|s64|u64", bind_carry, "d = a + b + carry"},
    {"sub.cc.s32|u32|s64|u64", bind_carry, "d = a - b, borrow out"},
    {"subc.cc?.s32|u32|s64|u64", bind_carry, "d = a - b - borrow"},
    {"mad.lo|hi.cc.s32|u32|s64|u64", bind_mad_carry, "half of a * b, plus c, carry out"},
    {"madc.lo|hi.cc?.s32|u32|s64|u64", bind_mad_carry, "half of a * b, plus c, plus carry"},
    {"mul.lo.s16|u16|s32|u32|s64|u64", bind_binary_bits<Mul>, "low half of a * b"},
    {"mul.hi.s16|u16|s32|u32|s64|u64", bind_binary<MulHi>, "high half of a * b"},
    {"mul.wide.s16|u16|s32|u32", bind_mul_wide, "a * b in twice the width"},
    {"mad.lo.s16|u16|s32|u32|s64|u64", bind_mad_lo, "low half of a * b, plus c"},
    {"mad.hi.sat?.s16|u16|s32|u32|s64|u64", bind_mad_hi, "high half of a * b, plus c"},
    {"mad.wide.s16|u16|s32|u32", bind_mad_wide, "a * b + c in twice the width"},
    {"mul24.lo|hi.s32|u32", bind_mul24, "product of the low 24 bits"},
    {"mad24.lo|hi.s32|u32", bind_mul24, "product of the low 24 bits, plus c"},
    {"div.s16|u16|s32|u32|s64|u64", bind_binary<Div>, "quotient, truncated"},
    {"rem.s16|u16|s32|u32|s64|u64", bind_binary<Rem>, "remainder, sign of a"},
    {"min.s16|u16|s32|u32|s64|u64", bind_binary<Min>, "smaller of a, b"},
    {"max.s16|u16|s32|u32|s64|u64", bind_binary<Max>, "larger of a, b"},
    {"neg.s16|s32|s64", bind_unary<Neg>, "-a, wrapping"},
    {"abs.s16|s32|s64", bind_unary<Abs>, "|a|, wrapping"},
    {"sad.s16|u16|s32|u32|s64|u64", bind_sad, "c + |a - b|"},
    {"dp4a.s32|u32.s32|u32", bind_dot, "c + dot of four bytes", 61},
    {"dp2a.lo|hi.s32|u32.s32|u32", bind_dot, "c + dot of two halves with two bytes", 61},
};

}  // namespace

std::span<const Entry> integer_entries() { return kEntries; }

}  // namespace dsk::emu::DSK_EMU_LEVEL
