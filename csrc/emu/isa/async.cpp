// Asynchronous copies without tensor maps: cp.async, cp.async.bulk, cp.reduce.async.bulk, st.async.
#include "emu/isa/async.hpp"

#include <algorithm>

#include "emu/isa/common.hpp"
#include "emu/num/convert.hpp"

namespace dsk::emu {

void complete_bytes(Warp& w, u32 rank, u32 offset, u64 bytes, int lane, const char* what) {
  Cta& cta = *w.cta->cluster->ctas[rank];
  Mbarrier& b = mbarrier_at(w, cta, offset, 1u << lane, what);
  for (auto& o : w.cta->cluster->observers) o->on_complete_tx(rank, offset);
  mbarrier_update(w, cta, b, 0, 0, static_cast<i64>(bytes), 1u << lane, what);
}

SharedSpot shared_spot(Warp& w, u64 address, int lane, u32 bytes, u32 align, const char* what) {
  SharedSpot s;
  s.rank = shared_owner(w, static_cast<u32>(address), lane, bytes, align, what, &s.offset).rank;
  return s;
}

u8* shared_bytes(Warp& w, const SharedSpot& s) {
  return w.cta->cluster->ctas[s.rank]->shared + s.offset;
}

u64 pair_address(Warp& w, const Ext& x, int which, int lane) {
  return read_wide(w, x.r[which], x.v[which] & 1, lane) + static_cast<u64>(x.v[which] >> 1);
}

void bind_pair_address(Decoder& d, Ext& x, int which, const ptx::Operand& o) {
  i64 displacement;
  bool wide;
  x.r[which] = d.address_register(o, &displacement, &wide);
  x.v[which] = displacement * 2 + (wide ? 1 : 0);
}

namespace {

// --- cp.async: 4, 8 or 16 bytes per thread, zero-filled behind src-size
void cp_async(Warp& w, const Inst& i, u32 mask) {
  const Ext& x = *i.ext;
  each_lane(mask, [&](int l) {
    const SharedSpot to = shared_spot(w, pair_address(w, x, 0, l), l, i.size, i.size, "cp.async");
    const u64 from = pair_address(w, x, 1, l);
    u32 valid = i.size;
    if (i.b != kNoReg) valid = std::min<u32>(w.reg<u32>(i.b)[l], i.size);
    if (i.c != kNoReg && (w.pred(i.c) >> l & 1)) valid = 0;  // ignore-src
    if (from % i.size != 0) fail(w, 1u << l, "misaligned-access", "cp.async source");
    const u8* host = valid == 0 ? nullptr : global_pointer(w, from, valid, 1u << l, false);
    const std::vector<Footprint> footprint = {
        {AccessKind::Read, Space::Global, 0, from, valid},
        {AccessKind::Write, Space::Shared, to.rank, to.offset, i.size}};
    const u32 size = i.size;
    w.cp_async.open.push_back(issue_async(
        w, static_cast<u32>(l), AsyncKind::CpAsync, size, footprint,
        [host, valid, size](AsyncOp& op) {
          op.buffer.assign(size, 0);
          if (valid != 0) std::memcpy(op.buffer.data(), host, valid);
        },
        [&w, to](AsyncOp& op) {
          std::memcpy(shared_bytes(w, to), op.buffer.data(), op.buffer.size());
        }));
  });
}
void bind_cp_async(Decoder& d, Inst& i) {
  const std::size_t hint = d.has("L2::cache_hint") ? 1 : 0;
  d.arity(3 + hint, 4 + hint);
  Ext& x = d.ext(i);
  bind_pair_address(d, x, 0, d.operand(0));
  bind_pair_address(d, x, 1, d.operand(1));
  const u64 size = d.immediate(2);
  if (size != 16 && ((size != 4 && size != 8) || d.has("cg"))) {
    d.fail("copy size must be 4, 8 or 16 (.cg: 16), got " + std::to_string(size));
  }
  i.size = static_cast<u8>(size);
  if (d.operands() > 3 + hint) {
    const bool ignore = d.register_bytes(d.operand(3)) == 0;
    if (ignore)
      i.c = d.src(3, 0);
    else
      i.b = d.src(3, 4);
  }
  i.fn = cp_async;
}

void cp_commit(Warp& w, const Inst& i, u32 mask) {
  w.cp_async.commit(mask);
  notify(w, SyncKind::CpAsyncCommit, mask);
}
Step cp_wait(Warp& w, const Inst& i, u32 mask, Split& s) {
  const u64 pending = static_cast<u64>(i.imm);
  if (i.op != 0 && !w.cp_async.open.empty()) {  // wait_all closes the group itself
    w.cp_async.commit(mask);
    notify(w, SyncKind::CpAsyncCommit, mask);
  }
  if (w.cp_async.reached(mask, pending, AsyncOp::Stage::Done)) {
    notify(w, SyncKind::CpAsyncWait, mask, pending);
    return Step::Next;
  }
  s.wait = Wait::CpAsync;
  s.value = pending;
  return Step::Wait;
}
void bind_cp_commit(Decoder& d, Inst& i) {
  d.arity(0);
  i.fn = cp_commit;
}
void bind_cp_wait(Decoder& d, Inst& i) {
  d.arity(d.has("wait_all") ? 0 : 1);
  i.op = d.has("wait_all");
  i.imm = i.op ? 0 : static_cast<i64>(d.immediate(0));
  make_blocking(i, cp_wait);
}

// Arrives once the thread's copies so far are done; without .noinc the count grows by one first.
void cp_mbarrier(Warp& w, const Inst& i, u32 mask) {
  each_lane(mask, [&](int l) {
    const SharedSpot at =
        shared_spot(w, lane_address(w, i, l), l, 8, 8, "cp.async.mbarrier.arrive");
    Cta& cta = *w.cta->cluster->ctas[at.rank];
    Mbarrier& b = mbarrier_at(w, cta, at.offset, 1u << l, "cp.async.mbarrier.arrive");
    if (i.op == 0) mbarrier_update(w, cta, b, -1, 0, 0, 1u << l, "cp.async.mbarrier.arrive");
    std::vector<AsyncPtr> before;
    for (const AsyncPtr& op : w.cp_async.open) {
      if (op->info.lane == static_cast<u32>(l)) before.push_back(op);
    }
    for (const AsyncGroup& g : w.cp_async.committed) {
      for (const AsyncPtr& op : g.ops) {
        if (op->info.lane == static_cast<u32>(l)) before.push_back(op);
      }
    }
    // An operation of its own that completes after the others.
    const u32 pc = w.current_pc;
    issue_async(
        w, static_cast<u32>(l), AsyncKind::CpAsync, 0, {},
        [before](AsyncOp&) {
          for (const AsyncPtr& op : before) {
            if (op->stage == AsyncOp::Stage::Issued)
              op->read(*op), op->stage = AsyncOp::Stage::Read;
            if (op->stage == AsyncOp::Stage::Read) op->write(*op), op->stage = AsyncOp::Stage::Done;
          }
        },
        [&w, at, l, pc](AsyncOp&) {
          w.current_pc = pc;
          Cta& owner = *w.cta->cluster->ctas[at.rank];
          Mbarrier& bar = mbarrier_at(w, owner, at.offset, 1u << l, "cp.async.mbarrier.arrive");
          notify(w, SyncKind::MbarArrive, 1u << l, at.rank, at.offset, bar.phase);
          mbarrier_update(w, owner, bar, 1, 0, 0, 1u << l, "cp.async.mbarrier.arrive");
        });
  });
}
void bind_cp_mbarrier(Decoder& d, Inst& i) {
  d.arity(1);
  bind_space(d, i);
  d.address(0, i);
  i.op = d.has("noinc");
  i.fn = cp_mbarrier;
}

// --- bulk copies. ext addresses: 0 destination, 1 source, 2 mbarrier; i.b size; i.c multicast
// mask.
u32 bulk_size(Warp& w, const Inst& i, int l) {
  const u32 bytes = w.reg<u32>(i.b)[l];
  if (bytes % 16 != 0) {
    fail(w, 1u << l, "misaligned-access",
         "bulk size " + std::to_string(bytes) + " is not a multiple of 16");
  }
  return bytes;
}

const u8* bulk_source(Warp& w, u64 address, u32 bytes, int l) {
  if (address % 16 != 0)
    fail(w, 1u << l, "misaligned-access", "bulk source must be 16-byte aligned");
  return bytes == 0 ? nullptr : global_pointer(w, address, bytes, 1u << l, false);
}

void bulk_load(Warp& w, const Inst& i, u32 mask) {
  const Ext& x = *i.ext;
  each_lane(mask, [&](int l) {
    const u32 bytes = bulk_size(w, i, l);
    const u64 from = pair_address(w, x, 1, l);
    const u8* host = bulk_source(w, from, bytes, l);
    const SharedSpot first =
        shared_spot(w, pair_address(w, x, 0, l), l, bytes, 16, "bulk destination");
    const SharedSpot bar = shared_spot(w, pair_address(w, x, 2, l), l, 8, 8, "mbarrier");
    const u32 ranks = i.c == kNoReg ? 1u << first.rank : w.reg<u16>(i.c)[l];
    std::vector<Footprint> footprint = {{AccessKind::Read, Space::Global, 0, from, bytes}};
    for (u32 r = ranks; r != 0; r &= r - 1) {
      const u32 rank = static_cast<u32>(std::countr_zero(r));
      check_multicast(w, rank, first.offset, bytes, l);
      footprint.push_back({AccessKind::Write, Space::Shared, rank, first.offset, bytes});
    }
    const u32 pc = w.current_pc;
    const bool multicast = i.c != kNoReg;
    issue_async(
        w, static_cast<u32>(l), AsyncKind::BulkLoad, bytes, footprint,
        [host, bytes](AsyncOp& op) { op.buffer.assign(host, host + bytes); },
        [&w, first, bar, ranks, bytes, l, pc, multicast](AsyncOp& op) {
          w.current_pc = pc;
          for (u32 r = ranks; r != 0; r &= r - 1) {
            const u32 rank = static_cast<u32>(std::countr_zero(r));
            if (bytes != 0)
              std::memcpy(shared_bytes(w, {rank, first.offset}), op.buffer.data(), bytes);
            complete_bytes(w, multicast ? rank : bar.rank, bar.offset, bytes, l, "cp.async.bulk");
          }
        });
  });
}

void bulk_cluster(Warp& w, const Inst& i, u32 mask) {
  const Ext& x = *i.ext;
  each_lane(mask, [&](int l) {
    const u32 bytes = bulk_size(w, i, l);
    const SharedSpot to =
        shared_spot(w, pair_address(w, x, 0, l), l, bytes, 16, "bulk destination");
    const SharedSpot from = shared_spot(w, pair_address(w, x, 1, l), l, bytes, 16, "bulk source");
    const SharedSpot bar = shared_spot(w, pair_address(w, x, 2, l), l, 8, 8, "mbarrier");
    const std::vector<Footprint> footprint = {
        {AccessKind::Read, Space::Shared, from.rank, from.offset, bytes},
        {AccessKind::Write, Space::Shared, to.rank, to.offset, bytes}};
    const u32 pc = w.current_pc;
    issue_async(
        w, static_cast<u32>(l), AsyncKind::BulkCluster, bytes, footprint,
        [&w, from, bytes](AsyncOp& op) {
          op.buffer.assign(shared_bytes(w, from), shared_bytes(w, from) + bytes);
        },
        [&w, to, bar, bytes, l, pc](AsyncOp& op) {
          w.current_pc = pc;
          std::memcpy(shared_bytes(w, to), op.buffer.data(), bytes);
          complete_bytes(w, bar.rank, bar.offset, bytes, l, "cp.async.bulk");
        });
  });
}

void bulk_store(Warp& w, const Inst& i, u32 mask) {
  const Ext& x = *i.ext;
  each_lane(mask, [&](int l) {
    const u32 bytes = bulk_size(w, i, l);
    const u64 to = pair_address(w, x, 0, l);
    if (to % 16 != 0)
      fail(w, 1u << l, "misaligned-access", "bulk destination must be 16-byte aligned");
    const SharedSpot from = shared_spot(w, pair_address(w, x, 1, l), l, bytes, 16, "bulk source");
    u8* host = bytes == 0 ? nullptr : global_pointer(w, to, bytes, 1u << l, true);
    const bool reduce = x.type != Type::None;
    const std::vector<Footprint> footprint = {
        {AccessKind::Read, Space::Shared, from.rank, from.offset, bytes},
        {reduce ? AccessKind::ReadWrite : AccessKind::Write, Space::Global, 0, to, bytes}};
    const Type type = x.type;
    const u8 op_code = i.op;
    w.bulk.open.push_back(issue_async(
        w, static_cast<u32>(l), reduce ? AsyncKind::BulkReduce : AsyncKind::BulkStore, bytes,
        footprint,
        [&w, from, bytes](AsyncOp& op) {
          op.buffer.assign(shared_bytes(w, from), shared_bytes(w, from) + bytes);
        },
        [host, bytes, type, op_code, reduce](AsyncOp& op) {
          if (bytes == 0) return;
          if (reduce)
            reduce_bytes(host, op.buffer.data(), bytes, type, op_code);
          else
            std::memcpy(host, op.buffer.data(), bytes);
        }));
  });
}

// dst, src, size [, mbarrier] [, mask] [, policy]
void bind_bulk(Decoder& d, Inst& i) {
  const bool to_shared = d.in().modifiers[2].rfind("shared", 0) == 0;
  const bool hint = d.has("L2::cache_hint"), multicast = d.has("multicast::cluster");
  d.arity(3u + to_shared + multicast + hint);
  Ext& x = d.ext(i);
  bind_pair_address(d, x, 0, d.operand(0));
  bind_pair_address(d, x, 1, d.operand(1));
  i.b = d.src(2, 4);
  if (to_shared) bind_pair_address(d, x, 2, d.operand(3));
  if (multicast) i.c = d.src(4, 2);
  i.fn = !to_shared ? bulk_store : d.has("global") ? bulk_load : bulk_cluster;
}
void bind_bulk_reduce(Decoder& d, Inst& i) {
  d.arity(3u + d.has("L2::cache_hint"));
  Ext& x = d.ext(i);
  bind_pair_address(d, x, 0, d.operand(0));
  bind_pair_address(d, x, 1, d.operand(1));
  i.b = d.src(2, 4);
  x.type = d.type();
  i.op = reduce_op(d);
  i.fn = bulk_store;
}

void bulk_commit(Warp& w, const Inst& i, u32 mask) {
  w.bulk.commit(mask);
  notify(w, SyncKind::BulkCommit, mask);
}
Step bulk_wait(Warp& w, const Inst& i, u32 mask, Split& s) {
  const u64 pending = static_cast<u64>(i.imm);
  const auto stage = i.op != 0 ? AsyncOp::Stage::Read : AsyncOp::Stage::Done;
  if (w.bulk.reached(mask, pending, stage)) {
    notify(w, i.op != 0 ? SyncKind::BulkWaitRead : SyncKind::BulkWait, mask, pending);
    return Step::Next;
  }
  s.wait = i.op != 0 ? Wait::BulkRead : Wait::Bulk;
  s.value = pending;
  return Step::Wait;
}
void bind_bulk_commit(Decoder& d, Inst& i) {
  d.arity(0);
  i.fn = bulk_commit;
}
void bind_bulk_wait(Decoder& d, Inst& i) {
  d.arity(1);
  i.imm = static_cast<i64>(d.immediate(0));
  i.op = d.has("read");
  make_blocking(i, bulk_wait);
}

// --- st.async, red.async: a store into another CTA that reports to its mbarrier
void st_async(Warp& w, const Inst& i, u32 mask) {
  const Ext& x = *i.ext;
  const u32 bytes = static_cast<u32>(i.size) * i.count;
  each_lane(mask, [&](int l) {
    const SharedSpot to = shared_spot(w, pair_address(w, x, 0, l), l, bytes, bytes, "st.async");
    const SharedSpot bar = shared_spot(w, pair_address(w, x, 2, l), l, 8, 8, "mbarrier");
    std::vector<u8> data(bytes);
    for (u32 k = 0; k < i.count; ++k) {
      const u64 v = read_wide(w, x.regs[k], i.size == 8, l);
      std::memcpy(data.data() + k * i.size, &v, i.size);
    }
    const bool reduce = i.sub != 0;
    const std::vector<Footprint> footprint = {{reduce ? AccessKind::ReadWrite : AccessKind::Write,
                                               Space::Shared, to.rank, to.offset, bytes}};
    const u32 pc = w.current_pc;
    const Type type = x.type;
    const u8 op_code = i.op;
    issue_async(
        w, static_cast<u32>(l), AsyncKind::StAsync, bytes, footprint,
        [data](AsyncOp& op) { op.buffer = data; },
        [&w, to, bar, bytes, l, pc, reduce, type, op_code](AsyncOp& op) {
          w.current_pc = pc;
          u8* host = shared_bytes(w, to);
          if (reduce)
            reduce_bytes(host, op.buffer.data(), bytes, type, op_code);
          else
            std::memcpy(host, op.buffer.data(), bytes);
          complete_bytes(w, bar.rank, bar.offset, bytes, l, "st.async");
        });
  });
}
void bind_st_async(Decoder& d, Inst& i) {
  d.arity(3);
  Ext& x = d.ext(i);
  x.type = d.type();
  i.size = static_cast<u8>(type_size(x.type));
  const auto& o = d.operand(1);
  const std::size_t want = d.has("v4") ? 4 : d.has("v2") ? 2 : 1;
  const std::vector<ptx::Operand> list =
      o.kind == ptx::Operand::Kind::Vector ? o.list : std::vector<ptx::Operand>{o};
  if (list.size() != want) d.fail("vector length does not match");
  i.count = static_cast<u8>(want);
  if (i.size * want > 16) d.fail("more than 16 bytes per thread");
  bind_pair_address(d, x, 0, d.operand(0));
  for (const auto& e : list) x.regs.push_back(d.src(e, i.size));
  bind_pair_address(d, x, 2, d.operand(2));
  i.sub = d.in().opcode == "red";
  if (i.sub) i.op = reduce_op(d);
  i.fn = st_async;
}

#define DSK_BULK_TYPES "u32|s32|u64|s64|b32|b64|f16|bf16|f32|f64"
constexpr Entry kEntries[] = {
    {"cp.async.ca|cg.shared|shared::cta.global.L2::cache_hint?.{prefetch}?", bind_cp_async,
     "copies 4, 8 or 16 bytes", 80},
    {"cp.async.commit_group", bind_cp_commit, "closes a group", 80},
    {"cp.async.wait_group", bind_cp_wait, "waits until n groups are pending", 80},
    {"cp.async.wait_all", bind_cp_wait, "waits for all copies", 80},
    {"cp.async.mbarrier.arrive.noinc?.shared|shared::cta?.b64", bind_cp_mbarrier,
     "arrives when the copies are done", 80},
    {"cp.async.bulk.shared::cluster|shared::cta.global.mbarrier::complete_tx::bytes."
     "multicast::cluster?.L2::cache_hint?",
     bind_bulk, "bulk copy, global to shared", 90},
    {"cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes", bind_bulk,
     "bulk copy to another CTA", 90},
    {"cp.async.bulk.global.shared::cta.bulk_group.L2::cache_hint?", bind_bulk,
     "bulk copy, shared to global", 90},
    {"cp.reduce.async.bulk.global.shared::cta.bulk_group.L2::cache_hint?."
     "add|min|max|and|or|xor|inc|dec.noftz?." DSK_BULK_TYPES,
     bind_bulk_reduce, "bulk reduction, shared to global", 90},
    {"cp.async.bulk.commit_group", bind_bulk_commit, "closes a bulk group", 90},
    {"cp.async.bulk.wait_group.read?", bind_bulk_wait, "waits until n bulk groups are pending", 90},
    {"st.async.weak?.shared::cluster?.mbarrier::complete_tx::bytes.v2|v4?.b32|b64|u32|u64|s32|s64|"
     "f32|f64",
     bind_st_async, "store to another CTA, reported to its mbarrier", 90},
    {"red.async.relaxed?.cluster?.shared::cluster?.mbarrier::complete_tx::bytes."
     "inc|dec|min|max|add|and|or|xor.u32|s32|u64|b32",
     bind_st_async, "reduction in another CTA, reported to its mbarrier", 90},
};

}  // namespace

void check_multicast(Warp& w, u32 rank, u32 offset, u32 bytes, int lane) {
  const Cluster& cluster = *w.cta->cluster;
  if (rank >= cluster.ctas.size()) {
    fail(w, 1u << lane, "bad-cluster-rank",
         "multicast to CTA " + std::to_string(rank) + " of a cluster of " +
             std::to_string(cluster.ctas.size()));
  }
  const Cta& cta = *cluster.ctas[rank];
  if (cta.done()) {
    fail(w, 1u << lane, "dsmem-exited-cta",
         "multicast to CTA " + std::to_string(rank) + ", which has exited");
  }
  if (offset < kSharedReserved || offset + bytes > cta.shared_bytes) {
    fail(w, 1u << lane, "shared-out-of-bounds", "multicast destination outside shared memory");
  }
}

std::span<const Entry> async_entries() { return kEntries; }

}  // namespace dsk::emu
