// What one PTX instruction costs the machine: issue slots, the pipe it occupies, its latency. And
// the order in which an assembler would issue the instructions of a straight piece of code.
#pragma once

#include <string>
#include <vector>

#include "emu/program.hpp"
#include "emu/timing/model.hpp"

namespace dsk::emu::timing {

enum class Pipe : u8 { None, Fma, Alu, Special, Fp64, Tensor };  // one of each per sub-partition
inline constexpr u32 kPipes = 6;

// For the instruction mix.
enum class Class : u8 {
  Move,
  Fp32,
  Integer,
  Logic,
  Convert,
  Special,
  Fp64,
  Half,
  Shared,
  Global,
  Tensor,
  AsyncCopy,
  Sync,
  Control,
  Exchange,
  Other,
};
inline constexpr u32 kClasses = 16;
const char* class_name(Class c);

struct Cost {
  Class group = Class::Other;
  Pipe pipe = Pipe::None;
  double slots = 1;    // machine instructions; 0 = the assembler makes it vanish
  double busy = 0;     // cycles of the pipe
  double latency = 4;  // until the result can be used (memory: what is added to the access)
  bool memory = false;
  bool ends_region = false;  // nothing is moved across it
};

// `text` is opcode and modifiers.
Cost cost_of(const std::string& text, const Inst& inst, const Model& m);

struct CostTable {
  std::vector<Cost> cost;   // by pc
  std::vector<u32> region;  // by pc: straight code without anything that ends a region inside
  std::vector<u32> rank;    // by pc: position in the region as issued
  std::vector<u32> region_first, region_size;
  std::vector<u32> order;  // region by region, pcs as issued
  CostTable(const Program& program, const Model& m);
};

}  // namespace dsk::emu::timing
