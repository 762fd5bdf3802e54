#include "emu/check/global_shadow.hpp"

#include <algorithm>
#include <bit>
#include <cstdlib>
#include <new>

namespace dsk::emu::check {
namespace {

constexpr std::size_t kReadsKept = 8;  // of one span; more readers replace earlier ones

void report(GlobalFindings& findings, const GlobalFinding& finding) {
  for (const GlobalFinding& known : findings) {
    if (known.conflict == finding.conflict && known.earlier.pc == finding.earlier.pc) return;
  }
  findings.push_back(finding);
}

bool is_dependency(const Asker& asker, const GlobalTouch& touch) {
  const GridRecord &mine = *asker.self.grid, &other = *touch.who->grid;
  return mine.programmatic && other.stream == mine.stream && other.order.number < mine.order.number;
}

GlobalConflict why_unordered(const Asker& asker, const GlobalTouch& earlier) {
  if (is_dependency(asker, earlier)) return GlobalConflict::GridDependency;
  const Past* past = past_of(asker.refused, earlier.who->home.cluster);
  if (past != nullptr && past->happened.of(earlier.agent) >= earlier.clock) {
    return GlobalConflict::ReleaseScope;
  }
  return GlobalConflict::Race;
}

Home home_of(const GlobalTouch& touch) {
  Home home = touch.who->home;
  home.rank = touch.rank;
  return home;
}

bool fenced(const Asker& asker, const GlobalTouch& touch) {
  if (touch.who == &asker.self) {
    return asker.knowledge.fenced.knows({touch.agent, touch.clock});
  }
  const Past* past = past_of(asker.knowledge.foreign, touch.who->home.cluster);
  return past != nullptr && past->fenced.knows({touch.agent, touch.clock});
}

void compare(const GlobalTouch& earlier, bool earlier_wrote, bool writes, const GlobalTouch& touch,
             u64 address, const Asker& asker, GlobalFindings& findings) {
  if (earlier.who == nullptr || (!writes && !earlier_wrote)) return;
  GlobalFinding finding{GlobalConflict::Race, earlier, earlier_wrote, address};
  if (!knows(asker, earlier)) {
    finding.conflict = why_unordered(asker, earlier);
    if (earlier.strong && touch.strong) {
      const Home a = home_of(earlier), b = home_of(touch);
      if (includes(earlier.scope, a, b) && includes(touch.scope, b, a)) return;
      finding.conflict = GlobalConflict::Scope;
    }
    report(findings, finding);
  } else if (touch.async && !earlier.async && !grid_is_over(asker, earlier) &&
             !fenced(asker, earlier)) {
    finding.conflict = earlier_wrote ? GlobalConflict::UnfencedWrite : GlobalConflict::UnfencedRead;
    report(findings, finding);
  }
}

// `reader` is null when the reader's knowledge is no longer at hand.
void remember_read(std::vector<GlobalTouch>& reads, const GlobalTouch& touch, const Asker* reader) {
  for (GlobalTouch& read : reads) {
    // Whoever is ordered after this read is ordered after those that it follows.
    const bool follows = reader != nullptr ? knows(*reader, read)
                                           : read.who == touch.who && read.agent == touch.agent;
    if (follows && read.async == touch.async) {
      read = touch;
      return;
    }
  }
  if (reads.size() < kReadsKept)
    reads.push_back(touch);
  else
    reads[(touch.clock * 31 + touch.agent + touch.who->home.cluster) % kReadsKept] = touch;
}

}  // namespace

bool grid_is_over(const Asker& asker, const GlobalTouch& touch) {
  const GridRecord &mine = *asker.self.grid, &other = *touch.who->grid;
  if (&mine == &other) return false;
  if (mine.order.before.of(other.stream) >= other.order.number) return true;
  return asker.knowledge.happened.of(asker.self.predecessor) != 0 &&
         mine.order.after_wait.of(other.stream) >= other.order.number;
}

bool knows(const Asker& asker, const GlobalTouch& touch) {
  if (touch.who == &asker.self) {
    return asker.knowledge.happened.knows({touch.agent, touch.clock});
  }
  if (grid_is_over(asker, touch)) return true;
  const Past* past = past_of(asker.knowledge.foreign, touch.who->home.cluster);
  return past != nullptr && past->happened.knows({touch.agent, touch.clock});
}

// --- bytes ever written

InitBits::InitBits(u64 base, u64 bytes) : base_(base), bytes_(bytes) {
  static_assert(sizeof(std::atomic<u64>) == sizeof(u64));
  void* memory =
      std::calloc((bytes + 63) / 64 + 1, sizeof(u64));  // lazily mapped where it is large
  if (memory == nullptr) throw std::bad_alloc();
  words_.reset(static_cast<std::atomic<u64>*>(memory));
}

void InitBits::mark_all(u64 address, u64 bytes) {
  u64 at = address - base_;
  const u64 end = std::min(at + bytes, bytes_);
  while (at < end) {
    const u64 bit = at % 64, count = std::min<u64>(64 - bit, end - at);
    const u64 mask = (count == 64 ? ~u64{0} : (u64{1} << count) - 1) << bit;
    std::atomic<u64>& word = words_[at / 64];
    if ((word.load(std::memory_order_relaxed) & mask) != mask) word.fetch_or(mask);
    at += count;
  }
}

u64 InitBits::find_unwritten(u64 address, u64 bytes) const {
  if (trusted_.load(std::memory_order_relaxed)) return 0;
  for (u64 at = address - base_, end = std::min(at + bytes, bytes_); at < end;) {
    const u64 bit = at % 64, count = std::min<u64>(64 - bit, end - at);
    const u64 mask = (count == 64 ? ~u64{0} : (u64{1} << count) - 1) << bit;
    const u64 missing = ~words_[at / 64].load(std::memory_order_relaxed) & mask;
    if (missing != 0) return base_ + at / 64 * 64 + static_cast<u64>(std::countr_zero(missing));
    at += count;
  }
  return 0;
}

// --- regions

void Region::access(AccessKind kind, const GlobalTouch& touch, const Box& box, const Asker& asker,
                    GlobalFindings& findings) {
  if (init_) {
    for (u32 row = 0; row < box.rows; ++row) {
      const u64 at = box.address + row * box.pitch;
      if (kind != AccessKind::Write) {
        const u64 hole = init_->first_unwritten(at, box.bytes);
        if (hole != 0) report(findings, {GlobalConflict::Uninitialized, {}, false, hole});
      }
      if (kind != AccessKind::Read) init_->mark(at, box.bytes);
    }
  }
  if (kind == AccessKind::Read) {
    if (note_read(touch, box)) return;
  } else if (!written_.load(std::memory_order_acquire)) {
    begin_writing();
  }
  for (u32 row = 0; row < box.rows; ++row) {
    access_pages(kind, touch, box.address + row * box.pitch, box.bytes, &asker, findings);
  }
}

// Notes a read of memory that nobody writes. False: it is written.
bool Region::note_read(const GlobalTouch& touch, const Box& box) {
  if (written_.load(std::memory_order_acquire)) return false;
  const std::lock_guard lock(notes_mutex_);
  if (written_.load(std::memory_order_relaxed)) return false;
  if (!notes_.empty() && box.rows == 1) {
    Note& last = notes_.back();
    const bool same = last.touch.who == touch.who && last.touch.agent == touch.agent &&
                      last.touch.clock == touch.clock && last.box.rows == 1;
    if (same && box.address >= last.box.address &&
        box.address <= last.box.address + last.box.bytes) {
      const u64 end = std::max(last.box.address + last.box.bytes, box.address + box.bytes);
      last.box.bytes = end - last.box.address;
      return true;
    }
  }
  if (notes_.size() < kMaxNotes) notes_.push_back({touch, box});
  return true;
}

void Region::begin_writing() {
  const std::lock_guard lock(notes_mutex_);
  if (written_.load(std::memory_order_relaxed)) return;
  GlobalFindings none;  // nothing was written: no read can conflict
  for (const Note& note : notes_) {
    for (u32 row = 0; row < note.box.rows; ++row) {
      access_pages(AccessKind::Read, note.touch, note.box.address + row * note.box.pitch,
                   note.box.bytes, nullptr, none);
    }
  }
  notes_ = {};
  written_.store(true, std::memory_order_release);
}

void Region::access_pages(AccessKind kind, const GlobalTouch& touch, u64 address, u64 bytes,
                          const Asker* asker, GlobalFindings& findings) {
  for (u64 at = address, end = address + bytes; at < end;) {
    const u64 index = (at - base) >> kPageBits;
    const u64 page_base = base + (index << kPageBits);
    const u32 first = static_cast<u32>(at - page_base);
    const u32 last = static_cast<u32>(std::min<u64>(end - page_base, kPage));
    Stripe& stripe = stripes_[index % kStripes];
    const std::lock_guard lock(stripe.mutex);
    Page& page = stripe.pages[index];
    if (kind == AccessKind::Read)
      read_page(page, first, last, page_base, touch, asker, findings);
    else
      write_page(page, first, last, page_base, touch, *asker, findings);
    at = page_base + last;
  }
}

// Splits a span in two at `at`; the second part.
Region::Page::iterator Region::split(Page& page, Page::iterator span, u32 at) {
  Span left = *span;
  left.end = static_cast<u16>(at);
  span->begin = static_cast<u16>(at);
  return page.insert(span, std::move(left)) + 1;
}

void Region::read_page(Page& page, u32 begin, u32 end, u64 base, const GlobalTouch& touch,
                       const Asker* asker, GlobalFindings& findings) {
  const auto fill = [&](Page::iterator before, u32 from, u32 to) {
    Span span;
    span.begin = static_cast<u16>(from), span.end = static_cast<u16>(to);
    span.reads.push_back(touch);
    return page.insert(before, std::move(span)) + 1;
  };
  auto it =
      std::partition_point(page.begin(), page.end(), [&](const Span& s) { return s.end <= begin; });
  while (begin < end) {
    if (it == page.end() || it->begin >= end) {
      fill(it, begin, end);
      return;
    }
    if (it->begin > begin) {
      const u32 gap_end = it->begin;
      it = fill(it, begin, gap_end);
      begin = gap_end;
    }
    if (it->begin < begin) it = split(page, it, begin);
    if (it->end > end) it = split(page, it, end) - 1;
    if (asker != nullptr) compare(it->write, true, false, touch, base + begin, *asker, findings);
    remember_read(it->reads, touch, asker);
    begin = it->end;
    ++it;
  }
}

void Region::write_page(Page& page, u32 begin, u32 end, u64 base, const GlobalTouch& touch,
                        const Asker& asker, GlobalFindings& findings) {
  auto it =
      std::partition_point(page.begin(), page.end(), [&](const Span& s) { return s.end <= begin; });
  if (it != page.end() && it->begin < begin) it = split(page, it, begin);
  const auto first = it - page.begin();
  for (; it != page.end() && it->begin < end; ++it) {
    if (it->end > end) it = split(page, it, end) - 1;
    compare(it->write, true, true, touch, base + it->begin, asker, findings);
    for (const GlobalTouch& read : it->reads) {
      compare(read, false, true, touch, base + it->begin, asker, findings);
    }
  }
  Span span;
  span.begin = static_cast<u16>(begin), span.end = static_cast<u16>(end);
  span.write = touch;
  const auto covered = page.begin() + first;
  if (covered == it) {
    page.insert(covered, std::move(span));
  } else {
    *covered = std::move(span);
    page.erase(covered + 1, it);
  }
}

GlobalTouch Region::last_write(u64 address) {
  const u64 index = (address - base) >> kPageBits;
  Stripe& stripe = stripes_[index % kStripes];
  const std::lock_guard lock(stripe.mutex);
  const auto it = stripe.pages.find(index);
  if (it == stripe.pages.end()) return {};
  const u32 at = static_cast<u32>(address - base) & (kPage - 1);
  for (const Span& s : it->second) {
    if (s.begin <= at && at < s.end) return s.write;
  }
  return {};
}

}  // namespace dsk::emu::check
