#include "emu/num/tensorcore_drive.hpp"

#include <algorithm>
#include <cstring>

namespace dsk::emu::num {
namespace {

std::byte* element_at(const Task& t, size_t index) {
  return static_cast<std::byte*>(t.d) + index * (t.kind.d == AccType::f16 ? 2 : 4);
}

// The scalar model for columns [column, column + count) of one row where `which` has a bit.
void redo_scalar(const Task& t, int row, int column, uint64_t which) {
  const size_t bytes = row_bytes(t.kind);
  while (which != 0) {
    const int j = column + __builtin_ctzll(which);
    which &= which - 1;
    mma_element(t.kind, t.model, t.a + static_cast<size_t>(row) * t.pitch,
                PanelAccess::raw(t.b) + bytes * static_cast<size_t>(j),
                element_at(t, static_cast<size_t>(row) * t.ldd + static_cast<size_t>(j)),
                t.accumulate);
  }
}

uint64_t special_columns(const Task& t, int column, int columns) {
  uint64_t mask = 0;
  if (!PanelAccess::special(t.b)) return mask;
  for (int j = 0; j < columns; ++j) {
    if (PanelAccess::columns(t.b)[column + j]) mask |= uint64_t{1} << j;
  }
  return mask;
}

uint64_t low_bits(int count) { return count >= 64 ? ~uint64_t{0} : (uint64_t{1} << count) - 1; }

void exact_block(const Task& t, const Kernels& kernels, const std::byte* block, const ARows& rows,
                 int first_row, int m, int column, int columns) {
  const uint64_t bad_columns = special_columns(t, column, columns);
  std::byte saved_c[64 * 4];
  for (int i = 0; i < m; ++i) {
    // Elements the vector sum cannot represent keep their C until the scalar model redoes them.
    uint64_t redo = rows.special[i] ? low_bits(columns) : bad_columns;
    const size_t index = static_cast<size_t>(first_row + i) * t.ldd + static_cast<size_t>(column);
    const Row row{rows.value[i], rows.negative[i], rows.exp[i]};
    const size_t width = t.kind.d == AccType::f16 ? 2 : 4;
    const bool keep_c = t.accumulate && t.model.group < t.kind.k;  // C comes last: widened FP8
    if (keep_c) std::memcpy(saved_c, element_at(t, index), width * static_cast<size_t>(columns));
    if (redo != low_bits(columns)) kernels.exact_row(t, block, row, columns, index, redo);
    for (int j = 0; keep_c && j < columns; ++j) {
      const std::byte* c = saved_c + static_cast<size_t>(j) * width;
      std::byte* out = element_at(t, index + static_cast<size_t>(j));
      if ((redo >> j) & 1) {
        std::memcpy(out, c, width);
      } else {
        add_c(t.kind.d, c, out);
      }
    }
    if (redo != 0) redo_scalar(t, first_row + i, column, redo);
  }
}

}  // namespace

void reorder_row(const MmaKind& kind, ARows& rows, int i) {
  float value[kMaxK];
  uint8_t negative[kMaxK];
  int32_t exp[kMaxK];
  for (int k = 0; k < kind.k; ++k) {
    const int to = sum_position(kind, k);
    value[to] = rows.value[i][k];
    negative[to] = rows.negative[i][k];
    exp[to] = rows.exp[i][k];
  }
  std::copy_n(value, kind.k, rows.value[i]);
  std::copy_n(negative, kind.k, rows.negative[i]);
  std::copy_n(exp, kind.k, rows.exp[i]);
}

void drive_mma(const BPanel& b, const uint8_t* a, size_t pitch, int m, void* d, size_t ldd,
               bool accumulate, const Kernels& kernels) {
  const MmaKind& kind = b.kind();
  const PanelForm form = panel_form(kind);
  const Task task{b, kind, sum_model(kind), form, a, pitch, d, ldd, accumulate};
  const int width = block_columns(form);
  thread_local ARows rows;
  for (int first_row = 0; first_row < m; first_row += kMaxRows) {
    const int count = std::min(kMaxRows, m - first_row);
    kernels.unpack_rows(kind, form, a + static_cast<size_t>(first_row) * pitch, pitch, count, rows);
    const std::byte* block = PanelAccess::base(b);
    for (int column = 0; column < b.n(); column += width) {
      const int columns = std::min(width, b.n() - column);
      if (form == PanelForm::fp32) {
        kernels.fast_block(task, block, rows, first_row, count, column, columns);
      } else {
        exact_block(task, kernels, block, rows, first_row, count, column, columns);
      }
      block += block_bytes(form, kind.k);
    }
  }
}

}  // namespace dsk::emu::num
