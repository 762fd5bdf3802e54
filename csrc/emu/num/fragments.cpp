#include "emu/num/fragments.hpp"

#include <cstring>

namespace dsk::emu::num {

// In bytes the multiplicand layouts are one for every element width: a register is four bytes of
// one row, at byte 4 * (lane % 4) of a 16-byte half row.
void unpack_a(const uint32_t* const* regs, int num_regs, uint8_t* rows, int pitch) {
  for (int r = 0; r < num_regs; ++r) {
    for (int lane = 0; lane < 32; ++lane) {
      const int row = lane / 4 + 8 * (r & 1);
      std::memcpy(rows + row * pitch + 4 * (lane % 4) + 16 * (r >> 1), regs[r] + lane, 4);
    }
  }
}

void unpack_b(const uint32_t* const* regs, int num_regs, uint8_t* rows, int pitch) {
  for (int r = 0; r < num_regs; ++r) {
    for (int lane = 0; lane < 32; ++lane) {
      std::memcpy(rows + (lane / 4) * pitch + 4 * (lane % 4) + 16 * r, regs[r] + lane, 4);
    }
  }
}

void ldmatrix(const uint8_t (*rows)[8][16], int count, bool trans, uint32_t* const* regs) {
  for (int m = 0; m < count; ++m) {
    for (int lane = 0; lane < 32; ++lane) {
      uint16_t halves[2];
      for (int half = 0; half < 2; ++half) {
        const Coord c = matrix_element(lane, half, trans);
        std::memcpy(&halves[half], rows[m][c.row] + 2 * c.col, 2);
      }
      regs[m][lane] = static_cast<uint32_t>(halves[0]) | (static_cast<uint32_t>(halves[1]) << 16);
    }
  }
}

void stmatrix(const uint32_t* const* regs, int count, bool trans, uint8_t (*rows)[8][16]) {
  for (int m = 0; m < count; ++m) {
    for (int lane = 0; lane < 32; ++lane) {
      for (int half = 0; half < 2; ++half) {
        const Coord c = matrix_element(lane, half, trans);
        const auto value = static_cast<uint16_t>(regs[m][lane] >> (16 * half));
        std::memcpy(rows[m][c.row] + 2 * c.col, &value, 2);
      }
    }
  }
}

}  // namespace dsk::emu::num
