// What the vector kernels share: unpacked A rows, and driving rows and column blocks through them.
#pragma once

#include <cstddef>
#include <cstdint>

#include "emu/num/tensorcore_impl.hpp"

namespace dsk::emu::num {

constexpr int kMaxRows = 64;
constexpr int kMaxK = 32;

// A rows, unpacked once per call: magnitudes, which panel a positive product takes, exponents
// splatted to 32 bits so that the exponent pass broadcasts by a plain load.
struct alignas(64) ARows {
  float value[kMaxRows][kMaxK];  // signed (fast), magnitude (exact)
  uint8_t negative[kMaxRows][kMaxK];
  int32_t exp[kMaxRows][kMaxK];
  bool special[kMaxRows];
};

struct Row {
  const float* value;
  const uint8_t* negative;
  const int32_t* exp;
};

struct Task {
  const BPanel& b;
  const MmaKind& kind;
  SumModel model;
  PanelForm form;
  const uint8_t* a;
  size_t pitch;
  void* d;
  size_t ldd;
  bool accumulate;
};

// One instruction set's kernels.
struct Kernels {
  void (*unpack_rows)(const MmaKind& kind, PanelForm form, const uint8_t* a, size_t pitch, int m,
                      ARows& rows);
  // One row of one block; sets bits of `redo` for columns that need the scalar model (an infinite
  // or NaN C) and leaves d there as it was, as for the bits that were set before.
  void (*exact_row)(const Task& t, const std::byte* block, const Row& row, int columns,
                    size_t index, uint64_t& redo);
  void (*fast_block)(const Task& t, const std::byte* block, const ARows& rows, int first_row, int m,
                     int column, int columns);
};

// mma() over a vector panel.
void drive_mma(const BPanel& b, const uint8_t* a, size_t pitch, int m, void* d, size_t ldd,
               bool accumulate, const Kernels& kernels);

// Puts row i's elements in the order in which the groups are summed (widened FP8).
void reorder_row(const MmaKind& kind, ARows& rows, int i);

}  // namespace dsk::emu::num
