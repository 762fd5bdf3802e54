// Addresses: windows, ranks, and the cache hints that the machine checks and ignores.
#include "emu/isa/common.hpp"

namespace dsk::emu {
namespace {

void nothing(Warp&, const Inst&, u32) {}

// imm: the window; op: 1 to the window, 2 parameter space.
void cvta(Warp& w, const Inst& i, u32 mask) {
  const u64 base =
      i.op & 2 ? reinterpret_cast<u64>(w.cta->cluster->grid->params) : static_cast<u64>(i.imm);
  each_lane(mask, [&](int l) {
    const u64 a = read_wide(w, i.a, i.flags & kAddress64, l);
    const u64 r = i.op & 1 ? a - base : a + base;
    if (i.size == 8)
      w.reg<u64>(i.d)[l] = r;
    else
      w.reg<u32>(i.d)[l] = static_cast<u32>(r);
  });
}
void bind_cvta(Decoder& d, Inst& i) {
  d.arity(2);
  bind_space(d, i);
  i.imm = i.space == Space::Shared || i.space == Space::SharedCluster
              ? static_cast<i64>(kSharedWindow)
          : i.space == Space::Local ? static_cast<i64>(kLocalWindow)
                                    : 0;
  i.op = static_cast<u8>(d.has("to") | (i.space == Space::Param ? 2 : 0));
  i.size = static_cast<u8>(type_size(d.type()));
  if (i.size == 4 && i.imm != 0) d.fail("32-bit generic addresses are not supported");
  i.d = d.dst(0, i.size);
  const int bytes = d.is_register(1) ? d.register_bytes(d.operand(1)) : i.size;
  i.a = d.src(1, bytes);
  if (bytes == 8) i.flags |= kAddress64;
  i.fn = cvta;
}

void mapa(Warp& w, const Inst& i, u32 mask) {
  const Cluster& cluster = *w.cta->cluster;
  each_lane(mask, [&](int l) {
    const u64 a = read_wide(w, i.a, i.size == 8, l);
    const u32 rank = w.reg<u32>(i.b)[l];
    if (rank >= cluster.ctas.size()) {
      fail(w, 1u << l, "bad-cluster-rank",
           "rank " + std::to_string(rank) + " in a cluster of " +
               std::to_string(cluster.ctas.size()));
    }
    const u64 r = (a & ~(u64{0xff} << kRankShift)) | u64{rank} << kRankShift;
    if (i.size == 8)
      w.reg<u64>(i.d)[l] = r;
    else
      w.reg<u32>(i.d)[l] = static_cast<u32>(r);
  });
}
void bind_mapa(Decoder& d, Inst& i) {
  d.arity(3);
  i.size = static_cast<u8>(type_size(d.type()));
  i.d = d.dst(0, i.size);
  i.a = d.src(1, i.size);
  i.b = d.src(2, 4);
  i.fn = mapa;
}

void getctarank(Warp& w, const Inst& i, u32 mask) {
  each_lane(mask, [&](int l) {
    w.reg<u32>(i.d)[l] = static_cast<u32>(read_wide(w, i.a, i.size == 8, l)) >> kRankShift;
  });
}
void bind_getctarank(Decoder& d, Inst& i) {
  d.arity(2);
  i.size = static_cast<u8>(type_size(d.type()));
  i.d = d.dst(0, 4);
  i.a = d.src(1, i.size);
  i.fn = getctarank;
}

void isspacep(Warp& w, const Inst& i, u32 mask) {
  const u64 params = reinterpret_cast<u64>(w.cta->cluster->grid->params);
  const u32 param_bytes = w.cta->cluster->grid->program->param_bytes;
  u32 hit = 0;
  each_lane(mask, [&](int l) {
    const u64 a = read_wide(w, i.a, i.flags & kAddress64, l);
    const u64 window = a >> kWindowShift;
    bool yes = false;
    switch (i.space) {
      case Space::Shared:
        yes = window == 1 && static_cast<u32>(a) >> kRankShift == w.cta->rank;
        break;
      case Space::SharedCluster:
        yes = window == 1;
        break;
      case Space::Local:
        yes = window == 2;
        break;
      case Space::Param:
        yes = a >= params && a < params + param_bytes;
        break;
      case Space::Const:
        yes = false;
        break;
      default:
        yes = window == 0;
        break;
    }
    hit |= static_cast<u32>(yes) << l;
  });
  set_pred(w, i.d, mask, hit);
}
void bind_isspacep(Decoder& d, Inst& i) {
  d.arity(2);
  bind_space(d, i);
  i.d = d.dst(0, 0);
  const int bytes = d.register_bytes(d.operand(1));
  i.a = d.src(1, bytes == 4 ? 4 : 8);
  if (bytes != 4) i.flags |= kAddress64;
  i.fn = isspacep;
}

// A cache policy is an opaque number.
void createpolicy(Warp& w, const Inst& i, u32 mask) {
  each_lane(mask, [&](int l) { w.reg<u64>(i.d)[l] = 0x12f0000000000000ull; });
}
void bind_createpolicy(Decoder& d, Inst& i) {
  d.arity(1, 4);
  i.d = d.dst(0, 8);
  i.fn = createpolicy;
}

// Hints: the address is decoded so that nonsense is refused, and nothing happens.
void bind_prefetch(Decoder& d, Inst& i) {
  d.arity(1, 2);
  bind_space(d, i);
  i.space = Space::Generic;
  d.address(0, i);
  i.fn = nothing;
}

constexpr Entry kEntries[] = {
    {"cvta.global|shared|shared::cta|shared::cluster|local|const|param|param::entry.u32|u64",
     bind_cvta, "to a generic address"},
    {"cvta.to.global|shared|shared::cta|shared::cluster|local|const|param|param::entry.u32|u64",
     bind_cvta, "from a generic address"},
    {"mapa.shared::cluster?.u32|u64", bind_mapa, "the same variable in another CTA", 90},
    {"getctarank.shared::cluster?.u32|u64", bind_getctarank, "whose shared memory it is", 90},
    {"isspacep.global|shared|shared::cta|shared::cluster|local|const|param|param::entry",
     bind_isspacep, "which window a generic address is in"},
    {"createpolicy.fractional.{evict}.{evict}?.b64", bind_createpolicy, "an opaque number", 80},
    {"createpolicy.range.global?.{evict}.{evict}?.b64", bind_createpolicy, "an opaque number", 80},
    {"createpolicy.cvt.L2.b64", bind_createpolicy, "an opaque number", 80},
    {"prefetch.global|local?.L1|L2", bind_prefetch, "no effect"},
    {"prefetch.global.L2::evict_last|L2::evict_normal", bind_prefetch, "no effect", 80},
    {"prefetch.const|param?.tensormap", bind_prefetch, "no effect", 90},
    {"prefetchu.L1", bind_prefetch, "no effect"},
    {"discard.global?.L2", bind_prefetch, "no effect", 80},
    {"applypriority.global?.L2::evict_normal", bind_prefetch, "no effect", 80},
};

}  // namespace

std::span<const Entry> address_entries() { return kEntries; }

}  // namespace dsk::emu
