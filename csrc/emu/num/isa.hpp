// Run-time choice of vector code for the units of this folder.
#pragma once

#include <cstdint>

namespace dsk::emu::num {

enum class Isa : uint8_t { scalar, avx2, avx512, avx512_bf16 };  // each has what is before it

Isa isa();  // what active_isa() names; one relaxed atomic load

}  // namespace dsk::emu::num

#if defined(__x86_64__) && defined(__GNUC__)
#define DSK_NUM_X86 1
#define DSK_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")))
#define DSK_AVX512_BF16 \
  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")))
#define DSK_AVX2 __attribute__((target("avx2,fma,f16c")))
#else
#define DSK_NUM_X86 0
#define DSK_AVX512
#define DSK_AVX512_BF16
#define DSK_AVX2
#endif
