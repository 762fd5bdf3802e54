// Replays a recording against the clock: warps issue in order on four sub-partitions per SM,
// results come after their latency, tensor cores, special units, the shared-memory port, TMA and
// the SM's share of L2 and HBM are resources that one user at a time holds. Waits end when the
// model says that what released them in the recorded run has happened, so the recorded run's own
// order does not matter. A few CTAs stand for the grid: all SMs are taken to do the same at the
// same time.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "emu/timing/cost.hpp"
#include "emu/timing/model.hpp"
#include "emu/timing/record.hpp"

namespace dsk::emu::timing {

enum class State : u8 {
  Issue,
  Mbarrier,  // detail = shared offset
  Named,     // detail = number
  ClusterBarrier,
  Wgmma,   // waits for the tensor cores' results
  Copies,  // waits for bulk or cp.async groups
  Memory,  // waits for a load
  Result,  // waits for arithmetic
  Busy,    // another warp has the issue slot, or the pipe is full
  Fence,   // waits for its own earlier accesses
};
inline constexpr u32 kStates = 10;
const char* state_name(State s);

struct Span {
  u32 warp = 0;  // index into ClusterRecord::warps
  State state = State::Issue;
  u32 detail = 0;
  u32 pc = 0;
  double begin = 0, end = 0;
};

// Work of the tensor cores or of TMA in the first cluster.
struct UnitSpan {
  u32 operation = 0;
  double begin = 0, end = 0;
  double freed = 0;  // loads: when the place that they fill was given back
};

struct WaitTotal {
  u64 times = 0;
  double cycles = 0;
};

struct Timing {
  double cycles = 0;         // one SM, its share of the grid, without launch
  double sample_cycles = 0;  // what was simulated
  double microseconds = 0;   // the launch
  double floor_hbm_us = 0, floor_l2_us = 0, floor_tensor_us = 0;
  u32 ctas_per_sm = 1;
  double waves = 1;
  double miss = 0;                     // of the bytes asked of L2, from HBM
  double hbm_bytes = 0, l2_bytes = 0;  // the whole launch
  // Busy fractions over the simulated time; shared memory without wgmma's own operand reads.
  double tensor = 0, issue = 0, shared = 0, l2 = 0, hbm = 0, special = 0;
  std::map<std::pair<State, u32>, WaitTotal> waits;  // by state and detail, all warps of the sample
  double warp_cycles = 0;                            // of all warps of the sample
  std::string bottleneck;
  std::vector<Span> spans;
  std::vector<UnitSpan> tensor_spans, copy_spans;
  bool spans_cut = false;
};

struct ReplayOptions {
  Model model;
  u32 ctas_per_sm = 0;      // 0: from shared memory, threads and the registers as packed here
  u32 registers = 0;        // of a thread, if known
  double unique_bytes = 0;  // of the whole launch; 0: from the recording
  bool trace = false;       // keep spans of the first cluster
};

// Throws Error if the recording is empty or incomplete.
Timing replay(const Recording& recording, const ReplayOptions& options);

// Bytes that the whole launch moves, estimated from the sample.
struct GridTraffic {
  double read = 0, written = 0;                // through L2
  double unique_read = 0, unique_written = 0;  // lines touched at least once
};
GridTraffic grid_traffic(const Recording& recording);

}  // namespace dsk::emu::timing
