"""CUDA kernels that the emulator's tests compile: small, each about one part of the machine."""

PRELUDE = r"""
#include <cstdint>
__device__ __forceinline__ uint32_t smem(const void* p)
  { return (uint32_t)__cvta_generic_to_shared(p); }
__device__ __forceinline__ void bar_init(uint64_t* b, int n) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(smem(b)), "r"(n)); }
__device__ __forceinline__ void bar_expect(uint64_t* b, int n) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(smem(b)), "r"(n)); }
__device__ __forceinline__ void bar_arrive(uint64_t* b) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(smem(b))); }
__device__ __forceinline__ void bar_wait(uint64_t* b, int parity) {
  asm volatile("{ .reg .pred p; W: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;"
               " @p bra D; bra W; D: }" ::"r"(smem(b)), "r"(parity) : "memory"); }
__device__ __forceinline__ void tma_load(void* d, const void* map, uint64_t* b, int x, int y) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
               " [%0], [%1, {%3, %4}], [%2];" ::"r"(smem(d)), "l"(map), "r"(smem(b)), "r"(x), "r"(y)
               : "memory"); }
struct alignas(64) Map { char bytes[128]; };
"""

SGEMM = r"""
extern "C" __global__ void sgemm(const float* A, const float* B, float* C, int M, int N, int K) {
  __shared__ float sa[32][33], sb[32][33];
  int tx = threadIdx.x, ty = threadIdx.y, col = blockIdx.x * 32 + tx;
  float acc[4] = {0, 0, 0, 0};
  for (int k0 = 0; k0 < K; k0 += 32) {
    for (int i = 0; i < 4; i++) {
      int r = blockIdx.y * 32 + ty + i * 8;
      sa[ty + i * 8][tx] = (r < M && k0 + tx < K) ? A[r * K + k0 + tx] : 0.f;
      sb[ty + i * 8][tx] = (k0 + ty + i * 8 < K && col < N) ? B[(k0 + ty + i * 8) * N + col] : 0.f;
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < 32; k++) {
      float b = sb[k][tx];
      for (int i = 0; i < 4; i++) acc[i] += sa[ty + i * 8][k] * b;
    }
    __syncthreads();
  }
  for (int i = 0; i < 4; i++) {
    int r = blockIdx.y * 32 + ty + i * 8;
    if (r < M && col < N) C[r * N + col] = acc[i];
  }
}
"""

COLLATZ = r"""
extern "C" __global__ void collatz(const int* x, int* y, int* total, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x, v = i < n ? x[i] : 0, s = 0;
  while (v > 1) { if (v & 1) v = 3 * v + 1; else v >>= 1; s++; }
  int t = s;
  for (int o = 16; o; o >>= 1) t += __shfl_xor_sync(~0u, t, o);
  unsigned odd = __ballot_sync(~0u, s & 1);
  if (i < n) y[i] = s + 1000 * __popc(odd);
  if (threadIdx.x % 32 == 0) atomicAdd(total, t);
}
"""

SPINLOCK = r"""
extern "C" __global__ void locked(int* lock, int* value, int rounds) {
  for (int r = 0; r < rounds; r++) {
    bool mine = false;
    while (!mine) {
      if (atomicCAS(lock, 0, 1) == 0) {
        __threadfence();
        volatile int* v = value; *v = *v + 1;
        __threadfence();
        atomicExch(lock, 0);
        mine = true;
      }
    }
  }
}
"""

GRID_BARRIER = r"""
extern "C" __global__ void grid_barrier(int* arrived, int* data, int* out) {
  data[blockIdx.x * blockDim.x + threadIdx.x] = blockIdx.x + 1;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    atomicAdd(arrived, 1);
    while (*(volatile int*)arrived < gridDim.x) {}
    __threadfence();
  }
  __syncthreads();
  int other = (blockIdx.x + 1) % gridDim.x;
  out[blockIdx.x * blockDim.x + threadIdx.x] =
      ((volatile int*)data)[other * blockDim.x + threadIdx.x];
}
"""

CLUSTER = r"""
#include <cooperative_groups.h>
namespace cg = cooperative_groups;
extern "C" __global__ void __cluster_dims__(4, 1, 1) rotate(const int* in, int* out) {
  __shared__ int box[64];
  cg::cluster_group c = cg::this_cluster();
  int* remote = c.map_shared_rank(box, (c.block_rank() + 1) % 4);
  remote[threadIdx.x] = in[blockIdx.x * 64 + threadIdx.x];
  c.sync();
  out[blockIdx.x * 64 + threadIdx.x] = box[threadIdx.x];
  c.sync();
}
"""

# A ring of kStages TMA loads; two consumer warps sum what arrives.
PIPELINE = (
    PRELUDE
    + r"""
#ifndef EXPECT
#define EXPECT (64 * 32 * 4)
#endif
extern "C" __global__ void pipeline(const __grid_constant__ Map map, float* out, int tiles) {
  constexpr int kStages = 3;
  __shared__ alignas(1024) float ring[kStages][32][64];
  __shared__ uint64_t full[kStages], empty[kStages];
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; s++) { bar_init(full + s, 1); bar_init(empty + s, 64); }
    asm volatile("fence.mbarrier_init.release.cluster;");
  }
  __syncthreads();
  if (warp == 2) {
    if (lane == 0)
      for (int t = 0; t < tiles; t++) {
        int s = t % kStages;
#ifndef SKIP_EMPTY_WAIT
        bar_wait(empty + s, (t / kStages & 1) ^ 1);
#endif
        bar_expect(full + s, EXPECT);
        tma_load(ring[s], &map, full + s, 0, t * 32);
      }
    return;
  }
  float sum = 0;
  for (int t = 0; t < tiles; t++) {
    int s = t % kStages;
    bar_wait(full + s, t / kStages & 1);
    for (int r = 0; r < 32; r++) sum += ring[s][r][threadIdx.x];
    bar_arrive(empty + s);
  }
  out[threadIdx.x] = sum;
}
"""
)

# One warpgroup, one 64 x 64 tile of bf16, A and B through TMA with 128-byte swizzle.
WGMMA = (
    PRELUDE
    + r"""
#include <cuda_bf16.h>
__device__ __forceinline__ uint64_t desc(const void* p) {
  return ((uint64_t)(smem(p) & 0x3ffff) >> 4) | (1ull << 16) | (64ull << 32) | (1ull << 62); }
extern "C" __global__ void wgmma_tile(const __grid_constant__ Map ma,
                                      const __grid_constant__ Map mb,
                                      float* out, int k) {
  __shared__ alignas(1024) __nv_bfloat16 a[64 * 64], b[64 * 64];
  __shared__ uint64_t full;
  if (threadIdx.x == 0) {
    bar_init(&full, 1);
    asm volatile("fence.mbarrier_init.release.cluster;");
  }
  __syncthreads();
  float d[32];
  for (int i = 0; i < 32; i++) d[i] = 0;
  for (int k0 = 0, t = 0; k0 < k; k0 += 64, t++) {
    if (threadIdx.x == 0) {
      bar_expect(&full, 2 * 64 * 64 * 2);
      tma_load(a, &ma, &full, k0, 0);
      tma_load(b, &mb, &full, k0, 0);
    }
    bar_wait(&full, t & 1);
#ifndef NO_FENCE
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
    for (int kk = 0; kk < 4; kk++)
      asm volatile("{ .reg .pred p; setp.ne.b32 p, 1, 0;"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
        "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
        "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31},"
        " %32, %33, p, 1, 1, 0, 0; }"
        : "+f"(d[0]),"+f"(d[1]),"+f"(d[2]),"+f"(d[3]),"+f"(d[4]),"+f"(d[5]),"+f"(d[6]),"+f"(d[7]),
          "+f"(d[8]),"+f"(d[9]),"+f"(d[10]),"+f"(d[11]),
          "+f"(d[12]),"+f"(d[13]),"+f"(d[14]),"+f"(d[15]),
          "+f"(d[16]),"+f"(d[17]),"+f"(d[18]),"+f"(d[19]),
          "+f"(d[20]),"+f"(d[21]),"+f"(d[22]),"+f"(d[23]),
          "+f"(d[24]),"+f"(d[25]),"+f"(d[26]),"+f"(d[27]),
          "+f"(d[28]),"+f"(d[29]),"+f"(d[30]),"+f"(d[31])
        : "l"(desc((char*)a + 32 * kk)), "l"(desc((char*)b + 32 * kk)));
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#ifndef NO_WAIT
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#endif
    __syncthreads();
  }
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int i = 0; i < 32; i++) {
    int row = warp * 16 + lane / 4 + 8 * (i / 2 % 2), col = 8 * (i / 4) + 2 * (lane % 4) + i % 2;
    out[row * 64 + col] = d[i];
  }
}
"""
)

MISUSE = r"""
extern "C" __global__ void out_of_bounds(float* x, int n) { x[threadIdx.x + n] = 1; }
extern "C" __global__ void null_pointer(float* x) { x[threadIdx.x] = 1; }
extern "C" __global__ void misaligned(char* x) { *(volatile int*)(x + 1) = 3; }
extern "C" __global__ void shared_bounds(int i) {
  extern __shared__ int s[]; ((volatile int*)s)[i + threadIdx.x] = 1; }
extern "C" __global__ void stuck(int n) {
  if (threadIdx.x < n) asm volatile("bar.sync 1, 64;"); }
extern "C" __global__ void disagree() {
  if (threadIdx.x < 32) asm volatile("bar.sync 1, 64;"); else asm volatile("bar.sync 1, 96;"); }
extern "C" __global__ void no_init(int* o) {
  __shared__ unsigned long long b;
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];"
               ::"r"((unsigned)__cvta_generic_to_shared(&b))); *o = 1; }
extern "C" __global__ void spins(volatile int* flag) { while (*flag == 0) {} }
extern "C" __global__ void traps() { asm volatile("trap;"); }
"""

PRINTF = r"""
#include <cstdio>
#include <cassert>
extern "C" __global__ void says(int a, double b, const char* s) {
  if (threadIdx.x == 1) printf("a=%d b=%.2f c=%c %s %llx\n", a, b, 'z', "text", 0x123456789abull);
}
extern "C" __global__ void asserts(int a) { assert(a == 7); }
"""
