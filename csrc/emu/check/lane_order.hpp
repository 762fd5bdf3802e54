// Lanes of one warp among themselves. They run together here, as nearly always on hardware, but
// since Volta nothing promises it: what one lane stores another may read (or overwrite what it
// still reads) only behind an instruction that the lanes meet at. An interval of a warp lasts from
// one such instruction to the next; every word remembers who touched it in which interval.
//
// Any convergent instruction ends an interval, shuffles and votes too: formally only bar.warp.sync
// and barriers order memory, but lanes that have met have issued what came before.
#pragma once

#include <algorithm>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "emu/observer.hpp"

namespace dsk::emu::check {

// Tables are as large as shared memory and expensive to touch first: one goes from CTA to CTA,
// stale entries never match.
struct LaneTable {
  struct Word {
    u32 written = 0, read = 0;  // the interval of the last write, of the last read
    u32 writers = 0, readers = 0;
    u32 write_pc = 0, read_pc = 0;
  };
  std::vector<Word> words;
  u32 intervals = 0;  // given out
};

class LaneOrder {
 public:
  struct Finding {
    u32 offset = 0;  // of the word
    u32 pc = 0;      // of the earlier access
    u32 lanes = 0;   // that made it
    bool wrote = false;
  };

  LaneOrder(u32 shared_bytes, std::size_t warps);
  ~LaneOrder();
  LaneOrder(const LaneOrder&) = delete;
  LaneOrder& operator=(const LaneOrder&) = delete;

  // The lanes of the warp have met.
  void meet(u32 warp) { interval_[warp] = 0, touched_[warp] = 0; }
  // Lanes of `mask` touch their CTA's shared memory at place[l]. Accesses of less than a word are
  // not looked at. Returns what another lane did to the same word with nothing in between.
  std::optional<Finding> access(u32 warp, u32 pc, u32 mask, const Access& access, const u64* place);
  // One lane hands [offset, offset + bytes) to an asynchronous copy that reads it.
  std::optional<Finding> source(u32 warp, u32 lane, u32 offset, u32 bytes) const;
  // Lanes that have touched shared memory in the warp's interval, and the interval's number.
  u32 touched(u32 warp) const { return touched_[warp]; }
  u32 now(u32 warp) const { return interval_[warp]; }
  // Calls visit(interval, finding) for the last write and the last read of each word of
  // [offset, offset + bytes) since interval `oldest` began, until it returns true.
  template <typename Visit>
  void for_each_since(u32 oldest, u32 offset, u32 bytes, Visit visit) const;

 private:
  u32 interval(u32 warp);

  u32 words_ = 0;
  std::unique_ptr<LaneTable> table_;
  std::vector<u32> interval_;  // of each warp; 0: none begun
  std::vector<u32> touched_;
};

template <typename Visit>
void LaneOrder::for_each_since(u32 oldest, u32 offset, u32 bytes, Visit visit) const {
  constexpr u32 kWord = 4;
  if (!table_) return;
  const u32 end = std::min((offset + bytes + kWord - 1) / kWord, words_);
  for (u32 at = offset / kWord; at < end; ++at) {
    const LaneTable::Word& word = table_->words[at];
    if (word.written >= oldest &&
        visit(word.written, Finding{at * kWord, word.write_pc, word.writers, true})) {
      return;
    }
    if (word.read >= oldest &&
        visit(word.read, Finding{at * kWord, word.read_pc, word.readers, false})) {
      return;
    }
  }
}

}  // namespace dsk::emu::check
