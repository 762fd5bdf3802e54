// Who touched each byte of a CTA's shared memory last: one record per 16 bytes, refined to 4
// records of 4 bytes where accesses are smaller than that.
#pragma once

#include <vector>

#include "emu/check/vector_clock.hpp"
#include "emu/observer.hpp"

namespace dsk::emu::check {

// One access as the shadow remembers it.
struct Touch {
  Epoch when;
  u32 pc = 0;
  u16 bytes = 0;        // mask within the record's 16 (or 4) bytes
  bool async = false;   // by the asynchronous proxy (TMA, wgmma)
  bool strong = false;  // atomic, volatile, relaxed, acquire or release: may meet its like
};

struct Record {
  Touch write;
  std::vector<Touch> reads;  // since the last write; one an agent
};

// What is wrong between an earlier access and the one being made.
enum class Conflict : u8 {
  Race,           // nothing orders them, and at least one writes
  UnfencedWrite,  // ordered, but a generic write meets the asynchronous proxy without its fence
  UnfencedRead,   // the same for a generic read before an asynchronous write: formal only
};

struct Finding {
  Conflict conflict = Conflict::Race;
  Touch earlier;
  bool earlier_wrote = false;
  u32 offset = 0;  // shared-memory offset of the first byte concerned
};

class Shadow {
 public:
  explicit Shadow(u32 bytes);

  // Records an access to [offset, offset + bytes) by an agent that knows `knowledge`, and appends
  // what it conflicts with to `findings` (at most one finding an agent and call).
  void access(AccessKind kind, const Touch& touch, u32 offset, u32 bytes,
              const Knowledge& knowledge, std::vector<Finding>& findings);

 private:
  static constexpr u32 kCoarse = 16;
  static constexpr u32 kFine = 4;

  struct Granule {
    Record whole;
    std::vector<Record> parts;  // empty, or kCoarse / kFine of them
  };

  void touch_record(Record& record, AccessKind kind, const Touch& touch, u32 offset,
                    const Knowledge& knowledge, std::vector<Finding>& findings);
  void touch_parts(Granule& granule, AccessKind kind, const Touch& touch, u32 base, u32 mask,
                   const Knowledge& knowledge, std::vector<Finding>& findings);

  std::vector<Granule> granules_;
};

}  // namespace dsk::emu::check
