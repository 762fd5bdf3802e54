// Recursive-descent parser state, split over parser.cpp (file level, declarations) and
// parser_body.cpp (function bodies).
#pragma once

#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "emu/lexer.hpp"
#include "emu/ptx.hpp"

namespace dsk::emu::ptx {

// One .loc, before inlining is resolved.
struct LocRecord {
  u32 file = 0, line = 0, column = 0;
  u32 at_file = 0, at_line = 0, at_column = 0;  // inlined_at; file 0 = none
};

class Parser {
 public:
  explicit Parser(std::string_view text) : tokens_(tokenize(text)) {}
  File run();

 private:
  // Token access.
  const Lexeme& peek(std::size_t ahead = 0) const;
  const Lexeme& take();
  bool at_punct(char c) const;
  bool at_word(std::string_view word) const;
  bool accept(char c);
  bool accept_word(std::string_view word);
  void expect(char c);
  std::string expect_word(const char* what);
  u64 expect_count(const char* what, u64 max);
  [[noreturn]] void fail(const std::string& what) const;
  void skip_line();
  void skip_braces();

  // File level.
  void parse_top_level();
  void parse_file_directive();
  Variable parse_variable(bool is_param);
  void parse_initializer(Variable& v);
  void parse_init_element(Variable& v, u64 index);
  void parse_function(bool entry);
  std::vector<Variable> parse_params();
  void parse_function_attributes(Function& f);
  void resolve_sources();

  // Bodies.
  void parse_body();
  void parse_statement();
  void parse_registers();
  void parse_loc();
  void parse_instruction();
  Operand parse_operand(int depth);
  Operand parse_memory(int depth);
  Operand parse_list(char close, int depth);
  Operand parse_number();
  Operand parse_name();
  i64 parse_displacement();
  void declare(const std::string& name, Type type);
  i32 lookup(const std::string& name);
  void open_scope();
  void close_scope();

  std::vector<Lexeme> tokens_;
  std::size_t pos_ = 0;
  File file_;
  Function* function_ = nullptr;
  std::vector<std::unordered_map<std::string, i32>> names_;  // by lexical block id
  std::vector<u32> scopes_;                                  // open blocks, innermost last
  std::vector<LocRecord> locs_;
  u32 current_loc_ = 0;  // index into locs_, 0 = none
};

// Value of a PTX number; throws PtxError. Float literals give their bits and the literal type.
u64 parse_literal(std::string_view text, u32 line, Type* literal);

}  // namespace dsk::emu::ptx
