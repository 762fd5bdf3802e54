#include "emu/num/isa.hpp"

#include <atomic>
#include <stdexcept>
#include <string>

#include "emu/num/tensorcore.hpp"

namespace dsk::emu::num {
namespace {

constexpr const char* kNames[] = {"scalar", "avx2", "avx512", "avx512bf16"};

Isa detect() {
#if DSK_NUM_X86
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return __builtin_cpu_supports("avx512bf16") ? Isa::avx512_bf16 : Isa::avx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c")) {
    return Isa::avx2;
  }
#endif
  return Isa::scalar;
}

std::atomic<Isa>& current() {
  static std::atomic<Isa> value{detect()};
  return value;
}

}  // namespace

Isa isa() { return current().load(std::memory_order_relaxed); }

const char* active_isa() { return kNames[static_cast<int>(isa())]; }

void force_isa(const char* name) {
  const Isa best = detect();
  const std::string wanted = name == nullptr ? "" : name;
  if (wanted.empty()) {
    current() = best;
    return;
  }
  for (int i = 0; i <= static_cast<int>(Isa::avx512_bf16); ++i) {
    if (wanted != kNames[i]) continue;
    if (i > static_cast<int>(best)) {
      throw std::invalid_argument("force_isa: this CPU has " +
                                  std::string(kNames[static_cast<int>(best)]) + ", not " + wanted);
    }
    current() = static_cast<Isa>(i);
    return;
  }
  throw std::invalid_argument(
      "force_isa: expected scalar, avx2, avx512, avx512bf16 or empty, got '" + wanted + "'");
}

}  // namespace dsk::emu::num
