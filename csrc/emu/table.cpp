#include "emu/table.hpp"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <unordered_map>

#include "emu/error.hpp"
#include "emu/isa/groups.hpp"

namespace dsk::emu {
namespace {

// Lists of modifiers that many patterns share.
struct Class {
  const char* name;
  const char* members;
};
constexpr Class kClasses[] = {
    {"space",
     "global|shared|shared::cta|shared::cluster|local|const|param|param::entry|param::func"},
    {"scope", "cta|cluster|gpu|sys"},
    {"cmp", "eq|ne|lt|le|gt|ge|lo|ls|hi|hs|equ|neu|ltu|leu|gtu|geu|num|nan"},
    {"cop", "ca|cg|cs|lu|cv|wb|wt"},
    {"evict",
     "L1::evict_normal|L1::evict_unchanged|L1::evict_first|L1::evict_last|L1::no_allocate|"
     "L2::evict_normal|L2::evict_first|L2::evict_last"},
    {"prefetch", "L2::64B|L2::128B|L2::256B"},
    {"sem", "relaxed|acquire|release|acq_rel"},
};

// wgmma shapes m64nNkK for all N; K by the width of the elements.
std::string wgmma_shapes(const char* k) {
  std::string s;
  for (int n = 8; n <= 256; n += 8) {
    s += (n > 8 ? "|m64n" : "m64n") + std::to_string(n) + "k" + k;
  }
  return s;
}

std::string expand(const std::string& token) {
  if (token.empty() || token.front() != '{') return token;
  for (const Class& c : kClasses) {
    if (token.compare(1, token.size() - 2, c.name) == 0) return c.members;
  }
  if (token.compare(0, 6, "{wgmma") == 0) {
    return wgmma_shapes(token.substr(6, token.size() - 7).c_str());
  }
  throw std::logic_error("unknown class in the instruction table: " + token);
}

struct Token {
  std::vector<std::string> alternatives;
  bool optional = false;
};

struct Row {
  std::vector<Token> tokens;  // after the opcode
  u32 index;
};

std::vector<std::string> split(const std::string& text, char separator) {
  std::vector<std::string> parts(1);
  for (char c : text) {
    if (c == separator)
      parts.emplace_back();
    else
      parts.back() += c;
  }
  return parts;
}

class Index {
 public:
  Index() {
    const auto& table = instruction_table();
    for (u32 k = 0; k < table.size(); ++k) {
      auto parts = split(table[k].pattern, '.');
      Row row;
      row.index = k;
      for (std::size_t t = 1; t < parts.size(); ++t) {
        Token token;
        if (parts[t].back() == '?') {
          token.optional = true;
          parts[t].pop_back();
        }
        token.alternatives = split(expand(parts[t]), '|');
        row.tokens.push_back(std::move(token));
      }
      rows_[parts[0]].push_back(std::move(row));
    }
  }

  bool find(const ptx::Instruction& in, u32* index) const {
    const auto it = rows_.find(in.opcode);
    if (it == rows_.end()) return false;
    for (const Row& row : it->second) {
      if (match(row.tokens, 0, in.modifiers, 0)) {
        *index = row.index;
        return true;
      }
    }
    return false;
  }

 private:
  static bool match(const std::vector<Token>& tokens, std::size_t t,
                    const std::vector<std::string>& mods, std::size_t m) {
    if (t == tokens.size()) return m == mods.size();
    if (m < mods.size()) {
      for (const std::string& a : tokens[t].alternatives) {
        if (a == mods[m] && match(tokens, t + 1, mods, m + 1)) return true;
      }
    }
    return tokens[t].optional && match(tokens, t + 1, mods, m);
  }

  std::unordered_map<std::string, std::vector<Row>> rows_;
};

std::string detect_isa() {
  std::string best = "portable";
#if defined(DSK_EMU_X86_LEVELS)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  best = avx512 ? "avx512" : avx2 ? "avx2" : "portable";
  if (const char* wish = std::getenv("DSK_EMU_ISA")) {
    const std::string w = wish;
    const bool have = w == "portable" || (w == "avx2" && avx2) || (w == "avx512" && avx512);
    if (!have)
      throw Error("DSK_EMU_ISA=" + w +
                  ": expected avx512, avx2 or portable, and a CPU that has it");
    best = w;
  }
#endif
  return best;
}

template <class Groups>
void append(std::vector<Entry>& table, Groups groups) {
  for (const auto group : groups) table.insert(table.end(), group.begin(), group.end());
}

}  // namespace

const char* host_isa() {
  static const std::string isa = detect_isa();
  return isa.c_str();
}

const std::vector<Entry>& instruction_table() {
  static const std::vector<Entry> table = [] {
    std::vector<Entry> t;
    const std::string isa = host_isa();
#if defined(DSK_EMU_X86_LEVELS)
    if (isa == "avx512")
      append(t, avx512::lane_groups());
    else if (isa == "avx2")
      append(t, avx2::lane_groups());
    else
      append(t, portable::lane_groups());
#else
    append(t, portable::lane_groups());
#endif
    append(t, common_groups());
    return t;
  }();
  return table;
}

const Entry* find_entry(const ptx::Instruction& in, u32* index) {
  static const Index rows;
  return rows.find(in, index) ? &instruction_table()[*index] : nullptr;
}

std::string describe_pattern(const char* pattern) {
  std::string out;
  for (const std::string& token : split(pattern, '.')) {
    if (!out.empty()) out += '.';
    const bool optional = token.back() == '?';
    const std::string body = optional ? token.substr(0, token.size() - 1) : token;
    const std::string members = expand(body);
    const bool group = members.find('|') != std::string::npos;
    out += group ? "(" + members + ")" : members;
    if (optional) out += '?';
  }
  return out;
}

}  // namespace dsk::emu
