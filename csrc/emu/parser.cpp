// File level of the PTX grammar: directives, variables, function headers.
#include "emu/parser.hpp"

#include <cctype>
#include <cstdlib>
#include <cstring>
#include <map>
#include <tuple>

namespace dsk::emu::ptx {
namespace {

constexpr u64 kMaxVariableBytes = u64{1} << 36;
constexpr u32 kMaxAlign = 1u << 20;

bool parse_space(std::string_view word, Space* space) {
  if (word == ".global")
    *space = Space::Global;
  else if (word == ".const")
    *space = Space::Const;
  else if (word == ".shared")
    *space = Space::Shared;
  else if (word == ".local")
    *space = Space::Local;
  else if (word == ".param")
    *space = Space::Param;
  else
    return false;
  return true;
}

int hex_digit(char c) {
  if (c >= '0' && c <= '9') return c - '0';
  if (c >= 'a' && c <= 'f') return c - 'a' + 10;
  if (c >= 'A' && c <= 'F') return c - 'A' + 10;
  return -1;
}

// Headers of the toolkit: nobody wants to be sent there.
bool is_toolkit_header(const std::string& path) {
  for (const char* part : {"/cuda/", "cuda/std", "cccl", "crt/", "cuda_runtime", "/cuda-", "cub/",
                           "sm_90_rt", "cuda_fp8", "cuda_bf16", "cuda_fp16", "device_functions"}) {
    if (path.find(part) != std::string::npos) return true;
  }
  return false;
}

}  // namespace

u64 parse_literal(std::string_view text, u32 line, Type* literal) {
  const auto bad = [&]() -> u64 {
    throw PtxError(line, "bad number '" + std::string(text.substr(0, 64)) + "'");
  };
  *literal = Type::None;
  if (text.find('.') != std::string_view::npos) {  // 0.5, 1.0E-3: doubles, narrowed by their use
    const std::string copy(text);
    char* stop = nullptr;
    const double value = std::strtod(copy.c_str(), &stop);
    if (stop != copy.c_str() + copy.size()) return bad();
    *literal = Type::F64;
    u64 bits;
    std::memcpy(&bits, &value, 8);
    return bits;
  }
  int base = 10;
  std::size_t k = 0;
  if (text.size() > 1 && text[0] == '0') {
    const char c = text[1];
    if (c == 'f' || c == 'F' || c == 'd' || c == 'D') {
      const bool single = c == 'f' || c == 'F';
      if (text.size() != (single ? 10u : 18u)) return bad();
      *literal = single ? Type::F32 : Type::F64;
      base = 16, k = 2;
    } else if (c == 'x' || c == 'X') {
      base = 16, k = 2;
    } else if (c == 'b' || c == 'B') {
      base = 2, k = 2;
    } else {
      base = 8, k = 1;
    }
  }
  std::size_t end = text.size();
  if (*literal == Type::None && end > k && (text[end - 1] == 'U' || text[end - 1] == 'u')) --end;
  if (k >= end && !(base == 8 && end == 1)) return bad();
  u64 value = 0;
  for (; k < end; ++k) {
    const int digit = hex_digit(text[k]);
    if (digit < 0 || digit >= base) return bad();
    if (value > (~u64{0} - digit) / base) return bad();
    value = value * base + digit;
  }
  return value;
}

const Lexeme& Parser::peek(std::size_t ahead) const {
  const std::size_t k = pos_ + ahead;
  return k < tokens_.size() ? tokens_[k] : tokens_.back();
}
const Lexeme& Parser::take() {
  const Lexeme& t = peek();
  if (pos_ + 1 < tokens_.size()) ++pos_;
  return t;
}
bool Parser::at_punct(char c) const { return peek().token == Token::Punct && peek().text[0] == c; }
bool Parser::at_word(std::string_view word) const {
  return peek().token == Token::Word && peek().text == word;
}
bool Parser::accept(char c) {
  if (!at_punct(c)) return false;
  take();
  return true;
}
bool Parser::accept_word(std::string_view word) {
  if (!at_word(word)) return false;
  take();
  return true;
}
void Parser::fail(const std::string& what) const {
  const Lexeme& t = peek();
  const std::string seen =
      t.token == Token::End ? "the end of the file" : "'" + std::string(t.text.substr(0, 64)) + "'";
  throw PtxError(t.line, what + ", at " + seen);
}
void Parser::expect(char c) {
  if (!accept(c)) fail(std::string("expected '") + c + "'");
}
std::string Parser::expect_word(const char* what) {
  if (peek().token != Token::Word) fail(std::string("expected ") + what);
  return std::string(take().text);
}
u64 Parser::expect_count(const char* what, u64 max) {
  if (peek().token != Token::Number) fail(std::string("expected ") + what);
  const Lexeme& t = take();
  Type literal;
  const u64 value = parse_literal(t.text, t.line, &literal);
  if (literal != Type::None || value > max) {
    throw PtxError(t.line, std::string(what) + " must be at most " + std::to_string(max) +
                               ", got " + std::string(t.text));
  }
  return value;
}
void Parser::skip_line() {
  const u32 line = peek().line;
  while (peek().token != Token::End && peek().line == line) take();
}
void Parser::skip_braces() {
  expect('{');
  for (int depth = 1; depth > 0;) {
    if (peek().token == Token::End) fail("'{' is never closed");
    if (at_punct('{')) ++depth;
    if (at_punct('}')) --depth;
    take();
  }
}

File Parser::run() {
  locs_.emplace_back();
  while (peek().token != Token::End) parse_top_level();
  resolve_sources();
  return std::move(file_);
}

void Parser::parse_top_level() {
  if (accept(';')) return;
  if (accept_word(".version")) {
    file_.version = std::string(take().text);
    return skip_line();
  }
  if (accept_word(".target")) {
    file_.target = std::string(take().text);
    return skip_line();
  }
  if (at_word(".address_size") || at_word(".loc")) return skip_line();
  if (at_word(".file")) return parse_file_directive();
  if (accept_word(".section")) {
    while (!at_punct('{') && peek().token != Token::End) take();
    return skip_braces();
  }
  if (at_word(".pragma") || at_word(".alias")) {
    while (peek().token != Token::End && !accept(';')) take();
    return;
  }
  while (at_word(".visible") || at_word(".weak") || at_word(".common") || at_word(".extern")) {
    const bool is_extern = at_word(".extern");
    take();
    if (is_extern && !at_word(".func") && !at_word(".entry")) {
      file_.variables.push_back(parse_variable(false));
      file_.variables.back().is_extern = true;
      return expect(';');
    }
  }
  if (accept_word(".entry")) return parse_function(true);
  if (accept_word(".func")) return parse_function(false);
  Space space;
  if (peek().token == Token::Word && parse_space(peek().text, &space)) {
    file_.variables.push_back(parse_variable(false));
    return expect(';');
  }
  fail("expected a directive");
}

void Parser::parse_file_directive() {
  const u32 line = take().line;
  const u32 index = static_cast<u32>(expect_count("file index", 1u << 24));
  if (peek().token != Token::String) fail("expected a file name");
  file_.files[index] = std::string(take().text);
  while (peek().token != Token::End && peek().line == line) take();
}

Variable Parser::parse_variable(bool is_param) {
  Variable v;
  v.line = peek().line;
  u64 vector = 1;
  if (peek().token != Token::Word || !parse_space(peek().text, &v.space)) {
    fail("expected a state space");
  }
  take();
  u32 align = 0;
  bool pointer = false;
  while (peek().token == Token::Word && peek().text[0] == '.') {
    const std::string word(take().text);
    Space ignored;
    if (word == ".align") {
      const u64 n = expect_count("alignment", kMaxAlign);
      if (n == 0 || (n & (n - 1)) != 0) fail("alignment must be a power of two");
      if (!pointer) align = static_cast<u32>(n);  // `.ptr .align` speaks of the pointee
    } else if (word == ".ptr") {
      pointer = true;
    } else if (word == ".v2" || word == ".v4" || word == ".v8") {
      vector = word[2] - '0';
    } else if (word == ".attribute") {
      expect('(');
      while (!accept(')')) {
        if (peek().token == Token::End) fail("'(' is never closed");
        take();
      }
    } else if (pointer && parse_space(word, &ignored)) {
      continue;
    } else {
      v.type = parse_type(std::string_view(word).substr(1));
      if (v.type == Type::None || v.type == Type::Pred) fail("unknown type '" + word + "'");
    }
  }
  v.name = expect_word("a variable name");
  v.count = vector;
  while (accept('[')) {
    if (accept(']')) {
      v.sized = false;
      v.count = 0;
      continue;
    }
    v.count *= expect_count("array size", kMaxVariableBytes);
    if (v.count > kMaxVariableBytes) fail("variable '" + v.name + "' is too large");
    expect(']');
  }
  if (v.bytes() > kMaxVariableBytes) fail("variable '" + v.name + "' is too large");
  v.align = align != 0 ? align : static_cast<u32>(type_size(v.type) * vector);
  if (v.align == 0) v.align = 1;
  if (!is_param && accept('=')) parse_initializer(v);
  return v;
}

void Parser::parse_initializer(Variable& v) {
  if (!at_punct('{')) return parse_init_element(v, 0);
  // Nested braces are flattened: PTX fills row-major and every row it writes is complete.
  int depth = 0;
  u64 index = 0;
  do {
    if (accept('{')) {
      ++depth;
    } else if (accept('}')) {
      --depth;
    } else if (accept(',')) {
      continue;
    } else {
      parse_init_element(v, index++);
    }
  } while (depth > 0);
}

void Parser::parse_init_element(Variable& v, u64 index) {
  const u64 size = static_cast<u64>(type_size(v.type));
  if (v.sized && index >= v.count) fail("too many initial values for '" + v.name + "'");
  if (!v.sized) v.count = index + 1;
  v.init.resize((index + 1) * size, 0);
  if (peek().token == Token::Word) {
    std::string symbol(take().text);
    bool generic = false;
    if (symbol == "generic" && accept('(')) {
      generic = true;
      symbol = expect_word("a symbol");
      expect(')');
    }
    const i64 addend = at_punct('+') || at_punct('-') ? parse_displacement() : 0;
    v.address_inits.push_back({index * size, symbol, addend, generic});
    return;
  }
  const bool negative = accept('-');
  if (peek().token != Token::Number) fail("expected an initial value");
  const Lexeme& t = take();
  Type literal;
  u64 value = parse_literal(t.text, t.line, &literal);
  if (negative) {
    value = literal == Type::F64   ? value ^ (u64{1} << 63)
            : literal == Type::F32 ? value ^ (u64{1} << 31)
                                   : ~value + 1;
  }
  std::memcpy(v.init.data() + index * size, &value, size < 8 ? size : 8);
}

std::vector<Variable> Parser::parse_params() {
  std::vector<Variable> params;
  if (!accept('(')) return params;
  while (!accept(')')) {
    if (at_word(".reg")) fail("register parameters of functions are not supported");
    params.push_back(parse_variable(true));
    if (!at_punct(')')) expect(',');
  }
  return params;
}

void Parser::parse_function_attributes(Function& f) {
  const auto counts = [&](u32* out) {
    int n = 0;
    do {
      const u32 value = static_cast<u32>(expect_count("count", 1u << 20));
      if (n < 3) out[n] = value;
      ++n;
    } while (accept(','));
  };
  while (peek().token == Token::Word && peek().text[0] == '.') {
    const std::string word(take().text);
    u32 xyz[3] = {1, 1, 1};
    if (peek().token == Token::Number) counts(xyz);
    if (word == ".maxntid" || word == ".reqntid") f.max_threads = xyz[0] * xyz[1] * xyz[2];
    if (word == ".reqnctapercluster") f.required_cluster = {xyz[0], xyz[1], xyz[2]};
    if (word == ".pragma" && peek().token == Token::String) take(), accept(';');
    if (word == ".attribute" && accept('(')) {
      while (peek().token != Token::End && !accept(')')) take();
    }
  }
}

void Parser::parse_function(bool entry) {
  Function f;
  f.is_entry = entry;
  f.line = peek().line;
  if (!entry && at_punct('(')) f.returns = parse_params();
  while (at_word(".attribute")) {
    take();
    while (peek().token != Token::End && !accept(')')) take();
  }
  f.name = expect_word("a function name");
  f.params = parse_params();
  parse_function_attributes(f);
  if (accept(';')) return;  // a prototype
  if (!at_punct('{')) fail("expected the body of '" + f.name + "'");
  for (const Function& other : file_.functions) {
    if (other.name == f.name) fail("function '" + f.name + "' is defined twice");
  }
  function_ = &f;
  parse_body();
  function_ = nullptr;
  file_.functions.push_back(std::move(f));
}

void Parser::resolve_sources() {
  using Place = std::tuple<u32, u32, u32>;
  std::map<Place, const LocRecord*> inlined;
  for (const LocRecord& r : locs_) {
    if (r.at_file != 0) inlined[{r.file, r.line, r.column}] = &r;
  }
  std::vector<SourceLine> resolved(locs_.size());
  for (std::size_t k = 1; k < locs_.size(); ++k) {
    LocRecord here = locs_[k];
    const auto in_toolkit = [&](u32 file) {
      const auto it = file_.files.find(file);
      return it != file_.files.end() && is_toolkit_header(it->second);
    };
    for (int depth = 0; depth < 64 && in_toolkit(here.file); ++depth) {
      u32 file = here.at_file, line = here.at_line, column = here.at_column;
      if (file == 0) {
        const auto it = inlined.find({here.file, here.line, here.column});
        if (it == inlined.end()) break;
        file = it->second->at_file, line = it->second->at_line, column = it->second->at_column;
      }
      here = {file, line, column, 0, 0, 0};
    }
    resolved[k] = {here.file, here.line};
  }
  for (Function& f : file_.functions) {
    for (Instruction& i : f.code) i.source = resolved[i.source.line];
  }
}

File parse(std::string_view text) { return Parser(text).run(); }

}  // namespace dsk::emu::ptx
