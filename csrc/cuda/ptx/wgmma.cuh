// Warpgroup matrix multiply-accumulate (PTX ISA 8.0, sm_90a). All four warps of a warpgroup execute
// each of these together. Accumulators are in flight from wgmma until wgmma_wait_group: the
// compiler knows nothing of that, so fence_accumulators must stand between them and any other use.
// Given the accumulators, wgmma_fence and wgmma_wait_group see to it.
#pragma once

#include <cstdint>

namespace dsk::ptx {

// wgmma.fence.sync.aligned;   orders register and shared-memory accesses before the next wgmma
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

// wgmma.commit_group.sync.aligned;
__device__ __forceinline__ void wgmma_commit_group() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// wgmma.wait_group.sync.aligned n;   until at most n groups are pending
template <int kPending>
__device__ __forceinline__ void wgmma_wait_group() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// No instruction: keeps the compiler from moving accumulator accesses across this point.
template <int kCount>
__device__ __forceinline__ void fence_accumulators(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// Whatever was done with the accumulators d is done before the next wgmma.
template <int kCount>
__device__ __forceinline__ void wgmma_fence(float (&d)[kCount]) {
  fence_accumulators(d);
  wgmma_fence();
}

// The accumulators d are those of a group that is waited for: nothing looks at them sooner.
template <int kPending, int kCount>
__device__ __forceinline__ void wgmma_wait_group(float (&d)[kCount]) {
  wgmma_wait_group<kPending>();
  fence_accumulators(d);
}

// D[64 x N] (+)= A[64 x 32] * B[N x 32]^T, e4m3 operands in shared memory, fp32 accumulators.
template <int kN>
struct WgmmaE4m3;

// The register list of an m64nN instruction: N/2 accumulators, four per 8 columns.
#define DSK_D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define DSK_D8 DSK_D4(0)
#define DSK_D16 DSK_D8, DSK_D4(4)
#define DSK_D24 DSK_D16, DSK_D4(8)
#define DSK_D32 DSK_D24, DSK_D4(12)
#define DSK_D40 DSK_D32, DSK_D4(16)
#define DSK_D48 DSK_D40, DSK_D4(20)
#define DSK_D56 DSK_D48, DSK_D4(24)
#define DSK_D64 DSK_D56, DSK_D4(28)
#define DSK_D80 DSK_D64, DSK_D4(32), DSK_D4(36)
#define DSK_D96 DSK_D80, DSK_D4(40), DSK_D4(44)
#define DSK_D112 DSK_D96, DSK_D4(48), DSK_D4(52)
#define DSK_D128 DSK_D112, DSK_D4(56), DSK_D4(60)
#define DSK_D160 DSK_D128, DSK_D4(64), DSK_D4(68), DSK_D4(72), DSK_D4(76)
#define DSK_D192 DSK_D160, DSK_D4(80), DSK_D4(84), DSK_D4(88), DSK_D4(92)
#define DSK_R8 "%0,%1,%2,%3"
#define DSK_R16 DSK_R8 ",%4,%5,%6,%7"
#define DSK_R24 DSK_R16 ",%8,%9,%10,%11"
#define DSK_R32 DSK_R24 ",%12,%13,%14,%15"
#define DSK_R40 DSK_R32 ",%16,%17,%18,%19"
#define DSK_R48 DSK_R40 ",%20,%21,%22,%23"
#define DSK_R56 DSK_R48 ",%24,%25,%26,%27"
#define DSK_R64 DSK_R56 ",%28,%29,%30,%31"
#define DSK_R80 DSK_R64 ",%32,%33,%34,%35,%36,%37,%38,%39"
#define DSK_R96 DSK_R80 ",%40,%41,%42,%43,%44,%45,%46,%47"
#define DSK_R112 DSK_R96 ",%48,%49,%50,%51,%52,%53,%54,%55"
#define DSK_R128 DSK_R112 ",%56,%57,%58,%59,%60,%61,%62,%63"
#define DSK_R160 DSK_R128 ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79"
#define DSK_R192 DSK_R160 ",%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95"

// wgmma.mma_async.sync.aligned.m64nNk32.f32.e4m3.e4m3 d, a-desc, b-desc, scale-d, 1, 1;
// The last three arguments are the operand numbers after the N/2 accumulators.
#define DSK_WGMMA_E4M3(N, A, B, SCALE_D)                                                       \
  template <>                                                                                  \
  struct WgmmaE4m3<N> {                                                                        \
    __device__ static __forceinline__ void mma(float (&d)[N / 2], uint64_t desc_a,             \
                                               uint64_t desc_b, int accumulate) {              \
      asm volatile(                                                                            \
          "{\n"                                                                                \
          ".reg .pred p;\n"                                                                    \
          "setp.ne.b32 p, " SCALE_D                                                            \
          ", 0;\n"                                                                             \
          "wgmma.mma_async.sync.aligned.m64n" #N "k32.f32.e4m3.e4m3 {" DSK_R##N "}, " A ", " B \
                                                                                ", p, 1, 1;\n" \
                                                                                "}\n"          \
          : DSK_D##N                                                                           \
          : "l"(desc_a), "l"(desc_b), "r"(accumulate));                                        \
    }                                                                                          \
  };
DSK_WGMMA_E4M3(8, "%4", "%5", "%6")
DSK_WGMMA_E4M3(16, "%8", "%9", "%10")
DSK_WGMMA_E4M3(24, "%12", "%13", "%14")
DSK_WGMMA_E4M3(32, "%16", "%17", "%18")
DSK_WGMMA_E4M3(40, "%20", "%21", "%22")
DSK_WGMMA_E4M3(48, "%24", "%25", "%26")
DSK_WGMMA_E4M3(56, "%28", "%29", "%30")
DSK_WGMMA_E4M3(64, "%32", "%33", "%34")
DSK_WGMMA_E4M3(80, "%40", "%41", "%42")
DSK_WGMMA_E4M3(96, "%48", "%49", "%50")
DSK_WGMMA_E4M3(112, "%56", "%57", "%58")
DSK_WGMMA_E4M3(128, "%64", "%65", "%66")
DSK_WGMMA_E4M3(160, "%80", "%81", "%82")
DSK_WGMMA_E4M3(192, "%96", "%97", "%98")
#undef DSK_WGMMA_E4M3

}  // namespace dsk::ptx
