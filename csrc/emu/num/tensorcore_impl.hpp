// What the tensor-core units share: the arithmetic model of a kind, the scalar model, the panels.
#pragma once

#include <cstddef>
#include <cstdint>

#include "emu/num/isa.hpp"
#include "emu/num/tensorcore.hpp"

namespace dsk::emu::num {

// One group of products and C: aligned to the largest exponent, truncated at `fraction_bits`.
struct SumModel {
  int fraction_bits = 25;  // kept below the largest exponent
  int group = 16;          // products per sum
  int kept_bits = 23;      // fraction bits of the RZ result (f32 output only)
  int zero_exp = -133;     // the exponent a zero C counts with
};

SumModel sum_model(const MmaKind& kind);

// FP8 mma.sync has no datapath on sm_90. ptxas (read from its SASS) widens each packed register's
// lower and upper half to f16, issues one HMMA for all lower halves with C = 0 and one for all
// upper halves on top, and adds C last with an ordinary rounded add.
bool is_widened_fp8(const MmaKind& kind);
// The place of element k in the order in which groups are summed: k itself unless widened.
int sum_position(const MmaKind& kind, int k);
// The last step of a widened FP8 instruction: *d = *c + *d (f32 or f16 elements).
void add_c(AccType type, const void* c, void* d);
int bits_of(MmaType type);
bool is_integer(MmaType type);  // s8 u8 s4 u4 b1
bool is_fp8(MmaType type);

// One output element by the integer model; a, b: packed rows. d points at one element.
void mma_element(const MmaKind& kind, const SumModel& model, const uint8_t* a, const uint8_t* b,
                 void* d, bool accumulate);

// Columns are processed in blocks of one exponent vector: 64 int8 or 32 int16 lanes.
enum class PanelForm : uint8_t { none, fp32, exact_f32, exact_f64 };
PanelForm panel_form(const MmaKind& kind);
constexpr int block_columns(PanelForm form) { return form == PanelForm::exact_f64 ? 32 : 64; }

// Block layout, each part 64-byte aligned:
//   fp32:      float  value[k][64]
//   exact_f32: float  value[k][2][64]  (positive part, magnitude of negative part), int8 exp[k][64]
//   exact_f64: double value[k][2][32], int16 exp[k][32]
constexpr size_t value_bytes(PanelForm form, int k) {
  return static_cast<size_t>(k) * (form == PanelForm::fp32 ? 256 : 512);
}
constexpr size_t block_bytes(PanelForm form, int k) {
  return value_bytes(form, k) + (form == PanelForm::fp32 ? 0 : static_cast<size_t>(k) * 64);
}

struct PanelAccess {
  static std::byte* base(const BPanel& p) {
    const auto address = reinterpret_cast<uintptr_t>(p.storage_.data());
    return reinterpret_cast<std::byte*>((address + 63) & ~uintptr_t{63});
  }
  static Isa isa(const BPanel& p) { return p.isa_; }
  static bool special(const BPanel& p) { return p.special_; }
  static const uint8_t* columns(const BPanel& p) { return p.columns_.data(); }
  static const uint8_t* raw(const BPanel& p) { return p.raw_.data(); }
};

// One operand element as the vector kernels need it. value is meaningless where special (NaN, Inf).
struct ElementView {
  float value;
  int exp;  // unnormalised: subnormals have the smallest normal exponent
  bool zero;
  bool special;
};
ElementView view_element(MmaType type, const uint8_t* row, int index);

void build_panel_avx2(const MmaKind& kind, const uint8_t* rows, size_t row_bytes, int n,
                      std::byte* base, uint8_t* special_columns);
void mma_avx2(const BPanel& b, const uint8_t* a, size_t pitch, int m, void* d, size_t ldd,
              bool accumulate);

// AVX-512 units; call only when isa() has it and panel_form is not none.
void build_panel_avx512(const MmaKind& kind, const uint8_t* rows, size_t row_bytes, int n,
                        std::byte* base, uint8_t* special_columns);
void mma_avx512(const BPanel& b, const uint8_t* a, size_t pitch, int m, void* d, size_t ldd,
                bool accumulate);
// AVX512-BF16: kinds that takes_bf16, whose panels fit in those of fp32.
bool takes_bf16(const MmaKind& kind);
void build_panel_bf16(const MmaKind& kind, const uint8_t* rows, int n, std::byte* base);
void mma_bf16(const BPanel& b, const uint8_t* a, size_t pitch, int m, void* d, size_t ldd,
              bool accumulate);
void load_accumulator_avx512(const uint32_t* const* regs, int n, void* dense, size_t ldd);
void store_accumulator_avx512(uint32_t* const* regs, int n, const void* dense, size_t ldd);

}  // namespace dsk::emu::num
