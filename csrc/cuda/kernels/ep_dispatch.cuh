// Dispatch inside a node: every token once to each rank that hosts an expert it names, into the
// place where the receiver keeps it.
//
// Bound by NVLink: 4096 tokens x 7168 bytes of FP8 to 5.3 ranks on average are 160 MB, 0.36 ms at
// 450 GB/s one way; the rows are read once from memory, 29 MB, 9 us at 3.35 TB/s. No SM computes
// anything, so few of them (num_sms) saturate the links.
//
// Schedule. CTA 0 ranks the tokens of every destination by prefix sums (so the order is that of the
// tokens, whatever runs first), writes the counts to all peers and raises kNotified, its own too.
// Every CTA waits for all notices, derives where its rank's rows begin at each peer, and its warps
// take tokens in turn: a row is loaded once and stored to every destination, straight into the
// peer's receive region, no ring and no copy behind it. The last CTA raises kSent at all peers and
// waits for theirs. Why no buffer is overwritten: proto/ep_epoch.hpp.
//
// CTA 0 must run for the others to end: grids no larger than the GPU holds at once.
#pragma once

#include "cuda/tile/ep_signals.cuh"

namespace dsk {

constexpr int kEpDispatchWarps = 8;

// Warp by warp over the ranks: tokens that go there, in order. Leaves row_of[t, r] (from 0) and
// rows_to[r]; mentions by counting, whose order does not matter.
__device__ __forceinline__ void rank_tokens(const EpDispatchParams& p) {
  const EpGroup& g = p.group;
  const int warp = threadIdx.x / kEpWarp, lane = threadIdx.x % kEpWarp, topk = p.row.topk;
  for (int rank = warp; rank < g.shape.ranks; rank += kEpDispatchWarps) {
    const int low = g.experts.begin[rank], high = g.experts.begin[rank + 1];
    const bool up = proto::is_alive(g.alive, rank);
    uint32_t rows = 0;
    for (int begin = 0; begin < p.tokens; begin += kEpWarp) {
      const int token = begin + lane;
      bool goes = false;
      for (int k = 0; token < p.tokens && k < topk; ++k) {
        const int64_t expert = p.topk_idx[int64_t(token) * topk + k];
        goes |= up && expert >= low && expert < high;
      }
      const uint32_t votes = __ballot_sync(0xffffffffu, goes);
      const uint32_t before = __popc(votes & ((1u << lane) - 1));
      if (token < p.tokens) {
        p.row_of[int64_t(token) * g.shape.ranks + rank] = goes ? int(rows + before) : -1;
      }
      rows += __popc(votes);
    }
    if (lane == 0) p.rows_to[rank] = rows;
  }
  for (int e = threadIdx.x; e < g.experts.total; e += blockDim.x) p.mentions[e] = 0;
  __syncthreads();
  for (int64_t i = threadIdx.x; i < int64_t(p.tokens) * topk; i += blockDim.x) {
    if (p.topk_idx[i] >= 0) atomicAdd(p.mentions + p.topk_idx[i], 1u);
  }
  __syncthreads();
}

__device__ __forceinline__ uint8_t* notice_at(const EpGroup& g, int owner, int source) {
  const proto::WindowLayout layout = proto::WindowLayout::of(g.shape);
  return g.windows[owner] + layout.notices + source * layout.notice_stride;
}

__device__ __forceinline__ void send_notices(const EpDispatchParams& p) {
  const EpGroup& g = p.group;
  for (int peer = 0; peer < g.shape.ranks; ++peer) {
    if (!proto::is_alive(g.alive, peer)) continue;
    auto* notice = reinterpret_cast<proto::Notice*>(notice_at(g, peer, g.rank));
    if (threadIdx.x == 0) {
      notice->epoch = g.epoch;
      notice->region = p.region;
      notice->shape = p.row;
    }
    for (int r = threadIdx.x; r < g.shape.ranks; r += blockDim.x) {
      notice->rows_to[r] = p.rows_to[r];
    }
    auto* mentions = reinterpret_cast<uint32_t*>(notice + 1);
    const int first = g.experts.begin[peer];
    for (int e = threadIdx.x; e < g.experts.count(peer); e += blockDim.x) {
      mentions[e] = p.mentions[first + e];
    }
  }
  raise_everywhere(g, proto::kNotified, g.epoch);
}

// Where this rank's rows begin at each peer.
struct EpTargets {
  uint8_t* region[proto::kMaxRanks];
  int32_t first_row[proto::kMaxRanks];
};

__device__ __forceinline__ void find_targets(const EpGroup& g, EpTargets& targets) {
  for (int peer = threadIdx.x; peer < g.shape.ranks; peer += blockDim.x) {
    if (!proto::is_alive(g.alive, peer)) continue;
    const auto rows_to = [&](int from, int to) {
      return reinterpret_cast<const proto::Notice*>(notice_at(g, g.rank, from))->rows_to[to];
    };
    const auto* notice = reinterpret_cast<const proto::Notice*>(notice_at(g, g.rank, peer));
    targets.region[peer] = g.windows[peer] + notice->region;
    targets.first_row[peer] = int32_t(proto::first_row(rows_to, g.rank, peer, g.alive));
  }
  __syncthreads();
}

// The record of a token for one rank, see proto::RegionLayout.
__device__ __forceinline__ void store_record(const EpDispatchParams& p, int token, int peer,
                                             const proto::RegionLayout& fields, uint8_t* record) {
  const EpGroup& g = p.group;
  const int lane = threadIdx.x % kEpWarp, topk = p.row.topk;
  for (int c = lane; c < p.row.scale_bytes / 4; c += kEpWarp) {
    reinterpret_cast<float*>(record + fields.scale)[c] =
        p.scale[token * p.scale_row + c * p.scale_column];
  }
  if (lane < topk) {
    const int64_t at = int64_t(token) * topk + lane, expert = p.topk_idx[at];
    const bool there = expert >= g.experts.begin[peer] && expert < g.experts.begin[peer + 1];
    reinterpret_cast<int64_t*>(record + fields.topk_idx)[lane] =
        there ? expert - g.experts.begin[peer] : -1;
    reinterpret_cast<float*>(record + fields.topk_weights)[lane] =
        there && p.row.with_weights ? p.topk_weights[at] : 0.f;
  }
  if (lane == 0) {
    auto* source = reinterpret_cast<int64_t*>(record + fields.source);
    source[0] = g.rank;
    source[1] = token;
  }
}

__device__ __forceinline__ void send_token(const EpDispatchParams& p, int token,
                                           const EpTargets& targets,
                                           const proto::RegionLayout& fields) {
  const EpGroup& g = p.group;
  const int lane = threadIdx.x % kEpWarp;
  int32_t* row_of = p.row_of + int64_t(token) * g.shape.ranks;
  const uint8_t* x = p.x + token * p.ld_x;
  // A row goes from registers to all its destinations: 16 bytes a lane, once read.
  for (int64_t at = lane * 16; at < p.row.row_bytes; at += kEpWarp * 16) {
    const uint4 piece = *reinterpret_cast<const uint4*>(x + at);
    for (int peer = 0; peer < g.shape.ranks; ++peer) {
      if (row_of[peer] < 0) continue;
      const int64_t row = targets.first_row[peer] + row_of[peer];
      *reinterpret_cast<uint4*>(targets.region[peer] + fields.x + row * p.row.row_bytes + at) =
          piece;
    }
  }
  for (int peer = 0; peer < g.shape.ranks; ++peer) {
    if (row_of[peer] < 0) continue;
    const int64_t row = targets.first_row[peer] + row_of[peer];
    store_record(p, token, peer, fields,
                 targets.region[peer] + fields.records + row * int64_t(fields.record_bytes));
  }
  __syncwarp();
  // From here on the token's row at each rank counts from the start of the region.
  for (int peer = lane; peer < g.shape.ranks; peer += kEpWarp) {
    if (row_of[peer] >= 0) row_of[peer] += targets.first_row[peer];
  }
}

// How much this rank has received, for the host or the next kernel.
__device__ __forceinline__ void count_received(const EpDispatchParams& p) {
  const EpGroup& g = p.group;
  for (int e = threadIdx.x; e <= g.experts.count(g.rank); e += blockDim.x) {
    uint32_t total = 0;
    for (int source = 0; source < g.shape.ranks; ++source) {
      if (!proto::is_alive(g.alive, source)) continue;
      const auto* notice = reinterpret_cast<const proto::Notice*>(notice_at(g, g.rank, source));
      total +=
          e == 0 ? notice->rows_to[g.rank] : reinterpret_cast<const uint32_t*>(notice + 1)[e - 1];
    }
    p.received[e] = int32_t(total);
  }
}

__device__ __forceinline__ void dispatch_tokens(const EpDispatchParams& p) {
  __shared__ EpTargets targets;
  const EpGroup& g = p.group;
  if (blockIdx.x == 0) {
    rank_tokens(p);
    send_notices(p);
  }
  if (!await_everyone(g, proto::kNotified, g.epoch)) return;
  find_targets(g, targets);
  const proto::RegionLayout fields =
      proto::RegionLayout::of(p.row, g.shape.ranks * g.shape.max_tokens);
  for (int token = blockIdx.x * kEpDispatchWarps + threadIdx.x / kEpWarp; token < p.tokens;
       token += gridDim.x * kEpDispatchWarps) {
    send_token(p, token, targets, fields);
  }
  if (!last_to_arrive(g)) return;
  raise_everywhere(g, proto::kSent, g.epoch);
  if (await_everyone(g, proto::kSent, g.epoch)) count_received(p);
}

}  // namespace dsk
