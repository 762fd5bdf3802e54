// Dispatch over several nodes: what a rank does for tokens of other nodes, and what it asks of
// them.
//
// Between nodes the network is the bound: 4096 tokens x 7168 bytes of FP8 with node-limited routing
// (at most 4 nodes) are 117 MB, 2.3 ms at 50 GB/s, against 3.2 times as many copies without it. A
// message is the row and its record; behind the record's expert numbers stand the rows that the
// token takes at each rank of the node, so that whoever passes it on computes nothing.
//
// Forwarded rows lie in [source rank][place] slots of a region that all ranks keep for it. They may
// be overwritten once their source has seen this rank's next notice, which comes after this launch.
#pragma once

#include "cuda/tile/ep_signals.cuh"

namespace dsk {

__device__ __forceinline__ uint8_t* notice_at(const EpGroup& g, int owner, int source) {
  const proto::WindowLayout layout = proto::WindowLayout::of(g.shape);
  return g.windows[owner] + layout.notices + source * layout.notice_stride;
}
__device__ __forceinline__ const proto::Notice* notice_from(const EpGroup& g, int source) {
  return reinterpret_cast<const proto::Notice*>(notice_at(g, g.rank, source));
}

// One warp numbers, in order, the tokens for which goes(token): number_of[token * stride], -1 for
// the others. Returns how many there are.
template <class Goes>
__device__ __forceinline__ int number_tokens(int tokens, Goes goes, int32_t* number_of,
                                             int64_t stride) {
  const int lane = threadIdx.x % kEpWarp;
  int count = 0;
  for (int begin = 0; begin < tokens; begin += kEpWarp) {
    const int token = begin + lane;
    const bool exists = token < tokens, chosen = exists && goes(token);
    const uint32_t votes = __ballot_sync(0xffffffffu, chosen);
    const int number = count + __popc(votes & ((1u << lane) - 1));
    if (exists) number_of[token * stride] = chosen ? number : -1;
    count += __popc(votes);
  }
  return count;
}

// What the notices say: where this rank's rows begin at each peer, and how many of the peer's rows
// it is to pass on.
struct EpTargets {
  uint8_t* region[proto::kMaxRanks];
  int32_t first_row[proto::kMaxRanks];
  int32_t forwards[proto::kMaxRanks];
};

// A token and all that goes along with it.
struct EpToken {
  const uint8_t* x;
  const float* scale;
  int64_t scale_column;
  const int64_t* topk_idx;
  const float* topk_weights;  // null: none
  int64_t rank, token;        // its source
};

// What each_row_batch has loaded, to the same place of another row.
template <class Each>
__device__ __forceinline__ void store_pieces(uint8_t* row, Each each) {
  each([&](int i, const uint4& piece) { reinterpret_cast<uint4*>(row)[i] = piece; });
}

// The experts whose numbers a record keeps, counted from the first of them.
struct EpHosted {
  int64_t begin, end;
};

// The record of a token: for a rank, with its local expert numbers, or for all.
__device__ __forceinline__ void store_record(const EpDispatchParams& p, const EpToken& from,
                                             const EpHosted& hosted,
                                             const proto::RegionLayout& fields, uint8_t* region,
                                             int64_t row) {
  const int lane = threadIdx.x % kEpWarp;
  uint8_t* record = region + fields.records + row * int64_t(fields.record_bytes);
  for (int c = lane; c < p.row.scale_bytes / 4; c += kEpWarp) {
    reinterpret_cast<float*>(record + fields.scale)[c] = from.scale[c * from.scale_column];
  }
  if (lane < p.row.topk) {
    const int64_t expert = from.topk_idx[lane];
    const bool there = expert >= hosted.begin && expert < hosted.end;
    reinterpret_cast<int64_t*>(record + fields.topk_idx)[lane] = there ? expert - hosted.begin : -1;
    reinterpret_cast<float*>(record + fields.topk_weights)[lane] =
        there && p.row.with_weights ? from.topk_weights[lane] : 0.f;
  }
  if (lane == 0) {
    auto* source = reinterpret_cast<int64_t*>(record + fields.source);
    source[0] = from.rank;
    source[1] = from.token;
  }
}

__device__ __forceinline__ int num_nodes(const EpDispatchParams& p) {
  return p.ranks_per_node == 0 ? 1 : p.group.shape.ranks / p.ranks_per_node;
}

// A record to forward has room for the rows at the node's ranks behind its expert numbers.
__device__ __forceinline__ proto::RegionLayout forward_fields(const EpDispatchParams& p) {
  proto::RowShape wide = p.row;
  wide.topk += (p.ranks_per_node + 1) / 2;
  return proto::RegionLayout::of(wide, p.group.shape.ranks * p.group.shape.max_tokens);
}
__device__ __forceinline__ int32_t* rows_behind(uint8_t* record, const proto::RegionLayout& fields,
                                                int topk) {
  return reinterpret_cast<int32_t*>(record + fields.topk_idx + topk * 8);
}

// Whether this rank sends tokens to another node through a rank there.
__device__ __forceinline__ bool uses_rail(const EpDispatchParams& p, const EpNow& now, int node) {
  const EpGroup& g = p.group;
  return node != proto::node_of(g.rank, p.ranks_per_node) &&
         proto::is_alive(now.alive, proto::rail_of(g.rank, node, p.ranks_per_node));
}

// Rank the tokens of every other node, as rank_tokens does for ranks; by CTA 0.
__device__ __forceinline__ void place_forwards(const EpDispatchParams& p, const EpNow& now) {
  if (p.ranks_per_node == 0) return;
  const EpGroup& g = p.group;
  const int nodes = num_nodes(p);
  for (int node = threadIdx.x / kEpWarp; node < nodes; node += blockDim.x / kEpWarp) {
    const auto goes = [&](int token) {
      bool wanted = false;
      for (int j = 0; j < p.ranks_per_node; ++j) {
        wanted |= p.place_of[int64_t(token) * g.shape.ranks + node * p.ranks_per_node + j] >= 0;
      }
      return wanted && uses_rail(p, now, node);
    };
    number_tokens(p.tokens, goes, p.forward_of + node, nodes);
  }
}

// How many rows the living `peer` is to pass on for this rank.
__device__ __forceinline__ uint32_t forwards_through(const EpDispatchParams& p, int peer) {
  if (!proto::share_rail(p.group.rank, peer, p.ranks_per_node)) return 0;
  const int node = proto::node_of(peer, p.ranks_per_node), nodes = num_nodes(p);
  int32_t last = -1;  // places grow with the tokens
  for (int token = p.tokens - 1; token >= 0 && last < 0; --token) {
    last = p.forward_of[int64_t(token) * nodes + node];
  }
  return uint32_t(last + 1);
}

// One copy of a token to each other node that hosts an expert of it; row_at(rank): its row there.
template <class RowAt>
__device__ __forceinline__ void send_forwards(const EpDispatchParams& p, const EpToken& from,
                                              RowAt row_at) {
  if (p.ranks_per_node == 0) return;
  const EpGroup& g = p.group;
  const int lane = threadIdx.x % kEpWarp, nodes = num_nodes(p);
  const proto::RegionLayout fields = forward_fields(p);
  for (int node = 0; node < nodes; ++node) {
    const int32_t place = p.forward_of[from.token * nodes + node];
    if (place < 0) continue;
    uint8_t* region = g.windows[proto::rail_of(g.rank, node, p.ranks_per_node)] + p.forward;
    const int64_t slot = g.rank * g.shape.max_tokens + place;
    copy_row(region + fields.x + slot * p.row.row_bytes, from.x, p.row.row_bytes);
    store_record(p, from, {0, g.experts.total}, fields, region, slot);
    uint8_t* record = region + fields.records + slot * int64_t(fields.record_bytes);
    for (int j = lane; j < p.ranks_per_node; j += kEpWarp) {
      rows_behind(record, fields, p.row.topk)[j] = row_at(node * p.ranks_per_node + j);
    }
  }
}

// My rows are where they belong, or at the rank that passes them on; and no CTA needs a notice of
// this call any more, so that the next may come.
__device__ __forceinline__ void say_sent(const EpDispatchParams& p, const EpNow& now) {
  const EpGroup& g = p.group;
  const int peer = threadIdx.x;
  if (!proto::is_alive(now.alive, peer)) return;
  if (proto::goes_direct(g.rank, peer, p.ranks_per_node, now.alive)) {
    raise_at(g, now, peer, proto::kSent, g.rank);
  } else if (proto::share_rail(g.rank, peer, p.ranks_per_node)) {
    raise_at(g, now, peer, proto::kForwarded, g.rank);
  }
}

__device__ __forceinline__ void forward_row(const EpDispatchParams& p, int64_t slot,
                                            const EpTargets& targets,
                                            const proto::RegionLayout& fields,
                                            const proto::RegionLayout& waiting) {
  const EpGroup& g = p.group;
  const int lane = threadIdx.x % kEpWarp;
  const int first = proto::node_of(g.rank, p.ranks_per_node) * p.ranks_per_node;
  uint8_t* region = g.windows[g.rank] + p.forward;
  uint8_t* record = region + waiting.records + slot * int64_t(waiting.record_bytes);
  const int32_t* rows = rows_behind(record, waiting, p.row.topk);
  const auto* source = reinterpret_cast<const int64_t*>(record + waiting.source);
  // Kept for combine, when others' rows stand here.
  const int node = proto::node_of(int(source[0]), p.ranks_per_node);
  const int64_t place = node * g.shape.max_tokens + slot % g.shape.max_tokens;
  for (int j = lane; j < p.ranks_per_node; j += kEpWarp) {
    p.forwarded[place * p.ranks_per_node + j] = rows[j];
  }
  const EpToken from{region + waiting.x + slot * p.row.row_bytes,
                     reinterpret_cast<const float*>(record + waiting.scale),
                     1,
                     reinterpret_cast<const int64_t*>(record + waiting.topk_idx),
                     reinterpret_cast<const float*>(record + waiting.topk_weights),
                     source[0],
                     source[1]};
  each_row_batch(from.x, p.row.row_bytes, [&](auto each) {
    for (int j = 0; j < p.ranks_per_node; ++j) {
      if (rows[j] < 0) continue;
      store_pieces(targets.region[first + j] + fields.x + rows[j] * p.row.row_bytes, each);
    }
  });
  for (int j = 0; j < p.ranks_per_node; ++j) {
    if (rows[j] < 0) continue;
    const int peer = first + j;
    store_record(p, from, {g.experts.begin[peer], g.experts.begin[peer + 1]}, fields,
                 targets.region[peer], rows[j]);
  }
}

// Pass on what other nodes sent here. False if somebody stayed silent.
__device__ __forceinline__ bool forward_rows(const EpDispatchParams& p, const EpNow& now,
                                             const EpTargets& targets,
                                             const proto::RegionLayout& fields) {
  const EpGroup& g = p.group;
  const uint64_t rails = proto::rails_of(g.rank, p.ranks_per_node, now.alive);
  if (!await_ranks(g, now, proto::kForwarded, rails)) return false;
  const proto::RegionLayout waiting = forward_fields(p);
  const int warps = blockDim.x / kEpWarp;
  proto::each_rank(rails, [&](int source) {
    const int rows = targets.forwards[source];
    if (blockIdx.x == 0 && threadIdx.x == 0) {
      p.num_forwarded[proto::node_of(source, p.ranks_per_node)] = rows;
    }
    for (int i = blockIdx.x * warps + threadIdx.x / kEpWarp; i < rows; i += gridDim.x * warps) {
      forward_row(p, source * g.shape.max_tokens + i, targets, fields, waiting);
    }
  });
  return true;
}

// The ranks of this node have what other nodes sent through this rank.
__device__ __forceinline__ void say_forwarded(const EpDispatchParams& p, const EpNow& now) {
  const EpGroup& g = p.group;
  const int node = proto::node_of(g.rank, p.ranks_per_node), peer = threadIdx.x;
  if (!proto::is_alive(now.alive, peer) || proto::node_of(peer, p.ranks_per_node) != node) return;
  proto::each_rank(proto::rails_of(g.rank, p.ranks_per_node, now.alive),
                   [&](int source) { raise_at(g, now, peer, proto::kSent, source); });
}

}  // namespace dsk
