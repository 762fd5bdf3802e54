// Tensor copies through tensor maps, and edits of the maps.
#include <algorithm>

#include "emu/isa/async.hpp"
#include "emu/isa/common.hpp"
#include "emu/num/tensor_map.hpp"

namespace dsk::emu {
namespace {

using Runs = std::shared_ptr<const std::vector<num::TmaRun>>;

num::TensorMapArgs read_map(Warp& w, u64 address, int lane, u64* global) {
  if (address % 64 != 0) {
    fail(w, 1u << lane, "misaligned-access", "a tensor map must be 64-byte aligned");
  }
  const Place p = resolve(w, Space::Generic, address, lane, 64, false);
  resolve(w, Space::Generic, address + 64, lane, 64, false);
  *global = p.space == Space::Global ? address : 0;
  num::TensorMapArgs args;
  std::string why;
  if (!num::decode_tensor_map(p.host, args, why)) {
    fail(w, 1u << lane, "bad-tensor-map", why);
  }
  return args;
}

// Ext: addresses 0 map, 1 shared memory, 2 mbarrier; regs: coordinates; i.c multicast mask.
struct Box {
  u64 map = 0;  // where it is in global memory
  num::TensorMapArgs args;
  Runs runs;
  u32 bytes = 0;
  SharedSpot spot;
};

// All runs must lie in allocations; mostly the whole box lies in one.
void check_global(Warp& w, const std::vector<num::TmaRun>& runs, int lane, bool write) {
  u64 low = ~u64{0}, high = 0;
  for (const num::TmaRun& r : runs) {
    if (r.fill) continue;
    low = std::min(low, r.global);
    high = std::max(high, r.global + r.bytes);
  }
  Allocation range;
  if (low >= high) return;
  if (AddressSpace::instance().find(low, high - low, &range) && !(write && range.read_only)) return;
  for (const num::TmaRun& r : runs) {
    if (!r.fill) global_pointer(w, r.global, r.bytes, 1u << lane, write);
  }
}

Box prepare(Warp& w, const Inst& i, int lane, bool write) {
  const Ext& x = *i.ext;
  Box box;
  box.args = read_map(w, pair_address(w, x, 0, lane), lane, &box.map);
  if (box.args.rank != x.regs.size()) {
    fail(w, 1u << lane, "bad-tensor-map",
         "the map has " + std::to_string(box.args.rank) + " dimensions, the instruction " +
             std::to_string(x.regs.size()));
  }
  box.bytes = num::box_bytes(box.args);
  box.spot = shared_spot(w, pair_address(w, x, 1, lane), lane, box.bytes,
                         num::shared_alignment(box.args), "tensor copy's shared address");
  i32 coords[5] = {};
  for (std::size_t k = 0; k < x.regs.size(); ++k) coords[k] = w.reg<i32>(x.regs[k])[lane];
  auto runs = std::make_shared<std::vector<num::TmaRun>>();
  num::walk_box(box.args, coords, box.spot.offset, *runs);
  check_global(w, *runs, lane, write);
  box.runs = std::move(runs);
  return box;
}

std::vector<Footprint> footprint(const Warp& w, const Box& box, u32 ranks, AccessKind shared,
                                 AccessKind global) {
  std::vector<Footprint> out;
  if (!watched(w)) return out;
  for (u32 r = ranks; r != 0; r &= r - 1) {
    out.push_back(
        {shared, Space::Shared, static_cast<u32>(std::countr_zero(r)), box.spot.offset, box.bytes});
  }
  for (const num::TmaRun& r : *box.runs) {
    if (r.fill) continue;
    const bool joins =
        out.back().space == Space::Global && out.back().address + out.back().bytes == r.global;
    if (joins)
      out.back().bytes += r.bytes;
    else
      out.push_back({global, Space::Global, 0, r.global, r.bytes});
  }
  return out;
}

void tensor_load(Warp& w, const Inst& i, u32 mask) {
  const Ext& x = *i.ext;
  each_lane(mask, [&](int l) {
    const Box box = prepare(w, i, l, false);
    const SharedSpot bar = shared_spot(w, pair_address(w, x, 2, l), l, 8, 8, "mbarrier");
    const bool multicast = i.c != kNoReg;
    const u32 ranks = multicast ? w.reg<u16>(i.c)[l] : 1u << box.spot.rank;
    for (u32 r = ranks; r != 0; r &= r - 1) {
      check_multicast(w, static_cast<u32>(std::countr_zero(r)), box.spot.offset, box.bytes, l);
    }
    const u32 pc = w.current_pc;
    issue_async(
        w, static_cast<u32>(l), AsyncKind::TensorLoad, box.bytes,
        footprint(w, box, ranks, AccessKind::Write, AccessKind::Read),
        [box](AsyncOp& op) {
          op.buffer.resize(box.bytes);
          u8* to = op.buffer.data();
          for (const num::TmaRun& r : *box.runs) {
            if (r.fill)
              num::write_fill(box.args, to, r.bytes);
            else
              std::memcpy(to, reinterpret_cast<const u8*>(r.global), r.bytes);
            to += r.bytes;
          }
        },
        [&w, box, bar, ranks, multicast, l, pc](AsyncOp& op) {
          w.current_pc = pc;
          for (u32 m = ranks; m != 0; m &= m - 1) {
            const u32 rank = static_cast<u32>(std::countr_zero(m));
            u8* base = shared_bytes(w, {rank, box.spot.offset});
            const u8* from = op.buffer.data();
            for (const num::TmaRun& r : *box.runs) {
              std::memcpy(base + static_cast<i32>(r.shared), from, r.bytes);
              from += r.bytes;
            }
            complete_bytes(w, multicast ? rank : bar.rank, bar.offset, box.bytes, l,
                           "cp.async.bulk.tensor");
          }
        },
        box.map);
  });
}

Type element_type(num::TmaType t) {
  switch (t) {
    case num::TmaType::u8:
      return Type::U8;
    case num::TmaType::u16:
      return Type::U16;
    case num::TmaType::u32:
      return Type::U32;
    case num::TmaType::s32:
      return Type::S32;
    case num::TmaType::u64:
      return Type::U64;
    case num::TmaType::s64:
      return Type::S64;
    case num::TmaType::f16:
      return Type::F16;
    case num::TmaType::bf16:
      return Type::BF16;
    case num::TmaType::f64:
      return Type::F64;
    default:
      return Type::F32;
  }
}

// Whether a lower lane stores the same box. The hardware's instruction is the warp's, not the
// lane's: libraries let a whole warp execute a store that it makes once.
bool stored_by_lower_lane(Warp& w, const Ext& x, u32 mask, int lane) {
  bool same = false;
  each_lane(mask & ((1u << lane) - 1), [&](int l) {
    bool equal = pair_address(w, x, 0, l) == pair_address(w, x, 0, lane) &&
                 pair_address(w, x, 1, l) == pair_address(w, x, 1, lane);
    for (u32 r : x.regs) equal &= w.reg<i32>(r)[l] == w.reg<i32>(r)[lane];
    same |= equal;
  });
  return same;
}

// sub: 1 = reduction, op the operation.
void tensor_store(Warp& w, const Inst& i, u32 mask) {
  each_lane(mask, [&](int l) {
    if (i.sub == 0 && stored_by_lower_lane(w, *i.ext, mask, l)) return;
    const Box box = prepare(w, i, l, true);
    const bool reduce = i.sub != 0;
    const u8 op_code = i.op;
    if (reduce && type_size(element_type(box.args.type)) == 1) {
      fail(w, 1u << l, "bad-tensor-map", "reductions need elements of at least 16 bits");
    }
    w.bulk.open.push_back(issue_async(
        w, static_cast<u32>(l), reduce ? AsyncKind::TensorReduce : AsyncKind::TensorStore,
        box.bytes,
        footprint(w, box, 1u << box.spot.rank, AccessKind::Read,
                  reduce ? AccessKind::ReadWrite : AccessKind::Write),
        [&w, box](AsyncOp& op) {
          op.buffer.resize(box.bytes);
          const u8* base = shared_bytes(w, box.spot);
          u8* to = op.buffer.data();
          for (const num::TmaRun& r : *box.runs) {
            std::memcpy(to, base + static_cast<i32>(r.shared), r.bytes);
            to += r.bytes;
          }
        },
        [box, reduce, op_code](AsyncOp& op) {
          const u8* from = op.buffer.data();
          for (const num::TmaRun& r : *box.runs) {
            u8* to = reinterpret_cast<u8*>(r.global);
            if (!r.fill && reduce) {
              reduce_bytes(to, from, r.bytes, element_type(box.args.type), op_code);
            } else if (!r.fill) {
              std::memcpy(to, from, r.bytes);
            }
            from += r.bytes;
          }
        },
        box.map));
  });
}

void nothing(Warp&, const Inst&, u32) {}

// [map, {coordinates}]
void bind_map(Decoder& d, Ext& x, const ptx::Operand& o) {
  bind_pair_address(d, x, 0, o);
  if (o.list.size() != 1) d.fail("expected [map, {coordinates}]");
  const auto& coords = o.list[0];
  const std::vector<ptx::Operand> list =
      coords.kind == ptx::Operand::Kind::Vector ? coords.list : std::vector<ptx::Operand>{coords};
  std::size_t rank = 0;
  for (const std::string& m : d.in().modifiers) {
    if (m.size() == 2 && m[1] == 'd') rank = static_cast<std::size_t>(m[0] - '0');
  }
  if (list.size() != rank) {
    d.fail("expected " + std::to_string(rank) + " coordinates, got " + std::to_string(list.size()));
  }
  for (const auto& c : list) x.regs.push_back(d.src(c, 4));
}

void bind_tensor_load(Decoder& d, Inst& i) {
  const bool multicast = d.has("multicast::cluster"), hint = d.has("L2::cache_hint");
  d.arity(3u + multicast + hint);
  Ext& x = d.ext(i);
  bind_map(d, x, d.operand(1));
  bind_pair_address(d, x, 1, d.operand(0));
  bind_pair_address(d, x, 2, d.operand(2));
  if (multicast) i.c = d.src(3, 2);
  i.fn = tensor_load;
}
void bind_tensor_store(Decoder& d, Inst& i) {
  d.arity(2u + d.has("L2::cache_hint"));
  Ext& x = d.ext(i);
  bind_map(d, x, d.operand(0));
  bind_pair_address(d, x, 1, d.operand(1));
  i.sub = d.has("reduce");
  if (i.sub) i.op = reduce_op(d);
  i.fn = tensor_store;
}
void bind_tensor_reduce(Decoder& d, Inst& i) {
  bind_tensor_store(d, i);
  i.sub = 1;
  i.op = reduce_op(d);
}
void bind_prefetch(Decoder& d, Inst& i) {
  d.arity(1, 3);
  Ext& x = d.ext(i);
  if (d.has("tensor"))
    bind_map(d, x, d.operand(0));
  else
    bind_pair_address(d, x, 0, d.operand(0));
  i.fn = nothing;
}

// --- tensormap.replace
struct Field {
  const char* name;
  num::MapField field;
};
constexpr Field kFields[] = {
    {"global_address", num::MapField::global_address},
    {"rank", num::MapField::rank},
    {"box_dim", num::MapField::box_dim},
    {"global_dim", num::MapField::global_dim},
    {"global_stride", num::MapField::global_stride},
    {"element_stride", num::MapField::element_stride},
    {"elemtype", num::MapField::elemtype},
    {"interleave_layout", num::MapField::interleave_layout},
    {"swizzle_mode", num::MapField::swizzle_mode},
    {"fill_mode", num::MapField::fill_mode},
};

void replace(Warp& w, const Inst& i, u32 mask) {
  each_lane(mask, [&](int l) {
    const u64 address = lane_address(w, i, l);
    Place p = resolve(w, i.space, address, l, 64, true);
    resolve(w, i.space, address + 64, l, 64, true);
    const u64 value = i.size == 8 ? w.reg<u64>(i.b)[l] : w.reg<u32>(i.b)[l];
    const std::string why =
        num::replace_field(p.host, static_cast<num::MapField>(i.op), i.sub, value);
    if (!why.empty()) fail(w, 1u << l, "bad-tensor-map", why);
    ++w.cta->cluster->changes;
    if (watched(w)) {
      Place places[kLanes];
      places[l] = p;
      observe(w, i, 1u << l, AccessKind::Write, 128, places, false);
    }
  });
}
void bind_replace(Decoder& d, Inst& i) {
  bind_space(d, i);
  bool ordinal = false;
  for (const Field& f : kFields) {
    if (!d.has(f.name)) continue;
    i.op = static_cast<u8>(f.field);
    const std::string name = f.name;
    ordinal = name.ends_with("_dim") || name.ends_with("_stride");
  }
  d.arity(ordinal ? 3 : 2);
  d.address(0, i);
  if (ordinal) i.sub = static_cast<u8>(d.immediate(1));
  i.size = static_cast<u8>(type_size(d.type()));
  i.b = d.src(ordinal ? 2 : 1, i.size);
  i.fn = replace;
}

void cp_fenceproxy(Warp& w, const Inst& i, u32 mask) {
  const Ext& x = *i.ext;
  const int l = std::countr_zero(mask);  // every lane names the same objects
  const SharedSpot from = shared_spot(w, pair_address(w, x, 1, l), l, 128, 16, "tensor map");
  const u64 to = pair_address(w, x, 0, l);
  u8* host = global_pointer(w, to, 128, 1u << l, true);
  if (watched(w)) {
    Place places[kLanes];
    places[l] = {w.cta->cluster->ctas[from.rank]->shared + from.offset, Space::Shared, from.rank,
                 from.offset};
    observe(w, i, 1u << l, AccessKind::Read, 128, places, false);
    places[l] = {host, Space::Global, 0, to};
    observe(w, i, 1u << l, AccessKind::Write, 128, places, false);
  }
  std::memcpy(host, shared_bytes(w, from), 128);
  ++w.cta->cluster->changes;
  notify(w, SyncKind::FenceProxyTensorMap, mask);
}
void bind_cp_fenceproxy(Decoder& d, Inst& i) {
  d.arity(3);
  Ext& x = d.ext(i);
  bind_pair_address(d, x, 0, d.operand(0));
  bind_pair_address(d, x, 1, d.operand(1));
  if (d.immediate(2) != 128) d.fail("the size must be 128");
  i.flags |= kAligned;
  i.fn = cp_fenceproxy;
}

#define DSK_DIMS "1d|2d|3d|4d|5d"
constexpr Entry kEntries[] = {
    {"cp.async.bulk.tensor." DSK_DIMS
     ".shared::cluster|shared::cta.global.tile?.mbarrier::complete_tx::bytes."
     "multicast::cluster?.L2::cache_hint?",
     bind_tensor_load, "box of a tensor, global to shared", 90},
    {"cp.async.bulk.tensor." DSK_DIMS ".global.shared::cta.tile?.bulk_group.L2::cache_hint?",
     bind_tensor_store, "box of a tensor, shared to global", 90},
    {"cp.reduce.async.bulk.tensor." DSK_DIMS
     ".global.shared::cta.add|min|max|inc|dec|and|or|xor.tile?.bulk_group.L2::cache_hint?",
     bind_tensor_reduce, "reduction of a box into a tensor", 90},
    {"cp.async.bulk.prefetch.tensor." DSK_DIMS ".L2.global.tile?.L2::cache_hint?", bind_prefetch,
     "no effect", 90},
    {"cp.async.bulk.prefetch.L2.global.L2::cache_hint?", bind_prefetch, "no effect", 90},
    {"tensormap.replace.tile.global_address|rank|box_dim|global_dim|global_stride|element_stride|"
     "elemtype|interleave_layout|swizzle_mode|fill_mode.global|shared::cta?.b1024.b32|b64",
     bind_replace, "edits one field of a tensor map", 90},
    {"tensormap.cp_fenceproxy.global.shared::cta.tensormap::generic.release.cta|cluster|gpu|sys."
     "sync.aligned",
     bind_cp_fenceproxy, "copies a map out and publishes it", 90},
};

}  // namespace

std::span<const Entry> tensor_entries() { return kEntries; }

}  // namespace dsk::emu
