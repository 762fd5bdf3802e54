// Parameters of the expert-parallel kernels: the group, as every kernel of it sees it, and what
// each call moves. The layout of a window is proto/ep_layout.hpp's, on every transport.
#pragma once

#include <cstdint>

#include "proto/ep_layout.hpp"
#include "proto/ep_slots.hpp"

namespace dsk {

// Where a kernel says that it gave up; all zero: it did not. Zeroed by the host before a launch.
struct EpStatus {
  uint32_t failed;   // 1
  uint32_t counter;  // proto::Counter that was awaited
  int32_t source;    // the rank that did not raise it
  uint32_t call;     // the value awaited, low word
};

// What is counted apart: normal calls (dispatch and combine in one row), and each of the launches
// of the low-latency mode.
enum EpKind : int32_t {
  kEpNormal,
  kEpLowSend,
  kEpLowReceive,
  kEpLowReturn,
  kEpLowReduce,
  kEpKinds
};
constexpr int kEpPhases = 3;  // where the CTAs of a launch meet, leaving it among them

// A rank's own memory of its calls. Launches count them, so a launch's parameters do not say which
// call it is, nor who is alive: the very same launch can be replayed, by a CUDA graph for one.
struct EpControl {
  uint64_t alive;  // ranks that take part; the host changes it while no launch is under way
  uint64_t calls[kEpKinds];                // made so far
  uint32_t arrivals[kEpKinds][kEpPhases];  // of CTAs; zero between launches
};

struct EpGroup {
  proto::GroupShape shape;
  proto::Experts experts;
  int32_t rank;
  uint32_t max_polls;  // of one wait, about 100 ns each
  // Peer memory: windows[r] and signals[r] (kCounterSlots words) of every rank, ours among them.
  uint8_t* windows[proto::kMaxRanks];
  uint64_t* signals[proto::kMaxRanks];
  EpStatus* status;
  EpControl* control;
};

struct EpDispatchParams {
  EpGroup group;
  proto::RowShape row;
  int32_t tokens;
  const uint8_t* x;           // [tokens, row.row_bytes], row stride ld_x bytes, 16-byte aligned
  int64_t ld_x;               // bytes
  const float* scale;         // [tokens, row.scale_bytes / 4] or null
  int64_t scale_row;          // floats between two tokens' scales
  int64_t scale_column;       // floats between two scales of a token
  const int64_t* topk_idx;    // [tokens, topk]
  const float* topk_weights;  // [tokens, topk] or null
  uint64_t region;            // offset of our receive region in our window
  int32_t whole_region;       // rows behind the last name no expert (-1)
  int32_t ranks_per_node;     // 0: one node
  uint64_t forward;           // several nodes: offset of the region to forward from, in all windows
  int32_t*
      forward_of;  // several nodes: out [tokens, nodes], place among those sent there, -1: none
  int32_t*
      forwarded;  // several nodes: out [nodes, max_tokens, ranks_per_node], see EpCombineParams
  int32_t* num_forwarded;  // several nodes: out [nodes]
  int32_t* row_of;         // out [tokens, ranks]: the token's row at each rank, -1: none
  int32_t* place_of;       // scratch [tokens, ranks]: the same, among the rows from this rank
  uint32_t* rows_to;       // scratch [ranks]
  uint32_t* mentions;      // scratch [experts]
  int32_t* received;       // out [1 + local experts]: rows, then mentions of each expert
};

struct EpCombineParams {
  EpGroup group;
  int32_t tokens;
  int32_t topk;
  int32_t elements;  // of a row; bf16, a multiple of 8
  int32_t with_weights;
  uint64_t results;        // offset of our results [rows, elements] bf16 in our window
  uint64_t weights;        // offset of fp32 [rows, topk] in our window
  const int32_t* row_of;   // [tokens, ranks], of the dispatch
  int32_t ranks_per_node;  // 0: one node
  uint64_t partial;  // several nodes: offset of the region for sums of other nodes, everywhere
  const int32_t* forward_of;  // several nodes: [tokens, nodes], of the dispatch
  const int32_t* forwarded;   // several nodes: [nodes, max_tokens, ranks_per_node], the tokens that
                              // this rank passed on for each node: their rows here, -1: none
  const int32_t* num_forwarded;  // several nodes: [nodes]
  const uint8_t* bias;           // [tokens, elements] bf16 or null
  uint8_t* out;                  // [tokens, elements] bf16
  float* out_weights;            // [tokens, topk]
};

struct EpLowSendParams {
  EpGroup group;
  proto::RowShape row;  // of a message: e4m3 and scales, or bf16 and none
  int32_t tokens;
  int32_t elements;
  int32_t ue8m0;            // scales are powers of two
  const uint8_t* x;         // [tokens, elements] bf16, contiguous
  const int64_t* topk_idx;  // [tokens, topk]
};

constexpr int kEpReceiveThreads = 512;  // of a CTA

struct EpLowReceiveParams {
  EpGroup group;
  proto::RowShape row;
  uint8_t* x;    // out [local experts, ranks * max_tokens, row_bytes]
  float* scale;  // out, MN-major: [local experts][scales][ld_scale]
  int64_t ld_scale;
  int32_t* count;         // out [local experts]
  int64_t* source;        // out [local experts, ranks * max_tokens], -1 behind count
  int64_t* layout_range;  // out [local experts, ranks]
  uint64_t* words;        // out [local experts, ranks * max_tokens]: token << 32 | slot
  int32_t* arrived;  // out [local experts], zero: 1 + rows of an expert once all are there, for a
                     // grouped GEMM that runs at the same time (tile/arrival.cuh); or null
};

struct EpLowReturnParams {
  EpGroup group;
  int64_t row_bytes;
  const uint8_t* y;             // [local experts, ranks * max_tokens, row_bytes]
  const int64_t* layout_range;  // [local experts, ranks]
  const uint64_t* words;        // [local experts, ranks * max_tokens]
};

struct EpLowReduceParams {
  EpGroup group;
  int32_t tokens;
  int32_t topk;
  int32_t elements;           // bf16
  const int64_t* topk_idx;    // [tokens, topk]
  const float* topk_weights;  // [tokens, topk]
  uint8_t* out;               // [tokens, elements] bf16
};

}  // namespace dsk
