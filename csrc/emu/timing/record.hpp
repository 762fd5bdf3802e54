// What a sample of clusters did, compact enough to keep: per warp the instructions in the order in
// which they ran, and what each of them meant to the machine (bank conflicts, sectors, barriers
// joined and passed, asynchronous operations). The timing model replays it (replay.hpp), as often
// as one likes and under other assumptions; the counts of one launch come from it directly.
//
// Nothing here knows a latency. Order between agents is kept as dependencies (nodes): a wait names
// the barrier phase that released it, and a phase names everybody who contributed, so a replay may
// reorder whatever the run's own schedule did not force.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "emu/observer.hpp"
#include "emu/system.hpp"

namespace dsk::emu::timing {

inline constexpr u32 kNone = 0xffffffffu;

// One executed instruction of a warp: its pc, and flags.
inline constexpr u32 kPcMask = 0x00ffffffu;
inline constexpr u32 kResumed = 0x40000000u;  // the same instruction again, after it had waited

enum class Act : u8 {
  Shared,       // a = wavefronts (cycles of the shared-memory port)
  Remote,       // shared memory of another CTA: a = bytes
  Load,         // global: a = sectors that miss the L1, b = sectors
  Store,        // global: a = sectors
  Atomic,       // global: a = sectors
  Issue,        // a = operation
  Arrive,       // a = node
  Pass,         // a = node
  WgmmaCommit,  // a = groups committed so far
  WgmmaWait,    // a = groups that must be complete
  BulkCommit,
  BulkWait,  // a = groups that may stay pending
  BulkWaitRead,
  CpCommit,
  CpWait,
};

struct Action {
  u32 event = 0;  // index into WarpRecord::events
  Act act = Act::Shared;
  u32 a = 0, b = 0;
};

struct WarpRecord {
  u32 cta = 0, index = 0;
  std::vector<u32> events;
  std::vector<Action> actions;  // by event
};

// A TMA copy, bulk copy, cp.async or wgmma.
struct Operation {
  AsyncKind kind = AsyncKind::BulkLoad;
  u32 warp = 0;  // index into ClusterRecord::warps
  u32 pc = 0;
  u32 global_bytes = 0;    // read or written in global memory
  u32 shared_bytes = 0;    // written to (or read from) one CTA's shared memory
  u32 shared_offset = 0;   // where they lie
  u32 ranks = 0;           // CTAs whose shared memory is written
  std::vector<u32> nodes;  // barrier phases that its landing contributes to
};

// One phase of an mbarrier, of a named barrier or of the cluster barrier.
struct Node {
  enum class Kind : u8 { Mbarrier, Named, Cluster } kind = Kind::Mbarrier;
  u32 rank = 0;   // CTA
  u32 place = 0;  // shared offset, or the barrier's number
  u32 contributions = 0;
};

struct ClusterRecord {
  u32 linear = 0;
  std::vector<WarpRecord> warps;  // CTA by CTA
  std::vector<Operation> operations;
  std::vector<Node> nodes;
};

// Counts by instruction (pc).
struct PcCount {
  u64 executed = 0;       // warp-instructions
  u64 requests = 0;       // memory instructions that touched memory
  u64 wavefronts = 0;     // shared memory: cycles taken
  u64 least = 0;          // shared memory: cycles without conflicts
  u64 sectors = 0;        // global memory: 32-byte sectors touched
  u64 least_sectors = 0;  // the fewest that hold the bytes asked for
  u32 worst = 0;          // most wavefronts of one request
};

// Traffic with one allocation; lines of 128 bytes.
struct Traffic {
  std::string name;
  u64 base = 0, bytes = 0;
  u64 read = 0, written = 0;  // through L2
  std::vector<bool> read_lines, written_lines;
};

struct Recording {
  std::shared_ptr<const Module> module;
  const Program* program = nullptr;
  LaunchConfig config;
  u32 num_sms = 132;
  u32 shared_bytes = 0;
  u32 clusters_total = 0;
  std::vector<u32> sample;  // clusters recorded, by number; empty: all
  bool complete = false;    // the grid ended
  LaunchStats launch;
  std::vector<ClusterRecord> clusters;  // the sample
  std::vector<PcCount> counts;
  std::map<u64, Traffic> traffic;
  u64 shared_read = 0, shared_written = 0, remote = 0, wgmma_shared = 0, l1_hits = 0;
  std::mutex mutex;  // recorders of concurrent clusters

  double scale() const;  // clusters of the grid for each one recorded
};

// The clusters to run: `wanted` of `total`, evenly spread, the first among them. 0 = all.
std::vector<u32> sample_of(u32 total, u32 wanted);

std::shared_ptr<Observer> make_recorder(std::shared_ptr<Recording> into);

}  // namespace dsk::emu::timing
