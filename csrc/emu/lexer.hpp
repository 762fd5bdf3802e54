// Cuts PTX text into tokens with their lines.
#pragma once

#include <string_view>
#include <vector>

#include "emu/types.hpp"

namespace dsk::emu::ptx {

enum class Token : u8 {
  Word,    // identifiers, opcodes with modifiers, directives, registers: "ld.global.f32", ".reg"
  Number,  // as written: "12", "-3" is two tokens, "0x1f", "0f3F800000"
  String,  // without the quotes
  Punct,   // one character
  End,
};

struct Lexeme {
  Token token = Token::End;
  std::string_view text;
  u32 line = 1;
};

// Comments are dropped. Throws PtxError on unterminated strings or comments and on characters that
// PTX does not have. The views point into `text`.
std::vector<Lexeme> tokenize(std::string_view text);

}  // namespace dsk::emu::ptx
