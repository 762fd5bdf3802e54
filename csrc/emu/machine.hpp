// The state of a running grid: grid -> clusters -> CTAs -> warps -> splits.
//
// A warp's lanes run together until they diverge; then each group of lanes is a Split with its own
// program counter. The split with the smallest pc runs first and splits meeting at one pc merge. A
// split that cannot go on is only state (Wait and what for): nothing here is a host thread. All
// CTAs of a cluster run on one host thread at a time, so nothing inside a cluster needs a lock.
#pragma once

#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "emu/error.hpp"
#include "emu/memory.hpp"
#include "emu/observer.hpp"
#include "emu/program.hpp"
#include "emu/types.hpp"

namespace dsk::emu {

enum class Wait : u8 {
  None,
  Converge,        // an instruction needs more lanes of the warp
  Barrier,         // id, value = generation that must end
  ClusterBarrier,  // value = phase that must end
  Mbarrier,        // id = rank, address = offset, value = phase that must end
  Wgmma,           // value = groups that must be complete
  CpAsync,         // value = groups that may stay pending
  Bulk,            // value = groups that may stay pending
  BulkRead,
  Grid,  // griddepcontrol.wait
};

struct Split {
  u32 pc = 0;
  u32 mask = 0;
  Wait wait = Wait::None;
  bool timed_out = false;  // a try_wait's time limit: the next look answers, whatever it sees
  u32 id = 0;
  u32 address = 0;
  u64 value = 0;
};

// A copy or reduction on its way. `read` gathers the source, `write` delivers it; the machine calls
// them late, and under a seed in random order. Both may throw HazardError.
struct AsyncOp {
  enum class Stage : u8 { Issued, Read, Done };
  AsyncInfo info;
  Stage stage = Stage::Issued;
  u64 born = 0;  // Cluster::rounds at issue
  std::function<void(AsyncOp&)> read, write;
  std::vector<u8> buffer;
};
using AsyncPtr = std::shared_ptr<AsyncOp>;

// Per-thread groups (cp.async, bulk): `mask` names the lanes that committed the group.
struct AsyncGroup {
  u32 mask = 0;
  std::vector<AsyncPtr> ops;
};

struct GroupQueue {
  std::vector<AsyncPtr> open;
  std::deque<AsyncGroup> committed;
  void commit(u32 mask);
  // Whether, for every lane of `mask`, all but the newest `pending` groups reached `stage`.
  bool reached(u32 mask, u64 pending, AsyncOp::Stage stage);
};

// One wgmma.mma_async as seen by one warp of the warpgroup: its 16 rows.
struct WgmmaOp {
  const Inst* inst = nullptr;
  u32 pc = 0;
  u64 id = 0;
  u64 desc_a = 0, desc_b = 0;
  bool accumulate = true;
  std::vector<u32> a_regs;  // A fragments captured at issue: [register][lane]
};

// Whether a warp uses what its wgmmas computed. A tile of fewer rows than the instruction's 64 lets
// some warps compute from bytes that are none of the tile's, where other agents may be writing: a
// race that matters only if the results are used.
class ResultUse {
 public:
  // A wgmma whose results may be such is issued.
  void issue(const std::vector<u32>& registers, u64 id, bool accumulate);
  // The program reads and writes registers, the next wgmma being `id`. Returns the race that a
  // result which is read comes from, if any.
  const Hazard* touch(const std::vector<u32>& reads, const std::vector<u32>& writes, u64 id);
  // What wgmma `id` puts in these registers comes from a race.
  void distrust(const std::vector<u32>& registers, u64 id, const Hazard& hazard);
  // Whether anything in these registers has been read since wgmma `id` was issued.
  bool used_since(const std::vector<u32>& registers, u64 id) const;
  // Whether touch() must be told.
  bool watches() const { return unread_ != 0 || num_suspect_ != 0; }

 private:
  struct Tile {  // the accumulators of some wgmma
    const std::vector<u32>* registers = nullptr;
    u64 begun = 0;  // the last wgmma that did not accumulate
    u64 used = 0;   // the wgmma that came next when one was read last
    bool unread = false;
  };
  std::vector<Tile> tiles_;
  u32 unread_ = 0;  // tiles
  std::vector<Hazard> suspects_;
  std::vector<u8> suspect_;  // per virtual register: 1 + the place of its hazard in suspects_
  std::size_t num_suspect_ = 0;

  void trust(const std::vector<u32>& registers);
};

struct WgmmaState {
  std::vector<WgmmaOp> open;
  std::deque<std::vector<WgmmaOp>> groups;  // committed, not yet complete
  u64 committed = 0, completed = 0;         // groups
  bool fenced = false;                      // any wgmma.fence yet
  std::vector<u8> dirty;     // per virtual register: written since the last wgmma.fence
  std::vector<u16> pending;  // per virtual register: wgmmas in flight that write it
  std::vector<u16> reading;  // per virtual register: wgmmas in flight that read it (A fragments)
  ResultUse use;
  bool idle() const { return open.empty() && groups.empty() && !use.watches(); }
};

struct Warp {
  Cta* cta = nullptr;
  u8* regs = nullptr;  // register file: 32 lanes per register, see Inst
  u32 index = 0;       // in the CTA
  u32 live = 0;        // lanes that exist
  u32 exited = 0;      // lanes that left
  bool done = false;
  std::vector<Split> splits;
  u64 turn = 0;  // rotates the choice among splits that spin
  u64 instructions = 0, thread_instructions = 0;
  AddressCache cache;
  std::unique_ptr<u8[]> local;  // local_stride bytes per lane
  u32 local_stride = 0;
  GroupQueue cp_async, bulk;
  WgmmaState wgmma;
  u64 cluster_phase = 0;    // cluster-barrier phase joined by the last arrive
  u32 cluster_arrived = 0;  // lanes between arrive and wait
  u32 carry = 0;            // the condition code of add.cc and its kin, one bit per lane
  u32 current_pc = 0;       // of the instruction being executed, for reports
  bool copies = false;      // has issued bulk or tensor copies

  template <class T>
  T* reg(u32 offset) {
    return reinterpret_cast<T*>(regs + offset);
  }
  u32& pred(u32 offset) { return *reinterpret_cast<u32*>(regs + offset); }
  u32 active_lanes() const { return live & ~exited; }
};

struct NamedBarrier {
  u32 expected = 0;  // threads; 0 until the first arrival of a generation
  bool whole_cta = false;
  u32 arrived = 0;
  u64 generation = 0;
  u32 last_pc = 0, last_warp = 0;
  u32 warps = 0;  // that have arrived, a bit each
  // bar.red of the generation under way, and the finished one's results.
  u32 and_all = 1, or_any = 0, popc = 0;
  u32 result_and = 0, result_or = 0, result_popc = 0;
};

struct Mbarrier {
  u32 offset = 0;
  u32 count = 0;
  i64 pending = 0;
  i64 tx = 0;
  u64 phase = 0;   // phases completed
  u64 mirror = 0;  // what the 8 bytes in shared memory must hold
  u32 init_pc = 0;
  u32 last_pc = 0, last_warp = 0;  // who touched it last
};

struct Cta {
  Cluster* cluster = nullptr;
  u32 rank = 0;    // in the cluster
  u32 linear = 0;  // in the grid
  Dim3 index{0, 0, 0};
  u32 sm = 0;
  u8* shared = nullptr;  // indexed by offset, the reserved KiB included
  u32 shared_bytes = 0;
  u32 shared_base = 0;     // rank << kRankShift
  u32 dynamic_offset = 0;  // where the dynamic part starts
  std::vector<std::unique_ptr<Warp>> warps;
  u32 warps_done = 0;
  NamedBarrier barriers[16];
  std::vector<Mbarrier> mbarriers;
  bool launched_dependents = false;
  std::vector<std::shared_ptr<void>> storage;

  Mbarrier* find_mbarrier(u32 offset);
  bool done() const { return warps_done == warps.size(); }
};

struct Cluster {
  Grid* grid = nullptr;
  u32 linear = 0;
  std::vector<std::unique_ptr<Cta>> ctas;
  std::vector<std::unique_ptr<ClusterObserver>> observers;
  bool watch_instructions = false;
  bool check = true;  // hazards that need bookkeeping
  std::deque<AsyncPtr> async;
  u64 next_async_id = 1;
  // Cluster barrier.
  u64 barrier_phase = 0;
  u32 barrier_arrived = 0;
  // Anything that another agent could be waiting for counts as a change: without changes there is
  // no progress, and a cluster without progress is either spinning on the outside or stuck.
  u64 changes = 0;
  u64 rounds = 0;
  u64 rng = 0;  // 0 = not seeded: oldest first, as late as possible
  u32 quiet_rounds = 0;
  std::vector<u32> loose_masks;  // pc of instructions whose member masks were found too small

  u32 random(u32 bound);  // uniform below `bound`; only when seeded
  bool done() const;
};

// Whether `mask` must be looked at by observers at all; the hot paths ask this first.
inline bool watched(const Warp& w) { return !w.cta->cluster->observers.empty(); }

// Throws HazardError for `w`, located at the instruction it is executing.
[[noreturn]] void fail(const Warp& w, u32 lanes, const char* kind, const std::string& message);
Hazard make_hazard(const Warp& w, u32 pc, u32 lanes, const char* kind, const std::string& message);
// A finding that stops nothing, unless the launch is strict (then HazardError). Goes to the
// statistics; thread-safe.
void note_formal(Grid& grid, Hazard hazard);
void notify(const Warp& w, SyncKind kind, u32 mask, u64 a = 0, u64 b = 0, u64 c = 0);

// mbarrier operations on (CTA, offset); `w` is whom to blame.
Mbarrier& mbarrier_at(Warp& w, Cta& cta, u32 offset, u32 lanes, const char* what);
void mbarrier_init(Warp& w, Cta& cta, u32 offset, u32 count, u32 lanes);
void mbarrier_inval(Warp& w, Cta& cta, u32 offset, u32 lanes);
void mbarrier_update(Warp& w, Cta& cta, Mbarrier& bar, i64 arrivals, i64 expect_tx, i64 complete_tx,
                     u32 lanes, const char* what);

// Issues an asynchronous operation; returns it so that groups can hold it.
AsyncPtr issue_async(Warp& w, u32 lane, AsyncKind kind, u64 bytes,
                     const std::vector<Footprint>& footprint, std::function<void(AsyncOp&)> read,
                     std::function<void(AsyncOp&)> write, u64 map = 0);

// Whether what a split waits for has come.
bool wait_over(Warp& w, Split& s);
// Completes wgmma groups of the warpgroup of `w` until `groups` are complete in each warp.
void drain_wgmma(Warp& w, u64 groups);
// Tells the observers that a CTA's warp left; releases barriers that only waited for it.
void on_warp_exit(Warp& w);

enum class Slice : u8 {
  Done,      // every warp of the cluster has exited
  Progress,  // something changed; call again
  Idle,      // polling or waiting for the outside; nothing changed
};
// Runs a cluster until it is done, the budget of warp-instructions is used up, or nothing changes.
// Throws DeadlockError when no outside event could help, HazardError, Error.
Slice run_cluster(Cluster& cluster, u64 budget);

// The report of every warp that has not exited.
std::vector<StuckWarp> describe(const Cluster& cluster);

}  // namespace dsk::emu
