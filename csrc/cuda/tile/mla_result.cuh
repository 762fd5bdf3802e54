// How a piece's result leaves MLA decode: rounded to bf16 when it is the whole request, else in
// fp32 for mla_combine.
#pragma once

#include <cuda_bf16.h>

#include <cuda/ptx>

#include "cuda/tile/mla_softmax.cuh"

namespace dsk {

constexpr float kMlaLn2 = 0.6931471805599453f;

// Sums of whole rows, from both warpgroups.
__device__ __forceinline__ void join_sums(MlaDecodeSmem& smem, MlaSide side, const MlaRows& rows,
                                          float (&total)[2]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float sum = rows.sum[half];
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    if (threadIdx.x % 4 == 0) smem.row_sum[side][mla_first_row() + 8 * half] = sum;
  }
  ptx::named_barrier_sync(kMlaBoth, kMlaMathThreads);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = mla_first_row() + 8 * half;
    total[half] = smem.row_sum[0][row] + smem.row_sum[1][row];
  }
}

// One side's half of the result, which its warps have written to Q's tiles, on its way to memory.
__device__ __forceinline__ void send_result(const MlaDecodeParams& p, const MlaPiece& piece,
                                            MlaDecodeSmem& smem, MlaSide side) {
  using namespace cuda::ptx;
  fence_proxy_async(space_shared);
  ptx::named_barrier_sync(kMlaWarpgroupOnly + side, kMlaWarpgroup);
  if (threadIdx.x % kMlaWarpgroup != 0) return;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int tile = side * 4 + i;
    const int32_t to[3] = {tile * 64, int(blockIdx.x) * kMlaRows, piece.request};
    cp_async_bulk_tensor(space_global, space_shared, &p.out, to, smem.q[tile]);
  }
  cp_async_bulk_commit_group();
  cp_async_bulk_wait_group_read(n32_t<0>{});  // before Q is loaded again, or shared memory is gone
}

template <MlaSide kSide>
__device__ __forceinline__ void store_whole(const MlaDecodeParams& p, const MlaPiece& piece,
                                            MlaDecodeSmem& smem, const float (&o)[128]) {
  const int thread = threadIdx.x % kMlaWarpgroup;
  const int lane = thread % 32;
  const int row = thread / 32 * 16 + lane % 16;
#pragma unroll
  for (int column = 0; column < 256; column += 16) {
    uint32_t packed[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const __nv_bfloat162 pair =
          __floats2bfloat162_rn(o[column / 2 + 2 * i], o[column / 2 + 2 * i + 1]);
      packed[i] = *reinterpret_cast<const uint32_t*>(&pair);
    }
    const uint32_t tile = shared_address(smem.q[kSide * 4 + column / 64]);
    ptx::stmatrix_x4(tile + swizzle128(row, column % 64 / 8 + lane / 16), packed[0], packed[1],
                     packed[2], packed[3]);
  }
  send_result(p, piece, smem, kSide);
}

template <MlaSide kSide>
__device__ __forceinline__ void store_split(const MlaDecodeParams& p, const MlaPiece& piece,
                                            const float (&o)[128]) {
  const int rows = p.s * p.h;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = int(blockIdx.x) * kMlaRows + mla_first_row() + 8 * half;
    if (row >= rows) continue;
    float* to = p.out_partial + (int64_t(piece.slot) * rows + row) * kMlaLatent + kSide * 256 +
                threadIdx.x % 4 * 2;
#pragma unroll
    for (int i = 0; i < 32; ++i) {
      *reinterpret_cast<float2*>(to + i * 8) = {o[i * 4 + half * 2], o[i * 4 + half * 2 + 1]};
    }
  }
}

// A row's log-sum-exp: peak and the logarithm of its sum of weights.
__device__ __forceinline__ void store_row_lse(const MlaDecodeParams& p, const MlaPiece& piece,
                                              int row, float peak, float total) {
  const bool nothing = total == 0.f;
  const float lse = peak + ptx::log2_approx(total);
  if (piece.slot < 0) {
    const int64_t head = int64_t(piece.request) * p.h + row % p.h;
    p.lse[head * p.s + row / p.h] = nothing ? INFINITY : lse * kMlaLn2;
  } else {
    p.lse_partial[int64_t(piece.slot) * p.s * p.h + row] = nothing ? -INFINITY : lse;
  }
}

// The thread that holds a row's first columns writes its lse.
__device__ __forceinline__ void store_lse(const MlaDecodeParams& p, const MlaPiece& piece,
                                          const MlaRows& state, const float (&total)[2]) {
  if (threadIdx.x % 4 != 0) return;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = int(blockIdx.x) * kMlaRows + mla_first_row() + 8 * half;
    if (row < p.s * p.h) store_row_lse(p, piece, row, state.peak[half], total[half]);
  }
}

template <MlaSide kSide>
__device__ __forceinline__ void store_result(const MlaDecodeParams& p, const MlaPiece& piece,
                                             MlaDecodeSmem& smem, const MlaRows& rows,
                                             float (&o)[128]) {
  float total[2];
  join_sums(smem, kSide, rows, total);
  float inverse[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) inverse[half] = total[half] == 0.f ? 0.f : 1.f / total[half];
  rescale(o, inverse);
  if (piece.slot < 0) {
    store_whole<kSide>(p, piece, smem, o);
  } else {
    store_split<kSide>(p, piece, o);
  }
  if (kSide == kLeft) store_lse(p, piece, rows, total);
}

}  // namespace dsk
