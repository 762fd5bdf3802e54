// ld and st. One access of a warp is resolved as a whole: when all lanes stay inside one allocation
// (or the CTA's shared memory) the check is two vector reductions, and equal or adjacent addresses
// need a single host access.
#include "emu/isa/access.hpp"
#include "emu/isa/lane.hpp"
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace dsk::emu::DSK_EMU_LEVEL {
namespace {

using Shape = Pattern;

struct Resolved {
  alignas(64) u64 host[kLanes];  // host addresses of the lanes of the mask; of a ramp the first
  Shape shape = Shape::Scattered;
  u8* at(int l) const { return reinterpret_cast<u8*>(host[l]); }
};

void resolve_each(Warp& w, const Inst& i, u32 mask, u32 bytes, bool write, Resolved* out) {
  Place places[kLanes];
  for (u32 m = mask; m != 0; m &= m - 1) {
    const int l = std::countr_zero(m);
    places[l] = resolve(w, i.space, lane_address(w, i, l), l, bytes, write);
    out->host[l] = reinterpret_cast<u64>(places[l].host);
  }
  if (watched(w)) {
    observe(w, i, mask, write ? AccessKind::Write : AccessKind::Read, bytes, places, false);
  }
}

// `where` holds every lane's place as observers know it.
void observe_warp(Warp& w, const Inst& i, const u64* where, bool shared, u32 bytes, bool write,
                  Shape shape) {
  u32 rank[kLanes];
  for (int l = 0; l < kLanes; ++l) rank[l] = w.cta->rank;
  Access access;
  access.kind = write ? AccessKind::Write : AccessKind::Read;
  access.space = shared ? Space::Shared : Space::Global;
  access.semantics = semantics_of(i);
  access.scope = scope_of(i);
  access.size = bytes;
  access.pattern = shape;
  for (auto& o : w.cta->cluster->observers) {
    o->on_access(w, w.current_pc, kFullMask, access, where, shared ? rank : nullptr);
  }
}

// a[l] == a[0] + l * step for all lanes.
template <class A>
DSK_LANE_INLINE bool is_ramp(const A* a, A step) {
#if defined(__AVX512F__)
  const A first = a[0];
  if constexpr (sizeof(A) == 4) {
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i s = _mm512_set1_epi32(static_cast<int>(step));
    const __m512i low =
        _mm512_add_epi32(_mm512_set1_epi32(static_cast<int>(first)), _mm512_mullo_epi32(lane, s));
    const __m512i high = _mm512_add_epi32(low, _mm512_slli_epi32(s, 4));
    const __mmask16 off = _mm512_cmpneq_epi32_mask(_mm512_loadu_si512(a), low) |
                          _mm512_cmpneq_epi32_mask(_mm512_loadu_si512(a + 16), high);
    return off == 0;
  } else {
    const __m512i lane = _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7);
    const __m512i s = _mm512_set1_epi64(static_cast<i64>(step));
    __m512i want =
        _mm512_add_epi64(_mm512_set1_epi64(static_cast<i64>(first)), _mm512_mul_epu32(lane, s));
    const __m512i next = _mm512_slli_epi64(s, 3);
    __mmask8 off = 0;
    for (int l = 0; l < kLanes; l += 8) {
      off = static_cast<__mmask8>(off | _mm512_cmpneq_epi64_mask(_mm512_loadu_si512(a + l), want));
      want = _mm512_add_epi64(want, next);
    }
    return off == 0;
  }
#else
  A gap = 0;
  for (int l = 0; l < kLanes; ++l) gap |= a[l] ^ (a[0] + static_cast<A>(l) * step);
  return gap == 0;
#endif
}

template <class A>
DSK_LANE_INLINE Shape shape_of(const A* a, u32 bytes) {
  if (a[1] == a[0]) return is_ramp<A>(a, 0) ? Shape::Uniform : Shape::Scattered;
  if (a[1] == a[0] + bytes) return is_ramp<A>(a, bytes) ? Shape::Adjacent : Shape::Scattered;
  return Shape::Scattered;
}

// The range that a full warp's accesses span, if it lies in the CTA's shared memory or in one
// allocation: what to add to an address to get the host's, and to get the place observers know.
struct Span {
  u64 move = 0, where = 0;
  bool shared = false;
};

DSK_LANE_INLINE bool span_of(const Warp& w, const Inst& i, u64 low, u64 bytes, Span* out) {
  out->shared = i.space == Space::Shared || i.space == Space::SharedCluster ||
                (i.space == Space::Generic && low >> kWindowShift == 1);
  if (out->shared) {
    const Cta& cta = *w.cta;
    const u64 window = low & ~u64{0xffffffff};
    const u64 first = (low & 0xffffffff) - cta.shared_base;
    if (first < kSharedReserved || first >= cta.shared_bytes) return false;
    if (bytes > cta.shared_bytes - first) return false;
    out->where = u64{0} - cta.shared_base - window;
    out->move = reinterpret_cast<u64>(cta.shared) + out->where;
    return true;
  }
  if (i.space == Space::Local || i.space == Space::Param) return false;
  return w.cache.hit(low, bytes) && w.cache.generation == AddressSpace::instance().generation();
}

// Equal or adjacent addresses of a full warp: one check. False: look at every lane.
template <class A>
DSK_LANE_INLINE bool resolve_ramp(Warp& w, const Inst& i, u32 bytes, bool write, Resolved* out) {
  const A* base = w.reg<A>(i.a);
  const Shape shape = shape_of(base, bytes);
  if (shape == Shape::Scattered) return false;
  const u64 first = static_cast<A>(base[0] + static_cast<A>(i.imm));
  const u64 stride = shape == Shape::Adjacent ? bytes : 0;
  Span span;
  if ((first & (bytes - 1)) != 0 || first + (kLanes - 1) * stride < first) return false;
  if (sizeof(A) == 4 && first + (kLanes - 1) * stride > 0xffffffff) return false;
  if (!span_of(w, i, first, (kLanes - 1) * stride + bytes, &span)) return false;
  if (watched(w)) {
    u64 where[kLanes];
    for (int l = 0; l < kLanes; ++l) where[l] = first + span.where + static_cast<u64>(l) * stride;
    observe_warp(w, i, where, span.shared, bytes, write, shape);
  }
  out->shape = shape;
  out->host[0] = first + span.move;
  if (i.kind == Kind::Yield) {  // a strong load's observers are told its places once more
    for (int l = 1; l < kLanes; ++l) out->host[l] = out->host[0] + static_cast<u64>(l) * stride;
  }
  return true;
}

// Full warps that stay inside one range. False: take the slow way, which also words the complaint.
DSK_LANE_INLINE bool resolve_fast(Warp& w, const Inst& i, u32 bytes, bool write, Resolved* out) {
  const bool wide = i.flags & kAddress64;
  if (wide ? resolve_ramp<u64>(w, i, bytes, write, out)
           : resolve_ramp<u32>(w, i, bytes, write, out)) {
    return true;
  }
  u64* a = out->host;
  if (wide) {
    const u64* base = w.reg<u64>(i.a);
    for (int l = 0; l < kLanes; ++l) a[l] = base[l] + static_cast<u64>(i.imm);
  } else {
    const u32* base = w.reg<u32>(i.a);
    const u32 add = static_cast<u32>(i.imm);
    for (int l = 0; l < kLanes; ++l) a[l] = static_cast<u32>(base[l] + add);
  }
  u64 low = a[0], high = a[0], bits = 0;
  for (int l = 0; l < kLanes; ++l) {
    low = low < a[l] ? low : a[l];
    high = high > a[l] ? high : a[l];
    bits |= a[l];
  }
  Span span;
  if ((bits & (bytes - 1)) != 0 || !span_of(w, i, low, high - low + bytes, &span)) return false;
  if (watched(w)) {
    u64 where[kLanes];
    for (int l = 0; l < kLanes; ++l) where[l] = a[l] + span.where;
    observe_warp(w, i, where, span.shared, bytes, write, Shape::Scattered);
  }
  out->shape = Shape::Scattered;
  if (span.move != 0) {
    for (int l = 0; l < kLanes; ++l) a[l] += span.move;
  }
  return true;
}

DSK_LANE_INLINE void resolve_warp(Warp& w, const Inst& i, u32 mask, u32 bytes, bool write,
                                  Resolved* out) {
  if (mask == kFullMask && resolve_fast(w, i, bytes, write, out)) return;
  out->shape = Shape::Scattered;
  resolve_each(w, i, mask, bytes, write, out);
}

template <class M>
DSK_LANE_INLINE M read(const u8* p) {
  M v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

DSK_LANE_INLINE u32 vector_reg(const Inst& i, int k) {
  const u32 regs[4] = {i.d, i.b, i.c, i.e};
  return regs[k];
}

// Element k of every lane, `Count` elements a lane.
template <class M, class R, int Count>
DSK_LANE_INLINE void load_ramp(R* d, const u8* p) {
  for (int l = 0; l < kLanes; ++l) d[l] = static_cast<R>(read<M>(p + l * Count * sizeof(M)));
}
template <class M, class R, int Count>
DSK_LANE_INLINE void store_ramp(const R* s, u8* p) {
  for (int l = 0; l < kLanes; ++l) {
    const M v = static_cast<M>(s[l]);
    std::memcpy(p + l * Count * sizeof(M), &v, sizeof v);
  }
}

// Memory elements of M into registers of R (wider registers are extended by M's sign).
template <class M, class R>
void load(Warp& w, const Inst& i, u32 mask) {
  Resolved r;
  const u32 bytes = i.count * static_cast<u32>(sizeof(M));
  resolve_warp(w, i, mask, bytes, false, &r);
  for (int k = 0; k < i.count; ++k) {
    const u32 reg = vector_reg(i, k);
    if (reg == kNoReg) continue;
    R* d = w.reg<R>(reg);
    if (r.shape == Shape::Uniform) {
      const R v = static_cast<R>(read<M>(r.at(0) + k * sizeof(M)));
      for (int l = 0; l < kLanes; ++l) d[l] = v;
    } else if (r.shape == Shape::Adjacent) {
      const u8* p = r.at(0) + k * sizeof(M);
      if (i.count == 1) load_ramp<M, R, 1>(d, p);
      if (i.count == 2) load_ramp<M, R, 2>(d, p);
      if (i.count == 4) load_ramp<M, R, 4>(d, p);
    } else {
      map_lanes(d, mask, [&](int l) { return static_cast<R>(read<M>(r.at(l) + k * sizeof(M))); });
    }
  }
  if (i.kind == Kind::Yield && watched(w)) {
    observe_value(w, i, mask, AccessKind::Read, bytes, r.host, false);
  }
}

// Every thread reads the same parameter: one check, one broadcast.
template <class M, class R>
void load_param(Warp& w, const Inst& i, u32 mask) {
  const u32 bytes = i.count * static_cast<u32>(sizeof(M));
  const int first = std::countr_zero(mask);
  const Place p = resolve(w, Space::Param, lane_address(w, i, first), first, bytes, false);
  if (i.op != 0 && std::popcount(mask) > 1) {  // through a register: lanes may differ
    for (u32 m = mask; m != 0; m &= m - 1) {
      const int l = std::countr_zero(m);
      const u8* host = resolve(w, Space::Param, lane_address(w, i, l), l, bytes, false).host;
      for (int k = 0; k < i.count; ++k) {
        const u32 reg = vector_reg(i, k);
        if (reg != kNoReg) w.reg<R>(reg)[l] = static_cast<R>(read<M>(host + k * sizeof(M)));
      }
    }
    return;
  }
  for (int k = 0; k < i.count; ++k) {
    const u32 reg = vector_reg(i, k);
    if (reg == kNoReg) continue;
    const R v = static_cast<R>(read<M>(p.host + k * sizeof(M)));
    map_lanes(w.reg<R>(reg), mask, [&](int) { return v; });
  }
}

template <class M, class R>
void store(Warp& w, const Inst& i, u32 mask) {
  Resolved r;
  const u32 bytes = i.count * static_cast<u32>(sizeof(M));
  resolve_warp(w, i, mask, bytes, true, &r);
  ++w.cta->cluster->changes;
  if (semantics_of(i) == Semantics::Release) std::atomic_thread_fence(std::memory_order_release);
  for (int k = 0; k < i.count; ++k) {
    const R* s = w.reg<R>(vector_reg(i, k));
    if (r.shape == Shape::Adjacent) {
      u8* p = r.at(0) + k * sizeof(M);
      if (i.count == 1) store_ramp<M, R, 1>(s, p);
      if (i.count == 2) store_ramp<M, R, 2>(s, p);
      if (i.count == 4) store_ramp<M, R, 4>(s, p);
      continue;
    }
    if (r.shape == Shape::Uniform) {  // the last lane wins
      const M v = static_cast<M>(s[kLanes - 1]);
      std::memcpy(r.at(0) + k * sizeof(M), &v, sizeof v);
      continue;
    }
    for (u32 m = mask; m != 0; m &= m - 1) {
      const int l = std::countr_zero(m);
      const M v = static_cast<M>(s[l]);
      std::memcpy(r.at(l) + k * sizeof(M), &v, sizeof v);
    }
  }
}

struct Wide128 {
  u64 lo, hi;
};
u8* lane_128(const Resolved& r, int l) {
  if (r.shape == Shape::Scattered) return r.at(l);
  return r.at(0) + (r.shape == Shape::Adjacent ? 16 * l : 0);
}
void load128(Warp& w, const Inst& i, u32 mask) {
  Resolved r;
  resolve_warp(w, i, mask, 16, false, &r);
  for (u32 m = mask; m != 0; m &= m - 1) {
    const int l = std::countr_zero(m);
    w.reg<Wide128>(i.d)[l] = read<Wide128>(lane_128(r, l));
  }
  if (i.kind == Kind::Yield && watched(w)) {
    observe_value(w, i, mask, AccessKind::Read, 16, r.host, false);
  }
}
void store128(Warp& w, const Inst& i, u32 mask) {
  Resolved r;
  resolve_warp(w, i, mask, 16, true, &r);
  ++w.cta->cluster->changes;
  for (u32 m = mask; m != 0; m &= m - 1) {
    const int l = std::countr_zero(m);
    std::memcpy(lane_128(r, l), &w.reg<Wide128>(i.d)[l], 16);
  }
}

template <class M, template <class, class> class H>
Handler pick_register(int bytes) {
  using S = std::conditional_t<std::is_signed_v<M>, i16, u16>;
  using I = std::conditional_t<std::is_signed_v<M>, i32, u32>;
  using L = std::conditional_t<std::is_signed_v<M>, i64, u64>;
  switch (bytes) {
    case 2:
      return H<M, S>::run;
    case 4:
      return H<M, I>::run;
    case 8:
      return H<M, L>::run;
    default:
      return nullptr;
  }
}
template <class M, class R>
struct Load {
  static constexpr Handler run = load<M, R>;
};
template <class M, class R>
struct LoadParam {
  static constexpr Handler run = load_param<M, R>;
};
template <class M, class R>
struct Store {
  static constexpr Handler run = store<M, R>;
};

template <template <class, class> class H>
Handler pick_memory(Type t, int bytes) {
  if (bytes < type_size(t)) return nullptr;
  switch (t) {
    case Type::S8:
      return pick_register<i8, H>(bytes);
    case Type::S16:
      return pick_register<i16, H>(bytes);
    case Type::S32:
      return pick_register<i32, H>(bytes);
    default:
      break;
  }
  switch (type_size(t)) {
    case 1:
      return pick_register<u8, H>(bytes);
    case 2:
      return pick_register<u16, H>(bytes);
    case 4:
      return pick_register<u32, H>(bytes);
    case 8:
      return bytes == 8 ? H<u64, u64>::run : nullptr;
    default:
      return nullptr;
  }
}

// The width of the registers of a vector operand: the first real register decides.
int vector_width(Decoder& d, const std::vector<ptx::Operand>& list, Type t) {
  for (const ptx::Operand& o : list) {
    const int bytes = d.register_bytes(o);
    if (bytes > 0) return bytes;
  }
  return std::max(type_size(t), 2);
}

std::vector<ptx::Operand> vector_operand(Decoder& d, std::size_t k) {
  const ptx::Operand& o = d.operand(k);
  const std::size_t want = d.has("v4") ? 4 : d.has("v2") ? 2 : 1;
  std::vector<ptx::Operand> list = {o};
  if (o.kind == ptx::Operand::Kind::Vector) list = o.list;
  if (list.size() != want) {
    d.fail("expected " + std::to_string(want) + " registers, got " + std::to_string(list.size()));
  }
  return list;
}

void yield_if_polling(Inst& i) {
  if (semantics_of(i) != Semantics::Weak) i.kind = Kind::Yield;
}

void bind_ld(Decoder& d, Inst& i) {
  const Type t = d.type();
  d.arity(2, 3);  // the third is a cache policy
  bind_space(d, i);
  const auto list = vector_operand(d, 0);
  const int bytes = vector_width(d, list, t);
  u32* regs[4] = {&i.d, &i.b, &i.c, &i.e};
  for (std::size_t k = 0; k < list.size(); ++k) *regs[k] = d.dst(list[k], bytes);
  d.address(1, i);
  i.op = d.operand(1).reg >= 0;
  i.count = static_cast<u8>(list.size());
  i.size = static_cast<u8>(type_size(t));
  if (i.size * i.count > 16) d.fail("more than 16 bytes per thread");
  if (i.size == 16) {
    i.fn = load128;
  } else if (i.space == Space::Param) {
    use(d, i, pick_memory<LoadParam>(t, bytes));
  } else {
    use(d, i, pick_memory<Load>(t, bytes));
  }
  yield_if_polling(i);
}

void bind_st(Decoder& d, Inst& i) {
  const Type t = d.type();
  d.arity(2, 3);
  bind_space(d, i);
  d.address(0, i);
  const auto list = vector_operand(d, 1);
  const int bytes = vector_width(d, list, t);
  u32* regs[4] = {&i.d, &i.b, &i.c, &i.e};
  for (std::size_t k = 0; k < list.size(); ++k) *regs[k] = d.src(list[k], bytes);
  i.count = static_cast<u8>(list.size());
  i.size = static_cast<u8>(type_size(t));
  if (i.size * i.count > 16) d.fail("more than 16 bytes per thread");
  if (i.space == Space::Param) d.fail("kernel parameters are read-only");
  use(d, i, i.size == 16 ? store128 : pick_memory<Store>(t, bytes));
}

#define DSK_MEM_TYPES "b8|u8|s8|b16|u16|s16|b32|u32|s32|b64|u64|s64|f32|f64|b128"
#define DSK_HINTS ".{cop}?.{evict}?.{evict}?.L2::cache_hint?.{prefetch}?"
constexpr Entry kEntries[] = {
    {"ld.weak?.{space}?.nc?" DSK_HINTS ".v2|v4?." DSK_MEM_TYPES, bind_ld, "load"},
    {"ld.volatile.{space}?" DSK_HINTS ".v2|v4?." DSK_MEM_TYPES, bind_ld, "load, never cached"},
    {"ld.relaxed|acquire.{scope}.{space}?" DSK_HINTS ".v2|v4?." DSK_MEM_TYPES, bind_ld,
     "load with memory order", 70},
    {"ld.mmio.relaxed.sys.global?." DSK_MEM_TYPES, bind_ld, "load of mapped I/O", 70},
    {"st.weak?.{space}?" DSK_HINTS ".v2|v4?." DSK_MEM_TYPES, bind_st, "store"},
    {"st.volatile.{space}?.v2|v4?." DSK_MEM_TYPES, bind_st, "store, never cached"},
    {"st.relaxed|release.{scope}.{space}?" DSK_HINTS ".v2|v4?." DSK_MEM_TYPES, bind_st,
     "store with memory order", 70},
    {"st.mmio.relaxed.sys.global?." DSK_MEM_TYPES, bind_st, "store to mapped I/O", 70},
};

}  // namespace

std::span<const Entry> memory_entries() { return kEntries; }

}  // namespace dsk::emu::DSK_EMU_LEVEL
