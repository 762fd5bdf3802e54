// The online softmax of MLA decode on wgmma accumulators: a thread holds rows r and r + 8 of its
// warp's 16, two columns of every eight. Maxima are those of score * scale * log2(e): powers of
// two.
#pragma once

#include <cuda_bf16.h>

#include <cuda/ptx>

#include "cuda/params/mla.hpp"
#include "cuda/ptx/control.cuh"
#include "cuda/ptx/math.cuh"
#include "cuda/ptx/matrix.cuh"
#include "cuda/tile/mla_pieces.cuh"
#include "cuda/tile/mla_smem.cuh"

namespace dsk {

constexpr float kMlaLowest = -1e30f;  // below any score; finite, so that differences are not NaN

// Row of the tile that accumulator half 0 belongs to; half 1 is 8 further.
__device__ __forceinline__ int mla_first_row() {
  return threadIdx.x % kMlaWarpgroup / 32 * 16 + threadIdx.x % 32 / 4;
}

// Running statistics of this thread's two rows.
struct MlaRows {
  float peak[2] = {kMlaLowest, kMlaLowest};
  float sum[2] = {0.f, 0.f};  // of this thread's columns, of the blocks this warpgroup scored

  // The other warpgroup has raised the maxima; factor is what that does to sums and to O.
  __device__ __forceinline__ void follow(const float (&row_max)[kMlaRows], float (&factor)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float raised = row_max[mla_first_row() + 8 * half];
      factor[half] = ptx::exp2_approx(peak[half] - raised);
      peak[half] = raised;
      sum[half] *= factor[half];
    }
  }
};

// The running maximum with a block's largest score: rounded up, so that every rescaling is by a
// power of two and the number of splits does not show. A request of one block has none: there the
// largest weight is 1, which bf16 holds exactly; the errors of two or three weights do not average
// out.
__device__ __forceinline__ float raised_peak(float peak, float largest, bool one_block) {
  return fmaxf(peak, one_block ? largest : ceilf(largest));
}

// s -> P = 2^(s * scale - peak), in bf16 pairs, ready to be the A operand of wgmma.
__device__ __forceinline__ void softmax(float (&s)[32], float scale, bool one_block, MlaRows& rows,
                                        float (&factor)[2], uint32_t (&p)[16]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float peak = -INFINITY;
#pragma unroll
    for (int i = half * 2; i < 32; i += 4) peak = fmaxf(peak, fmaxf(s[i], s[i + 1]));
    peak = fmaxf(peak, __shfl_xor_sync(0xffffffffu, peak, 1));
    peak = fmaxf(peak, __shfl_xor_sync(0xffffffffu, peak, 2));
    peak = raised_peak(rows.peak[half], peak * scale, one_block);
    factor[half] = ptx::exp2_approx(rows.peak[half] - peak);
    rows.peak[half] = peak;
    float sum = 0.f;
#pragma unroll
    for (int i = half * 2; i < 32; i += 4) {
      s[i] = ptx::exp2_approx(fmaf(s[i], scale, -peak));
      s[i + 1] = ptx::exp2_approx(fmaf(s[i + 1], scale, -peak));
      sum += s[i] + s[i + 1];
    }
    rows.sum[half] = fmaf(rows.sum[half], factor[half], sum);
  }
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(s[2 * i], s[2 * i + 1]);
    p[i] = *reinterpret_cast<const uint32_t*>(&pair);
  }
}

// Hands P and the maxima to the other warpgroup. The side that scored a block has its number. P
// overwrites columns that the scores were made of: a warp's wait for them is for all four shares.
__device__ __forceinline__ void publish(MlaDecodeSmem& smem, MlaSide side, const MlaRows& rows,
                                        const uint32_t (&p)[16]) {
  const int buffer = side;
  const int lane = threadIdx.x % 32;
  const int row = threadIdx.x % kMlaWarpgroup / 32 * 16 + lane % 16;
  const uint32_t tile = shared_address(smem.kv[buffer][kMlaRopeTile]);
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    ptx::stmatrix_x4(tile + swizzle128(row, 2 * k + lane / 16), p[4 * k], p[4 * k + 1],
                     p[4 * k + 2], p[4 * k + 3]);
  }
  if (lane % 4 == 0) {
    smem.row_max[buffer][mla_first_row()] = rows.peak[0];
    smem.row_max[buffer][mla_first_row() + 8] = rows.peak[1];
  }
}

__device__ __forceinline__ void rescale(float (&o)[128], const float (&factor)[2]) {
#pragma unroll
  for (int i = 0; i < 128; ++i) o[i] *= factor[i / 2 % 2];
}

// Zeroes the rows of V from `filled` on, in one side's four tiles. By that warpgroup.
template <class Cache>
__device__ __forceinline__ void mla_clear_tail(uint8_t (*tiles)[kMlaTileBytes], int filled,
                                               MlaSide side) {
  if (Cache::kZeroTail || filled >= kMlaBlock) return;
  const int thread = threadIdx.x % kMlaWarpgroup;
  const int tile = thread / 8 % 4, chunk = thread % 8;
  for (int row = filled + thread / 32; row < kMlaBlock; row += 4) {
    *reinterpret_cast<uint4*>(tiles[tile] + row * kSwizzleBytes + chunk * 16) = uint4{0, 0, 0, 0};
  }
  cuda::ptx::fence_proxy_async(cuda::ptx::space_shared);
  ptx::named_barrier_sync(kMlaWarpgroupOnly + side, kMlaWarpgroup);
}

// Which tokens this thread's rows attend.
class MlaMask {
 public:
  __device__ MlaMask(const MlaDecodeParams& p, const MlaPiece& piece)
      : length_(piece.length), first_end_(p.causal ? piece.length - p.s + 1 : piece.length) {
    const int row = int(blockIdx.x) * kMlaRows + mla_first_row();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      end_[half] = p.causal ? first_end_ + (row + 8 * half) / p.h : piece.length;
    }
  }

  __device__ __forceinline__ void apply(float (&s)[32], int block) const {
    const int first = block * kMlaBlock;
    if (first + kMlaBlock <= first_end_) return;
    const int column = first + threadIdx.x % 4 * 2;
#pragma unroll
    for (int i = 0; i < 32; ++i) {
      if (column + i / 4 * 8 + i % 2 >= end_[i / 2 % 2]) s[i] = -INFINITY;
    }
  }

  template <class Cache>
  __device__ __forceinline__ void clear_tail(uint8_t (*tiles)[kMlaTileBytes], int block,
                                             MlaSide side) const {
    mla_clear_tail<Cache>(tiles, length_ - block * kMlaBlock, side);
  }

 private:
  int length_;
  int first_end_;  // tokens that every row attends
  int end_[2];     // rows behind the last are unused
};

}  // namespace dsk
