// Warpgroup matrix multiply-accumulate on bf16 operands (PTX ISA 8.0, sm_90a); see wgmma.cuh.
#pragma once

#include <cstdint>

#include "cuda/ptx/wgmma.cuh"

namespace dsk::ptx {

// How an operand lies in shared memory. MN-major is what PTX calls transposed.
enum class Major : int { kK = 0, kMn = 1 };

// D[64 x N] (+)= A[64 x 16] * B[N x 16]^T, fp32 accumulators; A in shared memory (mma) or in four
// registers (mma_registers), B in shared memory.
template <int kN>
struct WgmmaBf16;

#define DSK_D256                                                                         \
  DSK_D192, DSK_D4(96), DSK_D4(100), DSK_D4(104), DSK_D4(108), DSK_D4(112), DSK_D4(116), \
      DSK_D4(120), DSK_D4(124)
#define DSK_R256                                                                       \
  DSK_R192                                                                             \
  ",%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112," \
  "%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"

// wgmma.mma_async.sync.aligned.m64nNk16.f32.bf16.bf16 d, a-desc, b-desc, scale-d, 1, 1, tA, tB;
// wgmma.mma_async.sync.aligned.m64nNk16.f32.bf16.bf16 d, {a0..a3}, b-desc, scale-d, 1, 1, tB;
// V0 .. V6 are the operand numbers after the N/2 accumulators.
#define DSK_WGMMA_BF16(N, V0, V1, V2, V3, V4, V5, V6)                                          \
  template <>                                                                                  \
  struct WgmmaBf16<N> {                                                                        \
    template <Major kA, Major kB>                                                              \
    __device__ static __forceinline__ void mma(float (&d)[N / 2], uint64_t desc_a,             \
                                               uint64_t desc_b, int accumulate) {              \
      asm volatile(                                                                            \
          "{\n"                                                                                \
          ".reg .pred p;\n"                                                                    \
          "setp.ne.b32 p, " V2                                                                 \
          ", 0;\n"                                                                             \
          "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" DSK_R##N                \
          "}, " V0 ", " V1 ", p, 1, 1, " V3 ", " V4                                            \
          ";\n"                                                                                \
          "}\n"                                                                                \
          : DSK_D##N                                                                           \
          : "l"(desc_a), "l"(desc_b), "r"(accumulate), "n"(int(kA)), "n"(int(kB)));            \
    }                                                                                          \
    template <Major kB>                                                                        \
    __device__ static __forceinline__ void mma_registers(float (&d)[N / 2], const uint32_t* a, \
                                                         uint64_t desc_b, int accumulate) {    \
      asm volatile(                                                                            \
          "{\n"                                                                                \
          ".reg .pred p;\n"                                                                    \
          "setp.ne.b32 p, " V5                                                                 \
          ", 0;\n"                                                                             \
          "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" DSK_R##N                \
          "}, {" V0 ", " V1 ", " V2 ", " V3 "}, " V4 ", p, 1, 1, " V6                          \
          ";\n"                                                                                \
          "}\n"                                                                                \
          : DSK_D##N                                                                           \
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(desc_b), "r"(accumulate),          \
            "n"(int(kB)));                                                                     \
    }                                                                                          \
  };
DSK_WGMMA_BF16(16, "%8", "%9", "%10", "%11", "%12", "%13", "%14")
DSK_WGMMA_BF16(32, "%16", "%17", "%18", "%19", "%20", "%21", "%22")
DSK_WGMMA_BF16(64, "%32", "%33", "%34", "%35", "%36", "%37", "%38")
DSK_WGMMA_BF16(128, "%64", "%65", "%66", "%67", "%68", "%69", "%70")
DSK_WGMMA_BF16(192, "%96", "%97", "%98", "%99", "%100", "%101", "%102")
DSK_WGMMA_BF16(256, "%128", "%129", "%130", "%131", "%132", "%133", "%134")
#undef DSK_WGMMA_BF16

}  // namespace dsk::ptx
