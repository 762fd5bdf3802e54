// The one table of instructions: what the decoder accepts and what the documentation lists.
#pragma once

#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "emu/program.hpp"
#include "emu/ptx.hpp"

namespace dsk::emu {

class Decoder;

// `pattern` is an opcode with its modifiers in order. A token may list alternatives (rn|rz), be
// optional (ftz?), and name a class in braces ({scope}); see kClasses in table.cpp.
struct Entry {
  const char* pattern;
  void (*bind)(Decoder&, Inst&);
  const char* summary;  // one line for the documentation
  u16 min_sm = 50;
};

// All rows, for the instruction set (AVX-512, AVX2, portable) chosen for this process.
const std::vector<Entry>& instruction_table();
// The row that matches, or nullptr. `index` gets its position.
const Entry* find_entry(const ptx::Instruction& in, u32* index);
// Expands {classes} for the documentation.
std::string describe_pattern(const char* pattern);
// "avx512", "avx2" or "portable"; DSK_EMU_ISA in the environment narrows the choice.
const char* host_isa();

}  // namespace dsk::emu
