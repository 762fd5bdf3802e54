// Moves, selection, bit logic, shifts and bit fields.
#include "emu/isa/lane.hpp"

namespace dsk::emu::DSK_EMU_LEVEL {
namespace {

template <class T>
using Bits = std::make_unsigned_t<T>;

struct And {
  template <class T>
  static T f(T a, T b) {
    return static_cast<T>(a & b);
  }
};
struct Or {
  template <class T>
  static T f(T a, T b) {
    return static_cast<T>(a | b);
  }
};
struct Xor {
  template <class T>
  static T f(T a, T b) {
    return static_cast<T>(a ^ b);
  }
};
struct Not {
  template <class T>
  static T f(T a) {
    return static_cast<T>(~a);
  }
};
struct Cnot {
  template <class T>
  static T f(T a) {
    return a == 0 ? 1 : 0;
  }
};
struct Copy {
  template <class T>
  static T f(T a) {
    return a;
  }
};
struct Brev {
  template <class T>
  static T f(T a) {
    u64 v = u64{a} << (64 - 8 * sizeof(T));
    v = (v >> 1 & 0x5555555555555555ull) | (v & 0x5555555555555555ull) << 1;
    v = (v >> 2 & 0x3333333333333333ull) | (v & 0x3333333333333333ull) << 2;
    v = (v >> 4 & 0x0f0f0f0f0f0f0f0full) | (v & 0x0f0f0f0f0f0f0f0full) << 4;
    return static_cast<T>(__builtin_bswap64(v));
  }
};

// Shift amounts are 32 bits whatever the type, and clamp.
template <class T>
struct Shl {
  static void run(Warp& w, const Inst& i, u32 mask) {
    const T* a = w.reg<T>(i.a);
    const u32* n = w.reg<u32>(i.b);
    map_lanes(w.reg<T>(i.d), mask, [&](int l) {
      const u32 s = n[l];
      return s >= 8 * sizeof(T) ? T(0) : static_cast<T>(Bits<T>(a[l]) << (s & (8 * sizeof(T) - 1)));
    });
  }
};
template <class T>
struct Shr {
  static void run(Warp& w, const Inst& i, u32 mask) {
    const T* a = w.reg<T>(i.a);
    const u32* n = w.reg<u32>(i.b);
    constexpr u32 kBits = 8 * sizeof(T);
    map_lanes(w.reg<T>(i.d), mask, [&](int l) {
      const u32 s = n[l];
      if (std::is_signed_v<T>) return static_cast<T>(a[l] >> (s >= kBits ? kBits - 1 : s));
      return s >= kBits ? T(0) : static_cast<T>(a[l] >> (s & (kBits - 1)));
    });
  }
};

template <bool Left, bool Wrap>
void shf(Warp& w, const Inst& i, u32 mask) {
  const u32 *a = w.reg<u32>(i.a), *b = w.reg<u32>(i.b), *c = w.reg<u32>(i.c);
  map_lanes(w.reg<u32>(i.d), mask, [&](int l) {
    const u32 n = Wrap ? c[l] & 31 : (c[l] > 32 ? 32 : c[l]);
    const u64 v = u64{b[l]} << 32 | a[l];
    return static_cast<u32>(Left ? (v << n) >> 32 : v >> n);
  });
}

void lop3(Warp& w, const Inst& i, u32 mask) {
  const u32 *a = w.reg<u32>(i.a), *b = w.reg<u32>(i.b), *c = w.reg<u32>(i.c);
  u32 term[8];  // all ones where the truth table has a one
  for (int k = 0; k < 8; ++k) term[k] = (i.imm >> k & 1) ? ~0u : 0u;
  map_lanes(w.reg<u32>(i.d), mask, [&](int l) {
    const u32 x = a[l], y = b[l], z = c[l];
    const u32 low =
        (~y & ((~z & term[0]) | (z & term[1]))) | (y & ((~z & term[2]) | (z & term[3])));
    const u32 high =
        (~y & ((~z & term[4]) | (z & term[5]))) | (y & ((~z & term[6]) | (z & term[7])));
    return (~x & low) | (x & high);
  });
}

// lop3.BoolOp: the predicate says whether the result, combined with q, is nonzero.
void lop3_bool(Warp& w, const Inst& i, u32 mask) {
  const Ext& x = *i.ext;
  const u32 q = w.pred(x.r[1]) ^ (x.v[0] ? kFullMask : 0);
  alignas(64) u32 scratch[kLanes];
  const u32 *a = w.reg<u32>(i.a), *b = w.reg<u32>(i.b), *c = w.reg<u32>(i.c);
  for (int l = 0; l < kLanes; ++l) {
    u32 r = 0;
    for (int bit = 0; bit < 8; ++bit) {
      if (i.imm >> bit & 1) {
        r |= (bit & 4 ? a[l] : ~a[l]) & (bit & 2 ? b[l] : ~b[l]) & (bit & 1 ? c[l] : ~c[l]);
      }
    }
    scratch[l] = r;
  }
  const u32 nonzero = mask_lanes(mask, [&](int l) { return scratch[l] != 0; });
  if (i.d != kNoReg) map_lanes(w.reg<u32>(i.d), mask, [&](int l) { return scratch[l]; });
  write_pred(w, x.r[0], mask, i.sub == 0 ? (nonzero | q) : (nonzero & q));
}

template <int Mode>  // 0 default, 1 f4e, 2 b4e, 3 rc8, 4 ecl, 5 ecr, 6 rc16
void prmt(Warp& w, const Inst& i, u32 mask) {
  const u32 *a = w.reg<u32>(i.a), *b = w.reg<u32>(i.b), *c = w.reg<u32>(i.c);
  map_lanes(w.reg<u32>(i.d), mask, [&](int l) {
    const u64 v = u64{b[l]} << 32 | a[l];
    const u32 sel = c[l];
    u32 r = 0;
    for (u32 k = 0; k < 4; ++k) {
      u32 n;
      const u32 s = sel & 3;
      switch (Mode) {
        case 0:
          n = sel >> (4 * k) & 15;
          break;
        case 1:
          n = s + k;
          break;
        case 2:
          n = (s + 8 - k) & 7;
          break;
        case 3:
          n = s;
          break;
        case 4:
          n = k < s ? s : k;
          break;
        case 5:
          n = k < s ? k : s;
          break;
        default:
          n = (s & 1) * 2 + (k & 1);
          break;
      }
      u32 byte = static_cast<u32>(v >> (8 * (n & 7))) & 0xff;
      if (Mode == 0 && (n & 8)) byte = byte & 0x80 ? 0xff : 0;
      r |= byte << (8 * k);
    }
    return r;
  });
}

template <class T>
struct Bfe {
  static void run(Warp& w, const Inst& i, u32 mask) {
    const T* a = w.reg<T>(i.a);
    const u32 *pos = w.reg<u32>(i.b), *len = w.reg<u32>(i.c);
    constexpr u32 kBits = 8 * sizeof(T);
    map_lanes(w.reg<T>(i.d), mask, [&](int l) {
      const u32 p = pos[l] & 255, n = len[l] & 255;
      if (n == 0) return T(0);
      const u32 top = p + n - 1 > kBits - 1 ? kBits - 1 : p + n - 1;  // where the sign comes from
      const bool fill = std::is_signed_v<T> && (Bits<T>(a[l]) >> top & 1);
      const Bits<T> body = p >= kBits ? 0 : Bits<T>(a[l]) >> p;
      const u32 have = p >= kBits ? 0 : (n < kBits - p ? n : kBits - p);
      const Bits<T> keep = have >= kBits ? ~Bits<T>(0) : (Bits<T>(1) << have) - 1;
      return static_cast<T>((body & keep) | (fill ? static_cast<Bits<T>>(~keep) : Bits<T>(0)));
    });
  }
};

template <class T>
struct Bfi {
  static void run(Warp& w, const Inst& i, u32 mask) {
    const T *a = w.reg<T>(i.a), *b = w.reg<T>(i.b);
    const u32 *pos = w.reg<u32>(i.c), *len = w.reg<u32>(i.e);
    constexpr u32 kBits = 8 * sizeof(T);
    map_lanes(w.reg<T>(i.d), mask, [&](int l) {
      const u32 p = pos[l] & 255, n = len[l] & 255;
      if (n == 0 || p >= kBits) return b[l];
      const T field = static_cast<T>((n >= kBits ? ~T(0) : (T(1) << n) - 1) << p);
      return static_cast<T>((b[l] & ~field) | ((a[l] << p) & field));
    });
  }
};

template <class T>
struct Popc {
  static void run(Warp& w, const Inst& i, u32 mask) {
    const T* a = w.reg<T>(i.a);
    map_lanes(w.reg<u32>(i.d), mask, [&](int l) { return static_cast<u32>(std::popcount(a[l])); });
  }
};
template <class T>
struct Clz {
  static void run(Warp& w, const Inst& i, u32 mask) {
    const T* a = w.reg<T>(i.a);
    map_lanes(w.reg<u32>(i.d), mask,
              [&](int l) { return static_cast<u32>(std::countl_zero(a[l])); });
  }
};
template <class T>
struct Bfind {
  static void run(Warp& w, const Inst& i, u32 mask) {
    const T* a = w.reg<T>(i.a);
    map_lanes(w.reg<u32>(i.d), mask, [&](int l) {
      const Bits<T> v = static_cast<Bits<T>>(std::is_signed_v<T> && a[l] < 0 ? ~a[l] : a[l]);
      if (v == 0) return ~0u;
      const u32 shift = static_cast<u32>(std::countl_zero(v));
      return i.op ? shift : static_cast<u32>(8 * sizeof(T) - 1) - shift;
    });
  }
};

void bmsk(Warp& w, const Inst& i, u32 mask) {
  const u32 *a = w.reg<u32>(i.a), *b = w.reg<u32>(i.b);
  map_lanes(w.reg<u32>(i.d), mask, [&](int l) {
    const u32 p = i.op ? a[l] & 31 : a[l], n = i.op ? b[l] & 31 : b[l];
    if (n == 0 || p >= 32) return 0u;
    const u32 ones = n >= 32 ? ~0u : (1u << n) - 1;
    return ones << p;
  });
}

template <bool Signed>
void szext(Warp& w, const Inst& i, u32 mask) {
  const u32 *a = w.reg<u32>(i.a), *b = w.reg<u32>(i.b);
  map_lanes(w.reg<u32>(i.d), mask, [&](int l) {
    const u32 n = i.op ? b[l] & 31 : b[l];
    if (n == 0) return 0u;
    if (n >= 32) return a[l];
    const u32 v = a[l] << (32 - n);
    return Signed ? static_cast<u32>(static_cast<i32>(v) >> (32 - n)) : v >> (32 - n);
  });
}

void fns(Warp& w, const Inst& i, u32 mask) {
  const u32 *a = w.reg<u32>(i.a), *b = w.reg<u32>(i.b);
  const i32* c = w.reg<i32>(i.c);
  map_lanes(w.reg<u32>(i.d), mask, [&](int l) {
    const i64 base = b[l] & 31;
    if (c[l] == 0) return a[l] >> base & 1 ? static_cast<u32>(base) : ~0u;
    const i64 step = c[l] > 0 ? 1 : -1;
    i64 left = c[l] > 0 ? i64{c[l]} : -i64{c[l]};
    for (i64 p = base; p >= 0 && p < 32; p += step) {
      if ((a[l] >> p & 1) && --left == 0) return static_cast<u32>(p);
    }
    return ~0u;
  });
}

// --- selection
template <class T>
struct Selp {
  static void run(Warp& w, const Inst& i, u32 mask) {
    const T *a = w.reg<T>(i.a), *b = w.reg<T>(i.b);
    const u32 p = w.pred(i.c) ^ (i.op ? kFullMask : 0);
    map_lanes(w.reg<T>(i.d), mask, [&](int l) { return p >> l & 1 ? a[l] : b[l]; });
  }
};
template <class T>
struct SlctInt {
  static void run(Warp& w, const Inst& i, u32 mask) {
    const T *a = w.reg<T>(i.a), *b = w.reg<T>(i.b);
    const i32* c = w.reg<i32>(i.c);
    map_lanes(w.reg<T>(i.d), mask, [&](int l) { return c[l] >= 0 ? a[l] : b[l]; });
  }
};
template <class T>
struct SlctFloat {
  static void run(Warp& w, const Inst& i, u32 mask) {
    const T *a = w.reg<T>(i.a), *b = w.reg<T>(i.b);
    const float* c = w.reg<float>(i.c);
    map_lanes(w.reg<T>(i.d), mask, [&](int l) { return c[l] >= 0 ? a[l] : b[l]; });
  }
};

// --- predicates
template <class Op>
void pred_binary(Warp& w, const Inst& i, u32 mask) {
  const u32 a = w.pred(i.a) ^ (i.op & 1 ? kFullMask : 0);
  const u32 b = w.pred(i.b) ^ (i.op & 2 ? kFullMask : 0);
  write_pred(w, i.d, mask, Op::template f<u32>(a, b));
}
void pred_not(Warp& w, const Inst& i, u32 mask) { write_pred(w, i.d, mask, ~w.pred(i.a)); }
void pred_copy(Warp& w, const Inst& i, u32 mask) {
  write_pred(w, i.d, mask, w.pred(i.a) ^ (i.op ? kFullMask : 0));
}

template <class Op>
void bind_logic(Decoder& d, Inst& i) {
  if (d.type() == Type::Pred) {
    bind_same(d, i, 0, 2);
    i.op = static_cast<u8>(d.operand(1).negated | d.operand(2).negated << 1);
    i.fn = pred_binary<Op>;
    return;
  }
  bind_same(d, i, type_size(d.type()), 2);
  use(d, i, pick_bits<Binary<Op>::template On>(d.type()));
}
void bind_not(Decoder& d, Inst& i) {
  bind_same(d, i, type_size(d.type()), 1);
  use(d, i, d.type() == Type::Pred ? pred_not : pick_bits<Unary<Not>::On>(d.type()));
}
void bind_cnot(Decoder& d, Inst& i) {
  bind_same(d, i, type_size(d.type()), 1);
  use(d, i, pick_bits<Unary<Cnot>::On>(d.type()));
}
void bind_brev(Decoder& d, Inst& i) {
  bind_same(d, i, type_size(d.type()), 1);
  i.fn = type_size(d.type()) == 4 ? Unary<Brev>::On<u32>::run : Unary<Brev>::On<u64>::run;
}
void bind_shift(Decoder& d, Inst& i) {
  const int bytes = type_size(d.type());
  d.arity(3);
  i.d = d.dst(0, bytes);
  i.a = d.src(1, bytes);
  i.b = d.src(2, 4);
  use(d, i, d.in().opcode == "shl" ? pick_bits<Shl>(d.type()) : pick_int<Shr>(d.type()));
}
void bind_shf(Decoder& d, Inst& i) {
  bind_same(d, i, 4, 3);
  const bool wrap = d.has("wrap");
  i.fn = d.has("l") ? (wrap ? shf<true, true> : shf<true, false>)
                    : (wrap ? shf<false, true> : shf<false, false>);
}
void bind_lop3(Decoder& d, Inst& i) {
  const bool with_pred = d.has("or") || d.has("and");
  d.arity(with_pred ? 6 : 5);
  i.d = with_pred ? d.dst(d.operand(0), 4) : d.dst(0, 4);
  i.a = d.src(1, 4);
  i.b = d.src(2, 4);
  i.c = d.src(3, 4);
  i.imm = static_cast<i64>(d.immediate(4));
  if (i.imm < 0 || i.imm > 255) d.fail("the truth table is one byte");
  i.fn = lop3;
  if (!with_pred) return;
  Ext& x = d.ext(i);
  x.r[0] = d.second_dst(0, 0);
  x.r[1] = d.src(5, 0);
  x.v[0] = d.operand(5).negated;
  i.sub = d.has("and");
  i.fn = lop3_bool;
}
void bind_prmt(Decoder& d, Inst& i) {
  bind_same(d, i, 4, 3);
  i.fn = d.has("f4e")    ? prmt<1>
         : d.has("b4e")  ? prmt<2>
         : d.has("rc8")  ? prmt<3>
         : d.has("ecl")  ? prmt<4>
         : d.has("ecr")  ? prmt<5>
         : d.has("rc16") ? prmt<6>
                         : prmt<0>;
}
void bind_bfe(Decoder& d, Inst& i) {
  const int bytes = type_size(d.type());
  d.arity(4);
  i.d = d.dst(0, bytes);
  i.a = d.src(1, bytes);
  i.b = d.src(2, 4);
  i.c = d.src(3, 4);
  use(d, i, pick_int<Bfe>(d.type()));
}
void bind_bfi(Decoder& d, Inst& i) {
  const int bytes = type_size(d.type());
  d.arity(5);
  i.d = d.dst(0, bytes);
  i.a = d.src(1, bytes);
  i.b = d.src(2, bytes);
  i.c = d.src(3, 4);
  i.e = d.src(4, 4);
  i.fn = bytes == 4 ? Bfi<u32>::run : Bfi<u64>::run;
}
template <template <class> class H>
void bind_count(Decoder& d, Inst& i) {
  d.arity(2);
  i.d = d.dst(0, 4);
  i.a = d.src(1, type_size(d.type()));
  i.fn = type_size(d.type()) == 4 ? H<u32>::run : H<u64>::run;
}
void bind_bfind(Decoder& d, Inst& i) {
  d.arity(2);
  i.d = d.dst(0, 4);
  i.a = d.src(1, type_size(d.type()));
  i.op = d.has("shiftamt");
  use(d, i, pick_int<Bfind>(d.type()));
}
void bind_bmsk(Decoder& d, Inst& i) {
  bind_same(d, i, 4, 2);
  i.op = d.has("wrap");
  i.fn = bmsk;
}
void bind_szext(Decoder& d, Inst& i) {
  bind_same(d, i, 4, 2);
  i.op = d.has("wrap");
  i.fn = d.type() == Type::S32 ? szext<true> : szext<false>;
}
void bind_fns(Decoder& d, Inst& i) {
  bind_same(d, i, 4, 3);
  i.fn = fns;
}
void bind_selp(Decoder& d, Inst& i) {
  const int bytes = type_size(d.type());
  d.arity(4);
  i.d = d.dst(0, bytes);
  i.a = d.src(1, bytes);
  i.b = d.src(2, bytes);
  i.c = d.src(3, 0);
  i.op = d.operand(3).negated;
  use(d, i, pick_bits<Selp>(d.type()));
}
void bind_slct(Decoder& d, Inst& i) {
  const int bytes = type_size(d.type(0));
  d.arity(4);
  i.d = d.dst(0, bytes);
  i.a = d.src(1, bytes);
  i.b = d.src(2, bytes);
  i.c = d.src(3, 4);
  use(d, i,
      d.type(1) == Type::F32 ? pick_bits<SlctFloat>(d.type(0)) : pick_bits<SlctInt>(d.type(0)));
}

// --- mov: registers, constants, addresses, and packing of vectors of registers
template <class Whole, class Part>
void mov_pack(Warp& w, const Inst& i, u32 mask) {
  constexpr int kParts = sizeof(Whole) / sizeof(Part);
  const u32 regs[4] = {i.a, i.b, i.c, i.e};
  Whole* d = w.reg<Whole>(i.d);
  map_lanes(d, mask, [&](int l) {
    Whole v = 0;
    for (int k = 0; k < kParts; ++k) v |= Whole{w.reg<Part>(regs[k])[l]} << (8 * sizeof(Part) * k);
    return v;
  });
}
template <class Whole, class Part>
void mov_unpack(Warp& w, const Inst& i, u32 mask) {
  constexpr int kParts = sizeof(Whole) / sizeof(Part);
  const u32 regs[4] = {i.d, i.b, i.c, i.e};
  alignas(64) Whole v[kLanes];
  std::memcpy(v, w.reg<Whole>(i.a), sizeof v);
  for (int k = 0; k < kParts; ++k) {
    if (regs[k] == kNoReg) continue;
    map_lanes(w.reg<Part>(regs[k]), mask,
              [&](int l) { return static_cast<Part>(v[l] >> (8 * sizeof(Part) * k)); });
  }
}

struct Wide128 {
  u64 lo, hi;
};
void mov_pack128(Warp& w, const Inst& i, u32 mask) {
  for (u32 m = mask; m != 0; m &= m - 1) {
    const int l = std::countr_zero(m);
    w.reg<Wide128>(i.d)[l] = {w.reg<u64>(i.a)[l], w.reg<u64>(i.b)[l]};
  }
}
void mov_unpack128(Warp& w, const Inst& i, u32 mask) {
  for (u32 m = mask; m != 0; m &= m - 1) {
    const int l = std::countr_zero(m);
    const Wide128 v = w.reg<Wide128>(i.a)[l];
    if (i.d != kNoReg) w.reg<u64>(i.d)[l] = v.lo;
    if (i.b != kNoReg) w.reg<u64>(i.b)[l] = v.hi;
  }
}
void mov128(Warp& w, const Inst& i, u32 mask) {
  for (u32 m = mask; m != 0; m &= m - 1) {
    const int l = std::countr_zero(m);
    w.reg<Wide128>(i.d)[l] = w.reg<Wide128>(i.a)[l];
  }
}

// One instruction issues per cycle: instructions executed stand for cycles.
void mov_clock(Warp& w, const Inst& i, u32 mask) {
  const u64 cycles = 4 * w.instructions + 64 * w.cta->cluster->rounds;
  const u64 ns = cycles * 1000 / 1755;
  u64 v = cycles;
  switch (static_cast<Special>(i.op)) {
    case Special::ClockHi:
      v = cycles >> 32;
      break;
    case Special::GlobalTimer:
      v = ns;
      break;
    case Special::GlobalTimerLo:
      v = ns & 0xffffffff;
      break;
    case Special::GlobalTimerHi:
      v = ns >> 32;
      break;
    default:
      break;
  }
  if (i.size == 8) {
    map_lanes(w.reg<u64>(i.d), mask, [&](int) { return v; });
  } else {
    map_lanes(w.reg<u32>(i.d), mask, [&](int) { return static_cast<u32>(v); });
  }
}

void bind_mov_parts(Decoder& d, Inst& i, int bytes, bool pack) {
  const auto& list = d.operand(pack ? 1 : 0).list;
  const int n = static_cast<int>(list.size());
  const int part = n == 0 ? 0 : bytes / n;
  if ((n != 2 && n != 4) || part == 0 || (bytes == 16 && n != 2)) d.fail("bad vector operand");
  u32* regs[4] = {pack ? &i.a : &i.d, &i.b, &i.c, &i.e};
  for (int k = 0; k < n; ++k) *regs[k] = pack ? d.src(list[k], part) : d.dst(list[k], part);
  if (pack)
    i.d = d.dst(0, bytes);
  else
    i.a = d.src(1, bytes);
  if (bytes == 16) {
    i.fn = pack ? mov_pack128 : mov_unpack128;
  } else if (bytes == 8) {
    i.fn = n == 2 ? (pack ? mov_pack<u64, u32> : mov_unpack<u64, u32>)
                  : (pack ? mov_pack<u64, u16> : mov_unpack<u64, u16>);
  } else if (bytes == 4) {
    i.fn = n == 2 ? (pack ? mov_pack<u32, u16> : mov_unpack<u32, u16>)
                  : (pack ? mov_pack<u32, u8> : mov_unpack<u32, u8>);
  } else {
    if (n != 2) d.fail("bad vector operand");
    i.fn = pack ? mov_pack<u16, u8> : mov_unpack<u16, u8>;
  }
}

void bind_mov(Decoder& d, Inst& i) {
  using K = ptx::Operand::Kind;
  const int bytes = type_size(d.type());
  d.arity(2);
  if (d.type() == Type::Pred) {
    i.d = d.dst(0, 0);
    i.a = d.src(1, 0);
    i.op = d.operand(1).negated;
    i.fn = pred_copy;
    return;
  }
  if (d.operand(1).kind == K::Vector) return bind_mov_parts(d, i, bytes, true);
  if (d.operand(0).kind == K::Vector) return bind_mov_parts(d, i, bytes, false);
  i.d = d.dst(0, bytes);
  i.a = d.src(1, bytes);
  Special which;
  if (d.is_clock(1, &which)) {
    i.op = static_cast<u8>(which);
    i.size = static_cast<u8>(bytes);
    i.fn = mov_clock;
    return;
  }
  use(d, i, bytes == 16 ? mov128 : pick_bits<Unary<Copy>::On>(d.type()));
}

constexpr Entry kEntries[] = {
    {"mov.pred|b8|u8|s8|b16|u16|s16|b32|u32|s32|f32|b64|u64|s64|f64|b128", bind_mov,
     "copy, address of a variable, packing and unpacking of {a, b, ...}"},
    {"selp.b16|u16|s16|b32|u32|s32|b64|u64|s64|f32|f64", bind_selp, "p ? a : b"},
    {"slct.ftz?.b16|u16|s16|b32|u32|s32|b64|u64|s64|f32|f64.s32|f32", bind_slct, "c >= 0 ? a : b"},
    {"and.pred|b16|b32|b64", bind_logic<And>, "a & b"},
    {"or.pred|b16|b32|b64", bind_logic<Or>, "a | b"},
    {"xor.pred|b16|b32|b64", bind_logic<Xor>, "a ^ b"},
    {"not.pred|b16|b32|b64", bind_not, "~a"},
    {"cnot.b16|b32|b64", bind_cnot, "a == 0"},
    {"lop3.b32", bind_lop3, "any function of three bits"},
    {"lop3.or|and.b32", bind_lop3, "the same, with a predicate", 82},
    {"shl.b16|b32|b64", bind_shift, "a << b, clamped"},
    {"shr.b16|u16|s16|b32|u32|s32|b64|u64|s64", bind_shift, "a >> b, clamped"},
    {"shf.l|r.clamp|wrap.b32", bind_shf, "funnel shift of b:a"},
    {"prmt.b32", bind_prmt, "any four bytes of b:a"},
    {"prmt.b32.f4e|b4e|rc8|ecl|ecr|rc16", bind_prmt, "byte patterns of b:a"},
    {"bfe.u32|s32|u64|s64", bind_bfe, "extract a bit field"},
    {"bfi.b32|b64", bind_bfi, "insert a bit field"},
    {"brev.b32|b64", bind_brev, "bits reversed"},
    {"popc.b32|b64", bind_count<Popc>, "number of ones"},
    {"clz.b32|b64", bind_count<Clz>, "leading zeros"},
    {"bfind.shiftamt?.u32|s32|u64|s64", bind_bfind, "position of the highest significant bit"},
    {"fns.b32", bind_fns, "n-th set bit from a position"},
    {"bmsk.clamp|wrap.b32", bind_bmsk, "a mask of b ones from bit a", 70},
    {"szext.clamp|wrap.u32|s32", bind_szext, "sign- or zero-extend from bit b", 70},
};

}  // namespace

std::span<const Entry> logic_entries() { return kEntries; }

}  // namespace dsk::emu::DSK_EMU_LEVEL
