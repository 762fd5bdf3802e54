// The up-projections of latent attention, absorbed: one product for each head. Queries:
// y[t, h, :512] = q[t, h, :128] W_uk[h], with the rotation of q[t, h, 128:] beside it, which makes
// y what decode attends with. Outputs: y[t, h, :128] = o[t, h, :512] W_uv[h]^T.
//
// Bound by memory at decode size: 128 heads' weights are 16.8 MB, 5.0 us at 3.35 TB/s; 128 tokens
// of queries read 6.3 MB and write 18.9 MB, 7.5 us. The products, 2.1 GFLOP each, are 2 us.
//
// The BF16 GEMM's ring, main loop and epilogue; the schedule differs: tiles of 64 tokens x 128
// columns of one head. Heads are columns of x and y and rows of the weight, so that both halves of
// kv_b_proj are read in place: W_uk's rows run along k, an MN-major operand. Queries are rotated by
// the math warps, a tile ahead.
#pragma once

#include <type_traits>

#include "cuda/kernels/gemm_bf16.cuh"
#include "cuda/mla_shape.hpp"
#include "cuda/params/mla_fused.hpp"
#include "cuda/tile/rotation.cuh"

namespace dsk {

using AbsorbShape = GemmBf16Shape<64, 128, 8>;

// Tiles of one weight follow one another, so that it comes from memory once.
class AbsorbScheduler {
 public:
  __device__ explicit AbsorbScheduler(const MlaAbsorbParams& p)
      : p_(p),
        row_blocks_((p.t + AbsorbShape::kBlockM - 1) / AbsorbShape::kBlockM),
        next_(blockIdx.x) {}

  __device__ bool next(GemmTile& tile) {
    const int column_blocks = p_.n / AbsorbShape::kBlockN;
    if (next_ >= row_blocks_ * column_blocks * p_.h) return false;
    const int weight = next_ / row_blocks_;
    tile.a_row = next_ % row_blocks_ * AbsorbShape::kBlockM;
    tile.row_end = p_.t;
    tile.n_start = weight % column_blocks * AbsorbShape::kBlockN;
    tile.group = weight / column_blocks;
    tile.k_begin = 0;
    tile.k_end = p_.k / kBf16BlockK;
    next_ += gridDim.x;
    return true;
  }

 private:
  const MlaAbsorbParams& p_;
  int row_blocks_;
  int next_;
};

// The queries' rotary parts, by one warpgroup: each column tile of a head turns a share of the
// row tile's tokens, a lane a pair. A tile's values are fetched while the tile before is at work:
// that is what they take.
class RotaryShare {
 public:
  __device__ explicit RotaryShare(const MlaAbsorbParams& p) : p_(p), tiles_(p) {
    const int pair = threadIdx.x % kWarp;
    element_[0] = p.interleaved ? 2 * pair : pair;
    element_[1] = p.interleaved ? 2 * pair + 1 : pair + kWarp;
    fetch();
  }

  // Fetches the next tile's share. All loads without a branch between them.
  __device__ __forceinline__ void fetch() {
    GemmTile tile;
    if (!tiles_.next(tile)) return;
    const int share = tile.n_start / AbsorbShape::kBlockN * kWarps + threadIdx.x / kWarp;
    head_ = tile.group;
    first_ = tile.a_row + share * kTokens;
    const auto* in = static_cast<const __nv_bfloat16*>(p_.rope_in) + head_ * p_.ld_in_head;
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      const int token = min(first_ + i, p_.t - 1);
      const auto* from = in + token * p_.ld_in;
      const int angle = token * kWarp + threadIdx.x % kWarp;
      value_[i][0] = __ldg(from + element_[0]);
      value_[i][1] = __ldg(from + element_[1]);
      angle_[i] = make_float2(__ldg(p_.cos + angle), __ldg(p_.sin + angle));
    }
  }

  __device__ __forceinline__ void store() const {
    auto* out = static_cast<__nv_bfloat16*>(p_.rope_out) + int64_t(head_) * p_.y_columns;
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      if (first_ + i >= p_.t) return;
      auto* to = out + int64_t(first_ + i) * p_.h * p_.y_columns;
      const float2 value = make_float2(to_float(value_[i][0]), to_float(value_[i][1]));
      const float2 turned = turn(value, angle_[i].x, angle_[i].y);
      to[element_[0]] = from_float<__nv_bfloat16>(turned.x);
      to[element_[1]] = from_float<__nv_bfloat16>(turned.y);
    }
  }

 private:
  static constexpr int kWarps = kWarpgroup / kWarp;
  static constexpr int kTokens =
      AbsorbShape::kBlockM / (kMlaLatent / AbsorbShape::kBlockN) / kWarps;

  const MlaAbsorbParams& p_;
  AbsorbScheduler tiles_;
  int element_[2];
  int head_ = 0;
  int first_ = 0;
  __nv_bfloat16 value_[kTokens][2];  // as loaded: converting would wait for them
  float2 angle_[kTokens];
};

struct NoRotation {
  __device__ explicit NoRotation(const MlaAbsorbParams&) {}
  __device__ void fetch() {}
  __device__ void store() const {}
};

// kWeight: kMn for queries (rows of the weight run along k), kK for outputs (along n).
template <ptx::Major kWeight>
__device__ __forceinline__ void mla_absorb(const MlaAbsorbParams& p) {
  extern __shared__ __align__(1024) uint8_t shared_memory[];
  auto& smem = *reinterpret_cast<GemmBf16Smem<AbsorbShape>*>(shared_memory);
  constexpr int kN = AbsorbShape::kBlockN;
  constexpr bool kQueries = kWeight == ptx::Major::kMn;

  const auto load = [&](const GemmTile& tile, int k_block, int stage, uint64_t* full) {
    const int k = k_block * kBf16BlockK;
    const int w_row = tile.group * p.w_rows;
    load_tile<AbsorbShape::kBlockM>(smem.a[stage], p.x, tile.group * p.x_columns + k, tile.a_row,
                                    false, full);
    if constexpr (kQueries) {
      for (int column = 0; column < kN; column += kPanelColumns) {
        load_tile<kBf16BlockK>(smem.b[stage] + column * kSwizzleBytes, p.w, tile.n_start + column,
                               w_row + k, false, full);
      }
    } else {
      load_tile<kN>(smem.b[stage], p.w, k, w_row + tile.n_start, false, full);
    }
  };
  const auto compute = [&](int warpgroup) {
    const auto left = [&](int stage) { return smem.a[stage]; };
    const auto right = [&](int stage) { return smem.b[stage]; };
    RingPosition<AbsorbShape::kNumStages> at;
    std::conditional_t<kQueries, RotaryShare, NoRotation> rotary(p);
    for_each_tile(smem.queue, [&](const GemmTile& tile) {
      float sum[kN / 2];
      running_sum<kN, kWeight>(smem.ring, at, 1, tile.k_begin, tile.k_end, left, right, sum);
      rotary.store();
      rotary.fetch();
      const ResultPlace place{tile.a_row, tile.row_end - tile.a_row,
                              tile.group * p.y_columns + tile.n_start, tile.group, true};
      await_panels(warpgroup);
      finish_tile<kN>(p.y, p.h * p.y_columns, place, smem.d[warpgroup], warpgroup, sum);
    });
    drain_stores();
  };
  const auto producer = make_producer<AbsorbScheduler>(smem, p, AbsorbShape::kStageBytes, load);
  run_roles<AbsorbShape::kMathWarpgroups>(smem, 1, producer, compute);
}

}  // namespace dsk
