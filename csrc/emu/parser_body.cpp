// Function bodies of the PTX grammar: blocks, declarations, instructions, operands.
#include <algorithm>

#include "emu/parser.hpp"

namespace dsk::emu::ptx {
namespace {
constexpr u64 kMaxRegisters = 1u << 20;
constexpr int kMaxDepth = 8;
constexpr std::size_t kMaxScopes = 256;
}  // namespace

std::string Instruction::text() const {
  std::string s = opcode;
  for (const std::string& m : modifiers) s += "." + m;
  return s;
}

void Parser::open_scope() {
  if (scopes_.size() >= kMaxScopes) fail("blocks are nested too deeply");
  function_->scope_parent.push_back(scopes_.empty() ? 0 : scopes_.back());
  scopes_.push_back(static_cast<u32>(names_.size()));
  names_.emplace_back();
}

void Parser::close_scope() { scopes_.pop_back(); }

void Parser::declare(const std::string& name, Type type) {
  if (function_->registers.size() >= kMaxRegisters) fail("too many registers");
  names_[scopes_.back()][name] = static_cast<i32>(function_->registers.size());
  function_->registers.push_back({name, type, false});
}

i32 Parser::lookup(const std::string& name) {
  for (auto it = scopes_.rbegin(); it != scopes_.rend(); ++it) {
    const auto found = names_[*it].find(name);
    if (found != names_[*it].end()) return found->second;
  }
  return -1;
}

void Parser::parse_body() {
  names_.clear();
  scopes_.clear();
  current_loc_ = 0;
  expect('{');
  open_scope();
  while (!scopes_.empty()) {
    if (peek().token == Token::End) fail("the body of '" + function_->name + "' is never closed");
    if (accept('{')) {
      open_scope();
    } else if (accept('}')) {
      close_scope();
    } else if (!accept(';')) {
      parse_statement();
    }
  }
}

void Parser::parse_statement() {
  if (peek().token == Token::Word && peek(1).token == Token::Punct && peek(1).text[0] == ':') {
    const std::string name(take().text);
    take();
    for (const auto& label : function_->labels) {
      if (label.name == name && label.scope == scopes_.back()) {
        fail("label '" + name + "' is defined twice");
      }
    }
    function_->labels.push_back({name, scopes_.back(), static_cast<u32>(function_->code.size())});
    return;
  }
  if (at_word(".reg")) return parse_registers();
  if (at_word(".loc")) return parse_loc();
  if (at_word(".file")) return skip_line();
  if (at_word(".pragma")) {
    while (peek().token != Token::End && !accept(';')) take();
    return;
  }
  if (at_word(".shared") || at_word(".local") || at_word(".param") || at_word(".global") ||
      at_word(".const")) {
    Variable v = parse_variable(false);
    const bool module_level = v.space == Space::Global || v.space == Space::Const;
    (module_level ? file_.variables : function_->locals).push_back(std::move(v));
    return expect(';');
  }
  if (peek().token == Token::Word && peek().text[0] == '.') fail("unsupported directive");
  parse_instruction();
}

void Parser::parse_registers() {
  take();
  const std::string word = expect_word("a register type");
  const Type type = parse_type(std::string_view(word).substr(1));
  if (word[0] != '.' || type == Type::None) fail("unknown register type '" + word + "'");
  do {
    const std::string name = expect_word("a register name");
    if (accept('<')) {
      const u64 n = expect_count("register count", kMaxRegisters);
      expect('>');
      for (u64 k = 0; k < n; ++k) declare(name + std::to_string(k), type);
    } else {
      declare(name, type);
    }
  } while (accept(','));
  expect(';');
}

// .loc FILE LINE COLUMN [, function_name LABEL[+n], inlined_at FILE LINE COLUMN], one line long.
void Parser::parse_loc() {
  const u32 line = take().line;
  const auto number = [&]() -> u32 {
    return static_cast<u32>(expect_count(".loc number", 0xffffffffu));
  };
  LocRecord r;
  r.file = number(), r.line = number(), r.column = number();
  while (peek().token != Token::End && peek().line == line) {
    if (accept_word("inlined_at")) {
      r.at_file = number(), r.at_line = number(), r.at_column = number();
    } else {
      take();
    }
  }
  current_loc_ = static_cast<u32>(locs_.size());
  locs_.push_back(r);
}

void Parser::parse_instruction() {
  Instruction in;
  in.line = peek().line;
  in.scope = scopes_.back();
  in.source.line = current_loc_;  // an index until resolve_sources()
  if (accept('@')) {
    in.predicate_negated = accept('!');
    const std::string name = expect_word("a predicate");
    in.predicate = lookup(name);
    if (in.predicate < 0) fail("unknown predicate '" + name + "'");
    if (function_->registers[in.predicate].type != Type::Pred) {
      fail("'" + name + "' is not a predicate");
    }
  }
  const std::string word = expect_word("an instruction");
  std::size_t start = 0;
  while (true) {
    const std::size_t dot = word.find('.', start);
    const std::string part = word.substr(start, dot - start);
    if (start == 0) {
      in.opcode = part;
    } else {
      in.modifiers.push_back(part);
    }
    if (dot == std::string::npos) break;
    start = dot + 1;
  }
  while (!at_punct(';')) {
    if (peek().token == Token::End) fail("expected ';'");
    in.operands.push_back(parse_operand(0));
    if (!at_punct(';')) expect(',');
  }
  take();
  function_->code.push_back(std::move(in));
}

Operand Parser::parse_operand(int depth) {
  if (depth > kMaxDepth) fail("operands are nested too deeply");
  if (at_punct('{')) return parse_list('}', depth);
  if (at_punct('(')) return parse_list(')', depth);
  if (at_punct('[')) return parse_memory(depth);
  if (accept('!')) {
    Operand o = parse_operand(depth + 1);
    o.negated = true;
    return o;
  }
  if (at_punct('-') || peek().token == Token::Number) return parse_number();
  return parse_name();
}

Operand Parser::parse_list(char close, int depth) {
  Operand o;
  o.kind = Operand::Kind::Vector;
  take();
  while (!accept(close)) {
    if (o.list.size() > 1024) fail("operand list is too long");
    o.list.push_back(parse_operand(depth + 1));
    if (!at_punct(close)) expect(',');
  }
  return o;
}

Operand Parser::parse_number() {
  Operand o;
  o.kind = Operand::Kind::Immediate;
  const bool negative = accept('-');
  if (peek().token != Token::Number) fail("expected a number");
  const Lexeme& t = take();
  o.imm = parse_literal(t.text, t.line, &o.literal);
  if (!negative) return o;
  if (o.literal == Type::None)
    o.imm = ~o.imm + 1;
  else
    o.imm ^= u64{1} << (o.literal == Type::F32 ? 31 : 63);
  return o;
}

i64 Parser::parse_displacement() {
  i64 sum = 0;
  while (at_punct('+') || at_punct('-')) {
    bool negative = take().text[0] == '-';
    if (accept('-')) negative = !negative;  // nvcc writes [%rd1+-16]
    if (peek().token != Token::Number) fail("expected a displacement");
    const Lexeme& t = take();
    Type literal;
    const u64 v = parse_literal(t.text, t.line, &literal);
    sum = static_cast<i64>(static_cast<u64>(sum) + (negative ? ~v + 1 : v));
  }
  return sum;
}

Operand Parser::parse_name() {
  Operand o;
  const std::string name = expect_word("an operand");
  if (name == "_") {
    o.kind = Operand::Kind::Sink;
  } else {
    o.reg = lookup(name);
    if (o.reg < 0 && name[0] == '%') {
      // Special registers live in the outermost block, declared when first named.
      names_[0][name] = o.reg = static_cast<i32>(function_->registers.size());
      function_->registers.push_back({name, Type::None, true});
    }
    if (o.reg >= 0) {
      o.kind = Operand::Kind::Register;
    } else {
      o.kind = Operand::Kind::Symbol;
      o.symbol = name;
      o.imm = static_cast<u64>(parse_displacement());
    }
  }
  if (accept('|')) {
    o.paired = true;
    const Operand other = parse_name();
    if (other.kind == Operand::Kind::Register) o.second = other.reg;
  }
  return o;
}

Operand Parser::parse_memory(int depth) {
  expect('[');
  Operand o;
  o.kind = Operand::Kind::Memory;
  if (peek().token == Token::Number || at_punct('-')) {
    o.imm = parse_number().imm;
  } else {
    const std::string name = expect_word("an address");
    o.reg = lookup(name);
    if (o.reg < 0) o.symbol = name;
    o.imm = static_cast<u64>(parse_displacement());
  }
  if (accept(',')) o.list.push_back(parse_operand(depth + 1));
  expect(']');
  return o;
}

}  // namespace dsk::emu::ptx
