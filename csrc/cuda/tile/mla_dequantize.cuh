// Blocks of an FP8 cache: a token is 512 e4m3, 4 fp32 scales (one for 128 values), 64 bf16 RoPE
// values, 656 bytes. A warpgroup turns them into the bf16 tiles that the products read.
//
// A warp has 16 tokens of a block, one page of which holds them all. It turns the left half of
// their latents, then the right one: the halves of a block are freed and awaited apart, so the
// scores of the left half run while the right one is turned. 16 lanes share half a token, 16 codes
// each. Shared memory holds eight tokens' halves on their way, too few for the latency of memory:
// so the block after this one is on its way to L2 meanwhile.
//
// Turning costs some 50 cycles a token, attending 64 query rows 34. Where a request has more rows,
// two CTAs of a cluster attend the same tokens: each turns half of them, for both. It stores them
// in its own shared memory and copies them from there to the other's, where they complete the
// barrier that the other's math warps wait for. A half block is free when the math warps of both
// have let go of it.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline.h>

#include <cuda/ptx>

#include "cuda/params/mla.hpp"
#include "cuda/ptx/cluster.cuh"
#include "cuda/ptx/fp8.cuh"
#include "cuda/ptx/lane.cuh"
#include "cuda/ptx/memory.cuh"
#include "cuda/tile/mla_pieces.cuh"
#include "cuda/tile/mla_smem.cuh"

namespace dsk {

// Four e4m3 -> four bf16, each the rounded product with the scale.
__device__ __forceinline__ uint2 dequantize4(uint32_t codes, float scale) {
  uint2 result;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t halves = ptx::cvt_f16x2(uint16_t(codes >> (16 * i)));
    const float2 value = __half22float2(*reinterpret_cast<const __half2*>(&halves));
    const __nv_bfloat162 pair = __floats2bfloat162_rn(value.x * scale, value.y * scale);
    (i ? result.y : result.x) = *reinterpret_cast<const uint32_t*>(&pair);
  }
  return result;
}

// kCtas: with two, a cluster's CTAs attend the same tokens and each turns half of them for both.
template <int kCtas>
struct MlaFp8Cache {
  static constexpr int kMathRegisters = 208;
  static constexpr int kProducerRegisters = 88;
  static constexpr int kWarps = kMlaWarpgroup / 32;
  static constexpr int kProducers = kWarps;
  static constexpr int kSharers = kCtas;
  static constexpr bool kWithQueries = false;
  static constexpr bool kZeroTail = true;
  static constexpr int kTokens = kMlaBlock / kWarps;  // of a warp: their RoPE values
  static constexpr int kTurned = kTokens / kCtas;     // of which it turns the latents
  static constexpr int kPasses = 4;                   // whose loads are in flight together
  static constexpr int kBatch = 2 * kPasses;          // tokens: two a pass, half a row each
  static constexpr int kHalfBytes = kMlaLatent / 2;   // of a token's codes
  static_assert(kTurned % kBatch == 0);

  __device__ static __forceinline__ void produce(const MlaDecodeParams& p, MlaDecodeSmem& smem) {
    const int warp = threadIdx.x % kMlaWarpgroup / 32;
    const int skip = kCtas == 1 ? 0 : ptx::cluster_rank() * kTurned;
    const int row = warp * kTokens + skip;
    const int ld_token = int(p.ld_token);
    uint4(*stage)[32] = smem.fp8_stage[warp];
    MlaPieces pieces(p);
    MlaPiece piece;
    uint32_t phases = 0;  // bit i: of buffer i
    while (pieces.next(piece)) {
      // Pages are looked up two blocks ahead, their latents come to L2 one block ahead.
      Tokens tokens = locate(p, piece, piece.begin, warp, look_up(p, piece, piece.begin, warp));
      int page = look_up(p, piece, piece.begin + 1, warp);
      float scale[kPasses];
      __pipeline_wait_prior(0);  // zeros behind the last piece's end, on their way to the stage
      fetch(tokens.after(skip, ld_token), ld_token, 0, stage, scale);
      for (int block = piece.begin; block < piece.end; ++block) {
        const int buffer = (block - piece.begin) % 2;
        const uint32_t phase = phases >> buffer & 1;
        Tokens next = locate(p, piece, block + 1, warp, page);
        prefetch(next.after(skip, ld_token), ld_token);
        page = look_up(p, piece, block + 2, warp);
        auto& ring = smem.kv_ring[buffer];
#pragma unroll 1
        for (int half = 0; half < 2; ++half) {
          ring.await_free({half, phase});
          if (half == 1) copy_rope(tokens, ld_token, smem.kv[buffer][kMlaRopeTile], warp * kTokens);
#pragma unroll 1
          for (int first = 0; first < kTurned; first += kBatch) {
            uint2 codes[kPasses][2];
            float factor[kPasses];
            if (half == 1 && first == 0) {
              __pipeline_wait_prior(1);  // RoPE values are behind these latents
            } else {
              __pipeline_wait_prior(0);
            }
            take(stage, scale, codes, factor);
            // The next batch is on its way while this one is turned.
            const bool more = first + kBatch < kTurned;
            const Tokens ahead = half == 0 || more ? tokens : next;
            fetch(ahead.after(skip + (more ? first + kBatch : 0), ld_token), ld_token,
                  more ? half : 1 - half, stage, scale);
            store(codes, factor, smem.kv[buffer] + half * kMlaHalfTiles, row + first);
          }
          if (half == 1) __pipeline_wait_prior(1);  // RoPE values, not the next latents
          cuda::ptx::fence_proxy_async(cuda::ptx::space_shared);
          __syncwarp();
          deliver(smem, buffer, half, row, phase);
        }
        tokens = next;
        phases ^= 1u << buffer;
      }
    }
  }

 private:
  struct Tokens {
    const uint8_t* from;
    int count;  // that exist from there on; none where it is not positive

    __device__ __forceinline__ Tokens after(int skipped, int ld_token) const {
      return {from + skipped * ld_token, count - skipped};
    }
  };

  // The page of this warp's tokens of a block, of the piece or behind it.
  __device__ static __forceinline__ int look_up(const MlaDecodeParams& p, const MlaPiece& piece,
                                                int block, int warp) {
    const int token = block * kMlaBlock + warp * kTokens;
    const int32_t* table = p.block_table + int64_t(piece.request) * p.ld_table;
    return token < piece.length ? __ldg(table + token / p.page) : 0;
  }

  // Those tokens; behind the piece there are none.
  __device__ static __forceinline__ Tokens locate(const MlaDecodeParams& p, const MlaPiece& piece,
                                                  int block, int warp, int page) {
    const int token = block * kMlaBlock + warp * kTokens;
    const int count = block < piece.end ? piece.length - token : 0;
    return {p.kv_rows + page * p.ld_page + token % p.page * p.ld_token, count};
  }

  // Two lanes a token or, where this CTA turns half of them, four: each a run of its bytes.
  __device__ static __forceinline__ void prefetch(const Tokens& tokens, int ld_token) {
    constexpr int kLanes = 32 / kTurned, kRun = kMlaFp8Bytes / kLanes;
    const int token = threadIdx.x % 32 / kLanes;
    if (token >= tokens.count) return;
    const uint8_t* at = tokens.from + token * ld_token + threadIdx.x % kLanes * kRun;
#pragma unroll
    for (int byte = 0; byte < kRun; byte += 128) ptx::prefetch_l2(at + byte);
  }

  // Starts the first kBatch tokens' way to this lane's place in the stage: in each pass, lanes 0-15
  // take 16 codes each of a token's half, the others those of the token after it. Zeros stand for
  // tokens that do not exist.
  __device__ static __forceinline__ void fetch(const Tokens& tokens, int ld_token, int half,
                                               uint4 (*stage)[32], float (&scale)[kPasses]) {
    const int lane = threadIdx.x % 32;
    const uint8_t* row = tokens.from + lane / 16 * ld_token;
    const int codes = half * kHalfBytes + lane % 16 * 16;
    const int factor = kMlaLatent + half * 8 + lane / 8 % 2 * 4;
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      const bool exists = 2 * i + lane / 16 < tokens.count;
      __pipeline_memcpy_async(&stage[i][lane], row + codes, 16, exists ? 0 : 16);
      scale[i] = exists ? __ldg(reinterpret_cast<const float*>(row + factor)) : 0.f;
      row += 2 * ld_token;
    }
    __pipeline_commit();
  }

  // Whether a lane turns the second half of its 16 codes first: so the two chunks of bf16 that
  // eight lanes store meet eight different bank groups.
  __device__ static __forceinline__ int second_first() { return threadIdx.x / 4 % 2; }

  // What has landed of them. A lane reads only what it fetched itself.
  __device__ static __forceinline__ void take(uint4 (*stage)[32], const float (&scale)[kPasses],
                                              uint2 (&codes)[kPasses][2],
                                              float (&factor)[kPasses]) {
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      const auto* mine = reinterpret_cast<const uint2*>(&stage[i][threadIdx.x % 32]);
      codes[i][0] = mine[second_first()];
      codes[i][1] = mine[1 - second_first()];
      factor[i] = scale[i];
    }
  }

  // Eight lanes a token.
  __device__ static __forceinline__ void copy_rope(const Tokens& tokens, int ld_token,
                                                   uint8_t* tile, int row) {
    const int lane = ptx::lane_here();
#pragma unroll
    for (int i = 0; i < kTokens; i += 4) {
      const int token = i + lane / 8;
      if (token < tokens.count) {
        const uint8_t* at = tokens.from + token * ld_token + kMlaLatent + kMlaScaleBytes;
        __pipeline_memcpy_async(tile + swizzle128(row + token, lane % 8), at + lane % 8 * 16, 16);
      }
    }
    __pipeline_commit();
  }

  // A lane's 16 latents of a token are two 16-byte chunks of one tile. row: a multiple of 8, so a
  // pass only moves the chunk by 2 * i in the swizzle.
  __device__ static __forceinline__ void store(const uint2 (&codes)[kPasses][2],
                                               const float (&scale)[kPasses],
                                               uint8_t (*tiles)[kMlaTileBytes], int row) {
    const int lane = threadIdx.x % 32;
    uint8_t* tile = tiles[lane % 16 / 4] + row * kSwizzleBytes;
    const uint32_t one = swizzle128(lane / 16, lane % 4 * 2 + second_first());
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const uint2 low = dequantize4(codes[i][k].x, scale[i]);
        const uint2 high = dequantize4(codes[i][k].y, scale[i]);
        const uint32_t chunk = one ^ ((2 * i + k) * 16);
        *reinterpret_cast<uint4*>(tile + 2 * i * kSwizzleBytes + chunk) =
            uint4{low.x, low.y, high.x, high.y};
      }
    }
  }

  // Announces this warp's half rows to this CTA's math warps and copies them to the other CTA,
  // whose warp of the same number does the same. Nobody else ever writes these rows there.
  __device__ static __forceinline__ void deliver(MlaDecodeSmem& smem, int buffer, int half, int row,
                                                 uint32_t phase) {
    auto& ring = smem.kv_ring[buffer];
    const int lane = threadIdx.x % 32;
    if constexpr (kCtas == 1) {
      if (lane == 0) ring.fill({half, phase});
    } else {
      constexpr uint32_t kBytes = kTurned * kSwizzleBytes;  // of a tile
      if (lane == 0) ring.announce({half, phase}, kMlaHalfTiles * kBytes);
      if (lane < kMlaHalfTiles) {
        const int peer = ptx::cluster_rank() ^ 1;
        uint8_t* from = smem.kv[buffer][half * kMlaHalfTiles + lane] + row * kSwizzleBytes;
        cuda::ptx::cp_async_bulk(cuda::ptx::space_cluster, cuda::ptx::space_shared,
                                 ptx::map_to_rank(from, peer), from, kBytes,
                                 ptx::map_to_rank(&ring.full[half], peer));
      }
    }
  }
};

}  // namespace dsk
