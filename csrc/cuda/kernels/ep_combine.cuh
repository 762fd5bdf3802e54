// Combine inside a node: each token's results, wherever they are, summed in fp32 in order of rank.
//
// Bound by NVLink: 4096 tokens x 14336 bytes of BF16 from 5.3 ranks are 310 MB, 0.69 ms at 450
// GB/s; 59 MB are written to memory, 18 us. The sums are 0.16 GFLOP, nothing.
//
// Schedule. The experts' results lie in this rank's window, written by earlier kernels. CTA 0 tells
// every peer where (kReady). Warps take tokens in turn; a lane loads 16 bytes from each rank that
// has a row, lowest rank first, and adds: the order is fixed, so the sum is, too. The last CTA
// raises kRead at all peers and waits for theirs: then the results may be overwritten.
#pragma once

#include <cuda_bf16.h>

#include "cuda/tile/ep_signals.cuh"

namespace dsk {

constexpr int kEpCombineWarps = 8;
constexpr int kEpValues = 8;  // bf16 in 16 bytes

__device__ __forceinline__ void add_piece(float (&total)[kEpValues], const uint4& piece) {
  const uint32_t words[4] = {piece.x, piece.y, piece.z, piece.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    total[2 * i] = __fadd_rn(total[2 * i], __uint_as_float(words[i] << 16));
    total[2 * i + 1] = __fadd_rn(total[2 * i + 1], __uint_as_float(words[i] & 0xffff0000u));
  }
}

__device__ __forceinline__ uint4 round_piece(const float (&total)[kEpValues]) {
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(total[2 * i], total[2 * i + 1]);
    words[i] = *reinterpret_cast<const uint32_t*>(&pair);
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

__device__ __forceinline__ proto::ReturnNotice* return_notice(const EpGroup& g, int owner,
                                                              int source) {
  const proto::WindowLayout layout = proto::WindowLayout::of(g.shape);
  return reinterpret_cast<proto::ReturnNotice*>(g.windows[owner] + layout.returns +
                                                source * proto::kLine);
}

__device__ __forceinline__ void offer_results(const EpCombineParams& p) {
  const EpGroup& g = p.group;
  const int peer = threadIdx.x;
  if (peer < g.shape.ranks && proto::is_alive(g.alive, peer)) {
    *return_notice(g, peer, g.rank) = {g.epoch, p.results, p.weights, int64_t(p.elements) * 2};
  }
  raise_everywhere(g, proto::kReady, g.epoch);
}

// Where the results of every rank lie.
struct EpResults {
  const uint8_t* rows[proto::kMaxRanks];
  const float* weights[proto::kMaxRanks];
};

__device__ __forceinline__ void sum_token(const EpCombineParams& p, int token,
                                          const EpResults& results) {
  const EpGroup& g = p.group;
  const int lane = threadIdx.x % kEpWarp;
  const int64_t row_bytes = int64_t(p.elements) * 2;
  const int32_t* row_of = p.row_of + int64_t(token) * g.shape.ranks;
  for (int64_t at = lane * 16; at < row_bytes; at += kEpWarp * 16) {
    float total[kEpValues] = {};
    for (int peer = 0; peer < g.shape.ranks; ++peer) {
      if (row_of[peer] < 0) continue;
      add_piece(total, *reinterpret_cast<const uint4*>(results.rows[peer] +
                                                       row_of[peer] * row_bytes + at));
    }
    if (p.bias != nullptr) {
      add_piece(total, *reinterpret_cast<const uint4*>(p.bias + token * row_bytes + at));
    }
    *reinterpret_cast<uint4*>(p.out + token * row_bytes + at) = round_piece(total);
  }
  if (p.with_weights && lane < p.topk) {
    float total = 0.f;
    for (int peer = 0; peer < g.shape.ranks; ++peer) {
      if (row_of[peer] < 0) continue;
      total = __fadd_rn(total, results.weights[peer][int64_t(row_of[peer]) * p.topk + lane]);
    }
    p.out_weights[int64_t(token) * p.topk + lane] = total;
  }
}

__device__ __forceinline__ void combine_results(const EpCombineParams& p) {
  __shared__ EpResults results;
  const EpGroup& g = p.group;
  if (blockIdx.x == 0) offer_results(p);
  if (!await_everyone(g, proto::kReady, g.epoch)) return;
  for (int peer = threadIdx.x; peer < g.shape.ranks; peer += blockDim.x) {
    if (!proto::is_alive(g.alive, peer)) continue;
    const proto::ReturnNotice& notice = *return_notice(g, g.rank, peer);
    results.rows[peer] = g.windows[peer] + notice.region;
    results.weights[peer] = reinterpret_cast<const float*>(g.windows[peer] + notice.weights);
  }
  __syncthreads();
  for (int token = blockIdx.x * kEpCombineWarps + threadIdx.x / kEpWarp; token < p.tokens;
       token += gridDim.x * kEpCombineWarps) {
    sum_token(p, token, results);
  }
  if (!last_to_arrive(g)) return;
  raise_everywhere(g, proto::kRead, g.epoch);
  await_everyone(g, proto::kRead, g.epoch);
}

}  // namespace dsk
