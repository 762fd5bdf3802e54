// Which target runs: the best the processor and the operating system support, or DSK_CPU_TARGET.
#include <atomic>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "check.hpp"
#include "cpu/kernels.hpp"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace dsk::cpu {

#define DSK_DECLARE(target)    \
  namespace target {           \
  extern const Kernels kTable; \
  }
DSK_DECLARE(portable)
#if defined(DSK_CPU_X86)
DSK_DECLARE(avx2)
DSK_DECLARE(avx512)
DSK_DECLARE(avx512_bf16)
DSK_DECLARE(avx512_fp16)
DSK_DECLARE(amx)
#endif
#undef DSK_DECLARE

namespace {

#if defined(DSK_CPU_X86)
// Leaf 7's feature bits that GCC 12's __builtin_cpu_supports does not know by name.
struct Leaf7 {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  Leaf7() { __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx); }
  bool amx_bf16() const { return (edx >> 22 & 1) && (edx >> 24 & 1); }
  bool avx512_fp16() const { return edx >> 23 & 1; }
};

bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         (__builtin_cpu_supports("avx512f") || [] {
           unsigned a = 0, b = 0, c = 0, d = 0;
           return __get_cpuid(1, &a, &b, &c, &d) && (c >> 29 & 1);  // F16C
         }());
}
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vbmi");
}
bool has_avx512_bf16() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return has_avx512() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1);
}
bool has_avx512_fp16() { return has_avx512() && Leaf7().avx512_fp16(); }

// Tile registers are off until the process asks Linux for them (arch_prctl, once, all threads).
bool has_amx() {
  if (!has_avx512_fp16() || !Leaf7().amx_bf16()) return false;
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

struct Target {
  const Kernels* table;
  bool (*available)();
  const char* needs;
};

// Best first.
const Target kTargets[] = {
#if defined(DSK_CPU_X86)
    {&amx::kTable, has_amx, "AMX-BF16, AVX512-FP16 and the kernel's permission for tile registers"},
    {&avx512_fp16::kTable, has_avx512_fp16, "AVX512-FP16"},
    {&avx512_bf16::kTable, has_avx512_bf16, "AVX512-BF16"},
    {&avx512::kTable, has_avx512, "AVX-512 F, BW, DQ, VL and VBMI"},
    {&avx2::kTable, has_avx2, "AVX2, FMA and F16C"},
#endif
    {&portable::kTable, [] { return true; }, "nothing"},
};

struct Choice {
  const Kernels* table = nullptr;
  std::string reason;
};

Choice choose(const char* forced, const char* by) {
  std::string known;
  for (const Target& target : kTargets) {
    const std::string name = target.table->name;
    known += known.empty() ? name : ", " + name;
    if (forced != nullptr && *forced != '\0') {
      if (name != forced) continue;
      DSK_CHECK(target.available(), by, ": expected a target this processor runs, got ", forced,
                ", which needs ", target.needs);
      return {target.table, std::string("forced by ") + by};
    }
    if (target.available()) {
      return {target.table, std::string("the best this processor runs: it has ") + target.needs};
    }
  }
  fail(by, ": expected one of ", known, ", got ", forced);
}

// Replaced choices are kept: a reason handed out stays valid.
std::mutex guard;
std::atomic<const Choice*> current{nullptr};

void set_choice(const char* forced, const char* by) {
  static std::vector<std::unique_ptr<Choice>> choices;
  choices.push_back(std::make_unique<Choice>(choose(forced, by)));
  current.store(choices.back().get(), std::memory_order_release);
}

const Choice& choice() {
  if (current.load(std::memory_order_acquire) == nullptr) {
    const std::lock_guard<std::mutex> lock(guard);
    if (current.load() == nullptr) set_choice(std::getenv("DSK_CPU_TARGET"), "DSK_CPU_TARGET");
  }
  return *current.load(std::memory_order_acquire);
}

}  // namespace

const Kernels& kernels() { return *choice().table; }
const char* target_reason() { return choice().reason.c_str(); }

void select_target(const char* name) {
  const std::lock_guard<std::mutex> lock(guard);
  set_choice(name, "target");
}

std::vector<const char*> available_targets() {
  std::vector<const char*> names;
  for (const Target& target : kTargets) {
    if (target.available()) names.push_back(target.table->name);
  }
  return names;
}

}  // namespace dsk::cpu
