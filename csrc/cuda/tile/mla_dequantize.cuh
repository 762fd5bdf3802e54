// Blocks of an FP8 cache: a token is 512 e4m3, 4 fp32 scales (one for 128 values), 64 bf16 RoPE
// values, 656 bytes. A warpgroup turns them into the bf16 tiles that the products read.
//
// A warp takes 16 tokens of a block, one page of which holds them all. Its lanes read a token's 512
// bytes in one go, 16 each, and write 2 x 16 bytes: lanes of odd tiles the second 16 first, so that
// eight lanes meet eight different bank groups. Registers hold four tokens' loads at a time, too
// few for the latency of memory; so the block after this one is on its way to L2 meanwhile.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline.h>

#include <cuda/ptx>

#include "cuda/params/mla.hpp"
#include "cuda/ptx/fp8.cuh"
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

struct MlaFp8Cache {
  static constexpr int kMathRegisters = 208;
  static constexpr int kProducerRegisters = 88;
  static constexpr int kWarps = kMlaWarpgroup / 32;
  static constexpr int kProducers = kWarps;
  static constexpr int kTokens = kMlaBlock / kWarps;  // of a warp
  static constexpr int kBatch = 4;                    // tokens whose loads are in flight together

  __device__ static __forceinline__ void produce(const MlaDecodeParams& p, MlaDecodeSmem& smem) {
    const int warp = threadIdx.x % kMlaWarpgroup / 32;
    const int ld_token = int(p.ld_token);
    MlaPieces pieces(p);
    MlaPiece piece;
    uint32_t phases = 0;  // bit i: of buffer i
    while (pieces.next(piece)) {
      Tokens next = locate(p, piece, piece.begin, warp);
      for (int block = piece.begin; block < piece.end; ++block) {
        const int buffer = (block - piece.begin) % 2;
        const uint32_t phase = phases >> buffer & 1;
        const auto [from, count] = next;
        if (block + 1 < piece.end) {
          next = locate(p, piece, block + 1, warp);
          prefetch(next, ld_token);
        }
        auto& ring = smem.kv_ring[buffer];
        const int row = warp * kTokens;
        uint4(*stage)[32] = smem.fp8_stage[warp];
        float scale[kBatch];
        fetch(from, ld_token, count, stage, scale);
        ring.await_free({0, phase});
        ring.await_free({1, phase});
        copy_rope(from, ld_token, count, smem.kv[buffer][kMlaRopeTile], row);
#pragma unroll 1
        for (int first = 0; first < kTokens; first += kBatch) {
          uint4 codes[kBatch];
          float factor[kBatch];
          take(stage, scale, codes, factor);
          fetch(from + (first + kBatch) * ld_token, ld_token, count - first - kBatch, stage, scale);
          store(codes, factor, smem.kv[buffer], row + first, count - first);
        }
        __pipeline_wait_prior(0);
        cuda::ptx::fence_proxy_async(cuda::ptx::space_shared);
        __syncwarp();
        if (threadIdx.x % 32 == 0) {
          ring.fill({0, phase});
          ring.fill({1, phase});
        }
        phases ^= 1u << buffer;
      }
    }
  }

 private:
  struct Tokens {
    const uint8_t* from;
    int count;  // of kTokens; none where it is not positive
  };

  // This warp's tokens of a block.
  __device__ static __forceinline__ Tokens locate(const MlaDecodeParams& p, const MlaPiece& piece,
                                                  int block, int warp) {
    const int token = block * kMlaBlock + warp * kTokens;
    const int count = min(piece.length - token, kTokens);
    const int32_t* table = p.block_table + int64_t(piece.request) * p.ld_table;
    const int page = count > 0 ? __ldg(table + token / p.page) : 0;
    return {p.kv_rows + page * p.ld_page + token % p.page * p.ld_token, count};
  }

  // Two lanes a token, three lines each.
  __device__ static __forceinline__ void prefetch(const Tokens& tokens, int ld_token) {
    static_assert(kTokens == 16 && kMlaFp8Bytes > 5 * 128 && kMlaFp8Bytes <= 6 * 128);
    const int lane = threadIdx.x % 32;
    if (lane / 2 >= tokens.count) return;
    const uint8_t* at = tokens.from + lane / 2 * ld_token + lane % 2 * 384;
#pragma unroll
    for (int line = 0; line < 3; ++line) ptx::prefetch_l2(at + line * 128);
  }

  // Starts the next kBatch tokens' way to this lane's place in the stage: 16 latents of each.
  __device__ static __forceinline__ void fetch(const uint8_t* from, int ld_token, int count,
                                               uint4 (*stage)[32], float (&scale)[kBatch]) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (i < count) {
        const uint8_t* at = from + i * ld_token;
        __pipeline_memcpy_async(&stage[i][lane], at + lane * 16, 16);
        scale[i] = __ldg(reinterpret_cast<const float*>(at + kMlaLatent) + lane / 8);
      }
    }
    __pipeline_commit();
  }

  // Waits for them. A lane reads only what it fetched itself.
  __device__ static __forceinline__ void take(uint4 (*stage)[32], const float (&scale)[kBatch],
                                              uint4 (&codes)[kBatch], float (&factor)[kBatch]) {
    __pipeline_wait_prior(0);
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      codes[i] = stage[i][threadIdx.x % 32];
      factor[i] = scale[i];
    }
  }

  // Eight lanes a token.
  __device__ static __forceinline__ void copy_rope(const uint8_t* from, int ld_token, int count,
                                                   uint8_t* tile, int row) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < kTokens; i += 4) {
      const int token = i + lane / 8;
      if (token < count) {
        const uint8_t* at = from + token * ld_token + kMlaLatent + kMlaScaleBytes;
        __pipeline_memcpy_async(tile + swizzle128(row + token, lane % 8), at + lane % 8 * 16, 16);
      }
    }
  }

  // A lane's 16 latents of a token are two 16-byte chunks of one tile.
  __device__ static __forceinline__ void store(const uint4 (&codes)[kBatch],
                                               const float (&scale)[kBatch],
                                               uint8_t (*tiles)[kMlaTileBytes], int row,
                                               int count) {
    const int lane = threadIdx.x % 32;
    uint8_t* tile = tiles[lane / 4];
    const int chunk = lane % 4 * 2, first = lane / 4 % 2;
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (i < count) {
        const uint2 a = dequantize4(codes[i].x, scale[i]), b = dequantize4(codes[i].y, scale[i]);
        const uint2 c = dequantize4(codes[i].z, scale[i]), d = dequantize4(codes[i].w, scale[i]);
        const uint4 low{a.x, a.y, b.x, b.y}, high{c.x, c.y, d.x, d.y};
        auto* one = reinterpret_cast<uint4*>(tile + swizzle128(row + i, chunk + first));
        auto* other = reinterpret_cast<uint4*>(tile + swizzle128(row + i, chunk + 1 - first));
        *one = first ? high : low;
        *other = first ? low : high;
      }
    }
  }
};

}  // namespace dsk
