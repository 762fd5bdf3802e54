// Attention of a few query rows over a range of keys, with a running softmax: the loop that MLA
// decode and prefill share. Keys come in blocks of kTokens.
#pragma once

#include "cpu/parallel.hpp"

namespace dsk::cpu::DSK_CPU_NS {

constexpr int64_t kTokens = 128;

// Query rows [rows, dk] and the keys they meet. Row r sees keys below first_limit + r / per_limit.
struct AttentionTask {
  const char* q = nullptr;
  int64_t q_row = 0;  // bytes
  Type type = Type::kBF16;
  int64_t rows = 0;
  int64_t first_limit = 0, per_limit = 1;
  KeyValues kv;
  const int32_t* pages = nullptr;  // null: one page holds every key
  int64_t begin = 0, end = 0;      // keys; begin is a multiple of kTokens
  float scale = 1;

  const char* key(int64_t t) const {
    return kv.keys + page_of(t) * kv.key_page + slot_of(t) * kv.key_row;
  }
  const char* value(int64_t t) const {
    return kv.values + page_of(t) * kv.value_page + slot_of(t) * kv.value_row;
  }
  int64_t page_of(int64_t t) const { return pages != nullptr ? pages[t / kv.page] : 0; }
  int64_t slot_of(int64_t t) const { return pages != nullptr ? t % kv.page : t; }
};

// What a task leaves: unnormalised sums, the maximum they are relative to, and the weights' sum.
//   out [rows][dv rounded up to 64], in plain column order; peak, total [rows rounded up to 32]
struct AttentionState {
  float* out = nullptr;
  float* peak = nullptr;   // of the scaled scores; -inf where nothing was seen
  float* total = nullptr;  // 0 where nothing was seen

  static int64_t width(int64_t dv) { return (dv + 63) / 64 * 64; }
  static int64_t floats(int64_t rows, int64_t dv) {
    const int64_t padded = (rows + 31) / 32 * 32;
    return padded * (width(dv) + 2);
  }
  static AttentionState at(float* memory, int64_t rows, int64_t dv) {
    const int64_t padded = (rows + 31) / 32 * 32;
    return {memory, memory + padded * width(dv), memory + padded * (width(dv) + 1)};
  }
};

void attend(const AttentionTask& task, const AttentionState& state);

// One cached row [dk] as fp32: any kind.
void load_row(const KeyValues& kv, const char* row, int64_t width, float* out);

}  // namespace dsk::cpu::DSK_CPU_NS
