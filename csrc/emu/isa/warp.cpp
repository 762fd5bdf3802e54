// Exchange between the lanes of a warp.
#include "emu/isa/common.hpp"

namespace dsk::emu {
namespace {

void nothing(Warp&, const Inst&, u32) {}

void bind_warp_sync(Decoder& d, Inst& i) {
  d.arity(1);
  i.e = d.src(0, 4);
  i.flags |= kMemberMask;
  i.op = 1;
  i.fn = nothing;
}

enum Shuffle : u8 { kUp, kDown, kBfly, kIdx };

void shfl(Warp& w, const Inst& i, u32 mask) {
  u32 source[kLanes];
  std::memcpy(source, w.reg<u32>(i.a), sizeof source);
  const u32 *b = w.reg<u32>(i.b), *c = w.reg<u32>(i.c);
  u32 result[kLanes];
  u32 in_range = 0;
  each_lane(mask, [&](int l) {
    const int lane_arg = static_cast<int>(b[l] & 31), clamp = static_cast<int>(c[l] & 31);
    const int segment = static_cast<int>(c[l] >> 8 & 31);
    const int max_lane = (l & segment) | (clamp & ~segment), min_lane = l & segment;
    int from;
    bool ok;
    switch (i.op) {
      case kUp:
        from = l - lane_arg, ok = from >= max_lane;
        break;
      case kDown:
        from = l + lane_arg, ok = from <= max_lane;
        break;
      case kBfly:
        from = l ^ lane_arg, ok = from <= max_lane;
        break;
      default:
        from = min_lane | (lane_arg & ~segment), ok = from <= max_lane;
        break;
    }
    if (!ok) from = l;
    if ((i.flags & kMemberMask) && !(mask >> (from & 31) & 1)) {
      // Reading a lane that does not take part gives an undefined value: poison shows it.
      result[l] = (w.active_lanes() >> (from & 31) & 1) ? source[from & 31] : 0xffffffffu;
    } else {
      result[l] = source[from & 31];
    }
    in_range |= static_cast<u32>(ok) << l;
  });
  if (i.d != kNoReg) each_lane(mask, [&](int l) { w.reg<u32>(i.d)[l] = result[l]; });
  if (i.ext != nullptr) set_pred(w, i.ext->r[0], mask, in_range);
}
void bind_shfl(Decoder& d, Inst& i) {
  d.arity(5);
  i.d = d.dst(d.operand(0), 4);
  i.a = d.src(1, 4);
  i.b = d.src(2, 4);
  i.c = d.src(3, 4);
  i.e = d.src(4, 4);
  i.op = d.has("up") ? kUp : d.has("down") ? kDown : d.has("bfly") ? kBfly : kIdx;
  i.flags |= kMemberMask;
  d.ext(i).r[0] = d.second_dst(0, 0);
  i.fn = shfl;
}

enum Vote : u8 { kAll, kAny, kUni, kBallot };

void vote(Warp& w, const Inst& i, u32 mask) {
  const u32 p = (w.pred(i.a) ^ (i.sub ? kFullMask : 0)) & mask;
  if (i.op == kBallot) {
    each_lane(mask, [&](int l) { w.reg<u32>(i.d)[l] = p; });
    return;
  }
  const bool yes = i.op == kAll ? p == mask : i.op == kAny ? p != 0 : (p == 0 || p == mask);
  set_pred(w, i.d, mask, yes ? kFullMask : 0);
}
void bind_vote(Decoder& d, Inst& i) {
  d.arity(3);
  i.op = d.has("all") ? kAll : d.has("any") ? kAny : d.has("uni") ? kUni : kBallot;
  i.d = d.dst(0, i.op == kBallot ? 4 : 0);
  i.a = d.src(1, 0);
  i.sub = d.operand(1).negated;
  i.e = d.src(2, 4);
  i.flags |= kMemberMask;
  i.fn = vote;
}

template <class T>
void match(Warp& w, const Inst& i, u32 mask) {
  T a[kLanes];
  std::memcpy(a, w.reg<T>(i.a), sizeof a);
  u32 everyone = 0;
  const T first = a[std::countr_zero(mask)];
  bool all_equal = true;
  each_lane(mask, [&](int l) { all_equal &= a[l] == first; });
  each_lane(mask, [&](int l) {
    u32 same = 0;
    if (i.op == kAny) {
      each_lane(mask, [&](int k) { same |= static_cast<u32>(a[k] == a[l]) << k; });
    } else {
      same = all_equal ? mask : 0;
      everyone = all_equal ? kFullMask : 0;
    }
    w.reg<u32>(i.d)[l] = same;
  });
  if (i.op == kAll && i.ext != nullptr) set_pred(w, i.ext->r[0], mask, everyone);
}
void bind_match(Decoder& d, Inst& i) {
  d.arity(3);
  const int bytes = type_size(d.type());
  i.op = d.has("any") ? kAny : kAll;
  i.d = d.dst(0, 4);
  if (d.operand(0).paired) d.ext(i).r[0] = d.second_dst(0, 0);
  i.a = d.src(1, bytes);
  i.e = d.src(2, 4);
  i.flags |= kMemberMask;
  i.fn = bytes == 4 ? match<u32> : match<u64>;
}

template <class T>
void redux(Warp& w, const Inst& i, u32 mask) {
  const T* a = w.reg<T>(i.a);
  T r = a[std::countr_zero(mask)];
  each_lane(mask & (mask - 1), [&](int l) {
    switch (i.op) {
      case 0:
        r = static_cast<T>(static_cast<u32>(r) + static_cast<u32>(a[l]));
        break;
      case 1:
        r = a[l] < r ? a[l] : r;
        break;
      case 2:
        r = a[l] > r ? a[l] : r;
        break;
      case 3:
        r &= a[l];
        break;
      case 4:
        r |= a[l];
        break;
      default:
        r ^= a[l];
        break;
    }
  });
  each_lane(mask, [&](int l) { w.reg<T>(i.d)[l] = r; });
}
void bind_redux(Decoder& d, Inst& i) {
  d.arity(3);
  i.d = d.dst(0, 4);
  i.a = d.src(1, 4);
  i.e = d.src(2, 4);
  i.op = d.has("add")   ? 0
         : d.has("min") ? 1
         : d.has("max") ? 2
         : d.has("and") ? 3
         : d.has("or")  ? 4
                        : 5;
  i.flags |= kMemberMask;
  i.fn = d.type() == Type::S32 ? redux<i32> : redux<u32>;
}

void elect(Warp& w, const Inst& i, u32 mask) {
  const u32 leader = static_cast<u32>(std::countr_zero(mask));
  if (i.d != kNoReg) each_lane(mask, [&](int l) { w.reg<u32>(i.d)[l] = leader; });
  set_pred(w, i.b, mask, 1u << leader);
}
void bind_elect(Decoder& d, Inst& i) {
  d.arity(2);
  i.d = d.dst(d.operand(0), 4);
  i.b = d.second_dst(0, 0);
  i.e = d.src(1, 4);
  i.flags |= kMemberMask;
  i.fn = elect;
}

void activemask(Warp& w, const Inst& i, u32 mask) {
  each_lane(mask, [&](int l) { w.reg<u32>(i.d)[l] = mask; });
}
void bind_activemask(Decoder& d, Inst& i) {
  d.arity(1);
  i.d = d.dst(0, 4);
  i.fn = activemask;
}

constexpr Entry kEntries[] = {
    {"bar.warp.sync", bind_warp_sync, "waits for the named lanes"},
    {"shfl.sync.up|down|bfly|idx.b32", bind_shfl, "a value of another lane"},
    {"vote.sync.all|any|uni.pred", bind_vote, "a predicate over lanes"},
    {"vote.sync.ballot.b32", bind_vote, "which lanes hold a predicate"},
    {"match.any|all.sync.b32|b64", bind_match, "which lanes hold the same value", 70},
    {"redux.sync.add|min|max.u32|s32", bind_redux, "reduction over lanes", 80},
    {"redux.sync.and|or|xor.b32", bind_redux, "bitwise reduction over lanes", 80},
    {"elect.sync", bind_elect, "one lane of the named ones", 90},
    {"activemask.b32", bind_activemask, "which lanes run together"},
};

}  // namespace

std::span<const Entry> warp_entries() { return kEntries; }

}  // namespace dsk::emu
