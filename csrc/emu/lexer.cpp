#include "emu/lexer.hpp"

#include <cctype>

#include "emu/error.hpp"

namespace dsk::emu::ptx {
namespace {

bool is_word_start(char c) {
  return std::isalpha(static_cast<unsigned char>(c)) || c == '_' || c == '$' || c == '%' ||
         c == '.';
}
bool is_word(char c) { return is_word_start(c) || std::isdigit(static_cast<unsigned char>(c)); }

class Cutter {
 public:
  explicit Cutter(std::string_view text) : text_(text) {}

  std::vector<Lexeme> run() {
    std::vector<Lexeme> out;
    while (skip_blank()) out.push_back(next());
    out.push_back({Token::End, {}, line_});
    return out;
  }

 private:
  char at(std::size_t k) const { return k < text_.size() ? text_[k] : '\0'; }

  // Moves to the next token; false at the end of the text.
  bool skip_blank() {
    while (pos_ < text_.size()) {
      const char c = text_[pos_];
      if (c == '\n') {
        ++line_;
        ++pos_;
      } else if (std::isspace(static_cast<unsigned char>(c)) || c == '\0') {
        ++pos_;  // nvcc ends its files with a NUL
      } else if (c == '/' && at(pos_ + 1) == '/') {
        while (pos_ < text_.size() && text_[pos_] != '\n') ++pos_;
      } else if (c == '/' && at(pos_ + 1) == '*') {
        skip_block_comment();
      } else {
        return true;
      }
    }
    return false;
  }

  void skip_block_comment() {
    const u32 first = line_;
    for (pos_ += 2; pos_ < text_.size(); ++pos_) {
      if (text_[pos_] == '\n') ++line_;
      if (text_[pos_] == '*' && at(pos_ + 1) == '/') {
        pos_ += 2;
        return;
      }
    }
    throw PtxError(first, "comment is never closed");
  }

  Lexeme next() {
    const std::size_t start = pos_;
    const char c = text_[pos_];
    if (c == '"') return string();
    if (std::isdigit(static_cast<unsigned char>(c))) {
      while (std::isalnum(static_cast<unsigned char>(at(pos_)))) ++pos_;
      // `.version 8.8`, `0.5`, `1.0E-3`.
      if (at(pos_) == '.' && std::isdigit(static_cast<unsigned char>(at(pos_ + 1)))) {
        ++pos_;
        while (std::isdigit(static_cast<unsigned char>(at(pos_)))) ++pos_;
        const bool sign = at(pos_ + 1) == '-' || at(pos_ + 1) == '+';
        const char digit = at(pos_ + 1 + sign);
        if ((at(pos_) | 0x20) == 'e' && std::isdigit(static_cast<unsigned char>(digit))) {
          pos_ += 1u + sign;
          while (std::isdigit(static_cast<unsigned char>(at(pos_)))) ++pos_;
        }
      }
      return make(Token::Number, start);
    }
    if (is_word_start(c)) {
      while (pos_ < text_.size()) {
        if (is_word(text_[pos_])) {
          ++pos_;
        } else if (text_[pos_] == ':' && at(pos_ + 1) == ':') {
          pos_ += 2;  // shared::cta
        } else {
          break;
        }
      }
      return make(Token::Word, start);
    }
    static constexpr std::string_view kPunct = ",;{}[]()<>=+-!|@:*/&^~?";
    if (kPunct.find(c) == std::string_view::npos) {
      throw PtxError(line_, "unexpected character (code " +
                                std::to_string(static_cast<unsigned char>(c)) + ")");
    }
    ++pos_;
    return make(Token::Punct, start);
  }

  Lexeme string() {
    const std::size_t start = ++pos_;
    while (pos_ < text_.size() && text_[pos_] != '"' && text_[pos_] != '\n') ++pos_;
    if (at(pos_) != '"') throw PtxError(line_, "string is never closed");
    Lexeme lexeme{Token::String, text_.substr(start, pos_ - start), line_};
    ++pos_;
    return lexeme;
  }

  Lexeme make(Token token, std::size_t start) const {
    return {token, text_.substr(start, pos_ - start), line_};
  }

  std::string_view text_;
  std::size_t pos_ = 0;
  u32 line_ = 1;
};

}  // namespace

std::vector<Lexeme> tokenize(std::string_view text) { return Cutter(text).run(); }

}  // namespace dsk::emu::ptx
