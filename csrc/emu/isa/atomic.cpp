// atom and red: real host atomics, since CTAs run on different host threads.
#include <atomic>

#include "emu/isa/async.hpp"
#include "emu/isa/common.hpp"
#include "emu/num/convert.hpp"

namespace dsk::emu {
namespace {

enum Op : u8 { kAdd, kMin, kMax, kAnd, kOr, kXor, kExch, kCas, kInc, kDec };

template <class T>
T integer_op(Op op, T old, T b, T c) {
  using U = std::make_unsigned_t<T>;
  switch (op) {
    case kAdd:
      return static_cast<T>(static_cast<U>(old) + static_cast<U>(b));
    case kMin:
      return b < old ? b : old;
    case kMax:
      return b > old ? b : old;
    case kAnd:
      return old & b;
    case kOr:
      return old | b;
    case kXor:
      return old ^ b;
    case kExch:
      return b;
    case kCas:
      return old == b ? c : old;
    case kInc:
      return old >= b ? T(0) : static_cast<T>(old + 1);
    default:
      return (old == 0 || old > b) ? b : static_cast<T>(old - 1);
  }
}

template <class T>
T float_add(T old, T b) {
  const T r = old + b;
  return r != r ? std::numeric_limits<T>::quiet_NaN() : r;
}

u16 half_op(bool bf, Op op, u16 old, u16 b) {
  const float x = bf ? num::bf16_to_f32(old) : num::f16_to_f32(old);
  const float y = bf ? num::bf16_to_f32(b) : num::f16_to_f32(b);
  if (op == kMin || op == kMax) {
    if (x != x) return y != y ? u16{0x7fff} : b;
    if (y != y) return old;
    if (x == y) return ((op == kMax) == ((old & 0x8000) != 0)) ? b : old;
    return (op == kMin) == (x < y) ? old : b;
  }
  return bf ? num::f32_to_bf16(x + y) : num::f32_to_f16(x + y);
}

// New value from old; bits of type T.
u64 combine(Type t, Op op, u64 old, u64 b, u64 c) {
  switch (t) {
    case Type::S32:
      return static_cast<u32>(
          integer_op<i32>(op, static_cast<i32>(old), static_cast<i32>(b), static_cast<i32>(c)));
    case Type::S64:
      return static_cast<u64>(
          integer_op<i64>(op, static_cast<i64>(old), static_cast<i64>(b), static_cast<i64>(c)));
    case Type::F32:
      return std::bit_cast<u32>(float_add(std::bit_cast<float>(static_cast<u32>(old)),
                                          std::bit_cast<float>(static_cast<u32>(b))));
    case Type::F64:
      return std::bit_cast<u64>(float_add(std::bit_cast<double>(old), std::bit_cast<double>(b)));
    case Type::F16:
    case Type::BF16:
      return half_op(t == Type::BF16, op, static_cast<u16>(old), static_cast<u16>(b));
    case Type::F16x2:
    case Type::BF16x2: {
      const bool bf = t == Type::BF16x2;
      return u32{half_op(bf, op, static_cast<u16>(old), static_cast<u16>(b))} |
             u32{half_op(bf, op, static_cast<u16>(old >> 16), static_cast<u16>(b >> 16))} << 16;
    }
    default:
      break;
  }
  switch (type_size(t)) {
    case 2:
      return integer_op<u16>(op, static_cast<u16>(old), static_cast<u16>(b), static_cast<u16>(c));
    case 4:
      return integer_op<u32>(op, static_cast<u32>(old), static_cast<u32>(b), static_cast<u32>(c));
    default:
      return integer_op<u64>(op, old, b, c);
  }
}

template <class U>
u64 apply(u8* host, Type t, Op op, u64 b, u64 c, bool* changed) {
  std::atomic_ref<U> cell(*reinterpret_cast<U*>(host));
  U old = cell.load();
  while (true) {
    const U next = static_cast<U>(combine(t, op, old, b, c));
    if (next == old && (op == kCas || op == kExch)) {
      // Even a failed compare-and-swap is ordered; a plain load would do for the value.
      std::atomic_thread_fence(std::memory_order_seq_cst);
      return old;
    }
    if (cell.compare_exchange_weak(old, next)) {
      *changed |= next != old;
      return old;
    }
  }
}

u64 read_source(Warp& w, u32 reg, int bytes, int l) {
  return bytes == 2 ? w.reg<u16>(reg)[l] : bytes == 4 ? w.reg<u32>(reg)[l] : w.reg<u64>(reg)[l];
}
void write_result(Warp& w, u32 reg, int bytes, int l, u64 v) {
  if (bytes == 2)
    w.reg<u16>(reg)[l] = static_cast<u16>(v);
  else if (bytes == 4)
    w.reg<u32>(reg)[l] = static_cast<u32>(v);
  else
    w.reg<u64>(reg)[l] = v;
}

// ext: type; count > 1 for vector forms (regs: destinations, regs2: sources).
void atomic(Warp& w, const Inst& i, u32 mask) {
  const Ext& x = *i.ext;
  const int bytes = i.size;
  const u32 all = static_cast<u32>(bytes) * i.count;
  Place places[kLanes];
  u64 host_addresses[kLanes];
  each_lane(mask, [&](int l) {
    places[l] = resolve(w, i.space, lane_address(w, i, l), l, all, true);
    host_addresses[l] = reinterpret_cast<u64>(places[l].host);
  });
  if (watched(w)) observe(w, i, mask, AccessKind::ReadWrite, all, places, true);
  bool changed = false;
  each_lane(mask, [&](int l) {
    for (u32 k = 0; k < i.count; ++k) {
      const u64 b = read_source(w, x.regs2[k], bytes, l);
      const u64 c = i.c == kNoReg ? 0 : read_source(w, i.c, bytes, l);
      u8* host = places[l].host + k * static_cast<u32>(bytes);
      const Op op = static_cast<Op>(i.op);
      const u64 old = bytes == 2   ? apply<u16>(host, x.type, op, b, c, &changed)
                      : bytes == 4 ? apply<u32>(host, x.type, op, b, c, &changed)
                                   : apply<u64>(host, x.type, op, b, c, &changed);
      if (!x.regs.empty() && x.regs[k] != kNoReg) write_result(w, x.regs[k], bytes, l, old);
    }
  });
  w.cta->cluster->changes += changed;
  if (watched(w)) {
    observe_value(w, i, mask, AccessKind::ReadWrite, all, host_addresses, true);
  }
}

Op parse_op(const Decoder& d) {
  static constexpr const char* kNames[] = {"add", "min",  "max", "and", "or",
                                           "xor", "exch", "cas", "inc", "dec"};
  for (u8 k = 0; k < 10; ++k) {
    if (d.has(kNames[k])) return static_cast<Op>(k);
  }
  d.fail("unknown operation");
}

std::vector<ptx::Operand> as_list(const ptx::Operand& o) {
  return o.kind == ptx::Operand::Kind::Vector ? o.list : std::vector<ptx::Operand>{o};
}

void bind_atomic(Decoder& d, Inst& i) {
  const bool returns = d.in().opcode == "atom";
  const std::size_t first = returns ? 1 : 0;
  i.op = parse_op(d);
  const std::size_t sources = i.op == kCas ? 2 : 1;
  d.arity(first + 1 + sources, first + 2 + sources);  // one more for a cache policy
  bind_space(d, i);
  const Type t = d.type();
  i.size = static_cast<u8>(type_size(t));
  Ext& x = d.ext(i);
  x.type = t;
  const std::size_t want = d.has("v2") ? 2 : d.has("v4") ? 4 : d.has("v8") ? 8 : 1;
  i.count = static_cast<u8>(want);
  d.address(first, i);
  const auto values = as_list(d.operand(first + 1));
  if (values.size() != want) d.fail("vector length does not match");
  for (const auto& o : values) x.regs2.push_back(d.src(o, i.size));
  if (i.op == kCas) i.c = d.src(first + 2, i.size);
  if (returns) {
    const auto results = as_list(d.operand(0));
    if (results.size() != want) d.fail("vector length does not match");
    for (const auto& o : results) x.regs.push_back(d.dst(o, i.size));
  }
  i.kind = Kind::Yield;
  i.fn = atomic;
}

#define DSK_ORDER ".{sem}?.{scope}?.{space}?"
#define DSK_INT_TYPES "u32|s32|u64|s64|b32|b64|b16"
constexpr Entry kEntries[] = {
    {"atom" DSK_ORDER ".add|min|max|and|or|xor|exch|inc|dec.L2::cache_hint?." DSK_INT_TYPES,
     bind_atomic, "atomic operation, old value returned"},
    {"atom.{space}?.add.relaxed|acquire|release|acq_rel.{scope}.u32|s32|u64", bind_atomic,
     "the operation before the order: as libraries write it", 70},
    {"atom" DSK_ORDER ".add.L2::cache_hint?.f32|f64", bind_atomic, "atomic float addition"},
    {"atom" DSK_ORDER ".add.noftz.L2::cache_hint?.f16|bf16|f16x2|bf16x2", bind_atomic,
     "atomic half addition", 70},
    {"atom" DSK_ORDER ".add.L2::cache_hint?.v2|v4?.f32", bind_atomic, "atomic vector addition", 90},
    {"atom" DSK_ORDER ".add|min|max.noftz.L2::cache_hint?.v2|v4|v8?.f16|bf16|f16x2|bf16x2",
     bind_atomic, "atomic vector operation", 90},
    {"atom" DSK_ORDER ".cas.L2::cache_hint?.b16|b32|b64|u32|u64|s32|s64", bind_atomic,
     "compare and swap"},
    {"red" DSK_ORDER ".add|min|max|and|or|xor|inc|dec.L2::cache_hint?." DSK_INT_TYPES, bind_atomic,
     "atomic operation"},
    {"red" DSK_ORDER ".add.L2::cache_hint?.v2|v4?.f32", bind_atomic, "atomic float addition"},
    {"red" DSK_ORDER ".add.L2::cache_hint?.f64", bind_atomic, "atomic double addition"},
    {"red" DSK_ORDER ".add|min|max.noftz.L2::cache_hint?.v2|v4|v8?.f16|bf16|f16x2|bf16x2",
     bind_atomic, "atomic half operation", 70},
};

}  // namespace

u8 reduce_op(const Decoder& d) { return parse_op(d); }

void reduce_bytes(u8* dst, const u8* src, u64 bytes, Type type, u8 op) {
  const u64 size = static_cast<u64>(type_size(type));
  bool changed = false;
  for (u64 k = 0; k + size <= bytes; k += size) {
    u64 b = 0;
    std::memcpy(&b, src + k, size);
    const Op o = static_cast<Op>(op);
    if (size == 2)
      apply<u16>(dst + k, type, o, b, 0, &changed);
    else if (size == 4)
      apply<u32>(dst + k, type, o, b, 0, &changed);
    else
      apply<u64>(dst + k, type, o, b, 0, &changed);
  }
}

std::span<const Entry> atomic_entries() { return kEntries; }

}  // namespace dsk::emu
