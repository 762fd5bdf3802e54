#include "emu/check/shadow.hpp"

#include <algorithm>

namespace dsk::emu::check {
namespace {

bool same(const Epoch& a, const Epoch& b) { return a.agent == b.agent && a.clock == b.clock; }

// The conflict of `touch` with one earlier access, if any.
bool conflicts(const Touch& earlier, bool earlier_wrote, AccessKind kind, const Touch& touch,
               const Knowledge& knowledge, Conflict& conflict) {
  const bool writes = kind != AccessKind::Read;
  if ((earlier.bytes & touch.bytes) == 0) return false;
  if (!writes && !earlier_wrote) return false;
  if (!knowledge.happened.knows(earlier.when)) {
    if (earlier.strong && touch.strong) return false;
    conflict = Conflict::Race;
    return true;
  }
  if (touch.async && !earlier.async && !knowledge.fenced.knows(earlier.when)) {
    const bool drained = touch.matrix && knowledge.drained.knows(earlier.when);
    conflict = !earlier_wrote ? Conflict::UnfencedRead
               : drained      ? Conflict::DrainedWrite
                              : Conflict::UnfencedWrite;
    return true;
  }
  return false;
}

void report(std::vector<Finding>& findings, const Finding& finding) {
  for (const Finding& known : findings) {
    // Whether results of rows are used is a question to each wgmma.
    if (known.conflict == finding.conflict && known.earlier.pc == finding.earlier.pc &&
        known.rows == finding.rows) {
      return;
    }
  }
  findings.push_back(finding);
}

void find_conflicts(const std::vector<Touch>& earlier, bool wrote, AccessKind kind,
                    const Touch& touch, const Knowledge& knowledge, u32 offset,
                    std::vector<Finding>& findings) {
  for (const Touch& e : earlier) {
    Finding finding;
    if (!conflicts(e, wrote, kind, touch, knowledge, finding.conflict)) continue;
    finding.earlier = e;
    finding.earlier_wrote = wrote;
    finding.rows = wrote ? touch.rows : e.rows;
    finding.offset = offset;
    report(findings, finding);
  }
}

void remember_read(std::vector<Touch>& reads, const Touch& touch, const Knowledge& knowledge) {
  for (Touch& read : reads) {
    // A read that happened before this one is covered by it: whoever is ordered after this read is
    // ordered after that one too. The proxies differ in what else they need, so they do not cover
    // one another.
    if (read.async != touch.async || !knowledge.happened.knows(read.when)) continue;
    if (touch.rows != 0 && read.rows == 0) continue;  // it may turn out harmless, the other not
    const bool same_agent = read.when.agent == touch.when.agent;
    if (!same_agent && (read.bytes & ~touch.bytes) != 0) continue;
    const u8 bytes = same_agent ? read.bytes | touch.bytes : touch.bytes;
    read = touch;
    read.bytes = bytes;
    return;
  }
  reads.push_back(touch);
}

// Takes the overwritten bytes away from what is remembered.
void forget(std::vector<Touch>& touches, u8 bytes) {
  for (Touch& t : touches) t.bytes &= static_cast<u8>(~bytes);
  std::erase_if(touches, [](const Touch& t) { return t.bytes == 0; });
}

u32 form_of(AccessKind kind, const Touch& touch) {
  return static_cast<u32>(kind) | u32{touch.bytes} << 2 | u32{touch.async} << 6 |
         u32{touch.strong} << 7 | u32{touch.matrix} << 8 | u32{touch.rows != 0} << 9;
}

}  // namespace

Shadow::Shadow(u32 bytes)
    : words_((bytes + kWord - 1) / kWord),
      writer_pc_(words_.size()),
      reader_(words_.size()),
      states_(1),
      memos_(kMemos) {
  states_[0].serial = next_serial_++;
}

void Shadow::leave(StateId id, u32 words) {
  State& state = states_[id];
  if (id == 0) return;
  state.words -= words;
  if (state.words != 0) return;
  state.serial = 0;
  free_.push_back(id);
}

Shadow::StateId Shadow::make_state(StateId from, AccessKind kind, const Touch& touch,
                                   const Knowledge& knowledge) {
  const bool whole = kind != AccessKind::Read && touch.bytes == kWholeWord;
  if (whole && last_write_ != 0 && states_[last_write_].serial != 0) {
    // A whole write leaves nothing of what was there: one state for all that it covers.
    const State& last = states_[last_write_];
    if (last.reads.empty() && last.writes.size() == 1) {
      const Touch& t = last.writes.front();
      if (same(t.when, touch.when) && form_of(kind, t) == form_of(kind, touch)) {
        return last_write_;
      }
    }
  }
  StateId id = 0;
  if (free_.empty()) {
    id = static_cast<StateId>(states_.size());
    states_.emplace_back();
  } else {
    id = free_.back();
    free_.pop_back();
  }
  State& state = states_[id];
  const State& old = states_[from];
  state.serial = next_serial_++;
  state.words = 0;
  if (whole) {
    state.writes.assign(1, touch);
    state.reads.clear();
    last_write_ = id;
    return id;
  }
  state.writes = old.writes;
  state.reads = old.reads;
  if (kind == AccessKind::Read) {
    remember_read(state.reads, touch, knowledge);
    return id;
  }
  forget(state.writes, touch.bytes);
  forget(state.reads, touch.bytes);
  state.writes.push_back(touch);
  return id;
}

Shadow::StateId Shadow::transition(StateId from, AccessKind kind, const Touch& touch, u32 offset,
                                   const Knowledge& knowledge, std::vector<Finding>& findings) {
  const u32 form = form_of(kind, touch);
  const u64 serial = states_[from].serial;
  const u64 happened = knowledge.happened.version(), fenced = knowledge.fenced.version();
  const auto matches = [&](const Memo& m) {
    return m.from == serial && m.happened == happened && m.fenced == fenced &&
           same(m.when, touch.when) && m.form == form && states_[m.id].serial == m.to;
  };
  // The rows of a tile come one by one, in the same state.
  if (matches(last_)) return last_.id;
  const u64 hash = (serial * 0x9e3779b97f4a7c15ull) ^ (happened * 0xbf58476d1ce4e5b9ull) ^
                   (touch.when.agent + (u64{form} << 32)) * 0x94d049bb133111ebull;
  Memo& memo = memos_[(hash >> 40) % kMemos];
  if (matches(memo)) {
    last_ = memo;
    return memo.id;
  }
  const std::size_t before = findings.size();
  find_conflicts(states_[from].writes, true, kind, touch, knowledge, offset, findings);
  if (kind != AccessKind::Read) {
    find_conflicts(states_[from].reads, false, kind, touch, knowledge, offset, findings);
  }
  for (std::size_t k = before; k < findings.size(); ++k) name_place(findings[k]);
  const StateId to = make_state(from, kind, touch, knowledge);
  if (findings.size() == before) {
    memo = last_ = {serial, states_[to].serial, happened, fenced, touch.when, form, to};
  }
  return to;
}

void Shadow::note_place(AccessKind kind, const Touch& touch, u32 begin, u32 end) {
  if (touch.async) return;  // its state names it
  if (kind != AccessKind::Read) {
    std::fill(writer_pc_.begin() + begin, writer_pc_.begin() + end, touch.pc);
  }
  if (kind != AccessKind::Write) {
    std::fill(reader_.begin() + begin, reader_.begin() + end, Reader{touch.when.agent, touch.pc});
  }
}

void Shadow::name_place(Finding& finding) const {
  Touch& earlier = finding.earlier;
  const u32 word = finding.offset / kWord;
  if (earlier.async) return;
  if (finding.earlier_wrote) {
    if (states_[words_[word]].writes.size() == 1) earlier.pc = writer_pc_[word];
  } else if (reader_[word].agent == earlier.when.agent) {
    earlier.pc = reader_[word].pc;
  }
}

void Shadow::access_words(AccessKind kind, const Touch& touch, u32 begin, u32 end,
                          const Knowledge& knowledge, std::vector<Finding>& findings) {
  StateId* words = words_.data();
  for (u32 at = begin; at < end;) {
    const StateId from = words[at];
    u32 stop = at + 1;
    while (stop < end && words[stop] == from) ++stop;
    const StateId to = transition(from, kind, touch, at * kWord, knowledge, findings);
    std::fill(words + at, words + stop, to);
    states_[to].words += stop - at;
    leave(from, stop - at);
    at = stop;
  }
  note_place(kind, touch, begin, end);
}

void Shadow::access(AccessKind kind, const Touch& touch, u32 offset, u32 bytes,
                    const Knowledge& knowledge, std::vector<Finding>& findings) {
  const u32 limit = static_cast<u32>(words_.size()) * kWord;
  const u32 end = std::min(offset + bytes, limit);  // out of bounds is another check's finding
  if (offset >= end) return;
  const u32 first = offset / kWord, last = end / kWord;
  const u32 skip = offset % kWord, rest = end % kWord;
  const u32 head = kWholeWord << skip & kWholeWord, tail = (1u << rest) - 1;
  Touch part = touch;
  const auto visit = [&](u32 mask, u32 begin, u32 stop) {
    part.bytes = static_cast<u8>(mask);
    access_words(kind, part, begin, stop, knowledge, findings);
  };
  if (first == last) return visit(head & tail, first, first + 1);
  const u32 begin = first + (skip != 0);
  if (skip != 0) visit(head, first, begin);
  if (begin < last) visit(kWholeWord, begin, last);
  if (rest != 0) visit(tail, last, last + 1);
}

}  // namespace dsk::emu::check
