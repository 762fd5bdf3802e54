// setp and set.
#include "emu/isa/lane.hpp"

namespace dsk::emu::DSK_EMU_LEVEL {
namespace {

// --- comparison
enum Cmp : u8 { kEq, kNe, kLt, kLe, kGt, kGe, kEqu, kNeu, kLtu, kLeu, kGtu, kGeu, kNum, kNan };

template <int C, class T>
DSK_LANE_INLINE bool compare(T a, T b) {
  switch (C) {
    case kEq:
      return a == b;
    case kNe:
      return std::is_floating_point_v<T> ? (a < b || a > b) : a != b;
    case kLt:
      return a < b;
    case kLe:
      return a <= b;
    case kGt:
      return a > b;
    case kGe:
      return a >= b;
    case kEqu:
      return !(a < b || a > b);
    case kNeu:
      return a != b;
    case kLtu:
      return !(a >= b);
    case kLeu:
      return !(a > b);
    case kGtu:
      return !(a <= b);
    case kGeu:
      return !(a < b);
    case kNum:
      return a == a && b == b;
    default:
      return a != a || b != b;
  }
}

template <class T, int C>
DSK_LANE_INLINE u32 compare_lanes(Warp& w, const Inst& i, u32 mask) {
  const T *a = w.reg<T>(i.a), *b = w.reg<T>(i.b);
  return mask_lanes(mask, [&](int l) { return compare<C, T>(a[l], b[l]); });
}

// Combines with a third predicate: sub 0 none, 1 and, 2 or, 3 xor; op 1 = that one negated.
void finish_setp(Warp& w, const Inst& i, u32 mask, u32 hit) {
  u32 other = ~hit;
  if (i.sub != 0) {
    const u32 c = w.pred(i.c) ^ (i.op ? kFullMask : 0);
    const auto combine = [&](u32 v) { return i.sub == 1 ? v & c : i.sub == 2 ? v | c : v ^ c; };
    hit = combine(hit);
    other = combine(other);
  }
  write_pred(w, i.d, mask, hit);
  write_pred(w, i.e, mask, other);
}

template <class T, int C>
void setp(Warp& w, const Inst& i, u32 mask) {
  finish_setp(w, i, mask, compare_lanes<T, C>(w, i, mask));
}

// set: a register instead of a predicate: all ones, or 1.0f.
template <class T, int C>
void set(Warp& w, const Inst& i, u32 mask) {
  u32 hit = compare_lanes<T, C>(w, i, mask);
  if (i.sub != 0) {
    const u32 c = w.pred(i.c) ^ (i.op ? kFullMask : 0);
    hit = i.sub == 1 ? hit & c : i.sub == 2 ? hit | c : hit ^ c;
  }
  const u32 yes = static_cast<u32>(i.imm);
  map_lanes(w.reg<u32>(i.d), mask, [&](int l) { return hit >> l & 1 ? yes : 0u; });
}

template <class T, bool Set>
Handler pick_compare(int c) {
  static constexpr Handler kSetp[] = {setp<T, kEq>,  setp<T, kNe>,  setp<T, kLt>,  setp<T, kLe>,
                                      setp<T, kGt>,  setp<T, kGe>,  setp<T, kEqu>, setp<T, kNeu>,
                                      setp<T, kLtu>, setp<T, kLeu>, setp<T, kGtu>, setp<T, kGeu>,
                                      setp<T, kNum>, setp<T, kNan>};
  static constexpr Handler kSet[] = {set<T, kEq>,  set<T, kNe>,  set<T, kLt>,  set<T, kLe>,
                                     set<T, kGt>,  set<T, kGe>,  set<T, kEqu>, set<T, kNeu>,
                                     set<T, kLtu>, set<T, kLeu>, set<T, kGtu>, set<T, kGeu>,
                                     set<T, kNum>, set<T, kNan>};
  if (!std::is_floating_point_v<T> && c > kGe) return nullptr;
  return Set ? kSet[c] : kSetp[c];
}

template <bool Set>
Handler pick_compare_type(Type t, int c) {
  switch (t) {
    case Type::S16:
      return pick_compare<i16, Set>(c);
    case Type::U16:
    case Type::B16:
      return pick_compare<u16, Set>(c);
    case Type::S32:
      return pick_compare<i32, Set>(c);
    case Type::U32:
    case Type::B32:
      return pick_compare<u32, Set>(c);
    case Type::S64:
      return pick_compare<i64, Set>(c);
    case Type::U64:
    case Type::B64:
      return pick_compare<u64, Set>(c);
    case Type::F32:
      return pick_compare<float, Set>(c);
    case Type::F64:
      return pick_compare<double, Set>(c);
    default:
      return nullptr;
  }
}

// Subnormal operands of .ftz comparisons read as zero: only equality to zero can tell.
template <int C>
void setp_ftz(Warp& w, const Inst& i, u32 mask) {
  const float *a = w.reg<float>(i.a), *b = w.reg<float>(i.b);
  const auto flush = [](float x) { return std::fabs(x) < 1.17549435e-38f ? 0.0f : x; };
  finish_setp(w, i, mask,
              mask_lanes(mask, [&](int l) { return compare<C, float>(flush(a[l]), flush(b[l])); }));
}

int parse_compare(const std::string& name) {
  static constexpr const char* kNames[] = {"eq",  "ne",  "lt",  "le",  "gt",  "ge",  "equ",
                                           "neu", "ltu", "leu", "gtu", "geu", "num", "nan"};
  for (int c = 0; c < 14; ++c) {
    if (name == kNames[c]) return c;
  }
  return name == "lo" ? kLt : name == "ls" ? kLe : name == "hi" ? kGt : kGe;  // hs
}

Handler pick_setp_ftz(int c) {
  static constexpr Handler kTable[] = {
      setp_ftz<kEq>,  setp_ftz<kNe>,  setp_ftz<kLt>,  setp_ftz<kLe>,  setp_ftz<kGt>,
      setp_ftz<kGe>,  setp_ftz<kEqu>, setp_ftz<kNeu>, setp_ftz<kLtu>, setp_ftz<kLeu>,
      setp_ftz<kGtu>, setp_ftz<kGeu>, setp_ftz<kNum>, setp_ftz<kNan>};
  return kTable[c];
}

void bind_combination(Decoder& d, Inst& i) {
  i.sub = d.has("and") ? 1 : d.has("or") ? 2 : d.has("xor") ? 3 : 0;
  d.arity(i.sub != 0 ? 4 : 3);
  if (i.sub != 0) {
    i.c = d.src(3, 0);
    i.op = d.operand(3).negated;
  }
}

void bind_setp(Decoder& d, Inst& i) {
  const int bytes = type_size(d.type());
  bind_combination(d, i);
  i.d = d.dst(d.operand(0), 0);
  i.e = d.second_dst(0, 0);
  i.a = d.src(1, bytes);
  i.b = d.src(2, bytes);
  const int c = parse_compare(d.in().modifiers[0]);
  use(d, i, d.has("ftz") ? pick_setp_ftz(c) : pick_compare_type<false>(d.type(), c));
}

void bind_set(Decoder& d, Inst& i) {
  const int bytes = type_size(d.type());
  bind_combination(d, i);
  i.d = d.dst(0, 4);
  i.a = d.src(1, bytes);
  i.b = d.src(2, bytes);
  i.imm = d.type(0) == Type::F32 ? 0x3f800000 : 0xffffffff;
  use(d, i, pick_compare_type<true>(d.type(), parse_compare(d.in().modifiers[0])));
}

#define DSK_CMP_TYPES "b16|u16|s16|b32|u32|s32|b64|u64|s64|f64|f32"
constexpr Entry kEntries[] = {
    {"setp.{cmp}.ftz?." DSK_CMP_TYPES, bind_setp, "predicate = a cmp b (second: its negation)"},
    {"setp.{cmp}.and|or|xor.ftz?." DSK_CMP_TYPES, bind_setp, "the same, combined with a predicate"},
    {"set.{cmp}.u32|s32|f32." DSK_CMP_TYPES, bind_set, "all ones (or 1.0f) where a cmp b"},
    {"set.{cmp}.and|or|xor.u32|s32|f32." DSK_CMP_TYPES, bind_set, "the same, combined"},
};

}  // namespace

std::span<const Entry> compare_entries() { return kEntries; }

}  // namespace dsk::emu::DSK_EMU_LEVEL
