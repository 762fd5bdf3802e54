// How a handler works on 32 lanes. The files that include this are compiled once per host
// instruction set, each time in a namespace of its own (DSK_EMU_LEVEL); see
// csrc/emu/CMakeLists.txt.
#pragma once

#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <span>
#include <type_traits>

#include "emu/decode.hpp"
#include "emu/machine.hpp"
#include "emu/table.hpp"

#ifndef DSK_EMU_LEVEL
#error "DSK_EMU_LEVEL names the host instruction set this file is compiled for"
#endif

#define DSK_LANE_INLINE inline __attribute__((always_inline))

namespace dsk::emu::DSK_EMU_LEVEL {

// d[l] = f(l) for the lanes of `mask`. A full warp is one straight vector loop; a partial one
// visits its lanes, which is also the fast way for the single lane of a producer warp. `d` may be
// the same register as a source of equal width, never a shifted one: hence ivdep.
template <class T, class F>
DSK_LANE_INLINE void map_lanes(T* d, u32 mask, F f) {
  if (mask == kFullMask) {
#pragma GCC ivdep
    for (int l = 0; l < kLanes; ++l) d[l] = f(l);
  } else {
    for (u32 m = mask; m != 0; m &= m - 1) {
      const int l = std::countr_zero(m);
      d[l] = f(l);
    }
  }
}

// The mask of lanes for which f holds. Lanes outside `mask` may or may not be computed.
template <class F>
DSK_LANE_INLINE u32 mask_lanes(u32 mask, F f) {
  u32 result = 0;
  if (mask == kFullMask) {
    // A byte per lane first: compilers turn this into compares, and the second loop into a
    // movemask.
    alignas(64) u8 flag[kLanes];
#pragma GCC ivdep
    for (int l = 0; l < kLanes; ++l) flag[l] = f(l) ? 1 : 0;
    for (int group = 0; group < 4; ++group) {
      u64 bytes;
      std::memcpy(&bytes, flag + 8 * group, 8);
      result |= static_cast<u32>((bytes * 0x0102040810204080ull) >> 56) << (8 * group);
    }
    return result;
  }
  for (u32 m = mask; m != 0; m &= m - 1) {
    const int l = std::countr_zero(m);
    result |= static_cast<u32>(f(l)) << l;
  }
  return result;
}

DSK_LANE_INLINE void write_pred(Warp& w, u32 offset, u32 mask, u32 value) {
  if (offset == kNoReg) return;
  u32& p = w.pred(offset);
  p = (p & ~mask) | (value & mask);
}

// Calls `H<T>::run` for the integer type named by a PTX type.
template <template <class> class H>
Handler pick_int(Type t) {
  switch (t) {
    case Type::S16:
      return H<i16>::run;
    case Type::U16:
    case Type::B16:
      return H<u16>::run;
    case Type::S32:
      return H<i32>::run;
    case Type::U32:
    case Type::B32:
      return H<u32>::run;
    case Type::S64:
      return H<i64>::run;
    case Type::U64:
    case Type::B64:
      return H<u64>::run;
    default:
      return nullptr;
  }
}

// The same where signedness makes no difference.
template <template <class> class H>
Handler pick_bits(Type t) {
  switch (type_size(t)) {
    case 1:
      return H<u8>::run;
    case 2:
      return H<u16>::run;
    case 4:
      return H<u32>::run;
    case 8:
      return H<u64>::run;
    default:
      return nullptr;
  }
}

template <class Op>
struct Unary {
  template <class T>
  struct On {
    static void run(Warp& w, const Inst& i, u32 mask) {
      const T* a = w.reg<T>(i.a);
      map_lanes(w.reg<T>(i.d), mask, [&](int l) { return Op::template f<T>(a[l]); });
    }
  };
};

template <class Op>
struct Binary {
  template <class T>
  struct On {
    static void run(Warp& w, const Inst& i, u32 mask) {
      const T* a = w.reg<T>(i.a);
      const T* b = w.reg<T>(i.b);
      map_lanes(w.reg<T>(i.d), mask, [&](int l) { return Op::template f<T>(a[l], b[l]); });
    }
  };
};

template <class Op>
struct Ternary {
  template <class T>
  struct On {
    static void run(Warp& w, const Inst& i, u32 mask) {
      const T* a = w.reg<T>(i.a);
      const T* b = w.reg<T>(i.b);
      const T* c = w.reg<T>(i.c);
      map_lanes(w.reg<T>(i.d), mask, [&](int l) { return Op::template f<T>(a[l], b[l], c[l]); });
    }
  };
};

// Binds d, a, b, c of equal width, as many as the instruction has.
inline void bind_same(Decoder& d, Inst& i, int bytes, std::size_t sources) {
  d.arity(sources + 1);
  i.d = d.dst(0, bytes);
  i.a = d.src(1, bytes);
  if (sources > 1) i.b = d.src(2, bytes);
  if (sources > 2) i.c = d.src(3, bytes);
}

inline void use(Decoder& d, Inst& i, Handler h) {
  if (h == nullptr) d.fail("unsupported type");
  i.fn = h;
}

std::span<const Entry> integer_entries();
std::span<const Entry> logic_entries();
std::span<const Entry> compare_entries();
std::span<const Entry> float_entries();
std::span<const Entry> convert_entries();
std::span<const Entry> memory_entries();

}  // namespace dsk::emu::DSK_EMU_LEVEL
