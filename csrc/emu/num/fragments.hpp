// Which element of a matrix each lane's register holds, for mma.sync, wgmma, ldmatrix and stmatrix.
//
// Pure index functions (PTX ISA, "Matrix Fragments for mma.*", "Register Fragments" of wgmma).
// Elements are counted low to high through a lane's registers: element e of b-bit data sits in
// register e * b / 32, at bit (e * b) % 32.
#pragma once

#include <cstdint>

namespace dsk::emu::num {

struct Coord {
  int row;
  int col;
  constexpr bool operator==(const Coord&) const = default;
};

// --- accumulators: mma.sync m16n8k* (n = 8) and wgmma m64nNk* are one layout, 16 rows a warp.
// lane 0..31, element 0 .. n/2-1. For wgmma add 16 * (warp % 4) to the row.
constexpr Coord accumulator(int lane, int element) {
  return {lane / 4 + 8 * ((element >> 1) & 1), 8 * (element >> 2) + 2 * (lane % 4) + (element & 1)};
}
constexpr int accumulator_elements(int n) { return n / 2; }

// --- A of mma.sync m16n8kK and of wgmma with A in registers: `bits` a multiplicand's width
// (32 tf32, 16, 8, 4, 1). A warp holds 16 rows; register r of a lane is row lane/4 (+8 if r is
// odd), and its 32/bits elements are consecutive in k from (lane % 4) * 32/bits, +4*32/bits if r
// >= 2.
constexpr Coord multiplicand_a(int lane, int element, int bits) {
  const int per_reg = 32 / bits;
  const int reg = element / per_reg;
  return {lane / 4 + 8 * (reg & 1),
          (lane % 4) * per_reg + element % per_reg + 4 * per_reg * (reg >> 1)};
}
constexpr int multiplicand_a_elements(int k) { return 16 * k / 32; }

// --- B of mma.sync m16n8kK: row is k, col is n.
constexpr Coord multiplicand_b(int lane, int element, int bits) {
  const int per_reg = 32 / bits;
  const int reg = element / per_reg;
  return {(lane % 4) * per_reg + element % per_reg + 4 * per_reg * reg, lane / 4};
}
constexpr int multiplicand_b_elements(int k) { return 8 * k / 32; }

// --- mma.sync with f64: m8n8k4 (a, b one element; c two) and m16n8k4/k8/k16.
constexpr Coord f64_m8_a(int lane) { return {lane / 4, lane % 4}; }
constexpr Coord f64_m8_c(int lane, int element) { return {lane / 4, 2 * (lane % 4) + element}; }
constexpr Coord f64_m16_a(int lane, int element) {
  return {lane / 4 + 8 * (element & 1), lane % 4 + 4 * (element >> 1)};
}
constexpr Coord f64_b(int lane, int element) { return {lane % 4 + 4 * element, lane / 4}; }

// --- m8n8k16 / m8n8k32 / m8n8k128 integer and bit mma: one register each of A and B, two of C.
constexpr Coord int_m8_a(int lane, int element, int bits) {
  return {lane / 4, (lane % 4) * (32 / bits) + element};
}
constexpr Coord int_m8_b(int lane, int element, int bits) {
  return {(lane % 4) * (32 / bits) + element, lane / 4};
}
constexpr Coord int_m8_c(int lane, int element) { return {lane / 4, 2 * (lane % 4) + element}; }

// --- ldmatrix / stmatrix .m8n8 .b16: matrix i's row r is at the address of lane 8i + r. Register i
// of lane l holds elements (l/4, 2*(l%4)) and the next; with .trans rows and columns swap.
constexpr int matrix_address_lane(int matrix, int row) { return 8 * matrix + row; }
constexpr Coord matrix_element(int lane, int half, bool trans) {
  const Coord c{lane / 4, 2 * (lane % 4) + half};
  return trans ? Coord{c.col, c.row} : c;
}

// --- moving whole operands of one warp: regs[i] points at register i's 32 lanes.
// Row-major packed rows (the form tensorcore.hpp takes), `pitch` bytes apart.
void unpack_a(const uint32_t* const* regs, int num_regs, uint8_t* rows, int pitch);  // 16 rows
void unpack_b(const uint32_t* const* regs, int num_regs, uint8_t* rows, int pitch);  // 8 rows (n)

// ldmatrix/stmatrix on rows already fetched: rows[m][r] are matrix m's 16-byte rows.
void ldmatrix(const uint8_t (*rows)[8][16], int count, bool trans, uint32_t* const* regs);
void stmatrix(const uint32_t* const* regs, int count, bool trans, uint8_t (*rows)[8][16]);

}  // namespace dsk::emu::num
