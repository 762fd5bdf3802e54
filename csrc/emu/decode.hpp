// From parsed PTX to a Program: binds every instruction through the table, then packs registers.
//
// While binding, the register fields of an Inst hold HANDLES: the index of a virtual register, or
// kConstantHandle | index of a constant. Binders name operands through the Decoder only, so reads
// and writes are known exactly; finish() replaces handles by register-file offsets.
#pragma once

#include <map>
#include <string>
#include <string_view>
#include <tuple>
#include <unordered_map>
#include <vector>

#include "emu/program.hpp"
#include "emu/ptx.hpp"

namespace dsk::emu {

inline constexpr u32 kConstantHandle = 0x40000000u;

// Where a module's own symbols are: shared offsets are decided by the linker, once per kernel.
struct ModuleSymbols {
  std::unordered_map<std::string, u32> globals;  // name -> index of Module::symbols()
  std::unordered_map<std::string, const ptx::Variable*> shared;
  u32 target_sm = 90;
};

class Decoder {
 public:
  Decoder(const ptx::Function& function, const ModuleSymbols& symbols);
  Program run();

  // --- what binders ask about the instruction at hand
  const ptx::Instruction& in() const { return *in_; }
  std::size_t operands() const { return in_->operands.size(); }
  bool has(std::string_view modifier) const;
  Type type(std::size_t n) const;  // n-th type modifier; Type::None if there are fewer
  Type type() const;               // the last one
  // Throws unless min <= operands() <= max.
  void arity(std::size_t min, std::size_t max);
  void arity(std::size_t n) { arity(n, n); }
  [[noreturn]] void fail(const std::string& what) const;

  // --- operands; k counts from 0. `bytes` 0 means predicate. A register of another width is an
  // error unless `wider` allows more bytes than the instruction needs.
  u32 dst(std::size_t k, int bytes);
  u32 src(std::size_t k, int bytes);
  // The same; but `_` gives kNoReg, for instructions that may throw a result away.
  u32 dst(const ptx::Operand& o, int bytes);
  u32 src(const ptx::Operand& o, int bytes);
  u32 constant(u64 value, int bytes);
  const ptx::Operand& operand(std::size_t k) const;
  bool is_register(std::size_t k) const { return is_register(operand(k)); }
  bool is_register(const ptx::Operand& o) const;
  int register_bytes(const ptx::Operand& o) const;  // of a register; -1 for anything else
  // Second destination of `d|p`; kNoReg when absent or `_`.
  u32 second_dst(std::size_t k, int bytes);
  u64 immediate(std::size_t k) const;
  // [register + displacement] or [symbol + displacement] into a, imm, flags. Rewrites i.space from
  // Param to Local for a function's own .param variables.
  void address(std::size_t k, Inst& i) { address(operand(k), i); }
  void address(const ptx::Operand& o, Inst& i);
  // The same for a second address: returns the base handle and sets *displacement and *wide.
  u32 address_register(const ptx::Operand& o, i64* displacement, bool* wide);
  // Which special register operand k is, if it is one read at execution time (clocks).
  bool is_clock(std::size_t k, Special* which) const;
  // Offset of a .local or .param variable of the function in the thread's local memory.
  u32 local_variable(const std::string& name) const;
  Ext& ext(Inst& i);
  // The listed registers belong to asynchronous wgmma: they get slots of their own.
  void matrix_register(u32 handle);
  // A register both read and written (predicated destinations are handled without this).
  void also_reads(u32 handle) { note_read(handle); }

 private:
  void bind_all();
  void bind(const ptx::Instruction& in, Inst& i, InstInfo& info);
  u32 find_label(const std::string& name, u32 scope) const;
  u32 symbol_constant(const std::string& name, i64 addend, int bytes);
  u32 add_constant(const ConstantReg& c);
  void layout_variables();
  void note_read(u32 handle);
  void note_write(u32 handle);
  void mark_matrix_users();
  void measure_runs();
  void allocate_registers();  // regalloc.cpp
  void patch();
  u32 offset_of(u32 handle) const;
  u32 text_index(const std::string& text);

  const ptx::Function& function_;
  const ModuleSymbols& symbols_;
  Program program_;
  const ptx::Instruction* in_ = nullptr;
  InstInfo* info_ = nullptr;
  std::unordered_map<std::string, u32> param_offset_;   // kernel parameters
  std::unordered_map<std::string, u32> local_offset_;   // .local and .param of functions
  std::unordered_map<std::string, u32> shared_offset_;  // static, from the start of the statics
  std::unordered_map<std::string, u32> text_index_;
  std::map<std::tuple<int, u8, u64, u32>, u32> constant_index_;
  std::vector<u8> is_matrix_;        // by virtual register
  std::vector<u32> virtual_offset_;  // by virtual register
};

// Replaces calls of the file's own functions by their bodies. Throws PtxError on recursion and on
// calls through pointers; calls of the runtime's functions (vprintf, __assertfail) stay.
ptx::Function inline_calls(const ptx::File& file, const ptx::Function& kernel);

}  // namespace dsk::emu
