// The decoded form: what the interpreter runs.
#pragma once

#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "emu/ptx.hpp"
#include "emu/types.hpp"

namespace dsk::emu {

struct Warp;
struct Inst;
struct Split;

// Executes one instruction for the lanes in `mask` (never 0).
using Handler = void (*)(Warp&, const Inst&, u32 mask);
// What a blocking instruction decided: go on, or wait (the split then says for what).
enum class Step : u8 { Next, Wait };
using BlockingHandler = Step (*)(Warp&, const Inst&, u32 mask, Split&);

enum class Kind : u8 {
  Plain,  // handler, then the next instruction
  Yield,  // like Plain, and the warp gives way: a polling load, an atomic, nanosleep
  Branch,
  Exit,
  Blocking,  // blocking handler
};

inline constexpr u32 kNoReg = 0xffffffffu;  // `_`, or an absent operand

// Flags of Inst::flags.
inline constexpr u8 kPredNegated = 1;     // @!p
inline constexpr u8 kAddress64 = 2;       // the address register is 64 bits wide
inline constexpr u8 kAligned = 4;         // needs every live lane of the warp
inline constexpr u8 kMemberMask = 8;      // needs the lanes named by the mask register in Inst::e
inline constexpr u8 kTouchesMatrix = 16;  // reads or writes a register that a wgmma also uses
inline constexpr u8 kWritesMatrix = 32;   // writes one

// Rare operands, kept out of the hot line.
struct Ext {
  std::vector<u32> regs;   // lists: fragments, coordinates, vectors longer than 4
  std::vector<u32> regs2;  // a second list
  std::vector<u32> matrix_writes, matrix_reads;  // wgmma: virtual ids of D and of A fragments
  u32 r[8] = {kNoReg, kNoReg, kNoReg, kNoReg, kNoReg, kNoReg, kNoReg, kNoReg};
  i64 v[8] = {0, 0, 0, 0, 0, 0, 0, 0};
  std::string text;
  Type type = Type::None, type2 = Type::None;
};

// One cache line. d, a, b, c, e are byte offsets into the warp's register file: a register is 32
// lanes side by side (a predicate is one 32-bit mask). Constants are registers too, filled when the
// warp starts, so that handlers know one operand form only.
struct alignas(64) Inst {
  union {
    Handler fn;
    BlockingHandler blocking;
  };
  const Ext* ext = nullptr;
  i64 imm = 0;
  u32 d = kNoReg, a = kNoReg, b = kNoReg, c = kNoReg, e = kNoReg;
  u32 pred = kNoReg;
  u32 target = 0;  // Branch: index of the next instruction
  Kind kind = Kind::Plain;
  Space space = Space::Generic;
  u8 flags = 0;
  u8 count = 1;  // vector elements, matrices
  u8 size = 0;   // bytes of a memory element
  u8 op = 0;     // handler's own
  u8 sem = 0;    // Semantics in the low nibble, Scope in the high one
  u8 sub = 0;    // handler's own
  // Instructions from this one on, without a gap, that are Plain, unpredicated and need no look at
  // lanes or at wgmma registers; `quiet_run` lets them read wgmma registers.
  u16 run = 0, quiet_run = 0;
  Inst() : fn(nullptr) {}
};
static_assert(sizeof(Inst) == 64);

// What the reports, the trace and the timing model ask about an instruction.
struct InstInfo {
  u32 ptx_line = 0;
  ptx::SourceLine source;
  u32 entry = 0;           // row of the instruction table
  u32 text = 0;            // index into Program::texts: "ld.shared.v4.f32"
  u32 block = 0;           // basic block
  std::vector<u32> reads;  // virtual registers
  std::vector<u32> writes;
};

// A constant register: value, or value relative to something known only at launch.
struct ConstantReg {
  enum class Base : u8 { None, SharedStatic, SharedDynamic, Symbol, ParamBuffer };
  u32 offset = 0;
  u8 size = 4;  // 0 = predicate
  Base base = Base::None;
  u64 value = 0;
  u32 symbol = 0;       // Base::Symbol: index into ModuleImage::symbols
  bool window = false;  // add the shared window (a generic address)
};

enum class Special : u8 {
  TidX,
  TidY,
  TidZ,
  NtidX,
  NtidY,
  NtidZ,
  CtaidX,
  CtaidY,
  CtaidZ,
  NctaidX,
  NctaidY,
  NctaidZ,
  LaneId,
  WarpId,
  NwarpId,
  SmId,
  NsmId,
  GridId,
  ClusterIdX,
  ClusterIdY,
  ClusterIdZ,
  NclusterIdX,
  NclusterIdY,
  NclusterIdZ,
  ClusterCtaidX,
  ClusterCtaidY,
  ClusterCtaidZ,
  ClusterNctaidX,
  ClusterNctaidY,
  ClusterNctaidZ,
  ClusterCtarank,
  ClusterNctarank,
  IsExplicitCluster,
  LanemaskEq,
  LanemaskLe,
  LanemaskLt,
  LanemaskGe,
  LanemaskGt,
  DynamicSmemSize,
  TotalSmemSize,
  AggrSmemSize,
  Envreg1,  // the grid's workspace, of cooperative launches: upper half of its address
  Envreg2,  // lower half
  Clock,
  ClockHi,
  Clock64,
  GlobalTimer,
  GlobalTimerLo,
  GlobalTimerHi,  // read when executed
};
// The register's width is part of its name (%tid is 32 bits; %clock64, %gridid 64).
bool parse_special(std::string_view name, Special* which, Type* type);

struct SpecialReg {
  u32 offset = 0;
  u8 size = 4;
  Special which = Special::TidX;
};

struct KernelParam {
  std::string name;
  u32 offset = 0;
  u32 size = 0;
  u32 align = 1;
  Type type = Type::B8;  // element type as declared
};

// One kernel, ready to run.
struct Program {
  std::string name;
  std::vector<Inst> code;  // ends with an exit
  std::vector<InstInfo> info;
  std::vector<std::string> texts;
  std::vector<std::unique_ptr<Ext>> exts;
  std::vector<ConstantReg> constants;
  std::vector<SpecialReg> specials;
  std::vector<KernelParam> params;
  u32 param_bytes = 0;
  u32 register_bytes = 0;  // register file of one warp
  u32 num_virtual = 0;     // virtual registers
  u32 peak_registers = 0;  // 32-bit registers per thread alive at once, as packed here
  u32 local_bytes = 0;     // per thread
  u32 static_shared = 0;   // bytes, this kernel's and the module's together
  u32 dynamic_align = 16;  // strictest alignment asked of the dynamic part
  u32 max_threads = 0;
  Dim3 required_cluster{0, 0, 0};
  bool uses_wgmma = false;
  bool uses_grid_workspace = false;  // grid-wide barriers of cooperative groups
};

}  // namespace dsk::emu
