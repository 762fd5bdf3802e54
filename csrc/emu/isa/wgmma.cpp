// wgmma: warpgroup matrix multiplication, asynchronous until wgmma.wait_group.
//
// Each of the four warps keeps its own queue and executes its own 16 rows; a group is complete only
// when all four warps have committed it. Execution is as late as possible: at the wait.
#include <algorithm>
#include <iterator>

#include "emu/isa/common.hpp"
#include "emu/num/fragments.hpp"
#include "emu/num/tensorcore.hpp"
#include "emu/num/wgmma_desc.hpp"

namespace dsk::emu {
namespace {

constexpr u32 kWarpsPerGroup = 4;

// Ext of wgmma.mma_async: regs = D, regs2 = A fragments, v: 0 n, 1 trans A, 2 trans B, 3 negate A,
// 4 negate B, 5 k; type = A's, type2 = B's; op = accumulator type.
num::MmaType mma_type(Type t) {
  switch (t) {
    case Type::F16:
      return num::MmaType::f16;
    case Type::BF16:
      return num::MmaType::bf16;
    case Type::TF32:
      return num::MmaType::tf32;
    case Type::E4M3:
      return num::MmaType::e4m3;
    case Type::E5M2:
      return num::MmaType::e5m2;
    case Type::S8:
      return num::MmaType::s8;
    default:
      return num::MmaType::u8;
  }
}

num::MmaKind kind_of(const Inst& i, Numerics numerics) {
  const Ext& x = *i.ext;
  num::MmaKind kind;
  kind.a = mma_type(x.type);
  kind.b = mma_type(x.type2);
  kind.d = static_cast<num::AccType>(i.op);
  kind.k = static_cast<int>(x.v[5]);
  kind.unit = num::MmaUnit::wgmma;
  kind.mode = numerics == Numerics::Fast ? num::MmaMode::fast : num::MmaMode::exact;
  kind.negate_a = x.v[3] != 0;
  kind.negate_b = x.v[4] != 0;
  kind.saturate = i.sub != 0;
  return kind;
}

// --- B panels are prepared once and reused: by the other warps of the group, by other warpgroups,
// and by repeated use of a slot whose bytes did not change.
struct CachedPanel {
  num::MmaKind kind;
  std::vector<u8> rows;
  num::BPanel panel;
  int n = 0;
};

bool same_kind(const num::MmaKind& a, const num::MmaKind& b) {
  return a.a == b.a && a.b == b.b && a.d == b.d && a.k == b.k && a.mode == b.mode &&
         a.negate_a == b.negate_a && a.negate_b == b.negate_b && a.saturate == b.saturate;
}

// `place` only chooses the entry: what counts is whether the rows are the same.
const num::BPanel& panel_for(const num::MmaKind& kind, const u8* rows, int n, u64 place) {
  constexpr std::size_t kPanels = 64;
  static thread_local std::vector<CachedPanel> cache(kPanels);
  const std::size_t bytes = static_cast<std::size_t>(n) * 32;
  CachedPanel& slot = cache[place * 0x9e3779b97f4a7c15ull >> 58];
  if (slot.n != n || !same_kind(slot.kind, kind) ||
      std::memcmp(slot.rows.data(), rows, bytes) != 0) {
    slot.rows.assign(rows, rows + bytes);
    slot.kind = kind;
    slot.n = n;
    slot.panel.load(kind, rows, 32, n);
  }
  return slot.panel;
}

num::Major major_of(i64 transposed) { return transposed ? num::Major::mn : num::Major::k; }

void gather(Warp& w, u64 bits, num::Major major, int rows, u8* dense, const char* what) {
  const Cta& cta = *w.cta;
  const num::SmemDesc desc = num::decode_desc(bits);
  if (desc.reserved_bits) {
    fail(w, w.live, "wgmma-bad-descriptor", std::string(what) + ": reserved bits are set");
  }
  const num::TileRead read =
      num::gather_tile(desc, major, rows, cta.shared + kSharedReserved, kSharedReserved,
                       cta.shared_bytes - kSharedReserved, dense);
  if (!read.ok) {
    fail(w, w.live, "shared-out-of-bounds",
         std::string(what) + ": the descriptor reaches shared offset " +
             std::to_string(i64{read.bad_address} - i64{kSharedReserved}) + " of " +
             std::to_string(cta.shared_bytes - kSharedReserved));
  }
}

void add_footprint(const Warp& w, u64 bits, num::Major major, int rows,
                   std::vector<Footprint>* out) {
  const Cta& cta = *w.cta;
  const num::TileRead read = num::locate_tile(num::decode_desc(bits), major, rows, kSharedReserved,
                                              cta.shared_bytes - kSharedReserved);
  if (!read.ok) return;  // found when it is executed
  for (const num::ByteRange& r : *read.relative) {
    out->push_back({AccessKind::Read, Space::Shared, cta.rank, read.base + r.begin, r.bytes});
  }
}

// A: a warp's results come from its own 16 rows alone. Those of a K-major tile lie two groups of 8
// rows after its predecessor's.
void add_rows(const Warp& w, u64 bits, num::Major major, std::vector<Footprint>* out) {
  if (major != num::Major::k) return add_footprint(w, bits, major, 64, out);
  const std::size_t before = out->size();
  num::SmemDesc desc = num::decode_desc(bits);
  const u32 quarter = w.index % kWarpsPerGroup;
  desc.start += 2 * quarter * desc.sbo;
  const Cta& cta = *w.cta;
  const num::TileRead read =
      num::locate_tile(desc, major, 16, kSharedReserved, cta.shared_bytes - kSharedReserved);
  if (!read.ok) return;
  for (const num::ByteRange& r : *read.relative) {
    out->push_back({AccessKind::Read, Space::Shared, cta.rank, read.base + r.begin, r.bytes});
  }
  for (std::size_t k = before; k < out->size(); ++k) {
    (*out)[k].quarter = static_cast<u8>(quarter + 1);
  }
}

bool same_shape(const WgmmaOp& op, const Inst& i) {
  return op.inst->ext->regs == i.ext->regs && op.inst->ext->v[0] == i.ext->v[0] &&
         op.inst->op == i.op;
}

// Registers must have been fenced since they were last written, except accumulators that a wgmma of
// the same shape already has in flight.
void check_fence(Warp& w, const Inst& i, u32 mask) {
  WgmmaState& g = w.wgmma;
  const Ext& x = *i.ext;
  if (!g.fenced) {
    fail(w, mask, "wgmma-missing-fence", "no wgmma.fence was executed before the first wgmma");
  }
  for (u32 r : x.matrix_writes) {
    if (g.dirty[r]) {
      fail(w, mask, "wgmma-missing-fence",
           "an accumulator register was written since the last wgmma.fence");
    }
  }
  for (u32 r : x.matrix_reads) {
    if (g.dirty[r]) {
      fail(w, mask, "wgmma-missing-fence", "an A register was written since the last wgmma.fence");
    }
  }
  const auto clashes = [&](const WgmmaOp& op) {
    if (same_shape(op, i)) return false;
    return std::any_of(x.matrix_writes.begin(), x.matrix_writes.end(), [&](u32 r) {
      const auto& other = op.inst->ext->matrix_writes;
      return std::find(other.begin(), other.end(), r) != other.end();
    });
  };
  for (const WgmmaOp& op : g.open) {
    if (clashes(op)) {
      fail(w, mask, "wgmma-result-before-wait",
           "accumulates into registers of another wgmma in flight of a different shape");
    }
  }
}

void mma_async(Warp& w, const Inst& i, u32 mask) {
  const Ext& x = *i.ext;
  if (w.index / kWarpsPerGroup * kWarpsPerGroup + kWarpsPerGroup > w.cta->warps.size()) {
    fail(w, mask, "wgmma-partial-warpgroup", "the warp's group of four is incomplete");
  }
  if (w.cta->cluster->check) check_fence(w, i, mask);
  WgmmaOp op;
  op.inst = &i;
  op.pc = w.current_pc;
  const int lane = std::countr_zero(mask);
  if (x.regs2.empty()) {
    op.desc_a = w.reg<u64>(i.a)[lane];
  } else {
    op.a_regs.resize(x.regs2.size() * kLanes);
    for (std::size_t k = 0; k < x.regs2.size(); ++k) {
      std::memcpy(&op.a_regs[k * kLanes], w.reg<u32>(x.regs2[k]), kLanes * 4);
    }
  }
  op.desc_b = w.reg<u64>(i.b)[lane];
  op.accumulate = ((w.pred(i.c) ^ (x.v[6] ? kFullMask : 0)) >> lane & 1) != 0;
  op.id = w.cta->cluster->next_async_id++;
  for (u32 r : x.matrix_writes) ++w.wgmma.pending[r];
  for (u32 r : x.matrix_reads) ++w.wgmma.reading[r];
  if (watched(w)) {
    static thread_local std::vector<Footprint> fp;
    fp.clear();
    add_footprint(w, op.desc_b, major_of(x.v[2]), static_cast<int>(x.v[0]), &fp);
    if (x.regs2.empty()) add_rows(w, op.desc_a, major_of(x.v[1]), &fp);
    if (w.cta->cluster->check && !fp.empty() && fp.back().quarter > 1) {
      w.wgmma.use.issue(x.matrix_writes, op.id, op.accumulate);
    }
    const AsyncInfo info{op.id, AsyncKind::Wgmma, &w, 0, op.pc, 0};
    for (auto& o : w.cta->cluster->observers) o->on_async_issue(info, fp);
  }
  w.wgmma.open.push_back(std::move(op));
}

void wgmma_fence(Warp& w, const Inst& i, u32 mask) {
  w.wgmma.fenced = true;
  std::fill(w.wgmma.dirty.begin(), w.wgmma.dirty.end(), 0);
  notify(w, SyncKind::WgmmaFence, mask);
}
void wgmma_commit(Warp& w, const Inst& i, u32 mask) {
  w.wgmma.groups.push_back(std::move(w.wgmma.open));
  w.wgmma.open.clear();
  ++w.wgmma.committed;
  ++w.cta->cluster->changes;
  notify(w, SyncKind::WgmmaCommit, mask, w.wgmma.committed);
}

Step wgmma_wait(Warp& w, const Inst& i, u32 mask, Split& s) {
  const u64 pending = static_cast<u64>(i.imm);
  const u64 groups = w.wgmma.committed > pending ? w.wgmma.committed - pending : 0;
  Split question = s;
  question.wait = Wait::Wgmma;
  question.value = groups;
  if (!wait_over(w, question)) {
    s = question;
    return Step::Wait;
  }
  drain_wgmma(w, groups);
  notify(w, SyncKind::WgmmaWait, mask, groups);
  return Step::Next;
}

// Fragment registers of A and D, scale-d, immediates.
void bind_mma_async(Decoder& d, Inst& i) {
  Ext& x = d.ext(i);
  int m = 0, n = 0, k = 0;
  if (std::sscanf(d.in().modifiers[3].c_str(), "m%dn%dk%d", &m, &n, &k) != 3 || m != 64) {
    d.fail("unknown shape");
  }
  const Type acc = d.type(0);
  x.type = d.type(1), x.type2 = d.type(2);
  const bool integer = acc == Type::S32;
  if (n < 8 || n > 256 || n % 8 != 0 || (integer && n % 16 != 0 && n != 8 && n != 24)) {
    d.fail("n must be a multiple of 8 in 8..256 (integers: 8, 16, 24, 32, 48, ...)");
  }
  const int bits = 8 * type_size(x.type == Type::TF32 ? Type::B32 : x.type);
  if (k * bits != 256) d.fail("k does not match the type");
  x.v[0] = n;
  x.v[5] = k;
  i.op = static_cast<u8>(acc == Type::F32   ? num::AccType::f32
                         : acc == Type::F16 ? num::AccType::f16
                                            : num::AccType::s32);
  i.sub = d.has("satfinite");
  const std::size_t num_regs = static_cast<std::size_t>(acc == Type::F16 ? n / 4 : n / 2);
  const auto& dest = d.operand(0);
  if (dest.list.size() != num_regs) {
    d.fail("expected " + std::to_string(num_regs) + " accumulator registers, got " +
           std::to_string(dest.list.size()));
  }
  for (const auto& o : dest.list) {
    if (o.kind == ptx::Operand::Kind::Sink) d.fail("an accumulator is `_`, expected a register");
    const u32 r = d.dst(o, 4);
    d.also_reads(r);
    d.matrix_register(r);
    x.regs.push_back(r);
    x.matrix_writes.push_back(r);
  }
  const bool from_regs = d.operand(1).kind == ptx::Operand::Kind::Vector;
  if (from_regs) {
    if (d.operand(1).list.size() != 4) d.fail("A takes four registers");
    for (const auto& o : d.operand(1).list) {
      const u32 r = d.src(o, 4);
      if (r < kConstantHandle) {
        d.matrix_register(r);
        x.matrix_reads.push_back(r);
      }
      x.regs2.push_back(r);
    }
  } else {
    i.a = d.src(1, 8);
  }
  i.b = d.src(2, 8);
  i.c = d.src(3, 0);
  x.v[6] = d.operand(3).negated;
  const bool half = x.type == Type::F16 || x.type == Type::BF16;
  d.arity(integer ? 4u : half ? (from_regs ? 7u : 8u) : 6u);
  if (!integer) {
    const auto scale = [&](std::size_t at) {
      const i64 v = static_cast<i64>(d.immediate(at));
      if (v != 1 && v != -1) d.fail("imm-scale must be 1 or -1");
      return v == -1;
    };
    x.v[3] = scale(4);
    x.v[4] = scale(5);
    if (half) {
      x.v[1] = from_regs ? 0 : static_cast<i64>(d.immediate(6));
      x.v[2] = static_cast<i64>(d.immediate(from_regs ? 6 : 7));
      if ((x.v[1] | x.v[2]) & ~i64{1}) d.fail("imm-trans must be 0 or 1");
    }
  }
  i.flags |= kAligned;
  i.fn = mma_async;
}
void bind_fence(Decoder& d, Inst& i) {
  d.arity(0);
  i.flags |= kAligned;
  i.fn = wgmma_fence;
}
void bind_commit(Decoder& d, Inst& i) {
  d.arity(0);
  i.flags |= kAligned;
  i.fn = wgmma_commit;
}
void bind_wait(Decoder& d, Inst& i) {
  d.arity(1);
  i.imm = static_cast<i64>(d.immediate(0));
  i.flags |= kAligned;
  make_blocking(i, wgmma_wait);
}

constexpr Entry kEntries[] = {
    {"wgmma.mma_async.sync.aligned.{wgmma16}.f32|f16.f16.f16", bind_mma_async, "D += A * B", 90},
    {"wgmma.mma_async.sync.aligned.{wgmma16}.f32.bf16.bf16", bind_mma_async, "D += A * B", 90},
    {"wgmma.mma_async.sync.aligned.{wgmma8}.f32.tf32.tf32", bind_mma_async, "D += A * B", 90},
    {"wgmma.mma_async.sync.aligned.{wgmma32}.f32|f16.e4m3|e5m2.e4m3|e5m2", bind_mma_async,
     "D += A * B", 90},
    {"wgmma.mma_async.sync.aligned.{wgmma32}.satfinite?.s32.s8|u8.s8|u8", bind_mma_async,
     "D += A * B", 90},
    {"wgmma.mma_async.sync.aligned.{wgmma32}.s32.s8|u8.s8|u8.satfinite", bind_mma_async,
     "D += A * B, clamped", 90},
    {"wgmma.fence.sync.aligned", bind_fence, "orders register writes before wgmma", 90},
    {"wgmma.commit_group.sync.aligned", bind_commit, "closes a group", 90},
    {"wgmma.wait_group.sync.aligned", bind_wait, "waits until n groups are pending", 90},
};

}  // namespace

namespace {

// The same instruction as the four warps of a warpgroup see it, or one warp's quarter alone.
struct Quarters {
  Warp* warps[kWarpsPerGroup];
  const WgmmaOp* ops[kWarpsPerGroup];
  u32 count = 0;
};

bool same_operands(const WgmmaOp& a, const WgmmaOp& b) {
  return a.inst == b.inst && a.desc_a == b.desc_a && a.desc_b == b.desc_b;
}

// Operands are read once; each warp owns 16 rows of A and of D.
void execute(const Quarters& q) {
  Warp& first = *q.warps[0];
  const WgmmaOp& op = *q.ops[0];
  const Ext& x = *op.inst->ext;
  const int n = static_cast<int>(x.v[0]);
  const num::MmaKind kind = kind_of(*op.inst, first.cta->cluster->grid->config.numerics);
  alignas(64) static thread_local u8 a[64 * 32], b[256 * 32], dense[16 * 256 * 4];
  first.current_pc = op.pc;
  const bool a_in_shared = op.a_regs.empty();
  if (a_in_shared) gather(first, op.desc_a, major_of(x.v[1]), 64, a, "A");
  gather(first, op.desc_b, major_of(x.v[2]), n, b, "B");
  const u64 place = reinterpret_cast<u64>(first.cta->shared) + op.desc_b;
  const num::BPanel& panel = panel_for(kind, b, n, place);
  for (u32 k = 0; k < q.count; ++k) {
    Warp& w = *q.warps[k];
    const u8* a_rows = a + (w.index % kWarpsPerGroup) * 16 * 32;
    if (!a_in_shared) {
      const u32* regs[4];
      for (int r = 0; r < 4; ++r) regs[r] = &q.ops[k]->a_regs[static_cast<std::size_t>(r) * kLanes];
      num::unpack_a(regs, 4, a, 32);
      a_rows = a;
    }
    u32* regs[128];
    for (std::size_t r = 0; r < x.regs.size(); ++r) regs[r] = w.reg<u32>(x.regs[r]);
    const bool accumulate = q.ops[k]->accumulate;
    if (accumulate) num::load_accumulator(regs, n, kind.d, dense, static_cast<std::size_t>(n));
    num::mma(panel, a_rows, 32, 16, dense, static_cast<std::size_t>(n), accumulate);
    num::store_accumulator(regs, n, kind.d, dense, static_cast<std::size_t>(n));
  }
}

void finish(Warp& w, const WgmmaOp& op) {
  for (u32 r : op.inst->ext->matrix_writes) --w.wgmma.pending[r];
  for (u32 r : op.inst->ext->matrix_reads) --w.wgmma.reading[r];
  const AsyncInfo info{op.id, AsyncKind::Wgmma, &w, 0, op.pc, 0};
  for (auto& o : w.cta->cluster->observers) {
    o->on_async_read_done(info);
    o->on_async_done(info);
  }
}

// The oldest group of every warp that is behind `groups`.
void execute_oldest(const std::vector<Warp*>& warps) {
  std::size_t longest = 0;
  for (const Warp* w : warps) longest = std::max(longest, w->wgmma.groups.front().size());
  for (std::size_t k = 0; k < longest; ++k) {
    Quarters q;
    for (Warp* w : warps) {
      const auto& group = w->wgmma.groups.front();
      if (k >= group.size()) continue;
      if (q.count != 0 && !same_operands(*q.ops[0], group[k])) {
        execute(q);
        q.count = 0;
      }
      q.warps[q.count] = w;
      q.ops[q.count++] = &group[k];
    }
    execute(q);
  }
  for (Warp* w : warps) {
    for (const WgmmaOp& op : w->wgmma.groups.front()) finish(*w, op);
    w->wgmma.groups.pop_front();
    ++w->wgmma.completed;
    ++w->cta->cluster->changes;
  }
}

}  // namespace

void drain_wgmma(Warp& w, u64 groups) {
  const u32 first = w.index / kWarpsPerGroup * kWarpsPerGroup;
  u32 saved_pc[kWarpsPerGroup];
  std::vector<Warp*> all, behind;
  for (u32 k = first; k < first + kWarpsPerGroup && k < w.cta->warps.size(); ++k) {
    all.push_back(w.cta->warps[k].get());
    saved_pc[k - first] = all.back()->current_pc;
  }
  const auto is_behind = [&](const Warp* x) {
    return x->wgmma.completed < groups && !x->wgmma.groups.empty();
  };
  while (true) {
    behind.clear();
    std::copy_if(all.begin(), all.end(), std::back_inserter(behind), is_behind);
    if (behind.empty()) break;
    execute_oldest(behind);
  }
  for (std::size_t k = 0; k < all.size(); ++k) all[k]->current_pc = saved_pc[k];
}

std::span<const Entry> wgmma_entries() { return kEntries; }

}  // namespace dsk::emu
