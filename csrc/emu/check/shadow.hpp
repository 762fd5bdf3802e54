// Who touched each byte of a CTA's shared memory last.
//
// Every 4-byte word has a state: the writes that its bytes hold and the reads since. Words that
// share a history share the state, so a word is only the number of one, and an access to a run of
// words in equal states decides once what conflicts and what the next state is, then overwrites a
// run of numbers. Tiles that TMA writes and wgmma reads are a handful of states at any time.
// States are counted by the words in them and reused when none is left.
//
// Where in the program a warp made an access is kept beside the states, for each word's last write
// and last read: accesses of one warp between two synchronisations are alike but for that. Of the
// reads before the last one a report may therefore name another of the same warp and interval.
#pragma once

#include <vector>

#include "emu/check/vector_clock.hpp"
#include "emu/observer.hpp"

namespace dsk::emu::check {

// One access as the shadow remembers it.
struct Touch {
  Epoch when;
  u32 pc = 0;
  u8 bytes = 0;         // mask within the word; filled in by the shadow
  bool async = false;   // by the asynchronous proxy (TMA, wgmma)
  bool strong = false;  // atomic, volatile, relaxed, acquire or release: may meet its like
  bool matrix = false;  // by wgmma
  u32 rows = 0;         // the wgmma that reads rows of A which the first warp does not; 0: none
};

// What is wrong between an earlier access and the one being made.
enum class Conflict : u8 {
  Race,           // nothing orders them, and at least one writes
  UnfencedWrite,  // ordered, but a generic write meets the asynchronous proxy without its fence
  UnfencedRead,   // the same for a generic read before an asynchronous write: formal only
  DrainedWrite,   // wgmma reads what was written, unfenced, two CTA barriers ago: formal only
};

struct Finding {
  Conflict conflict = Conflict::Race;
  Touch earlier;
  bool earlier_wrote = false;
  u32 rows = 0;    // what is read, now or earlier, are such rows
  u32 offset = 0;  // shared-memory offset of the first byte concerned
};

class Shadow {
 public:
  explicit Shadow(u32 bytes);

  // Records an access to [offset, offset + bytes) by an agent that knows `knowledge`, and appends
  // what it conflicts with to `findings` (one finding a pair of places in the program). An agent's
  // knowledge is always the same object: decisions are remembered by its version.
  void access(AccessKind kind, const Touch& touch, u32 offset, u32 bytes,
              const Knowledge& knowledge, std::vector<Finding>& findings);

 private:
  using StateId = u32;
  static constexpr u32 kWord = 4;
  static constexpr u8 kWholeWord = 15;

  struct State {
    std::vector<Touch> writes;  // of disjoint bytes
    std::vector<Touch> reads;   // since those writes
    u64 serial = 0;             // unique; a new one whenever the slot is used again
    u32 words = 0;              // in this state
  };

  // A remembered decision: state `from` under this access becomes `to`, without findings.
  struct Memo {
    u64 from = 0, to = 0;          // serials
    u64 happened = 0, fenced = 0;  // versions of the agent's knowledge
    Epoch when;
    u32 form = 0;
    StateId id = 0;
  };
  static constexpr std::size_t kMemos = 256;  // they stay in the first-level cache

  struct Reader {
    Agent agent = 0;
    u32 pc = 0;
  };

  void access_words(AccessKind kind, const Touch& touch, u32 begin, u32 end,
                    const Knowledge& knowledge, std::vector<Finding>& findings);
  StateId transition(StateId from, AccessKind kind, const Touch& touch, u32 offset,
                     const Knowledge& knowledge, std::vector<Finding>& findings);
  StateId make_state(StateId from, AccessKind kind, const Touch& touch, const Knowledge& knowledge);
  void leave(StateId id, u32 words);
  void note_place(AccessKind kind, const Touch& touch, u32 begin, u32 end);
  void name_place(Finding& finding) const;

  std::vector<StateId> words_;
  std::vector<u32> writer_pc_;  // of each word's last write by a warp
  std::vector<Reader> reader_;  // of each word's last read by a warp
  std::vector<State> states_;   // state 0: never touched, never freed
  std::vector<StateId> free_;
  std::vector<Memo> memos_;
  Memo last_;
  u64 next_serial_ = 1;
  StateId last_write_ = 0;  // the state that the newest whole-word write made
};

}  // namespace dsk::emu::check
