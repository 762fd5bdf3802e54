// The low-latency mode: fixed slots per (expert, source), no counts in advance, send and receive
// halves that the caller may drive apart.
#include <bit>
#include <cstring>

#include "check.hpp"
#include "comm/exchange.hpp"

namespace dsk::comm {

using proto::counter_index;
using proto::is_alive;

LowLatencyHandle Exchange::low_latency_send(const LowLatencyInput& in, Deadline) {
  begin("low_latency_dispatch");
  const proto::RowShape& s = in.shape;
  DSK_CHECK(in.tokens <= shape_.max_tokens, "x: expected at most ", shape_.max_tokens,
            " tokens, as the group was made for, got ", in.tokens);
  check_row("x", s.row_bytes);
  DSK_CHECK(s.topk <= shape_.max_topk, "topk_idx: expected at most ", shape_.max_topk,
            " slots, got ", s.topk);
  const uint64_t call = low_call_ + 1;
  DSK_CHECK(low_received_ >= proto::must_be_received(call),
            "low_latency_dispatch: expected the hook of call ", proto::must_be_received(call),
            " to have run before call ", call, " (", proto::kLowLatencyDepth, " sets of slots)");
  DSK_CHECK(low_reduced_ + proto::kLowLatencyDepth >= call,
            "low_latency_dispatch: expected the combine of call ", call - proto::kLowLatencyDepth,
            " to be complete before call ", call);
  low_call_ = call;
  LowLatencyHandle handle;
  handle.call = call;
  handle.alive = alive_;
  handle.tokens = in.tokens;
  handle.topk = s.topk;
  handle.topk_idx.assign(in.topk_idx, in.topk_idx + in.tokens * s.topk);
  const int copy = proto::low_latency_copy(call);
  std::vector<uint32_t> next(static_cast<size_t>(experts_.total));
  ScaleReader scales(in.scale, in.scale_element_stride, s.scale_bytes, in.tokens);
  for (int64_t t = 0; t < in.tokens; ++t) {
    const void* row = static_cast<const std::byte*>(in.x.data) + t * in.x.stride;
    const void* scale = s.scale_bytes > 0 ? scales.row(t) : nullptr;
    for (int k = 0; k < s.topk; ++k) {
      int64_t& expert = handle.topk_idx[static_cast<size_t>(t * s.topk + k)];
      if (expert < 0) continue;
      const int peer = experts_.rank_of(expert);
      if (!is_alive(alive_, peer)) {
        expert = -1;
        continue;
      }
      const uint64_t slot =
          proto::receive_slot(shape_, copy, static_cast<int>(expert) - experts_.begin[peer], me(),
                              next[static_cast<size_t>(expert)]++);
      const uint64_t at = layout_.low_latency;
      transport_.put(peer, at + low_.x + slot * static_cast<uint64_t>(shape_.max_row_bytes), row,
                     static_cast<uint64_t>(s.row_bytes));
      if (s.scale_bytes > 0) {
        transport_.put(peer, at + low_.scale + slot * static_cast<uint64_t>(shape_.max_scale_bytes),
                       scale, static_cast<uint64_t>(s.scale_bytes));
      }
      const uint64_t source = static_cast<uint64_t>(t) << 32 | static_cast<uint64_t>(k);
      transport_.put(peer, at + low_.source + slot * 8, &source, 8);
    }
  }
  for_alive([&](int peer) {
    const uint64_t place = static_cast<uint64_t>(copy * shape_.ranks + me()) *
                           static_cast<uint64_t>(shape_.max_local_experts) * 4;
    transport_.put_notify(peer, layout_.low_latency + low_.count + place,
                          next.data() + experts_.begin[peer],
                          static_cast<uint64_t>(experts_.count(peer)) * 4,
                          counter_index(proto::kLowSent, me()), call);
  });
  return handle;
}

void Exchange::low_latency_receive(LowLatencyHandle& handle, const proto::RowShape& shape,
                                   const LowLatencyOutput& out, Deadline deadline) {
  begin("low_latency_dispatch hook");
  DSK_CHECK(handle.call == low_received_ + 1, "hook: expected call ", low_received_ + 1,
            " next, got ", handle.call, "; hooks run once each, in order of their calls");
  wait_for_all(proto::kLowSent, handle.call, deadline);
  const int experts = experts_.count(me());
  const int64_t slots = shape_.ranks * shape_.max_tokens;
  handle.slot_of_row.assign(static_cast<size_t>(experts * slots), 0);
  handle.rank_of_row.assign(static_cast<size_t>(experts * slots), -1);
  handle.count.assign(static_cast<size_t>(experts), 0);
  for (int expert = 0; expert < experts; ++expert) pack_expert(handle, shape, out, expert);
  handle.received = true;
  low_received_ = handle.call;
}

void Exchange::pack_expert(LowLatencyHandle& handle, const proto::RowShape& shape,
                           const LowLatencyOutput& out, int expert) {
  const int64_t slots = shape_.ranks * shape_.max_tokens;
  const int copy = proto::low_latency_copy(handle.call);
  const std::byte* low = transport_.window() + layout_.low_latency;
  const auto* counts = reinterpret_cast<const uint32_t*>(low + low_.count);
  int64_t row = 0;
  for (int source = 0; source < shape_.ranks; ++source) {
    const int64_t from =
        !is_alive(handle.alive, source)
            ? 0
            : counts[(copy * shape_.ranks + source) * shape_.max_local_experts + expert];
    out.layout_range[expert * shape_.ranks + source] = row << 32 | from;
    for (int64_t i = 0; i < from; ++i, ++row) {
      const uint64_t slot = proto::receive_slot(shape_, copy, expert, source, i);
      std::memcpy(out.x + (expert * slots + row) * shape.row_bytes,
                  low + low_.x + slot * static_cast<uint64_t>(shape_.max_row_bytes),
                  static_cast<size_t>(shape.row_bytes));
      const auto* scale = reinterpret_cast<const float*>(
          low + low_.scale + slot * static_cast<uint64_t>(shape_.max_scale_bytes));
      for (int64_t c = 0; c < shape.scale_bytes / 4; ++c) {
        out.scale[expert * out.scale_expert_stride + row * out.scale_row_stride +
                  c * out.scale_column_stride] = scale[c];
      }
      uint64_t word;
      std::memcpy(&word, low + low_.source + slot * 8, 8);
      handle.slot_of_row[static_cast<size_t>(expert * slots + row)] = word;
      handle.rank_of_row[static_cast<size_t>(expert * slots + row)] = source;
      out.source[expert * slots + row] =
          source * shape_.max_tokens + static_cast<int64_t>(word >> 32);
    }
  }
  out.count[expert] = handle.count[static_cast<size_t>(expert)] = static_cast<int32_t>(row);
  for (; row < slots; ++row) out.source[expert * slots + row] = -1;
}

uint64_t Exchange::low_latency_return(const LowLatencyHandle& handle, Element type,
                                      int64_t elements, const Rows& y, int64_t y_expert_stride,
                                      Deadline) {
  begin("low_latency_combine");
  const int64_t row_bytes = elements * static_cast<int64_t>(element_bytes(type));
  check_row("y", row_bytes);
  DSK_CHECK(handle.received, "handle: expected one whose receive hook has run");
  DSK_CHECK(handle.alive == alive_,
            "handle: expected one of a dispatch with the ranks that are "
            "alive now; after recover() dispatch again");
  DSK_CHECK(handle.call == low_return_ + 1, "handle: expected that of call ", low_return_ + 1,
            " next, got ", handle.call, "; every low_latency_dispatch needs its combine, in order");
  low_return_ = handle.call;
  const int copy = proto::low_latency_copy(handle.call);
  const int64_t slots = shape_.ranks * shape_.max_tokens;
  for (int expert = 0; expert < experts_.count(me()); ++expert) {
    for (int64_t row = 0; row < handle.count[static_cast<size_t>(expert)]; ++row) {
      const size_t at = static_cast<size_t>(expert * slots + row);
      const uint64_t word = handle.slot_of_row[at];
      const uint64_t slot = proto::return_slot(shape_, copy, static_cast<int64_t>(word >> 32),
                                               static_cast<int>(word & 0xffffffffu));
      transport_.put(
          handle.rank_of_row[at],
          layout_.low_latency + low_.returned + slot * static_cast<uint64_t>(shape_.max_row_bytes),
          static_cast<const std::byte*>(y.data) + expert * y_expert_stride + row * y.stride,
          static_cast<uint64_t>(row_bytes));
    }
  }
  for_alive([&](int peer) {
    transport_.fence(peer);
    transport_.notify(peer, counter_index(proto::kLowReturned, me()), handle.call);
  });
  return handle.call;
}

void Exchange::low_latency_reduce(const LowLatencyHandle& handle, uint64_t call, Element type,
                                  int64_t elements, const float* topk_weights, void* out,
                                  Deadline deadline) {
  begin("low_latency_combine hook");
  DSK_CHECK(call == low_reduced_ + 1, "hook: expected call ", low_reduced_ + 1, " next, got ", call,
            "; hooks run once each, in order of their calls");
  wait_for_all(proto::kLowReturned, call, deadline);
  const int copy = proto::low_latency_copy(call);
  const int64_t row_bytes = elements * static_cast<int64_t>(element_bytes(type));
  const std::byte* returned = transport_.window() + layout_.low_latency + low_.returned;
  for (int64_t t = 0; t < handle.tokens; ++t) {
    const void* rows[proto::kMaxTopk];
    float weights[proto::kMaxTopk];
    int n = 0;
    for (int k = 0; k < handle.topk; ++k) {
      if (handle.topk_idx[static_cast<size_t>(t * handle.topk + k)] < 0) continue;
      rows[n] = returned + proto::return_slot(shape_, copy, t, k) *
                               static_cast<uint64_t>(shape_.max_row_bytes);
      weights[n++] = topk_weights[t * handle.topk + k];
    }
    sum_rows(type, static_cast<std::byte*>(out) + t * row_bytes, rows, weights, n, {}, elements);
  }
  low_reduced_ = call;
}

}  // namespace dsk::comm
