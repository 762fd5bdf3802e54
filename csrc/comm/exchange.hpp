// Expert-parallel dispatch and combine over any Transport: the protocol of proto/ep_epoch.hpp with
// the slots of proto/ep_layout.hpp. One Exchange per rank; its calls are collective and come in the
// same order on every rank. Not thread safe: one thread per rank.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "comm/copy.hpp"
#include "comm/transport.hpp"
#include "proto/ep_layout.hpp"
#include "proto/ep_slots.hpp"

namespace dsk::comm {

// Who waited for whom when a wait failed.
struct SilentPeer {
  int rank;
  PeerState state;
  uint64_t have, want;        // the counter waited for
  WaitNote waits;             // what the silent peer waits for itself, where it can be read
  std::vector<int> waits_on;  // ranks whose counter the silent peer lacks, where known
};
struct WaitReport {
  int rank = 0;
  std::string reason;  // "timeout", "rank 3 died", "aborted by rank 3", "rank 3 left ..."
  std::string phase;   // what was awaited, see proto::kCounterNames
  uint64_t epoch = 0;
  double waited_seconds = 0;
  std::vector<SilentPeer> silent;
  std::vector<std::vector<uint64_t>> counters;  // [kind][source], as this rank has them
};
struct WaitFailed {
  WaitReport report;
};

// Pointers into a rank's tokens. Strides in bytes.
struct Rows {
  const void* data = nullptr;
  int64_t stride = 0;
};

struct DispatchInput {
  int64_t tokens;
  proto::RowShape shape;
  Rows x;
  Rows scale;                    // data null: none; a row is shape.scale_bytes
  int64_t scale_element_stride;  // bytes between scales of one token (MN-major: not 4)
  const int64_t* topk_idx;       // [tokens, topk]
  const float* topk_weights;     // [tokens, topk] or null
};

// What a rank keeps of a dispatch to bring results back.
struct Handle {
  uint64_t epoch = 0, alive = 0;
  int64_t tokens = 0, rows = 0;
  int region = -1;
  proto::RowShape shape{};
  std::vector<uint64_t> goes_to;   // [tokens]: mask of ranks
  std::vector<int32_t> row_at;     // the row at each of those ranks, token by token
  std::vector<int64_t> row_begin;  // [tokens + 1] into row_at
  std::vector<int64_t> source;     // [rows, 2] of the rows received
  std::vector<int64_t> rows_from;  // [ranks]
  std::vector<int64_t> mentions;   // [local experts]: how often received rows name each
};

struct CombineInput {
  Element type;
  int64_t elements;                // per row
  Rows y;                          // handle.rows rows
  bool with_weights = false;       // sum weights back, too
  const float* weights = nullptr;  // [rows, topk]
  Rows bias[2];                    // [tokens], or data null
  int32_t ranks_per_node = 0;      // orders the sums: a node's rows first; 0: one node
  void* out = nullptr;             // [tokens, elements], contiguous
  float* out_weights = nullptr;    // [tokens, topk]
};

// Low-latency mode.
struct LowLatencyInput {
  int64_t tokens;
  proto::RowShape shape;
  Rows x, scale;
  int64_t scale_element_stride;
  const int64_t* topk_idx;  // [tokens, topk]
};
struct LowLatencyOutput {
  // [local experts, ranks * max_tokens] rows, packed per expert
  std::byte* x;
  float* scale;  // any strides, in elements
  int64_t scale_row_stride, scale_column_stride, scale_expert_stride;
  int32_t* count;         // [local experts]
  int64_t* source;        // source rank * max_tokens + source token, -1 behind count
  int64_t* layout_range;  // [local experts, ranks]: first row << 32 | rows
};
struct LowLatencyHandle {
  uint64_t call = 0, alive = 0;
  int64_t tokens = 0;
  int topk = 0;
  bool received = false;
  std::vector<int64_t> topk_idx;      // [tokens, topk], -1 where nothing was sent
  std::vector<uint64_t> slot_of_row;  // [local experts, ranks * max_tokens]: token << 32 | slot
  std::vector<int32_t> rank_of_row;
  std::vector<int32_t> count;
};

// Scales of one token after another as contiguous rows. MN-major scales are transposed a few tokens
// at a time: column by column they would touch one cache line per scale and token, all in one set.
class ScaleReader {
 public:
  ScaleReader(const Rows& scale, int64_t element_stride, int64_t bytes, int64_t tokens);
  const void* row(int64_t token);

 private:
  static constexpr int64_t kBlock = 16;
  const std::byte* data_;
  int64_t stride_, element_stride_, bytes_, tokens_, begin_ = -kBlock;
  std::vector<std::byte> block_;
};

class Exchange {
 public:
  Exchange(Transport& transport, const proto::GroupShape& shape, const proto::Experts& experts,
           bool pull = true);

  const proto::GroupShape& shape() const { return shape_; }
  const proto::Experts& experts() const { return experts_; }
  const proto::WindowLayout& layout() const { return layout_; }
  uint64_t alive() const { return alive_; }
  bool broken() const { return broken_; }
  // After a failure, and after the transport has moved to fresh memory.
  void restart(uint64_t alive);

  // Send every token once to each rank that hosts an expert it names; returns where the rows lie:
  // region `handle.region` of the window. The region stays taken until release().
  Handle dispatch(const DispatchInput& in, Deadline deadline);
  std::byte* region(int index);
  int take_region();
  void release(int index);
  // Which regions are taken; outlives the exchange, for views that are dropped late.
  std::shared_ptr<std::atomic<bool>[]> taken() const { return taken_; }
  // Whether a pointer lies in one of our regions: results written there are read in place.
  std::optional<uint64_t> window_offset(const void* pointer) const;

  void combine(const Handle& handle, const CombineInput& in, Deadline deadline);

  LowLatencyHandle low_latency_send(const LowLatencyInput& in, Deadline deadline);
  void low_latency_receive(LowLatencyHandle& handle, const proto::RowShape& shape,
                           const LowLatencyOutput& out, Deadline deadline);
  // y: [local experts, ranks * max_tokens] rows.
  uint64_t low_latency_return(const LowLatencyHandle& handle, Element type, int64_t elements,
                              const Rows& y, int64_t y_expert_stride, Deadline deadline);
  void low_latency_reduce(const LowLatencyHandle& handle, uint64_t call, Element type,
                          int64_t elements, const float* topk_weights, void* out,
                          Deadline deadline);

 private:
  Transport& transport_;
  proto::GroupShape shape_;
  proto::Experts experts_;
  proto::WindowLayout layout_;
  proto::LowLatencyLayout low_;
  bool pull_;
  uint64_t alive_;
  bool broken_ = false;
  uint64_t epoch_ = 0, low_call_ = 0, low_received_ = 0, low_return_ = 0, low_reduced_ = 0;
  std::shared_ptr<std::atomic<bool>[]> taken_;

  int me() const { return transport_.rank(); }
  // Each rank starts with its right neighbour, so that not all write to rank 0 at once.
  template <typename Body>
  void for_alive(Body&& body) const {
    for (int i = 1; i <= shape_.ranks; ++i) {
      const int peer = (me() + i) % shape_.ranks;
      if (proto::is_alive(alive_, peer)) body(peer);
    }
  }
  void wait_for_all(proto::Counter kind, uint64_t value, Deadline deadline);
  [[noreturn]] void give_up(proto::Counter kind, uint64_t value, Wait why, int peer,
                            Clock::time_point since);
  void begin(const char* call);
  void check_row(const char* name, int64_t row_bytes) const;
  void plan(const DispatchInput& in, Handle& handle, proto::Notice& notice,
            std::vector<uint32_t>& mentions) const;
  void send_notices(const proto::Notice& notice, const std::vector<uint32_t>& mentions);
  std::vector<const proto::Notice*> read_notices(const proto::Notice& mine, Deadline deadline);
  void send_rows(const DispatchInput& in, Handle& handle,
                 const std::vector<const proto::Notice*>& notices);
  void address_record(const DispatchInput& in, int64_t token, int peer,
                      const proto::RegionLayout& fields, std::vector<std::byte>& record) const;
  bool direct() const;  // every peer's window can be read
  void combine_by_pull(const Handle& handle, const CombineInput& in, Deadline deadline);
  void combine_by_push(const Handle& handle, const CombineInput& in, Deadline deadline);
  RowGroups nodes_of(uint64_t hosts, int32_t ranks_per_node) const;
  void sum_token(const Handle& handle, const CombineInput& in, int64_t token,
                 const void* const* rows, const float* const* weights, int num_rows);
  void pack_expert(LowLatencyHandle& handle, const proto::RowShape& shape,
                   const LowLatencyOutput& out, int expert);
};

}  // namespace dsk::comm
