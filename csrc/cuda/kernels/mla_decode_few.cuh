// Latent attention of at most kN = 16 or 32 query rows: what mla_decode does, the other way round.
//
// wgmma takes 64 rows, so few queries there would waste most of it. Here tokens and latents are its
// rows and queries its columns: S^T = K Q^T (64 tokens x kN), O^T = V^T P^T (64 latents x kN), V^T
// being V read along its columns. 32 rows then cost half of what 64 cost, 16 a quarter.
//
// The floors are memory's, 16 heads and 4096 cached tokens: 4.7 MB at 3.35 TB/s = 1.41 us for a
// request, 0.14 us of tensor core.
//
// Roles, blocks in pairs, shared memory and results are those of mla_decode.cuh; a softmax reduces
// over wgmma's rows, so the warps of a side exchange their maxima.
#pragma once

#include "cuda/kernels/mla_decode.cuh"
#include "cuda/tile/mla_columns.cuh"

namespace dsk {

// One side's share of a pair of blocks. The left side scores the first, the right side the second.
template <class Cache, int kN, MlaSide kSide>
class MlaFew {
 public:
  __device__ MlaFew(const MlaDecodeParams& p, MlaDecodeSmem& smem) : p_(p), smem_(smem) {}

  __device__ __forceinline__ void run(const MlaPiece& piece, uint32_t (&phase)[2]) {
    MlaColumns<kN> columns;
    float o[4][kN / 2];
#pragma unroll
    for (int i = 0; i < 4 * kN / 2; ++i) o[i / (kN / 2)][i % (kN / 2)] = 0.f;
    for (int block = piece.begin; block < piece.end; block += 2) {
      const bool second = block + 1 < piece.end;
      // In order of arrival: tensor cores have time, and a place that is free is loaded again.
      if constexpr (kSide == kLeft) {
        own<0>(piece, block, phase, columns, o);
        if (second) other<1>(piece, block + 1, phase, columns, o);
      } else {
        other<0>(piece, block, phase, columns, o);
        if (second) own<1>(piece, block + 1, phase, columns, o);
      }
      phase[0] ^= 1;
      if (second) phase[1] ^= 1;
    }
    store_columns<kN>(p_, piece, smem_, kSide, columns, o);
  }

 private:
  static constexpr int kTile = kSide * 4;  // first of this side's tiles of V

  // The block that this side scores.
  template <int kBuffer>
  __device__ __forceinline__ void own(const MlaPiece& piece, int block, uint32_t (&phase)[2],
                                      MlaColumns<kN>& columns, float (&o)[4][kN / 2]) {
    float factor[kN / 4], s[kN / 2];
    score_tokens<kN>(s, smem_, kBuffer, phase[kBuffer]);
    mask_tokens<kN>(p_, piece, s, block);
    columns.softmax(s, p_.scale_log2, piece.is_one_block(), smem_, kSide, factor);
    columns.publish(s, smem_, kSide);
    ptx::named_barrier_arrive(kBuffer ? kMlaSecondReady : kMlaFirstReady, kMlaMathThreads);
    multiply<kBuffer>(piece, block, phase, factor, o);
  }

  // The block that the other side scores.
  template <int kBuffer>
  __device__ __forceinline__ void other(const MlaPiece& piece, int block, uint32_t (&phase)[2],
                                        MlaColumns<kN>& columns, float (&o)[4][kN / 2]) {
    float factor[kN / 4];
    ptx::named_barrier_sync(kBuffer ? kMlaSecondReady : kMlaFirstReady, kMlaMathThreads);
    columns.follow(smem_.row_max[kBuffer], factor);
    smem_.kv_ring[kBuffer].await({kSide, phase[kBuffer]});
    multiply<kBuffer>(piece, block, phase, factor, o);
  }

  template <int kBuffer>
  __device__ __forceinline__ void multiply(const MlaPiece& piece, int block, uint32_t (&phase)[2],
                                           const float (&factor)[kN / 4], float (&o)[4][kN / 2]) {
    mla_clear_tail<Cache>(smem_.kv[kBuffer] + kTile, piece.length - block * kMlaBlock, kSide);
    rescale_columns<kN>(o, factor);
    multiply_latents<kN>(o, mla_few_weights(smem_, kBuffer), smem_.kv[kBuffer] + kTile);
    release<Cache>(smem_, kBuffer, kSide, phase);
  }

  const MlaDecodeParams& p_;
  MlaDecodeSmem& smem_;
};

template <int kN>
struct MlaFewRows {
  template <class Cache, MlaSide kSide>
  __device__ static __forceinline__ void run(const MlaDecodeParams& p, const MlaPiece& piece,
                                             MlaDecodeSmem& smem, uint32_t (&phase)[2]) {
    MlaFew<Cache, kN, kSide>(p, smem).run(piece, phase);
  }
};

}  // namespace dsk
