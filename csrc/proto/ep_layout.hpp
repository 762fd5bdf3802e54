// Where everything lies in a rank's window. Standard library only: kernels, CPU code and
// transports share it. All offsets are bytes from the start of a window; every rank computes the
// same ones.
#pragma once

#include <cstdint>

#include "proto/ep_epoch.hpp"

namespace dsk::proto {

DSK_HD constexpr uint64_t align_up(uint64_t value, uint64_t to) {
  return (value + to - 1) / to * to;
}

constexpr uint64_t kLine = 64;

// What a group is made for; equal on all ranks.
struct GroupShape {
  int32_t ranks;
  int32_t max_topk;
  int32_t max_local_experts;  // of the rank with the most
  int32_t buffers;            // receive regions of the normal mode
  int64_t max_tokens;         // per rank and call
  int64_t max_row_bytes;      // data of one token in the widest type used
  int64_t max_scale_bytes;    // scales of one token, 0 if none
};

// What one call moves per token; equal on all ranks (the notice carries it as a check).
struct RowShape {
  int64_t row_bytes;
  int64_t scale_bytes;
  int32_t topk;
  int32_t with_weights;
};

// Dispatch, per (destination, source): all that a receiver must know before rows arrive.
struct Notice {
  uint64_t epoch;
  uint64_t region;  // in the SENDER's window: where it wants its own rows
  RowShape shape;
  uint32_t forwards;            // rows that this destination is to pass on inside its node
  uint32_t rows_to[kMaxRanks];  // rows that the sender has for every rank
  // followed by uint32_t mentions[max_local_experts]: of the destination's experts
};

// Combine, per (destination, source): where the sender's results lie, or where it wants its own.
struct ReturnNotice {
  uint64_t epoch;
  uint64_t region;
  uint64_t weights;  // offset of fp32 weights; 0 if none
  int64_t row_bytes;
};

// One receive region: the data of `capacity` rows, then a record per row with all that goes along.
// Records are whole cache lines, so that a sender streams them without reading what is there.
struct RegionLayout {
  uint64_t x, records, record_bytes;               // of the region
  uint64_t scale, topk_idx, topk_weights, source;  // of a record
  uint64_t bytes;

  DSK_HD static constexpr RegionLayout of(const RowShape& s, int64_t capacity) {
    RegionLayout r{};
    r.scale = 0;
    r.topk_idx = align_up(static_cast<uint64_t>(s.scale_bytes), 8);   // int64 [topk], local numbers
    r.topk_weights = r.topk_idx + static_cast<uint64_t>(s.topk) * 8;  // fp32 [topk]
    r.source = align_up(r.topk_weights + static_cast<uint64_t>(s.topk) * 4, 8);
    r.record_bytes = align_up(r.source + 16, kLine);  // int64 [2]: source rank, source token
    r.x = 0;
    r.records = align_up(static_cast<uint64_t>(capacity * s.row_bytes), kLine);
    r.bytes = r.records + static_cast<uint64_t>(capacity) * r.record_bytes;
    return r;
  }
};

// Slots of the low-latency mode. Receive: [copy][local expert][source][max_tokens]; return:
// [copy][token][topk slot], so it grows with top-k and not with the number of experts.
struct LowLatencyLayout {
  uint64_t x, scale, source, count, returned, bytes;

  DSK_HD static constexpr LowLatencyLayout of(const GroupShape& g) {
    LowLatencyLayout r{};
    const uint64_t slots = static_cast<uint64_t>(kLowLatencyDepth) *
                           static_cast<uint64_t>(g.max_local_experts) *
                           static_cast<uint64_t>(g.ranks * g.max_tokens);
    uint64_t at = 0;
    r.x = at;
    at = align_up(at + slots * static_cast<uint64_t>(g.max_row_bytes), kLine);
    r.scale = at;
    at = align_up(at + slots * static_cast<uint64_t>(g.max_scale_bytes), kLine);
    r.source = at;  // uint64: source token << 32 | topk slot
    at = align_up(at + slots * 8, kLine);
    r.count = at;  // uint32 [copy][source][local expert]
    at = align_up(at + static_cast<uint64_t>(kLowLatencyDepth * g.ranks) *
                           static_cast<uint64_t>(g.max_local_experts) * 4,
                  kLine);
    r.returned = at;
    at = align_up(at + static_cast<uint64_t>(kLowLatencyDepth) *
                           static_cast<uint64_t>(g.max_tokens * g.max_topk * g.max_row_bytes),
                  kLine);
    r.bytes = at;
    return r;
  }
};

// Index of a low-latency receive slot.
DSK_HD constexpr uint64_t receive_slot(const GroupShape& g, int copy, int local_expert, int source,
                                       int64_t place) {
  return ((static_cast<uint64_t>(copy) * static_cast<uint64_t>(g.max_local_experts) +
           static_cast<uint64_t>(local_expert)) *
              static_cast<uint64_t>(g.ranks) +
          static_cast<uint64_t>(source)) *
             static_cast<uint64_t>(g.max_tokens) +
         static_cast<uint64_t>(place);
}
// Index of a low-latency return slot.
DSK_HD constexpr uint64_t return_slot(const GroupShape& g, int copy, int64_t token, int topk_slot) {
  return (static_cast<uint64_t>(copy) * static_cast<uint64_t>(g.max_tokens) +
          static_cast<uint64_t>(token)) *
             static_cast<uint64_t>(g.max_topk) +
         static_cast<uint64_t>(topk_slot);
}

struct WindowLayout {
  uint64_t notices, notice_stride, returns, low_latency, regions, region_bytes, bytes;

  DSK_HD static constexpr WindowLayout of(const GroupShape& g) {
    WindowLayout w{};
    const uint64_t ranks = static_cast<uint64_t>(g.ranks);
    uint64_t at = 0;
    w.notices = at;
    w.notice_stride =
        align_up(sizeof(Notice) + static_cast<uint64_t>(g.max_local_experts) * 4, kLine);
    at += ranks * w.notice_stride;
    w.returns = at;
    at += ranks * kLine;
    at = align_up(at, 4096);
    w.low_latency = at;
    at = align_up(at + LowLatencyLayout::of(g).bytes, 4096);
    w.regions = at;
    const RowShape widest{g.max_row_bytes, g.max_scale_bytes, g.max_topk, 1};
    w.region_bytes = align_up(RegionLayout::of(widest, g.ranks * g.max_tokens).bytes, 4096);
    w.bytes = at + static_cast<uint64_t>(g.buffers) * w.region_bytes;
    return w;
  }
};
static_assert(sizeof(ReturnNotice) <= kLine);

}  // namespace dsk::proto
