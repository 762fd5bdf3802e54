#include "comm/copy.hpp"

#include <algorithm>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace dsk::comm {
namespace {

// Below this a row's cache lines are shared with its neighbours and streaming only splits them.
constexpr uint64_t kLeastStreamed = 128;
// Rows of a token matrix follow each other: reading ahead runs into the next row, which saves its
// first misses. A prefetch of an address that does not exist does nothing.
constexpr uint64_t kAhead = 2048;
constexpr int kBlock = 512;  // floats summed at a time: 2 KB, in the first cache

#if defined(__x86_64__)
__attribute__((target("avx512f"))) void stream_avx512(char* to, const char* from, uint64_t lines) {
  for (uint64_t i = 0; i < lines; ++i) {
    __builtin_prefetch(from + 64 * i + kAhead);
    const auto line = _mm512_loadu_si512(reinterpret_cast<const void*>(from + 64 * i));
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to + 64 * i), line);
  }
}
__attribute__((target("avx2"))) void stream_avx2(char* to, const char* from, uint64_t lines) {
  for (uint64_t i = 0; i < 2 * lines; ++i) {
    const auto half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + 32 * i));
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to + 32 * i), half);
  }
}
#endif

void stream_portable(char* to, const char* from, uint64_t lines) {
  std::memcpy(to, from, 64 * lines);
}

float widen_bf16(uint16_t value) {
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}
// To nearest, ties to even; NaN becomes the canonical one, as torch does.
uint16_t narrow_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

struct F32 {
  using Stored = float;
  static float widen(float v) { return v; }
  static float narrow(float v) { return v; }
};
struct BF16 {
  using Stored = uint16_t;
  static float widen(uint16_t v) { return widen_bf16(v); }
  static uint16_t narrow(float v) { return narrow_bf16(v); }
};
struct F16 {
  using Stored = _Float16;
  static float widen(_Float16 v) { return static_cast<float>(v); }
  static _Float16 narrow(float v) { return static_cast<_Float16>(v); }
};

// Inlined into one function per instruction set, where the compiler vectorises the loops.
template <typename Type>
[[gnu::always_inline]] inline void sum_block(typename Type::Stored* to, const void* const* rows,
                                             const float* weights, int num_rows, const Bias& bias,
                                             int64_t at, int count, RowGroups groups) {
  using Stored = typename Type::Stored;
  alignas(64) float total[kBlock], apart[kBlock];
  for (int i = 0; i < count; ++i) total[i] = 0.0f;
  for (int i = 0; groups.last != 0 && i < count; ++i) apart[i] = 0.0f;
  for (int r = 0; r < num_rows; ++r) {
    const Stored* row = static_cast<const Stored*>(rows[r]) + at;
    float* sum = groups.last >> r == 0 ? total : apart;
    if (weights == nullptr) {
      for (int i = 0; i < count; ++i) sum[i] = sum[i] + Type::widen(row[i]);
    } else {
      const float weight = weights[r];
      for (int i = 0; i < count; ++i) sum[i] = sum[i] + weight * Type::widen(row[i]);
    }
    if ((groups.last >> r & 1) == 0) continue;
    if (groups.rounded >> r & 1) {
      for (int i = 0; i < count; ++i) apart[i] = Type::widen(Type::narrow(apart[i]));
    }
    for (int i = 0; i < count; ++i) total[i] = total[i] + apart[i];
    for (int i = 0; i < count; ++i) apart[i] = 0.0f;
  }
  for (const void* added : bias) {
    if (added == nullptr) continue;
    const Stored* row = static_cast<const Stored*>(added) + at;
    for (int i = 0; i < count; ++i) total[i] = total[i] + Type::widen(row[i]);
  }
  for (int i = 0; i < count; ++i) to[i] = Type::narrow(total[i]);
}

template <typename Type>
[[gnu::always_inline]] inline void sum_all(void* to, const void* const* rows, const float* weights,
                                           int num_rows, const Bias& bias, int64_t elements,
                                           RowGroups groups) {
  for (int64_t at = 0; at < elements; at += kBlock) {
    const int count = static_cast<int>(std::min<int64_t>(kBlock, elements - at));
    sum_block<Type>(static_cast<typename Type::Stored*>(to) + at, rows, weights, num_rows, bias, at,
                    count, groups);
  }
}

[[gnu::always_inline]] inline void sum_any(Element type, void* to, const void* const* rows,
                                           const float* weights, int num_rows, const Bias& bias,
                                           int64_t elements, RowGroups groups) {
  switch (type) {
    case Element::kF32:
      return sum_all<F32>(to, rows, weights, num_rows, bias, elements, groups);
    case Element::kBF16:
      return sum_all<BF16>(to, rows, weights, num_rows, bias, elements, groups);
    case Element::kF16:
      return sum_all<F16>(to, rows, weights, num_rows, bias, elements, groups);
  }
}

void sum_portable(Element type, void* to, const void* const* rows, const float* weights,
                  int num_rows, const Bias& bias, int64_t elements, RowGroups groups) {
  sum_any(type, to, rows, weights, num_rows, bias, elements, groups);
}
#if defined(__x86_64__)
__attribute__((target("avx2,f16c"))) void sum_avx2(Element type, void* to, const void* const* rows,
                                                   const float* weights, int num_rows,
                                                   const Bias& bias, int64_t elements,
                                                   RowGroups groups) {
  sum_any(type, to, rows, weights, num_rows, bias, elements, groups);
}
__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,f16c,prefer-vector-width=512"))) void
sum_avx512(Element type, void* to, const void* const* rows, const float* weights, int num_rows,
           const Bias& bias, int64_t elements, RowGroups groups) {
  sum_any(type, to, rows, weights, num_rows, bias, elements, groups);
}
#endif

struct Functions {
  const char* name;
  void (*stream)(char*, const char*, uint64_t);
  void (*sum)(Element, void*, const void* const*, const float*, int, const Bias&, int64_t,
              RowGroups);
};

Functions choose() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    return {"avx512", stream_avx512, sum_avx512};
  }
  if (__builtin_cpu_supports("avx2")) return {"avx2", stream_avx2, sum_avx2};
#endif
  return {"portable", stream_portable, sum_portable};
}

const Functions& functions() {
  static const Functions chosen = choose();
  return chosen;
}

}  // namespace

void stream_copy(void* to, const void* from, uint64_t bytes) {
  char* target = static_cast<char*>(to);
  const char* source = static_cast<const char*>(from);
  if (bytes < kLeastStreamed) {
    std::memcpy(target, source, bytes);
    return;
  }
  const uint64_t head = (64 - reinterpret_cast<uintptr_t>(target) % 64) % 64;
  std::memcpy(target, source, head);
  const uint64_t lines = (bytes - head) / 64;
  functions().stream(target + head, source + head, lines);
  const uint64_t done = head + 64 * lines;
  std::memcpy(target + done, source + done, bytes - done);
}

void stream_fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
  __atomic_thread_fence(__ATOMIC_RELEASE);
}

const char* copy_isa() { return functions().name; }

uint64_t element_bytes(Element type) { return type == Element::kF32 ? 4 : 2; }

void sum_rows(Element type, void* to, const void* const* rows, const float* weights, int num_rows,
              const Bias& bias, int64_t elements, RowGroups groups) {
  functions().sum(type, to, rows, weights, num_rows, bias, elements, groups);
}

}  // namespace dsk::comm
