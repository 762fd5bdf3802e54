// Tensor-core arithmetic on dense tiles: D = A * B + C, as Hopper computes it.
//
// Operands are packed rows: A is [m][k], B is [n][k] (both K-major), each row `k` elements in their
// storage format, so one wgmma instruction's row is always 32 bytes (mma.sync: 16 or 32). C/D is
// [m][n] row-major: float for f32, uint16_t bit patterns for f16, int32_t for s32, double for f64.
//
// exact: bitwise what the hardware gives (PyPI `mmasim` is the golden model; see
// docs/emulator_numerics.md). Products and C are aligned to the largest exponent, truncated toward
// zero at F fraction bits, summed exactly, rounded once; F and the group size depend on unit and
// type. fast: fp32 fused multiply-adds in k order, not bitwise, for speed. Integers are exact in
// both.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "emu/num/isa.hpp"

namespace dsk::emu::num {

enum class MmaType : uint8_t { f16, bf16, tf32, e4m3, e5m2, s8, u8, s4, u4, b1, f64 };
enum class AccType : uint8_t { f32, f16, s32, f64 };
enum class MmaUnit : uint8_t { wgmma, mma_sync };
enum class MmaMode : uint8_t { exact, fast };
enum class BitOp : uint8_t { bit_and, bit_xor };  // b1: popcount of a AND b, or a XOR b

struct MmaKind {
  MmaType a = MmaType::bf16;
  MmaType b = MmaType::bf16;
  AccType d = AccType::f32;
  int k = 16;  // elements of one instruction
  MmaUnit unit = MmaUnit::wgmma;
  MmaMode mode = MmaMode::exact;
  bool negate_a = false;  // wgmma imm-scale-a = -1 (floating types)
  bool negate_b = false;
  bool saturate = false;  // integer .satfinite: clamp to int32 instead of wrapping
  BitOp bit_op = BitOp::bit_and;
};

// Bytes of one packed row of A or B: k * bits / 8. Throws std::invalid_argument naming what is
// wrong if the combination of types, accumulator and k exists on neither unit.
size_t row_bytes(const MmaKind& kind);
void check_kind(const MmaKind& kind);

// A prepared B operand: unpacked once, used with many A tiles (both consumer warpgroups, repeated
// instructions on the same slot). Reusable: load() keeps its storage.
class BPanel {
 public:
  BPanel() = default;
  BPanel(BPanel&&) = default;
  BPanel& operator=(BPanel&&) = default;
  BPanel(const BPanel&) = delete;  // the panels sit at an aligned place inside storage_
  BPanel& operator=(const BPanel&) = delete;

  // rows: n rows, `pitch` bytes apart (>= row_bytes). 1 <= n <= 256.
  void load(const MmaKind& kind, const uint8_t* rows, size_t pitch, int n);
  const MmaKind& kind() const { return kind_; }
  int n() const { return n_; }

 private:
  friend struct PanelAccess;  // tensorcore_impl.hpp
  MmaKind kind_{};
  int n_ = 0;
  Isa isa_ = Isa::scalar;           // whose panels storage_ holds
  bool special_ = false;            // some column holds a NaN or an infinity
  std::vector<std::byte> storage_;  // value panels and exponents
  std::vector<uint8_t> columns_;    // 1 where a column holds a NaN or an infinity
  std::vector<uint8_t> raw_;        // the packed rows, for the scalar model
};

// d[m][n] (leading dimension ldd elements) = A * B + (accumulate ? d : 0). a: m rows, `pitch` bytes
// apart. d's element type follows b.kind().d. A's negate flag is kind's.
void mma(const BPanel& b, const uint8_t* a, size_t pitch, int m, void* d, size_t ldd,
         bool accumulate);

// The same through the scalar integer model alone: slow, obviously right, the oracle of the tests.
void mma_reference(const MmaKind& kind, const uint8_t* a, size_t a_pitch, const uint8_t* b,
                   size_t b_pitch, int m, int n, void* d, size_t ldd, bool accumulate);

// Accumulator fragments <-> dense rows, vectorised. regs[i] points at register i of one warp: 32
// lanes of 32 bits. f32/s32: n/2 registers, f16: n/4. dense covers the warp's 16 rows
// (see fragments.hpp for the map). wgmma warp w owns rows 16w..16w+15 of the 64.
void load_accumulator(const uint32_t* const* regs, int n, AccType type, void* dense, size_t ldd);
void store_accumulator(uint32_t* const* regs, int n, AccType type, const void* dense, size_t ldd);

// "avx512bf16", "avx512", "avx2" or "scalar": the run-time choice. force_isa("scalar") narrows it
// (tests, benchmarks); "" restores the choice. Throws if the name is unknown or this CPU lacks it.
const char* active_isa();
void force_isa(const char* name);

}  // namespace dsk::emu::num
