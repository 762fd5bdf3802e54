// mbarrier objects in shared memory.
#include "emu/isa/common.hpp"

namespace dsk::emu {
namespace {

struct Target {
  Cta* cta;
  u32 offset;
};

// The address operand in one lane. Generic addresses must lie in the shared window.
Target target(Warp& w, const Inst& i, int lane, const char* what) {
  const u64 address = lane_address(w, i, lane);
  if (i.space == Space::Generic && address >> kWindowShift != 1) {
    fail(w, 1u << lane, "mbarrier-bad-address", std::string(what) + ": not a shared address");
  }
  Target t;
  t.cta = &shared_owner(w, static_cast<u32>(address), lane, 8, 8, what, &t.offset);
  if (i.space == Space::Shared && t.cta != w.cta) {
    fail(w, 1u << lane, "mbarrier-bad-address",
         std::string(what) + ": .shared::cta names another CTA's barrier");
  }
  return t;
}

// The opaque state: the phase joined, and the pending count for mbarrier.pending_count.
u64 token(const Mbarrier& b) {
  return (b.phase & 0xffffffff) | (static_cast<u64>(b.pending) & 0xfffff) << 32;
}

void init(Warp& w, const Inst& i, u32 mask) {
  each_lane(mask, [&](int l) {
    const Target t = target(w, i, l, "mbarrier.init");
    mbarrier_init(w, *t.cta, t.offset, w.reg<u32>(i.b)[l], 1u << l);
  });
}
void inval(Warp& w, const Inst& i, u32 mask) {
  each_lane(mask, [&](int l) {
    const Target t = target(w, i, l, "mbarrier.inval");
    mbarrier_inval(w, *t.cta, t.offset, 1u << l);
  });
}

// op: 1 expect_tx, 2 complete_tx.
void transaction(Warp& w, const Inst& i, u32 mask) {
  each_lane(mask, [&](int l) {
    const char* what = i.op == 1 ? "mbarrier.expect_tx" : "mbarrier.complete_tx";
    const Target t = target(w, i, l, what);
    Mbarrier& b = mbarrier_at(w, *t.cta, t.offset, 1u << l, what);
    const i64 bytes = w.reg<u32>(i.b)[l];
    mbarrier_update(w, *t.cta, b, 0, i.op == 1 ? bytes : 0, i.op == 1 ? 0 : bytes, 1u << l, what);
    if (i.op == 1) notify(w, SyncKind::MbarExpectTx, 1u << l, t.cta->rank, t.offset, u64(bytes));
  });
}

// op bits: 1 expect_tx (b = bytes), 2 drop. Without 1, b is the count.
void arrive(Warp& w, const Inst& i, u32 mask) {
  each_lane(mask, [&](int l) {
    const char* what = i.op & 2 ? "mbarrier.arrive_drop" : "mbarrier.arrive";
    const Target t = target(w, i, l, what);
    Mbarrier& b = mbarrier_at(w, *t.cta, t.offset, 1u << l, what);
    const u32 operand = i.b == kNoReg ? 1 : w.reg<u32>(i.b)[l];
    const i64 count = i.op & 1 ? 1 : operand;
    if (i.d != kNoReg) w.reg<u64>(i.d)[l] = token(b);
    if (i.op & 2) {
      b.count -= static_cast<u32>(count);
    }
    notify(w, SyncKind::MbarArrive, 1u << l, t.cta->rank, t.offset, b.phase);
    mbarrier_update(w, *t.cta, b, count, i.op & 1 ? i64{operand} : 0, 0, 1u << l, what);
  });
}

bool passed(const Mbarrier& b, const Inst& i, Warp& w, int l) {
  if (i.sub != 0) return (b.phase & 1) != (w.reg<u32>(i.b)[l] & 1);  // parity
  return (b.phase & 0xffffffff) != (w.reg<u64>(i.b)[l] & 0xffffffff);
}

// Lanes whose phase is over; *same tells whether all look at one barrier.
u32 look(Warp& w, const Inst& i, u32 mask, const char* what, Mbarrier** first, bool* same) {
  u32 over = 0;
  *first = nullptr;
  *same = true;
  each_lane(mask, [&](int l) {
    const Target t = target(w, i, l, what);
    if (t.cta != w.cta) fail(w, 1u << l, "mbarrier-bad-address", "waits on another CTA's barrier");
    Mbarrier& b = mbarrier_at(w, *t.cta, t.offset, 1u << l, what);
    if (*first == nullptr) *first = &b;
    *same &= *first == &b;
    if (passed(b, i, w, l)) {
      over |= 1u << l;
      if (watched(w)) notify(w, SyncKind::MbarPass, 1u << l, t.cta->rank, t.offset, b.phase - 1);
    }
  });
  return over;
}

void test_wait(Warp& w, const Inst& i, u32 mask) {
  Mbarrier* b;
  bool same;
  set_pred(w, i.d, mask, look(w, i, mask, "mbarrier.test_wait", &b, &same));
}

Step try_wait(Warp& w, const Inst& i, u32 mask, Split& s) {
  Mbarrier* b;
  bool same;
  const u32 over = look(w, i, mask, "mbarrier.try_wait", &b, &same);
  if (over == 0 && same && !s.timed_out) {
    s.wait = Wait::Mbarrier;
    s.id = w.cta->rank;
    s.address = b->offset;
    s.value = b->phase;
    return Step::Wait;
  }
  set_pred(w, i.d, mask, over);
  return Step::Next;
}

void pending_count(Warp& w, const Inst& i, u32 mask) {
  each_lane(mask, [&](int l) {
    w.reg<u32>(i.d)[l] = static_cast<u32>(w.reg<u64>(i.a)[l] >> 32 & 0xfffff);
  });
}

void bind_target(Decoder& d, Inst& i, std::size_t k) {
  bind_space(d, i);
  d.address(k, i);
}
void bind_init(Decoder& d, Inst& i) {
  d.arity(2);
  bind_target(d, i, 0);
  i.b = d.src(1, 4);
  i.fn = init;
}
void bind_inval(Decoder& d, Inst& i) {
  d.arity(1);
  bind_target(d, i, 0);
  i.fn = inval;
}
void bind_transaction(Decoder& d, Inst& i) {
  d.arity(2);
  bind_target(d, i, 0);
  i.b = d.src(1, 4);
  i.op = d.has("expect_tx") ? 1 : 2;
  i.fn = transaction;
}
void bind_arrive(Decoder& d, Inst& i) {
  const bool has_state = d.operand(0).kind != ptx::Operand::Kind::Memory;
  const std::size_t at = has_state ? 1 : 0;
  const bool expect = d.has("expect_tx");
  d.arity(at + 1 + expect, at + 2);
  bind_target(d, i, at);
  if (has_state) i.d = d.dst(d.operand(0), 8);
  if (d.operands() > at + 1) i.b = d.src(at + 1, 4);
  i.op = static_cast<u8>(expect | (d.has("arrive_drop") ? 2 : 0));
  i.fn = arrive;
}
void bind_wait(Decoder& d, Inst& i) {
  const bool attempt = d.has("try_wait");
  d.arity(3, attempt ? 4 : 3);
  bind_target(d, i, 1);
  i.d = d.dst(0, 0);
  i.sub = d.has("parity");
  i.b = d.src(2, i.sub ? 4 : 8);
  if (d.operands() == 4) i.c = d.src(3, 4);  // the time limit in ns: limits here are rounds
  if (attempt) {
    make_blocking(i, try_wait);
  } else {
    i.kind = Kind::Yield;
    i.fn = test_wait;
  }
}
void bind_pending(Decoder& d, Inst& i) {
  d.arity(2);
  i.d = d.dst(0, 4);
  i.a = d.src(1, 8);
  i.fn = pending_count;
}

#define DSK_OWN ".shared|shared::cta?.b64"
#define DSK_ANY ".shared|shared::cta|shared::cluster?.b64"
constexpr Entry kEntries[] = {
    {"mbarrier.init" DSK_OWN, bind_init, "makes a barrier of a count", 80},
    {"mbarrier.inval" DSK_OWN, bind_inval, "ends a barrier", 80},
    {"mbarrier.expect_tx.relaxed?.cta|cluster?" DSK_ANY, bind_transaction,
     "bytes that the phase must still see", 90},
    {"mbarrier.complete_tx.relaxed?.cta|cluster?" DSK_ANY, bind_transaction, "bytes that have come",
     90},
    {"mbarrier.arrive.noComplete.release?.cta?" DSK_OWN, bind_arrive, "arrives", 80},
    {"mbarrier.arrive_drop.noComplete.release?.cta?" DSK_OWN, bind_arrive, "arrives and leaves",
     80},
    {"mbarrier.arrive.expect_tx?.release|relaxed?.cta|cluster?" DSK_ANY, bind_arrive, "arrives",
     80},
    {"mbarrier.arrive_drop.expect_tx?.release|relaxed?.cta|cluster?" DSK_ANY, bind_arrive,
     "arrives and leaves", 80},
    {"mbarrier.test_wait.parity?.acquire|relaxed?.cta|cluster?" DSK_OWN, bind_wait,
     "is the phase over?", 80},
    {"mbarrier.try_wait.parity?.acquire|relaxed?.cta|cluster?" DSK_OWN, bind_wait,
     "waits for the phase, for a time", 90},
    {"mbarrier.pending_count.b64", bind_pending, "arrivals a state still lacked", 80},
};

}  // namespace

std::span<const Entry> mbarrier_entries() { return kEntries; }

}  // namespace dsk::emu
