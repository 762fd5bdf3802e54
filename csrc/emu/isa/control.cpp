// Control flow, hints, register budgets, traps, and calls of the runtime's functions.
#include <cinttypes>
#include <cstdio>

#include "emu/isa/common.hpp"

namespace dsk::emu {
namespace {

void nothing(Warp&, const Inst&, u32) {}

void bind_bra(Decoder& d, Inst& i) {
  d.arity(1);
  i.kind = Kind::Branch;
}
void bind_exit(Decoder& d, Inst& i) {
  d.arity(0);
  i.kind = Kind::Exit;
}

void trap(Warp& w, const Inst& i, u32 mask) { fail(w, mask, "trap", "executed"); }
void bind_trap(Decoder& d, Inst& i) {
  d.arity(0);
  i.fn = trap;
}

void nanosleep(Warp& w, const Inst& i, u32 mask) { w.instructions += 16; }
void bind_nanosleep(Decoder& d, Inst& i) {
  d.arity(1);
  i.a = d.src(0, 4);
  i.kind = Kind::Yield;
  i.fn = nanosleep;
}

void bind_hint(Decoder& d, Inst& i) { i.fn = nothing; }

// The register budget shapes no result; only its legality is checked.
void bind_setmaxnreg(Decoder& d, Inst& i) {
  d.arity(1);
  const u64 n = d.immediate(0);
  if (n < 24 || n > 256 || n % 8 != 0) {
    d.fail("register count must be a multiple of 8 in 24..256, got " + std::to_string(n));
  }
  i.flags |= kAligned;
  i.fn = nothing;
}

Step grid_wait(Warp& w, const Inst& i, u32 mask, Split& s) {
  if (w.cta->cluster->grid->predecessor_done) {
    notify(w, SyncKind::GridWait, mask);
    return Step::Next;
  }
  s.wait = Wait::Grid;
  return Step::Wait;
}
void grid_launch(Warp& w, const Inst& i, u32 mask) {
  notify(w, SyncKind::GridLaunchDependents, mask);
  if (w.cta->launched_dependents) return;
  w.cta->launched_dependents = true;
  Grid& grid = *w.cta->cluster->grid;
  const std::lock_guard lock(grid.mutex);
  ++grid.ctas_launched_dependents;
  ++w.cta->cluster->changes;
}
void bind_griddep(Decoder& d, Inst& i) {
  d.arity(0);
  if (d.has("wait"))
    make_blocking(i, grid_wait);
  else
    i.fn = grid_launch;
}

// --- vprintf and __assertfail

std::string c_string(Warp& w, u64 address, int lane) {
  std::string s;
  while (s.size() < 4096) {
    const char c =
        static_cast<char>(*resolve(w, Space::Generic, address + s.size(), lane, 1, false).host);
    if (c == '\0') break;
    s += c;
  }
  return s;
}

// The value the runtime packed for one conversion: 4 or 8 bytes, naturally aligned.
u64 next_argument(Warp& w, u64 base, u64* offset, u32 bytes, int lane) {
  *offset = (*offset + bytes - 1) / bytes * bytes;
  const Place p = resolve(w, Space::Generic, base + *offset, lane, bytes, false);
  *offset += bytes;
  u64 v = 0;
  std::memcpy(&v, p.host, bytes);
  return v;
}

// One conversion specification "%-08.3llx": its text without length modifiers, its letter.
struct Conversion {
  std::string flags;
  char letter = 0;
  bool wide = false;
};
Conversion parse_conversion(const std::string& format, std::size_t* k) {
  Conversion c;
  c.flags = "%";
  for (++*k; *k < format.size(); ++*k) {
    const char ch = format[*k];
    if (ch == 'l' || ch == 'z' || ch == 'j' || ch == 't') {
      c.wide = true;
    } else if (ch == 'h') {
      continue;
    } else if (std::strchr("-+ #0123456789.", ch) != nullptr && c.flags.size() < 32) {
      c.flags += ch;
    } else {
      c.letter = ch;
      ++*k;
      break;
    }
  }
  return c;
}

std::string format_one(Warp& w, const Conversion& c, u64 args, u64* offset, int lane) {
  char buffer[512];
  switch (c.letter) {
    case '%':
      return "%";
    case 's': {
      const u64 address = next_argument(w, args, offset, 8, lane);
      return c_string(w, address, lane);
    }
    case 'f':
    case 'F':
    case 'e':
    case 'E':
    case 'g':
    case 'G':
    case 'a':
    case 'A': {
      const double v = std::bit_cast<double>(next_argument(w, args, offset, 8, lane));
      std::snprintf(buffer, sizeof buffer, (c.flags + c.letter).c_str(), v);
      return buffer;
    }
    case 'p': {
      const u64 v = next_argument(w, args, offset, 8, lane);
      std::snprintf(buffer, sizeof buffer, "0x%" PRIx64, v);
      return buffer;
    }
    case 'd':
    case 'i': {
      const u64 raw = next_argument(w, args, offset, c.wide ? 8 : 4, lane);
      const long long v = c.wide ? static_cast<i64>(raw) : static_cast<i32>(raw);
      std::snprintf(buffer, sizeof buffer, (c.flags + "ll" + c.letter).c_str(), v);
      return buffer;
    }
    case 'u':
    case 'x':
    case 'X':
    case 'o':
    case 'c': {
      const u64 raw = next_argument(w, args, offset, c.wide ? 8 : 4, lane);
      if (c.letter == 'c') return std::string(1, static_cast<char>(raw));
      std::snprintf(buffer, sizeof buffer, (c.flags + "ll" + c.letter).c_str(),
                    static_cast<unsigned long long>(raw));
      return buffer;
    }
    default:
      return c.flags + c.letter;
  }
}

// Parameters of the call lie in the thread's local memory, where st.param put them.
u64 call_argument(Warp& w, const Ext& x, int k, int lane) {
  const Place p = resolve(w, Space::Local, static_cast<u64>(x.v[k]), lane, 8, false);
  u64 v;
  std::memcpy(&v, p.host, 8);
  return v;
}

void vprintf_lane(Warp& w, const Inst& i, int lane) {
  const Ext& x = *i.ext;
  const std::string format = c_string(w, call_argument(w, x, 1, lane), lane);
  const u64 args = call_argument(w, x, 2, lane);
  std::string out;
  u64 offset = 0;
  for (std::size_t k = 0; k < format.size();) {
    if (format[k] != '%')
      out += format[k++];
    else
      out += format_one(w, parse_conversion(format, &k), args, &offset, lane);
  }
  Grid& grid = *w.cta->cluster->grid;
  const std::lock_guard lock(grid.mutex);
  if (grid.print)
    grid.print(out);
  else
    std::fputs(out.c_str(), stdout);
}

void call_vprintf(Warp& w, const Inst& i, u32 mask) {
  each_lane(mask, [&](int l) {
    vprintf_lane(w, i, l);
    if (i.ext->v[0] < 0) return;
    const u32 ok = 1;
    std::memcpy(resolve(w, Space::Local, static_cast<u64>(i.ext->v[0]), l, 4, true).host, &ok, 4);
  });
}

void call_assertfail(Warp& w, const Inst& i, u32 mask) {
  const int l = std::countr_zero(mask);
  const Ext& x = *i.ext;
  const std::string message = c_string(w, call_argument(w, x, 1, l), l);
  const std::string file = c_string(w, call_argument(w, x, 2, l), l);
  const Place p = resolve(w, Space::Local, static_cast<u64>(x.v[3]), l, 4, false);
  u32 line;
  std::memcpy(&line, p.host, 4);
  fail(w, mask, "assert",
       file + ":" + std::to_string(line) + ": assertion `" + message + "' failed");
}

void bind_call(Decoder& d, Inst& i) {
  // (result), function, (arguments): find the parts by their form.
  const ptx::Operand *results = nullptr, *arguments = nullptr;
  std::string name;
  for (std::size_t k = 0; k < d.operands(); ++k) {
    const ptx::Operand& o = d.operand(k);
    if (o.kind == ptx::Operand::Kind::Vector)
      (name.empty() ? results : arguments) = &o;
    else if (name.empty())
      name = o.symbol;
  }
  const bool print = name == "vprintf";
  if (!print && name != "__assertfail") d.fail("call of unknown function '" + name + "'");
  if (arguments == nullptr || arguments->list.size() < (print ? 2u : 3u)) {
    d.fail("too few arguments for '" + name + "'");
  }
  Ext& x = d.ext(i);
  x.v[0] = -1;
  if (results != nullptr && !results->list.empty()) {
    x.v[0] = d.local_variable(results->list[0].symbol);
  }
  for (std::size_t k = 0; k < arguments->list.size() && k < 5; ++k) {
    x.v[k + 1] = d.local_variable(arguments->list[k].symbol);
  }
  i.fn = print ? call_vprintf : call_assertfail;
}

constexpr Entry kEntries[] = {
    {"bra.uni?", bind_bra, "branch"},
    {"ret.uni?", bind_exit, "return; from a kernel, exit"},
    {"exit", bind_exit, "the thread ends"},
    {"trap", bind_trap, "raises the hazard `trap`"},
    {"brkpt", bind_trap, "raises the hazard `trap`"},
    {"nanosleep.u32", bind_nanosleep, "gives way", 70},
    {"pmevent.mask?", bind_hint, "no effect"},
    {"setmaxnreg.inc|dec.sync.aligned.u32", bind_setmaxnreg, "checked, no effect", 90},
    {"griddepcontrol.launch_dependents|wait", bind_griddep, "programmatic dependent launch", 90},
    {"call.uni?", bind_call, "functions of the file are inlined; vprintf, __assertfail"},
};

}  // namespace

std::span<const Entry> control_entries() { return kEntries; }

}  // namespace dsk::emu
