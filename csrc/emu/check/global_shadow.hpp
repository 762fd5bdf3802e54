// Who touched each byte of global memory last. A page of 4 KiB is a sorted list of spans, each with
// its last write and the reads since; spans split where accesses overlap them in part, and a write
// makes one of those it covers. Memory that nobody has written since everything was last in order
// (a GEMM's operands) needs none of that: its reads are only noted, a box of rows as one note, and
// the notes are spread over pages when the first write comes.
#pragma once

#include <atomic>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "emu/check/words.hpp"
#include "emu/system.hpp"

namespace dsk::emu::check {

// Outlive grids and clusters: later accesses are compared with theirs.
struct GridRecord {
  u64 stream = 0;
  u32 device = 0;
  bool programmatic = false;
  GridOrder order;
  std::shared_ptr<const Module> module;
  const Program* program = nullptr;
};

struct ClusterRecord {
  Home home;  // rank 0
  std::shared_ptr<const GridRecord> grid;
  Agent predecessor = 0;  // the agent whose clock 1 is griddepcontrol.wait
  std::vector<Dim3> blocks;
  // Writes to tensor maps up to here are published by fence.proxy.tensormap.release.
  mutable std::mutex mutex;
  mutable VectorClock maps_published;
};

struct GlobalTouch {
  const ClusterRecord* who = nullptr;  // null: nobody
  Agent agent = 0;
  u32 clock = 0;
  u32 pc = 0;
  u16 warp = 0;
  u8 rank = 0;
  Scope scope = Scope::None;
  bool strong = false;
  bool async = false;
};

// Who makes an access, and all that is known there.
struct Asker {
  const ClusterRecord& self;
  const Knowledge& knowledge;
  const ForeignPtr& refused;
};

enum class GlobalConflict : u8 {
  Race,
  Scope,           // both strong, but the scope of one does not include the other
  ReleaseScope,    // a release or acquire in between had too narrow a scope
  GridDependency,  // the other is of the grid that griddepcontrol.wait waits for
  UnfencedWrite,   // ordered, but no proxy fence
  UnfencedRead,    // formal
  Uninitialized,   // formal
};

struct GlobalFinding {
  GlobalConflict conflict = GlobalConflict::Race;
  GlobalTouch earlier;
  bool earlier_wrote = false;
  u64 address = 0;
};
using GlobalFindings = std::vector<GlobalFinding>;

bool knows(const Asker& asker, const GlobalTouch& touch);
// Whether the touch's grid was over before the asker began, by the order of streams.
bool grid_is_over(const Asker& asker, const GlobalTouch& touch);

// `rows` rows of `bytes` bytes, `pitch` apart.
struct Box {
  u64 address = 0;
  u64 bytes = 0;
  u64 pitch = 0;
  u32 rows = 1;
};

// The bytes of a device allocation that were ever written.
class InitBits {
 public:
  InitBits(u64 base, u64 bytes);
  void mark(u64 address, u64 bytes) {
    if (!has(address, bytes)) mark_all(address, bytes);
  }
  void trust() { trusted_ = true; }  // all bytes count as written
  // The first byte of [address, address + bytes) that was never written, or 0.
  u64 first_unwritten(u64 address, u64 bytes) const {
    return has(address, bytes) ? 0 : find_unwritten(address, bytes);
  }

 private:
  // Most accesses lie in one word whose bits are set.
  bool has(u64 address, u64 bytes) const {
    const u64 at = address - base_, bit = at % 64;
    if (bit + bytes > 64 || bytes == 0) return false;
    const u64 mask = (~u64{0} >> (64 - bytes)) << bit;
    return (words_[at / 64].load(std::memory_order_relaxed) & mask) == mask;
  }
  void mark_all(u64 address, u64 bytes);
  u64 find_unwritten(u64 address, u64 bytes) const;
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  u64 base_, bytes_;
  std::atomic<bool> trusted_{false};
  std::unique_ptr<std::atomic<u64>[], Free> words_;
};

// One allocation, or a part of one.
class Region {
 public:
  Region(u64 base, u64 end, std::shared_ptr<InitBits> init)
      : base(base), end(end), init_(std::move(init)) {}
  const u64 base, end;

  // The box lies inside. Thread-safe.
  void access(AccessKind kind, const GlobalTouch& touch, const Box& box, const Asker& asker,
              GlobalFindings& findings);
  GlobalTouch last_write(u64 address);

 private:
  static constexpr u32 kPageBits = 12;
  static constexpr u32 kPage = 1u << kPageBits;
  static constexpr u32 kStripes = 16;
  static constexpr std::size_t kMaxNotes = 1 << 18;

  struct Span {
    u16 begin = 0, end = 0;
    GlobalTouch write;
    std::vector<GlobalTouch> reads;
  };
  using Page = std::vector<Span>;
  struct Stripe {
    std::mutex mutex;
    std::unordered_map<u64, Page> pages;
  };
  struct Note {
    GlobalTouch touch;
    Box box;
  };

  bool note_read(const GlobalTouch& touch, const Box& box);
  void begin_writing();
  void access_pages(AccessKind kind, const GlobalTouch& touch, u64 address, u64 bytes,
                    const Asker* asker, GlobalFindings& findings);
  // A null asker: reads noted earlier.
  static void read_page(Page& page, u32 begin, u32 end, u64 base, const GlobalTouch& touch,
                        const Asker* asker, GlobalFindings& findings);
  static void write_page(Page& page, u32 begin, u32 end, u64 base, const GlobalTouch& touch,
                         const Asker& asker, GlobalFindings& findings);
  static Page::iterator split(Page& page, Page::iterator span, u32 at);

  std::shared_ptr<InitBits> init_;
  std::atomic<bool> written_{false};
  std::mutex notes_mutex_;
  std::vector<Note> notes_;
  Stripe stripes_[kStripes];
};

}  // namespace dsk::emu::check
