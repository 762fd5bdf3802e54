// Dispatch: every token once to each rank that hosts an expert it names, into the
// place where the receiver keeps it.
//
// Inside a node bound by NVLink: 4096 tokens x 7168 bytes of FP8 to 5.3 ranks on average are 160
// MB, 0.36 ms at 450 GB/s one way; the rows are read once from memory, 29 MB, 9 us at 3.35 TB/s. No
// SM computes anything, so few of them (num_sms) saturate the links.
//
// Schedule. CTA 0 ranks the tokens of every destination by prefix sums (so the order is that of the
// tokens, whatever runs first), writes the counts to all peers and raises kNotified, its own too.
// Every CTA waits for all notices, derives where its rank's rows begin at each peer, and its warps
// take tokens in turn: a row is loaded once and stored to every destination, straight into the
// peer's receive region, no ring and no copy behind it. The last CTA raises kSent at all peers and
// waits for theirs. Why no buffer is overwritten: proto/ep_epoch.hpp.
//
// Over several nodes a token crosses once per node: to the rank there that has the sender's place
// in its node, which passes it on (ep_forward.cuh); the receive regions end up the same.
//
// CTA 0 must run for the others to end: grids no larger than the GPU holds at once.
#pragma once

#include "cuda/kernels/ep_forward.cuh"
#include "cuda/tile/ep_signals.cuh"

namespace dsk {

constexpr int kEpDispatchWarps = 8;

// Warp by warp over the ranks: tokens that go there, in order. Leaves place_of[t, r] and
// rows_to[r]; mentions by counting, whose order does not matter.
__device__ __forceinline__ void rank_tokens(const EpDispatchParams& p, const EpNow& now) {
  const EpGroup& g = p.group;
  const int warp = threadIdx.x / kEpWarp, topk = p.row.topk;
  for (int rank = warp; rank < g.shape.ranks; rank += kEpDispatchWarps) {
    const int low = g.experts.begin[rank], high = g.experts.begin[rank + 1];
    const bool up = proto::is_alive(now.alive, rank);
    const auto goes = [&](int token) {
      bool named = false;
      for (int k = 0; k < topk; ++k) {
        const int64_t expert = p.topk_idx[int64_t(token) * topk + k];
        named |= expert >= low && expert < high;
      }
      return up && named;
    };
    const int rows = number_tokens(p.tokens, goes, p.place_of + rank, g.shape.ranks);
    if (threadIdx.x % kEpWarp == 0) p.rows_to[rank] = uint32_t(rows);
  }
  for (int e = threadIdx.x; e < g.experts.total; e += blockDim.x) p.mentions[e] = 0;
  __syncthreads();
  place_forwards(p, now);
  for (int64_t i = threadIdx.x; i < int64_t(p.tokens) * topk; i += blockDim.x) {
    if (p.topk_idx[i] >= 0) atomicAdd(p.mentions + p.topk_idx[i], 1u);
  }
  __syncthreads();
}

__device__ __forceinline__ void send_notices(const EpDispatchParams& p, const EpNow& now) {
  const EpGroup& g = p.group;
  proto::each_rank(now.alive, [&](int peer) {
    auto* notice = reinterpret_cast<proto::Notice*>(notice_at(g, peer, g.rank));
    if (threadIdx.x == 0) {
      notice->epoch = now.epoch;
      notice->region = p.region;
      notice->shape = p.row;
      notice->forwards = forwards_through(p, peer);
    }
    const int receiver = threadIdx.x;
    if (proto::is_alive(now.alive, receiver)) notice->rows_to[receiver] = p.rows_to[receiver];
    auto* mentions = reinterpret_cast<uint32_t*>(notice + 1);
    const int first = g.experts.begin[peer];
    for (int e = threadIdx.x; e < g.experts.count(peer); e += blockDim.x) {
      mentions[e] = p.mentions[first + e];
    }
  });
  raise_everywhere(g, now, proto::kNotified);
}

__device__ __forceinline__ void find_targets(const EpGroup& g, const EpNow& now,
                                             EpTargets& targets) {
  const int peer = threadIdx.x;
  if (proto::is_alive(now.alive, peer)) {
    const auto rows_to = [&](int from, int to) { return notice_from(g, from)->rows_to[to]; };
    targets.region[peer] = g.windows[peer] + notice_from(g, peer)->region;
    targets.forwards[peer] = int32_t(notice_from(g, peer)->forwards);
    targets.first_row[peer] = int32_t(proto::first_row(rows_to, g.rank, peer, now.alive));
  }
  __syncthreads();
}

__device__ __forceinline__ EpToken own_token(const EpDispatchParams& p, int token) {
  const int64_t at = int64_t(token) * p.row.topk;
  return {p.x + token * p.ld_x,
          p.scale == nullptr ? nullptr : p.scale + token * p.scale_row,
          p.scale_column,
          p.topk_idx + at,
          p.row.with_weights ? p.topk_weights + at : nullptr,
          p.group.rank,
          token};
}

__device__ __forceinline__ void send_token(const EpDispatchParams& p, const EpNow& now, int token,
                                           const EpTargets& targets,
                                           const proto::RegionLayout& fields) {
  const EpGroup& g = p.group;
  const int lane = threadIdx.x % kEpWarp;
  const int64_t entry = int64_t(token) * g.shape.ranks;
  const auto row_at = [&](int peer) {
    const int32_t place = p.place_of[entry + peer];
    return place < 0 ? -1 : place + targets.first_row[peer];
  };
  for (int peer = lane; peer < g.shape.ranks; peer += kEpWarp) {
    p.row_of[entry + peer] = row_at(peer);
  }
  const auto each_direct = [&](auto use) {  // use(peer, row)
    for (int peer = 0; peer < g.shape.ranks; ++peer) {
      const int32_t row = row_at(peer);
      if (row < 0 || !proto::goes_direct(g.rank, peer, p.ranks_per_node, now.alive)) continue;
      use(peer, row);
    }
  };
  const EpToken from = own_token(p, token);
  // A row goes from registers to all its destinations: 16 bytes a lane, once read.
  each_row_batch(from.x, p.row.row_bytes, [&](auto each) {
    each_direct([&](int peer, int32_t row) {
      store_pieces(targets.region[peer] + fields.x + row * p.row.row_bytes, each);
    });
  });
  each_direct([&](int peer, int32_t row) {
    store_record(p, from, {g.experts.begin[peer], g.experts.begin[peer + 1]}, fields,
                 targets.region[peer], row);
  });
  send_forwards(p, from, row_at);
}

// How much this rank receives, for the host or the next kernel.
__device__ __forceinline__ void count_received(const EpDispatchParams& p, const EpNow& now) {
  const EpGroup& g = p.group;
  for (int e = threadIdx.x; e <= g.experts.count(g.rank); e += blockDim.x) {
    uint32_t total = 0;
    proto::each_rank(now.alive, [&](int source) {
      const proto::Notice* notice = notice_from(g, source);
      total +=
          e == 0 ? notice->rows_to[g.rank] : reinterpret_cast<const uint32_t*>(notice + 1)[e - 1];
    });
    p.received[e] = int32_t(total);
  }
}

// Rows that nobody sent name no expert: for callers that take the whole region, sizes unread.
__device__ __forceinline__ void clear_behind(const EpDispatchParams& p, const EpNow& now,
                                             const proto::RegionLayout& fields) {
  const EpGroup& g = p.group;
  int64_t rows = 0;
  proto::each_rank(now.alive, [&](int source) { rows += notice_from(g, source)->rows_to[g.rank]; });
  uint8_t* records = g.windows[g.rank] + p.region + fields.records + fields.topk_idx;
  const int64_t slots = g.shape.ranks * g.shape.max_tokens * p.row.topk;
  for (int64_t i = rows * p.row.topk + blockIdx.x * blockDim.x + threadIdx.x; i < slots;
       i += gridDim.x * blockDim.x) {
    uint8_t* record = records + i / p.row.topk * int64_t(fields.record_bytes);
    reinterpret_cast<int64_t*>(record)[i % p.row.topk] = -1;
  }
}

__device__ __forceinline__ void dispatch_call(const EpDispatchParams& p, const EpNow& now) {
  __shared__ EpTargets targets;
  const EpGroup& g = p.group;
  if (blockIdx.x == 0) {
    rank_tokens(p, now);
    send_notices(p, now);
  }
  if (!await_everyone(g, now, proto::kNotified)) return;
  find_targets(g, now, targets);
  if (blockIdx.x == 0) count_received(p, now);
  const proto::RegionLayout fields =
      proto::RegionLayout::of(p.row, g.shape.ranks * g.shape.max_tokens);
  for (int token = blockIdx.x * kEpDispatchWarps + threadIdx.x / kEpWarp; token < p.tokens;
       token += gridDim.x * kEpDispatchWarps) {
    send_token(p, now, token, targets, fields);
  }
  if (p.whole_region) clear_behind(p, now, fields);
  if (last_to_arrive(g, now, 0)) say_sent(p, now);
  if (p.ranks_per_node != 0 && !forward_rows(p, now, targets, fields)) return;
  if (!last_to_arrive(g, now, 1)) return;
  if (p.ranks_per_node != 0) say_forwarded(p, now);
  await_everyone(g, now, proto::kSent);
}

__device__ __forceinline__ void dispatch_tokens(const EpDispatchParams& p) {
  const EpNow now = begin_call(p.group, kEpNormal);
  dispatch_call(p, now);
  end_call(p.group, now);
}

}  // namespace dsk
