#include "cpu/packed.hpp"

#include <cstring>

#include "cpu/threads.hpp"

namespace dsk::cpu {
namespace {

struct Job {
  const uint8_t* from;
  uint8_t* to;
  int64_t stride;
  PackedShape shape;
  uint8_t* nan_blocks;
};

bool is_nan(uint8_t code) { return (code & 0x7f) == 0x7f; }

// First touch: the thread that packs a panel places its pages, and tasks are handed out in order.
void pack_panel(void* context, int64_t panel, int) {
  const Job& job = *static_cast<const Job*>(context);
  const PackedShape& s = job.shape;
  if (s.k == 0) return;
  uint8_t* line = job.to + panel * s.panel_bytes();
  uint8_t* nans = job.nan_blocks + panel * s.blocks();
  std::memset(line, 0, static_cast<size_t>(s.panel_bytes()));
  std::memset(nans, 0, static_cast<size_t>(s.blocks()));
  for (int half = 0; half < 2; ++half) {
    for (int word = 0; word < 32; ++word) {
      const int64_t n = panel * kPanel + half * 32 + word_column(word);
      if (n >= s.n) continue;
      const uint8_t* row = job.from + n * job.stride;
      uint8_t* to = line + half * 64 + word * 2;
      for (int64_t k = 0; k < s.k; ++k) {
        to[k / 2 * 128 + k % 2] = row[k];
        nans[k / kScaleBlock] |= is_nan(row[k]);
      }
    }
  }
}

void unpack_panel(void* context, int64_t panel, int) {
  const Job& job = *static_cast<const Job*>(context);
  const PackedShape& s = job.shape;
  const uint8_t* line = job.from + panel * s.panel_bytes();
  for (int half = 0; half < 2; ++half) {
    for (int word = 0; word < 32; ++word) {
      const int64_t n = panel * kPanel + half * 32 + word_column(word);
      if (n >= s.n) continue;
      uint8_t* row = job.to + n * job.stride;
      const uint8_t* from = line + half * 64 + word * 2;
      for (int64_t k = 0; k < s.k; ++k) row[k] = from[k / 2 * 128 + k % 2];
    }
  }
}

}  // namespace

void pack(const uint8_t* b, int64_t stride, PackedShape shape, uint8_t* packed, uint8_t* nan_blocks,
          int threads) {
  Job job{b, packed, stride, shape, nan_blocks};
  run_tasks(shape.panels(), threads, pack_panel, &job);
}

void unpack(const uint8_t* packed, PackedShape shape, uint8_t* b, int64_t stride, int threads) {
  Job job{packed, b, stride, shape, nullptr};
  run_tasks(shape.panels(), threads, unpack_panel, &job);
}

}  // namespace dsk::cpu
