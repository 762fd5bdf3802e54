// The parsed form of a PTX file: what the text says, before any meaning is given to an opcode.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "emu/error.hpp"
#include "emu/types.hpp"

namespace dsk::emu::ptx {

struct SourceLine {
  u32 file = 0;  // key of File::files; 0 = unknown
  u32 line = 0;
};

// A variable with storage: .global/.const/.shared/.local/.param.
struct Variable {
  std::string name;
  Space space = Space::Global;
  Type type = Type::B8;
  u64 count = 1;  // elements
  u32 align = 1;
  bool is_extern = false;  // for .shared: the dynamic part
  bool sized = true;       // false for `name[]`
  std::vector<u8> init;    // initial bytes, shorter than the variable when zero-padded
  struct AddressInit {     // initialiser that names another symbol
    u64 offset;
    std::string symbol;
    i64 addend;
    bool generic;
  };
  std::vector<AddressInit> address_inits;
  u32 line = 0;
  u64 bytes() const { return count * static_cast<u64>(type_size(type)); }
};

struct Register {
  std::string name;
  Type type = Type::B32;
  bool special = false;  // %tid.x and friends
};

struct Operand {
  enum class Kind : u8 { Register, Immediate, Symbol, Memory, Vector, Sink };
  Kind kind = Kind::Sink;
  bool negated = false;       // !p
  i32 reg = -1;               // Register; Memory with a register base
  i32 second = -1;            // `d|p`
  bool paired = false;        // a `|` was written, even if one side is `_`
  u64 imm = 0;                // Immediate bits; displacement of Symbol and Memory
  Type literal = Type::None;  // F32 / F64 for 0f / 0d literals
  std::string symbol;         // Symbol; Memory with a symbolic base; label
  std::vector<Operand> list;  // Vector elements; coordinates inside [..., {...}]
};

struct Instruction {
  std::string opcode;                  // the first word: "ld"
  std::vector<std::string> modifiers;  // the rest: "global", "v4", "f32"
  std::vector<Operand> operands;
  i32 predicate = -1;
  bool predicate_negated = false;
  u32 line = 0;              // in the PTX text
  SourceLine source;         // in the CUDA source, inlining followed outwards
  u32 scope = 0;             // lexical block, for labels
  std::string text() const;  // "ld.global.v4.f32"
};

struct Function {
  std::string name;
  bool is_entry = false;
  std::vector<Variable> params;   // in order; offsets follow alignment
  std::vector<Variable> returns;  // .func only
  std::vector<Variable> locals;   // .shared/.local/.param declared inside
  std::vector<Register> registers;
  std::vector<Instruction> code;
  struct Label {
    std::string name;
    u32 scope;
    u32 index;  // of the next instruction
  };
  std::vector<Label> labels;
  std::vector<u32> scope_parent;   // lexical blocks; 0 is the body
  u32 max_threads = 0;             // .maxntid product, 0 = not stated
  Dim3 required_cluster{0, 0, 0};  // .reqnctapercluster / .explicitcluster
  u32 line = 0;
};

struct File {
  std::string version, target;
  std::vector<Variable> variables;
  std::vector<Function> functions;
  std::map<u32, std::string> files;  // .file
};

// Parses PTX text; throws PtxError with the line at fault. Never reads outside `text`.
File parse(std::string_view text);

}  // namespace dsk::emu::ptx
