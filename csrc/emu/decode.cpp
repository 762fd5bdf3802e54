#include "emu/decode.hpp"

#include <algorithm>
#include <cstring>

#include "emu/table.hpp"

namespace dsk::emu {
namespace {

u32 align_up(u32 value, u32 align) { return (value + align - 1) / align * align; }

constexpr u64 kMaxLocalBytes = 1u << 19;
constexpr u64 kMaxParamBytes = 32764;

}  // namespace

Decoder::Decoder(const ptx::Function& function, const ModuleSymbols& symbols)
    : function_(function), symbols_(symbols) {}

Program Decoder::run() {
  program_.name = function_.name;
  program_.max_threads = function_.max_threads;
  program_.required_cluster = function_.required_cluster;
  layout_variables();
  is_matrix_.assign(function_.registers.size(), 0);
  bind_all();
  mark_matrix_users();
  measure_runs();
  allocate_registers();
  patch();
  return std::move(program_);
}

void Decoder::layout_variables() {
  u64 offset = 0;
  for (const ptx::Variable& p : function_.params) {
    offset = (offset + p.align - 1) / p.align * p.align;
    if (offset + p.bytes() > kMaxParamBytes) {
      throw PtxError(p.line, "parameters of '" + function_.name + "' exceed " +
                                 std::to_string(kMaxParamBytes) + " bytes");
    }
    param_offset_[p.name] = static_cast<u32>(offset);
    program_.params.push_back(
        {p.name, static_cast<u32>(offset), static_cast<u32>(p.bytes()), p.align, p.type});
    offset += p.bytes();
  }
  program_.param_bytes = static_cast<u32>(offset);

  u64 shared = 0;
  const auto place_shared = [&](const ptx::Variable& v) {
    if (v.is_extern || !v.sized) {
      program_.dynamic_align = std::max(program_.dynamic_align, v.align);
      return;
    }
    shared = (shared + v.align - 1) / v.align * v.align;
    shared_offset_[v.name] = static_cast<u32>(shared);
    shared += v.bytes();
    if (shared > (1u << 20)) throw PtxError(v.line, "static shared memory exceeds 1 MiB");
  };
  for (const auto& [name, variable] : symbols_.shared) place_shared(*variable);
  u64 local = 0;
  // Call sequences reuse names (param0, retval0) one after the other: one slot per name.
  std::map<std::string, std::pair<u64, u32>> locals;
  for (const ptx::Variable& v : function_.locals) {
    if (v.space == Space::Shared) {
      place_shared(v);
      continue;
    }
    auto& slot = locals[v.name];
    slot.first = std::max(slot.first, v.bytes());
    slot.second = std::max(slot.second, v.align);
  }
  for (const auto& [name, slot] : locals) {
    local = (local + slot.second - 1) / slot.second * slot.second;
    local_offset_[name] = static_cast<u32>(local);
    local += slot.first;
  }
  if (local > kMaxLocalBytes) {
    throw PtxError(function_.line, "local memory exceeds 512 KiB per thread");
  }
  program_.local_bytes = align_up(static_cast<u32>(local), 16);
  program_.static_shared = static_cast<u32>(shared);
}

void Decoder::bind_all() {
  const std::size_t n = function_.code.size();
  program_.code.resize(n + 1);
  program_.info.resize(n + 1);
  for (std::size_t k = 0; k < n; ++k) {
    bind(function_.code[k], program_.code[k], program_.info[k]);
  }
  program_.code[n].kind = Kind::Exit;  // falling off the end is leaving
  program_.info[n].ptx_line = n > 0 ? program_.info[n - 1].ptx_line : function_.line;
  program_.info[n].text = text_index("exit");
}

void Decoder::bind(const ptx::Instruction& in, Inst& i, InstInfo& info) {
  in_ = &in;
  info_ = &info;
  info.ptx_line = in.line;
  info.source = in.source;
  const std::string text = in.text();
  info.text = text_index(text);
  if (in.predicate >= 0) {
    i.pred = static_cast<u32>(in.predicate);
    if (in.predicate_negated) i.flags |= kPredNegated;
    note_read(i.pred);
  }
  const Entry* entry = find_entry(in, &info.entry);
  if (entry == nullptr) fail("unsupported instruction");
  if (entry->min_sm > symbols_.target_sm) {
    fail("needs sm_" + std::to_string(entry->min_sm) + ", the file says sm_" +
         std::to_string(symbols_.target_sm));
  }
  entry->bind(*this, i);
  if (i.kind == Kind::Branch) {
    if (in.operands.size() != 1 || in.operands[0].kind != ptx::Operand::Kind::Symbol) {
      fail("expected a label");
    }
    i.target = find_label(in.operands[0].symbol, in.scope);
  }
  // A predicated write keeps the old value in some lanes.
  if (in.predicate >= 0) {
    info.reads.insert(info.reads.end(), info.writes.begin(), info.writes.end());
  }
}

u32 Decoder::find_label(const std::string& name, u32 scope) const {
  while (true) {
    for (const auto& label : function_.labels) {
      if (label.scope == scope && label.name == name) return label.index;
    }
    if (scope == 0) break;
    scope = function_.scope_parent[scope];
  }
  fail("unknown label '" + name + "'");
}

void Decoder::fail(const std::string& what) const {
  throw PtxError(in_->line, in_->text() + ": " + what);
}

bool Decoder::has(std::string_view modifier) const {
  return std::find(in_->modifiers.begin(), in_->modifiers.end(), modifier) != in_->modifiers.end();
}

Type Decoder::type(std::size_t n) const {
  for (const std::string& m : in_->modifiers) {
    const Type t = parse_type(m);
    if (t != Type::None && n-- == 0) return t;
  }
  return Type::None;
}

Type Decoder::type() const {
  for (auto it = in_->modifiers.rbegin(); it != in_->modifiers.rend(); ++it) {
    const Type t = parse_type(*it);
    if (t != Type::None) return t;
  }
  return Type::None;
}

void Decoder::arity(std::size_t min, std::size_t max) {
  const std::size_t n = operands();
  if (n < min || n > max) {
    fail("expected " + std::to_string(min) + (max != min ? ".." + std::to_string(max) : "") +
         " operands, got " + std::to_string(n));
  }
}

const ptx::Operand& Decoder::operand(std::size_t k) const {
  if (k >= operands()) fail("operand " + std::to_string(k + 1) + " is missing");
  return in_->operands[k];
}

bool Decoder::is_register(const ptx::Operand& o) const {
  return o.kind == ptx::Operand::Kind::Register;
}

int Decoder::register_bytes(const ptx::Operand& o) const {
  if (!is_register(o)) return -1;
  const ptx::Register& r = function_.registers[o.reg];
  if (r.special) {
    Special which;
    Type type;
    if (!parse_special(r.name, &which, &type)) fail("unknown special register '" + r.name + "'");
    return type_size(type);
  }
  return type_size(r.type);
}

void Decoder::note_read(u32 handle) {
  if (handle < kConstantHandle) info_->reads.push_back(handle);
}
void Decoder::note_write(u32 handle) {
  if (handle < kConstantHandle) info_->writes.push_back(handle);
}

u32 Decoder::dst(std::size_t k, int bytes) {
  if (operand(k).kind == ptx::Operand::Kind::Sink) fail("destination is `_`, expected a register");
  return dst(operand(k), bytes);
}

u32 Decoder::dst(const ptx::Operand& o, int bytes) {
  if (o.kind == ptx::Operand::Kind::Sink) return kNoReg;
  if (!is_register(o) || function_.registers[o.reg].special) fail("destination is no register");
  const int have = register_bytes(o);
  if (have != bytes || (bytes == 0) != (function_.registers[o.reg].type == Type::Pred)) {
    fail("destination '" + function_.registers[o.reg].name + "' has " + std::to_string(8 * have) +
         " bits, expected " + std::to_string(8 * bytes) + " (0 is a predicate)");
  }
  note_write(static_cast<u32>(o.reg));
  return static_cast<u32>(o.reg);
}

u32 Decoder::second_dst(std::size_t k, int bytes) {
  const ptx::Operand& o = operand(k);
  if (o.second < 0) return kNoReg;
  ptx::Operand second;
  second.kind = ptx::Operand::Kind::Register;
  second.reg = o.second;
  return dst(second, bytes);
}

u32 Decoder::src(std::size_t k, int bytes) { return src(operand(k), bytes); }

u32 Decoder::src(const ptx::Operand& o, int bytes) {
  using Kind = ptx::Operand::Kind;
  switch (o.kind) {
    case Kind::Register: {
      const int have = register_bytes(o);
      if (have != bytes) {
        fail("source '" + function_.registers[o.reg].name + "' has " + std::to_string(8 * have) +
             " bits, expected " + std::to_string(8 * bytes) + " (0 is a predicate)");
      }
      note_read(static_cast<u32>(o.reg));
      return static_cast<u32>(o.reg);
    }
    case Kind::Immediate: {
      u64 value = o.imm;
      if (o.literal == Type::F64 && bytes == 4) {
        double d;
        std::memcpy(&d, &value, 8);
        const float f = static_cast<float>(d);
        u32 bits;
        std::memcpy(&bits, &f, 4);
        value = bits;
      }
      return constant(value, bytes);
    }
    case Kind::Symbol:
      return symbol_constant(o.symbol, static_cast<i64>(o.imm), bytes);
    default:
      fail("operand is neither register nor constant");
  }
}

u32 Decoder::constant(u64 value, int bytes) {
  if (bytes == 0) value = value != 0;
  if (bytes > 0 && bytes < 8) value &= (u64{1} << (8 * bytes)) - 1;
  ConstantReg c;
  c.size = static_cast<u8>(bytes);
  c.value = value;
  return add_constant(c);
}

u32 Decoder::symbol_constant(const std::string& name, i64 addend, int bytes) {
  ConstantReg c;
  c.size = static_cast<u8>(bytes);
  c.value = static_cast<u64>(addend);
  if (bytes != 4 && bytes != 8) fail("an address needs a 32- or 64-bit register");
  if (const auto p = param_offset_.find(name); p != param_offset_.end()) {
    c.value += p->second;
  } else if (const auto l = local_offset_.find(name); l != local_offset_.end()) {
    c.value += l->second;
  } else if (const auto s = shared_offset_.find(name); s != shared_offset_.end()) {
    c.base = ConstantReg::Base::SharedStatic;
    c.value += s->second;
  } else if (const auto g = symbols_.globals.find(name); g != symbols_.globals.end()) {
    if (bytes != 8) fail("the address of '" + name + "' needs 64 bits");
    c.base = ConstantReg::Base::Symbol;
    c.symbol = g->second;
  } else if (symbols_.shared.count(name) != 0 ||
             std::any_of(function_.locals.begin(), function_.locals.end(),
                         [&](const ptx::Variable& v) { return v.name == name; })) {
    c.base = ConstantReg::Base::SharedDynamic;
  } else {
    fail("unknown symbol '" + name + "'");
  }
  return add_constant(c);
}

u32 Decoder::add_constant(const ConstantReg& c) {
  const auto key =
      std::make_tuple(static_cast<int>(c.size), static_cast<u8>(c.base), c.value, c.symbol);
  const auto [it, inserted] =
      constant_index_.try_emplace(key, static_cast<u32>(program_.constants.size()));
  if (inserted) program_.constants.push_back(c);
  return kConstantHandle | it->second;
}

u64 Decoder::immediate(std::size_t k) const {
  const ptx::Operand& o = operand(k);
  if (o.kind != ptx::Operand::Kind::Immediate) {
    fail("operand " + std::to_string(k + 1) + " must be an immediate");
  }
  return o.imm;
}

u32 Decoder::address_register(const ptx::Operand& o, i64* displacement, bool* wide) {
  if (o.kind != ptx::Operand::Kind::Memory) fail("expected an address in brackets");
  *displacement = static_cast<i64>(o.imm);
  if (o.reg >= 0) {
    ptx::Operand base;
    base.kind = ptx::Operand::Kind::Register;
    base.reg = o.reg;
    const int bytes = register_bytes(base);
    if (bytes != 4 && bytes != 8) fail("an address register has 32 or 64 bits");
    *wide = bytes == 8;
    return src(base, bytes);
  }
  *wide = true;
  if (o.symbol.empty()) return constant(0, 8);
  return symbol_constant(o.symbol, 0, 8);
}

void Decoder::address(const ptx::Operand& o, Inst& i) {
  if (o.kind == ptx::Operand::Kind::Memory && local_offset_.count(o.symbol) != 0 &&
      i.space == Space::Param) {
    i.space = Space::Local;
  }
  bool wide = false;
  i.a = address_register(o, &i.imm, &wide);
  if (wide) i.flags |= kAddress64;
}

bool Decoder::is_clock(std::size_t k, Special* which) const {
  const ptx::Operand& o = operand(k);
  if (!is_register(o) || !function_.registers[o.reg].special) return false;
  Type type;
  if (!parse_special(function_.registers[o.reg].name, which, &type)) return false;
  return *which >= Special::Clock;
}

u32 Decoder::local_variable(const std::string& name) const {
  const auto it = local_offset_.find(name);
  if (it == local_offset_.end()) fail("'" + name + "' is not a variable of the function");
  return it->second;
}

Ext& Decoder::ext(Inst& i) {
  if (i.ext == nullptr) {
    program_.exts.push_back(std::make_unique<Ext>());
    i.ext = program_.exts.back().get();
  }
  return const_cast<Ext&>(*i.ext);  // ours until run() returns
}

void Decoder::matrix_register(u32 handle) {
  if (handle < kConstantHandle) is_matrix_[handle] = 1;
  program_.uses_wgmma = true;
}

// Instructions that touch a wgmma register are looked at one by one at run time: which registers
// they concern is noted here, so that all others pay nothing.
void Decoder::mark_matrix_users() {
  if (!program_.uses_wgmma) return;
  for (std::size_t k = 0; k < program_.code.size(); ++k) {
    Inst& i = program_.code[k];
    const InstInfo& info = program_.info[k];
    const bool is_wgmma = program_.texts[info.text].rfind("wgmma.", 0) == 0;
    if (is_wgmma) continue;
    const auto touches = [&](const std::vector<u32>& regs) {
      return std::any_of(regs.begin(), regs.end(), [&](u32 r) { return is_matrix_[r] != 0; });
    };
    if (touches(info.reads) || touches(info.writes)) i.flags |= kTouchesMatrix;
    if (touches(info.writes)) i.flags |= kWritesMatrix;
  }
}

void Decoder::measure_runs() {
  constexpr u16 kLongest = 1024;
  u16 run = 0, quiet = 0;
  for (std::size_t k = program_.code.size(); k-- > 0;) {
    Inst& i = program_.code[k];
    const bool plain = i.kind == Kind::Plain && i.pred == kNoReg;
    const auto grow = [&](u16& length, int excluded) {
      length = plain && (i.flags & excluded) == 0 ? std::min<u16>(length + 1, kLongest) : 0;
    };
    grow(run, kAligned | kMemberMask | kTouchesMatrix);
    grow(quiet, kAligned | kMemberMask | kWritesMatrix);
    i.run = run;
    i.quiet_run = quiet;
  }
}

u32 Decoder::text_index(const std::string& text) {
  const auto [it, inserted] =
      text_index_.try_emplace(text, static_cast<u32>(program_.texts.size()));
  if (inserted) program_.texts.push_back(text);
  return it->second;
}

u32 Decoder::offset_of(u32 handle) const {
  if (handle == kNoReg) return kNoReg;
  if (handle & kConstantHandle) return program_.constants[handle & ~kConstantHandle].offset;
  return virtual_offset_[handle];
}

void Decoder::patch() {
  for (Inst& i : program_.code) {
    for (u32* field : {&i.d, &i.a, &i.b, &i.c, &i.e, &i.pred}) *field = offset_of(*field);
  }
  for (auto& ext : program_.exts) {
    for (u32& r : ext->regs) r = offset_of(r);
    for (u32& r : ext->regs2) r = offset_of(r);
    for (u32& r : ext->r) r = offset_of(r);
  }
}

}  // namespace dsk::emu
