// The normal mode: dispatch and combine. See proto/ep_epoch.hpp for why no buffer is overwritten.
#include "comm/exchange.hpp"

#include <algorithm>
#include <bit>
#include <cstring>

#include "check.hpp"

namespace dsk::comm {

using proto::Counter;
using proto::counter_index;
using proto::is_alive;

Exchange::Exchange(Transport& transport, const proto::GroupShape& shape,
                   const proto::Experts& experts, bool pull)
    : transport_(transport),
      shape_(shape),
      experts_(experts),
      layout_(proto::WindowLayout::of(shape)),
      low_(proto::LowLatencyLayout::of(shape)),
      pull_(pull),
      alive_(shape.ranks == 64 ? ~uint64_t{0} : (uint64_t{1} << shape.ranks) - 1),
      taken_(new std::atomic<bool>[static_cast<size_t>(shape.buffers)]()) {
  DSK_CHECK(transport.window_bytes() >= layout_.bytes, "window: expected at least ", layout_.bytes,
            " bytes, got ", transport.window_bytes());
}

void Exchange::restart(uint64_t alive) {
  alive_ = alive;
  broken_ = false;
  epoch_ = low_call_ = low_received_ = low_return_ = low_reduced_ = 0;
  // The memory is new; views of the old one release the old marks.
  taken_.reset(new std::atomic<bool>[static_cast<size_t>(shape_.buffers)]());
}

void Exchange::begin(const char* call) {
  DSK_CHECK(!broken_, call,
            ": expected a group whose last call succeeded; after a timeout call "
            "recover() on every surviving rank first");
}

void Exchange::wait_for_all(Counter kind, uint64_t value, Deadline deadline) {
  const auto since = Clock::now();
  for (int peer = 0; peer < shape_.ranks; ++peer) {
    if (!is_alive(alive_, peer)) continue;
    const Wait got = transport_.wait_count(counter_index(kind, peer), value, peer, deadline);
    if (got != Wait::kReached) give_up(kind, value, got, peer, since);
  }
}

void Exchange::give_up(Counter kind, uint64_t value, Wait why, int peer, Clock::time_point since) {
  broken_ = true;
  WaitReport report;
  report.rank = me();
  report.phase = proto::kCounterNames[kind];
  report.epoch = value;
  report.waited_seconds = std::chrono::duration<double>(Clock::now() - since).count();
  const std::string who = "rank " + std::to_string(peer);
  report.reason = why == Wait::kTimeout    ? "timeout"
                  : why == Wait::kPeerDead ? who + " died"
                  : why == Wait::kPeerLeft
                      ? who + " left the call to recover"
                      : "aborted by rank " + std::to_string(transport_.aborted_by());
  for (uint32_t kind_idx = 0; kind_idx < proto::kNumCounters; ++kind_idx) {
    std::vector<uint64_t>& row = report.counters.emplace_back();
    for (int r = 0; r < shape_.ranks; ++r) {
      row.push_back(transport_.count(counter_index(static_cast<Counter>(kind_idx), r)));
    }
  }
  for (int r = 0; r < shape_.ranks; ++r) {
    const uint64_t have = report.counters[kind][static_cast<size_t>(r)];
    if (!is_alive(alive_, r) || have >= value) continue;
    SilentPeer silent{r, transport_.peer_state(r), have, value, transport_.peer_waits(r), {}};
    if (silent.waits.counter < proto::kCounterSlots) {
      const auto awaited = static_cast<Counter>(silent.waits.counter / proto::kMaxRanks);
      for (int s = 0; s < shape_.ranks; ++s) {
        if (is_alive(alive_, s) &&
            transport_.peer_count(r, counter_index(awaited, s)) < silent.waits.value) {
          silent.waits_on.push_back(s);
        }
      }
    }
    report.silent.push_back(std::move(silent));
  }
  // So that the others do not wait for us. Where the cause is that one has left, those who can
  // still complete an earlier call shall do so.
  why == Wait::kPeerLeft ? transport_.leave() : transport_.abort(value);
  throw WaitFailed{std::move(report)};
}

int Exchange::take_region() {
  for (int i = 0; i < shape_.buffers; ++i) {
    if (!taken_[i].exchange(true)) return i;
  }
  fail("buffers: expected a free receive buffer, got all ", shape_.buffers,
       " in use by tensors of earlier calls; drop or clone those, or make the group with more "
       "buffers");
}

void Exchange::release(int index) {
  if (index >= 0) taken_[index] = false;
}

std::byte* Exchange::region(int index) {
  return transport_.window() + layout_.regions +
         static_cast<uint64_t>(index) * layout_.region_bytes;
}

std::optional<uint64_t> Exchange::window_offset(const void* pointer) const {
  const auto at = reinterpret_cast<uintptr_t>(pointer);
  const auto begin = reinterpret_cast<uintptr_t>(transport_.window());
  if (at < begin || at >= begin + transport_.window_bytes()) return std::nullopt;
  return at - begin;
}

void Exchange::check_row(const char* name, int64_t row_bytes) const {
  DSK_CHECK(row_bytes <= shape_.max_row_bytes, name, ": expected rows of at most ",
            shape_.max_row_bytes, " bytes, as the group was made for, got ", row_bytes);
}

ScaleReader::ScaleReader(const Rows& scale, int64_t element_stride, int64_t bytes, int64_t tokens)
    : data_(static_cast<const std::byte*>(scale.data)),
      stride_(scale.stride),
      element_stride_(element_stride),
      bytes_(bytes),
      tokens_(tokens),
      block_(element_stride == 4 ? 0 : static_cast<size_t>(kBlock * bytes)) {}

const void* ScaleReader::row(int64_t token) {
  if (block_.empty()) return data_ + token * stride_;
  if (token < begin_ || token >= begin_ + kBlock) {
    begin_ = token / kBlock * kBlock;
    const int64_t count = std::min(kBlock, tokens_ - begin_);
    for (int64_t i = 0; i < bytes_ / 4; ++i) {
      const std::byte* column = data_ + begin_ * stride_ + i * element_stride_;
      for (int64_t t = 0; t < count; ++t) {
        std::memcpy(block_.data() + t * bytes_ + 4 * i, column + t * stride_, 4);
      }
    }
  }
  return block_.data() + (token - begin_) * bytes_;
}

// ---- dispatch ----

Handle Exchange::dispatch(const DispatchInput& in, Deadline deadline) {
  begin("dispatch");
  DSK_CHECK(in.tokens <= shape_.max_tokens, "x: expected at most ", shape_.max_tokens,
            " tokens, as the group was made for, got ", in.tokens);
  check_row("x", in.shape.row_bytes);
  DSK_CHECK(in.shape.scale_bytes <= shape_.max_scale_bytes, "x: expected scales of at most ",
            shape_.max_scale_bytes, " bytes a token, got ", in.shape.scale_bytes);
  DSK_CHECK(in.shape.topk <= shape_.max_topk, "topk_idx: expected at most ", shape_.max_topk,
            " slots, as the group was made for, got ", in.shape.topk);
  Handle handle;
  proto::Notice notice{};
  std::vector<uint32_t> mentions;
  plan(in, handle, notice, mentions);
  handle.region = take_region();  // before the first message: a failure here harms nobody
  handle.epoch = notice.epoch = ++epoch_;
  notice.region = layout_.regions + static_cast<uint64_t>(handle.region) * layout_.region_bytes;
  try {
    send_notices(notice, mentions);
    send_rows(in, handle, read_notices(notice, deadline));
    wait_for_all(proto::kSent, epoch_, deadline);
  } catch (...) {
    release(handle.region);
    throw;
  }
  const proto::RegionLayout fields =
      proto::RegionLayout::of(in.shape, shape_.ranks * shape_.max_tokens);
  if (!direct()) {  // the way back by puts needs the rows' sources
    const std::byte* record = region(handle.region) + fields.records + fields.source;
    handle.source.resize(static_cast<size_t>(2 * handle.rows));
    for (int64_t i = 0; i < handle.rows; ++i, record += fields.record_bytes) {
      std::memcpy(handle.source.data() + 2 * i, record, 16);
    }
  }
  return handle;
}

void Exchange::plan(const DispatchInput& in, Handle& handle, proto::Notice& notice,
                    std::vector<uint32_t>& mentions) const {
  const int topk = in.shape.topk;
  handle.alive = alive_;
  handle.tokens = in.tokens;
  handle.shape = in.shape;
  handle.goes_to.resize(static_cast<size_t>(in.tokens));
  handle.row_begin.resize(static_cast<size_t>(in.tokens) + 1);
  mentions.assign(static_cast<size_t>(experts_.total), 0);
  notice.shape = in.shape;
  for (int64_t t = 0; t < in.tokens; ++t) {
    const int64_t* idx = in.topk_idx + t * topk;
    const uint64_t mask = proto::destinations(experts_, idx, topk, alive_);
    handle.goes_to[static_cast<size_t>(t)] = mask;
    handle.row_begin[static_cast<size_t>(t)] = static_cast<int64_t>(handle.row_at.size());
    for (uint64_t rest = mask; rest != 0; rest &= rest - 1) {
      handle.row_at.push_back(static_cast<int32_t>(notice.rows_to[std::countr_zero(rest)]++));
    }
    for (int k = 0; k < topk; ++k) {
      if (idx[k] >= 0) ++mentions[static_cast<size_t>(idx[k])];
    }
  }
  handle.row_begin.back() = static_cast<int64_t>(handle.row_at.size());
}

void Exchange::send_notices(const proto::Notice& notice, const std::vector<uint32_t>& mentions) {
  std::vector<std::byte> message(layout_.notice_stride);
  std::memcpy(message.data(), &notice, sizeof notice);
  for_alive([&](int peer) {
    std::memcpy(message.data() + sizeof notice, mentions.data() + experts_.begin[peer],
                static_cast<size_t>(experts_.count(peer)) * 4);
    transport_.put_notify(
        peer, layout_.notices + static_cast<uint64_t>(me()) * layout_.notice_stride, message.data(),
        message.size(), counter_index(proto::kNotified, me()), epoch_);
  });
}

std::vector<const proto::Notice*> Exchange::read_notices(const proto::Notice& mine,
                                                         Deadline deadline) {
  wait_for_all(proto::kNotified, epoch_, deadline);
  std::vector<const proto::Notice*> notices(static_cast<size_t>(shape_.ranks));
  for_alive([&](int peer) {
    const auto* notice =
        reinterpret_cast<const proto::Notice*>(transport_.window() + layout_.notices +
                                               static_cast<uint64_t>(peer) * layout_.notice_stride);
    const bool same = std::memcmp(&notice->shape, &mine.shape, sizeof mine.shape) == 0 &&
                      notice->epoch == mine.epoch;
    if (!same) {
      broken_ = true;
      transport_.abort(epoch_);
      fail("dispatch: expected the same call on every rank: ", mine.shape.row_bytes, " + ",
           mine.shape.scale_bytes, " bytes a token, top-", mine.shape.topk, ", epoch ", mine.epoch,
           "; rank ", peer, " has ", notice->shape.row_bytes, " + ", notice->shape.scale_bytes,
           " bytes, top-", notice->shape.topk, ", epoch ", notice->epoch);
    }
    notices[static_cast<size_t>(peer)] = notice;
  });
  return notices;
}

void Exchange::send_rows(const DispatchInput& in, Handle& handle,
                         const std::vector<const proto::Notice*>& notices) {
  const auto rows_to = [&](int from, int to) {
    return notices[static_cast<size_t>(from)]->rows_to[to];
  };
  const proto::RegionLayout fields =
      proto::RegionLayout::of(in.shape, shape_.ranks * shape_.max_tokens);
  int64_t base[proto::kMaxRanks] = {};
  uint64_t regions[proto::kMaxRanks] = {};
  handle.rows_from.assign(static_cast<size_t>(shape_.ranks), 0);
  handle.mentions.assign(static_cast<size_t>(experts_.count(me())), 0);
  for_alive([&](int peer) {
    const proto::Notice* notice = notices[static_cast<size_t>(peer)];
    base[peer] = proto::first_row(rows_to, me(), peer, alive_);
    regions[peer] = notice->region;
    handle.rows_from[static_cast<size_t>(peer)] = notice->rows_to[me()];
    handle.rows += notice->rows_to[me()];
    const auto* counts = reinterpret_cast<const uint32_t*>(notice + 1);
    for (size_t e = 0; e < handle.mentions.size(); ++e) handle.mentions[e] += counts[e];
  });
  // Token by token: a row is read from memory once, however many ranks it goes to.
  std::vector<std::byte> record(fields.record_bytes);
  ScaleReader scales(in.scale, in.scale_element_stride, in.shape.scale_bytes, in.tokens);
  for (int64_t t = 0; t < in.tokens; ++t) {
    uint64_t rest = handle.goes_to[static_cast<size_t>(t)];
    if (rest == 0) continue;
    if (in.shape.scale_bytes > 0) {
      std::memcpy(record.data() + fields.scale, scales.row(t),
                  static_cast<size_t>(in.shape.scale_bytes));
    }
    const int64_t source[2] = {me(), t};
    std::memcpy(record.data() + fields.source, source, sizeof source);
    const void* row_data = static_cast<const std::byte*>(in.x.data) + t * in.x.stride;
    int64_t at = handle.row_begin[static_cast<size_t>(t)];
    for (; rest != 0; rest &= rest - 1) {
      const int peer = std::countr_zero(rest);
      int32_t& row = handle.row_at[static_cast<size_t>(at++)];
      row += static_cast<int32_t>(base[peer]);
      const auto place = static_cast<uint64_t>(row);
      const auto row_bytes = static_cast<uint64_t>(in.shape.row_bytes);
      transport_.put(peer, regions[peer] + fields.x + place * row_bytes, row_data, row_bytes);
      address_record(in, t, peer, fields, record);
      transport_.put(peer, regions[peer] + fields.records + place * fields.record_bytes,
                     record.data(), fields.record_bytes);
    }
  }
  for_alive([&](int peer) {
    transport_.fence(peer);
    transport_.notify(peer, counter_index(proto::kSent, me()), epoch_);
  });
}

// What a token's record says to one rank: the experts that live there, by local number.
void Exchange::address_record(const DispatchInput& in, int64_t token, int peer,
                              const proto::RegionLayout& fields,
                              std::vector<std::byte>& record) const {
  const int topk = in.shape.topk;
  int64_t idx[proto::kMaxTopk];
  float weights[proto::kMaxTopk];
  for (int k = 0; k < topk; ++k) {
    const int64_t expert = in.topk_idx[token * topk + k];
    const bool there = expert >= experts_.begin[peer] && expert < experts_.begin[peer + 1];
    idx[k] = there ? expert - experts_.begin[peer] : -1;
    weights[k] = there && in.shape.with_weights ? in.topk_weights[token * topk + k] : 0.0f;
  }
  std::memcpy(record.data() + fields.topk_idx, idx, static_cast<size_t>(topk) * 8);
  std::memcpy(record.data() + fields.topk_weights, weights, static_cast<size_t>(topk) * 4);
}

// ---- combine ----

bool Exchange::direct() const {
  bool all = pull_;
  for_alive([&](int peer) { all = all && transport_.peer_window(peer) != nullptr; });
  return all;
}

void Exchange::combine(const Handle& handle, const CombineInput& in, Deadline deadline) {
  begin("combine");
  check_row("y", in.elements * static_cast<int64_t>(element_bytes(in.type)));
  DSK_CHECK(handle.alive == alive_,
            "handle: expected one of a dispatch with the ranks that are "
            "alive now; after recover() dispatch again");
  direct() ? combine_by_pull(handle, in, deadline) : combine_by_push(handle, in, deadline);
}

// Which of a token's rows are one node's; those of other nodes than this one are rounded.
RowGroups Exchange::nodes_of(uint64_t hosts, int32_t ranks_per_node) const {
  RowGroups groups;
  if (ranks_per_node == 0) return groups;
  int row = 0;
  for (; hosts != 0; hosts &= hosts - 1, ++row) {
    const int node = proto::node_of(std::countr_zero(hosts), ranks_per_node);
    const uint64_t rest = hosts & (hosts - 1);
    if (rest != 0 && proto::node_of(std::countr_zero(rest), ranks_per_node) == node) continue;
    groups.last |= uint64_t{1} << row;
    if (node != proto::node_of(me(), ranks_per_node)) groups.rounded |= uint64_t{1} << row;
  }
  return groups;
}

void Exchange::sum_token(const Handle& handle, const CombineInput& in, int64_t token,
                         const void* const* rows, const float* const* weights, int num_rows) {
  const auto row_bytes = in.elements * static_cast<int64_t>(element_bytes(in.type));
  Bias bias{};
  for (size_t i = 0; i < bias.size(); ++i) {
    if (in.bias[i].data == nullptr) continue;
    bias[i] = static_cast<const std::byte*>(in.bias[i].data) + token * in.bias[i].stride;
  }
  const RowGroups groups = nodes_of(handle.goes_to[static_cast<size_t>(token)], in.ranks_per_node);
  sum_rows(in.type, static_cast<std::byte*>(in.out) + token * row_bytes, rows, nullptr, num_rows,
           bias, in.elements, groups);
  if (!in.with_weights) return;
  const void* weight_rows[proto::kMaxRanks];
  std::copy(weights, weights + num_rows, weight_rows);
  sum_rows(Element::kF32, in.out_weights + token * handle.shape.topk, weight_rows, nullptr,
           num_rows, {}, handle.shape.topk, groups);
}

// Results stay where they are; the tokens' ranks read and sum them. One pass over the data.
void Exchange::combine_by_pull(const Handle& handle, const CombineInput& in, Deadline deadline) {
  const int64_t row_bytes = in.elements * static_cast<int64_t>(element_bytes(in.type));
  const int topk = handle.shape.topk;
  const bool in_place =
      in.y.stride == row_bytes && window_offset(in.y.data).has_value() && !in.with_weights;
  const int region_idx = in_place ? -1 : take_region();
  ++epoch_;
  try {
    proto::ReturnNotice notice{epoch_, 0, 0, row_bytes};
    if (in_place) {
      notice.region = *window_offset(in.y.data);
    } else {
      std::byte* to = region(region_idx);
      notice.region = *window_offset(to);
      for (int64_t i = 0; i < handle.rows; ++i) {
        stream_copy(to + i * row_bytes, static_cast<const std::byte*>(in.y.data) + i * in.y.stride,
                    static_cast<uint64_t>(row_bytes));
      }
      if (in.with_weights) {
        const uint64_t behind =
            proto::align_up(static_cast<uint64_t>(handle.rows * row_bytes), proto::kLine);
        notice.weights = notice.region + behind;
        if (handle.rows > 0) {
          std::memcpy(to + behind, in.weights, static_cast<size_t>(handle.rows * topk) * 4);
        }
      }
    }
    for_alive([&](int peer) {
      transport_.put_notify(peer, layout_.returns + static_cast<uint64_t>(me()) * proto::kLine,
                            &notice, sizeof notice, counter_index(proto::kReady, me()), epoch_);
    });
    wait_for_all(proto::kReady, epoch_, deadline);

    const std::byte* base[proto::kMaxRanks] = {};
    const float* base_weights[proto::kMaxRanks] = {};
    for_alive([&](int peer) {
      const auto* theirs = reinterpret_cast<const proto::ReturnNotice*>(
          transport_.window() + layout_.returns + static_cast<uint64_t>(peer) * proto::kLine);
      if (theirs->row_bytes != row_bytes || (theirs->weights != 0) != in.with_weights) {
        broken_ = true;
        transport_.abort(epoch_);
        fail("combine: expected the same call on every rank: rows of ", row_bytes, " bytes; rank ",
             peer, " has ", theirs->row_bytes,
             " and differs in size or in "
             "whether weights are sent back");
      }
      base[peer] = transport_.peer_window(peer) + theirs->region;
      base_weights[peer] =
          reinterpret_cast<const float*>(transport_.peer_window(peer) + theirs->weights);
    });
    for (int64_t t = 0; t < handle.tokens; ++t) {
      const void* rows[proto::kMaxRanks];
      const float* weights[proto::kMaxRanks];
      int n = 0;
      int64_t at = handle.row_begin[static_cast<size_t>(t)];
      for (uint64_t rest = handle.goes_to[static_cast<size_t>(t)]; rest != 0; rest &= rest - 1) {
        const int peer = std::countr_zero(rest);
        const int64_t row = handle.row_at[static_cast<size_t>(at++)];
        rows[n] = base[peer] + row * row_bytes;
        weights[n++] = base_weights[peer] + row * topk;
      }
      sum_token(handle, in, t, rows, weights, n);
    }
    for_alive([&](int peer) {
      transport_.fence(peer);
      transport_.notify(peer, counter_index(proto::kRead, me()), epoch_);
    });
    wait_for_all(proto::kRead, epoch_, deadline);
  } catch (...) {
    release(region_idx);
    throw;
  }
  release(region_idx);
}

// For transports that only put: results go to [rank][token] slots at the tokens' ranks, which then
// sum what they have.
void Exchange::combine_by_push(const Handle& handle, const CombineInput& in, Deadline deadline) {
  const int64_t row_bytes = in.elements * static_cast<int64_t>(element_bytes(in.type));
  const int topk = handle.shape.topk;
  const int64_t capacity = shape_.ranks * shape_.max_tokens;
  const uint64_t behind =
      proto::align_up(static_cast<uint64_t>(capacity * row_bytes), proto::kLine);
  const int region_idx = take_region();
  ++epoch_;
  try {
    proto::ReturnNotice notice{epoch_, *window_offset(region(region_idx)), 0, row_bytes};
    for_alive([&](int peer) {
      transport_.put_notify(peer, layout_.returns + static_cast<uint64_t>(me()) * proto::kLine,
                            &notice, sizeof notice, counter_index(proto::kAnnounced, me()), epoch_);
    });
    wait_for_all(proto::kAnnounced, epoch_, deadline);
    uint64_t base[proto::kMaxRanks] = {};
    for_alive([&](int peer) {
      base[peer] =
          reinterpret_cast<const proto::ReturnNotice*>(transport_.window() + layout_.returns +
                                                       static_cast<uint64_t>(peer) * proto::kLine)
              ->region;
    });
    for (int64_t i = 0; i < handle.rows; ++i) {
      const int peer = static_cast<int>(handle.source[static_cast<size_t>(2 * i)]);
      const int64_t slot = me() * shape_.max_tokens + handle.source[static_cast<size_t>(2 * i + 1)];
      transport_.put(peer, base[peer] + static_cast<uint64_t>(slot * row_bytes),
                     static_cast<const std::byte*>(in.y.data) + i * in.y.stride,
                     static_cast<uint64_t>(row_bytes));
      if (in.with_weights) {
        transport_.put(peer, base[peer] + behind + static_cast<uint64_t>(slot * topk * 4),
                       in.weights + i * topk, static_cast<uint64_t>(topk) * 4);
      }
    }
    for_alive([&](int peer) {
      transport_.fence(peer);
      transport_.notify(peer, counter_index(proto::kReady, me()), epoch_);
    });
    wait_for_all(proto::kReady, epoch_, deadline);
    const std::byte* own = region(region_idx);
    for (int64_t t = 0; t < handle.tokens; ++t) {
      const void* rows[proto::kMaxRanks];
      const float* weights[proto::kMaxRanks];
      int n = 0;
      for (uint64_t rest = handle.goes_to[static_cast<size_t>(t)]; rest != 0; rest &= rest - 1) {
        const int64_t slot = std::countr_zero(rest) * shape_.max_tokens + t;
        rows[n] = own + slot * row_bytes;
        weights[n++] = reinterpret_cast<const float*>(own + behind) + slot * topk;
      }
      sum_token(handle, in, t, rows, weights, n);
    }
  } catch (...) {
    release(region_idx);
    throw;
  }
  release(region_idx);
}

}  // namespace dsk::comm
