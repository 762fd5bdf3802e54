// Combine: each token's results, wherever they are, summed in fp32 in order of rank.
//
// Inside a node bound by NVLink: 4096 tokens x 14336 bytes of BF16 from 5.3 ranks are 310 MB, 0.69
// ms at 450 GB/s; 59 MB are written to memory, 18 us. The sums are 0.16 GFLOP, nothing.
//
// Schedule. The experts' results lie in this rank's window, written by earlier kernels. CTA 0 tells
// every peer where (kReady). Warps take chunks of tokens in turn; a lane loads 16 bytes from each
// rank that has a row and adds them, lowest rank first: the order is fixed, so the sum is, too. The
// last CTA raises kRead at all peers and waits for theirs: then the results may be overwritten.
//
// Over several nodes the network is the bound: 4096 tokens from 3 other nodes are 176 MB, 3.5 ms at
// 50 GB/s. Each rank first sums, for the tokens that it passed on in dispatch (ep_forward.cuh), the
// rows of its node, and stores the sum, rounded to bf16, at the token's rank (kPartial): one row
// per token and node crosses. Then it adds the sums of all nodes, lowest first, its own unrounded.
// Where the rank on its rail is dead it reads that node's rows itself and rounds their sum: the
// same bits. Partial sums lie where dispatch keeps what it forwards; both sides have left it by
// kReady.
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

__device__ __forceinline__ void offer_results(const EpCombineParams& p, const EpNow& now) {
  const EpGroup& g = p.group;
  const int peer = threadIdx.x;
  if (proto::is_alive(now.alive, peer)) {
    *return_notice(g, peer, g.rank) = {now.epoch, p.results, p.weights, int64_t(p.elements) * 2};
  }
  raise_everywhere(g, now, proto::kReady);
}

// Where the results of every rank lie.
struct EpResults {
  const uint8_t* rows[proto::kMaxRanks];
  const float* weights[proto::kMaxRanks];
};

// Ranks of a node, and nodes; one node if ranks_per_node is 0.
struct EpNodes {
  int ranks, count, own;
};
__device__ __forceinline__ EpNodes nodes_of(const EpCombineParams& p) {
  const EpGroup& g = p.group;
  if (p.ranks_per_node == 0) return {g.shape.ranks, 1, 0};
  return {p.ranks_per_node, g.shape.ranks / p.ranks_per_node, g.rank / p.ranks_per_node};
}

// Rows are dealt to the warps in chunks, so that few tokens occupy many of them.
__device__ __forceinline__ int num_chunks(const EpCombineParams& p) {
  return (p.elements * 2 + kEpChunk - 1) / kEpChunk;
}
__device__ __forceinline__ int64_t chunk_at(const EpCombineParams& p, int item) {
  return item % num_chunks(p) * kEpChunk + threadIdx.x % kEpWarp * 16;
}

// Adds 16 bytes of a token's rows at the ranks of one node; row_of[j] is its row at the j-th.
__device__ __forceinline__ void add_node(const EpCombineParams& p, const EpNow& now,
                                         const EpResults& results, const int32_t* row_of, int first,
                                         int ranks, int64_t at, float (&total)[kEpValues]) {
  const auto where = [&](int j) -> const uint8_t* {
    if (row_of[j] < 0 || !proto::is_alive(now.alive, first + j)) return nullptr;
    return results.rows[first + j] + row_of[j] * int64_t(p.elements) * 2 + at;
  };
  each_load(ranks, where, [&](int, const uint4& piece) { add_piece(total, piece); });
}
// Whether a lane that is at byte `at` of a row takes one of its weights, too.
__device__ __forceinline__ bool has_weight(const EpCombineParams& p, int64_t at) {
  return p.with_weights && at < kEpChunk && threadIdx.x % kEpWarp < p.topk;
}
__device__ __forceinline__ float node_weight(const EpCombineParams& p, const EpNow& now,
                                             const EpResults& results, const int32_t* row_of,
                                             int first, int ranks, int slot) {
  float total = 0.f;
  for (int j = 0; j < ranks; ++j) {
    if (row_of[j] < 0 || !proto::is_alive(now.alive, first + j)) continue;
    total = __fadd_rn(total, results.weights[first + j][int64_t(row_of[j]) * p.topk + slot]);
  }
  return total;
}

// ---- sums for other nodes ----

// A sum and its weights, as a row and its record; [source rank][place] in the owner's region.
__device__ __forceinline__ proto::RegionLayout partial_fields(const EpCombineParams& p) {
  return proto::RegionLayout::of({int64_t(p.elements) * 2, 0, p.topk, 1},
                                 p.group.shape.ranks * p.group.shape.max_tokens);
}
__device__ __forceinline__ uint8_t* partial_row(const EpCombineParams& p,
                                                const proto::RegionLayout& fields, int owner,
                                                int source, int64_t place) {
  const int64_t slot = source * p.group.shape.max_tokens + place;
  return p.group.windows[owner] + p.partial + fields.x + slot * p.elements * 2;
}
__device__ __forceinline__ float* partial_weights(const EpCombineParams& p,
                                                  const proto::RegionLayout& fields, int owner,
                                                  int source, int64_t place) {
  const int64_t slot = source * p.group.shape.max_tokens + place;
  return reinterpret_cast<float*>(p.group.windows[owner] + p.partial + fields.records +
                                  slot * int64_t(fields.record_bytes) + fields.topk_weights);
}

// 16 bytes a lane of one sum, and its weights with the first of them.
__device__ __forceinline__ void send_sum(const EpCombineParams& p, const EpNow& now,
                                         const EpResults& results, int owner, int place,
                                         int64_t at) {
  const EpGroup& g = p.group;
  const EpNodes nodes = nodes_of(p);
  const int lane = threadIdx.x % kEpWarp, first = nodes.own * nodes.ranks;
  const proto::RegionLayout fields = partial_fields(p);
  const int64_t entry = (owner / nodes.ranks) * g.shape.max_tokens + place;
  const int32_t* row_of = p.forwarded + entry * nodes.ranks;
  if (at < int64_t(p.elements) * 2) {
    float total[kEpValues] = {};
    add_node(p, now, results, row_of, first, nodes.ranks, at, total);
    *reinterpret_cast<uint4*>(partial_row(p, fields, owner, g.rank, place) + at) =
        round_piece(total);
  }
  if (has_weight(p, at)) {
    partial_weights(p, fields, owner, g.rank, place)[lane] =
        node_weight(p, now, results, row_of, first, nodes.ranks, lane);
  }
}

// This node's sums to the ranks of other nodes, then wait for theirs. False: somebody is silent.
__device__ __forceinline__ bool exchange_sums(const EpCombineParams& p, const EpNow& now,
                                              const EpResults& results) {
  const EpGroup& g = p.group;
  const int warps = blockDim.x / kEpWarp;
  const uint64_t rails = proto::rails_of(g.rank, p.ranks_per_node, now.alive);
  proto::each_rank(rails, [&](int owner) {
    const int items = p.num_forwarded[owner / p.ranks_per_node] * num_chunks(p);
    for (int i = blockIdx.x * warps + threadIdx.x / kEpWarp; i < items; i += gridDim.x * warps) {
      send_sum(p, now, results, owner, i / num_chunks(p), chunk_at(p, i));
    }
  });
  const int peer = threadIdx.x;
  if (last_to_arrive(g, now, 1) && proto::has_rank(rails, peer)) {
    raise_at(g, now, peer, proto::kPartial, g.rank);
  }
  return await_ranks(g, now, proto::kPartial, rails);
}

// ---- this rank's tokens ----

// Where a token's sum over `node` lies in this rank's window; -1: nobody sent one.
__device__ __forceinline__ int sent_sum(const EpCombineParams& p, const EpNow& now,
                                        const EpNodes& nodes, int token, int node) {
  if (node == nodes.own) return -1;
  const int rail = proto::rail_of(p.group.rank, node, nodes.ranks);
  return proto::is_alive(now.alive, rail) ? p.forward_of[int64_t(token) * nodes.count + node] : -1;
}

// 16 bytes a lane of one token's sum.
__device__ __forceinline__ void sum_token(const EpCombineParams& p, const EpNow& now,
                                          const EpResults& results, int token, int64_t at) {
  const EpGroup& g = p.group;
  const EpNodes nodes = nodes_of(p);
  const proto::RegionLayout fields = partial_fields(p);
  const int64_t row = int64_t(token) * p.elements * 2 + at;
  const int32_t* row_of = p.row_of + int64_t(token) * g.shape.ranks;
  float total[kEpValues] = {};
  for (int node = 0; node < nodes.count; ++node) {
    const int place = sent_sum(p, now, nodes, token, node), first = node * nodes.ranks;
    if (place >= 0) {
      const int rail = proto::rail_of(g.rank, node, nodes.ranks);
      add_piece(total,
                *reinterpret_cast<const uint4*>(partial_row(p, fields, g.rank, rail, place) + at));
      continue;
    }
    float sum[kEpValues] = {};
    add_node(p, now, results, row_of + first, first, nodes.ranks, at, sum);
    if (node != nodes.own) {
      add_piece(total, round_piece(sum));
      continue;
    }
#pragma unroll
    for (int i = 0; i < kEpValues; ++i) total[i] = __fadd_rn(total[i], sum[i]);
  }
  if (p.bias != nullptr) add_piece(total, *reinterpret_cast<const uint4*>(p.bias + row));
  *reinterpret_cast<uint4*>(p.out + row) = round_piece(total);
}

__device__ __forceinline__ void sum_weights(const EpCombineParams& p, const EpNow& now,
                                            const EpResults& results, int token, int slot) {
  const EpGroup& g = p.group;
  const EpNodes nodes = nodes_of(p);
  const proto::RegionLayout fields = partial_fields(p);
  const int32_t* row_of = p.row_of + int64_t(token) * g.shape.ranks;
  float total = 0.f;
  for (int node = 0; node < nodes.count; ++node) {
    const int place = sent_sum(p, now, nodes, token, node), first = node * nodes.ranks;
    const int rail = proto::rail_of(g.rank, node, nodes.ranks);
    const float sum = place >= 0
                          ? partial_weights(p, fields, g.rank, rail, place)[slot]
                          : node_weight(p, now, results, row_of + first, first, nodes.ranks, slot);
    total = __fadd_rn(total, sum);
  }
  p.out_weights[int64_t(token) * p.topk + slot] = total;
}

__device__ __forceinline__ void combine_call(const EpCombineParams& p, const EpNow& now) {
  __shared__ EpResults results;
  const EpGroup& g = p.group;
  if (blockIdx.x == 0) offer_results(p, now);
  if (!await_everyone(g, now, proto::kReady)) return;
  const int peer = threadIdx.x;
  if (proto::is_alive(now.alive, peer)) {
    const proto::ReturnNotice& notice = *return_notice(g, g.rank, peer);
    results.rows[peer] = g.windows[peer] + notice.region;
    results.weights[peer] = reinterpret_cast<const float*>(g.windows[peer] + notice.weights);
  }
  __syncthreads();
  if (p.ranks_per_node != 0 && !exchange_sums(p, now, results)) return;
  for (int item = blockIdx.x * kEpCombineWarps + threadIdx.x / kEpWarp;
       item < p.tokens * num_chunks(p); item += gridDim.x * kEpCombineWarps) {
    const int token = item / num_chunks(p);
    const int64_t at = chunk_at(p, item);
    if (at < int64_t(p.elements) * 2) sum_token(p, now, results, token, at);
    if (has_weight(p, at)) sum_weights(p, now, results, token, threadIdx.x % kEpWarp);
  }
  if (!last_to_arrive(g, now, 0)) return;
  raise_everywhere(g, now, proto::kRead);
  await_everyone(g, now, proto::kRead);
}

__device__ __forceinline__ void combine_results(const EpCombineParams& p) {
  const EpNow now = begin_call(p.group, kEpNormal);
  combine_call(p, now);
  end_call(p.group, now);
}

}  // namespace dsk
