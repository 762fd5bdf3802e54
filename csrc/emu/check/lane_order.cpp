#include "emu/check/lane_order.hpp"

#include <algorithm>
#include <bit>
#include <mutex>

namespace dsk::emu::check {

namespace {

constexpr u32 kWord = 4;

std::mutex pool_mutex;
std::vector<std::unique_ptr<LaneTable>> pool;

std::unique_ptr<LaneTable> take_table() {
  const std::lock_guard<std::mutex> lock(pool_mutex);
  if (pool.empty()) return std::make_unique<LaneTable>();
  auto table = std::move(pool.back());
  pool.pop_back();
  return table;
}

// Calls visit(first word, words, lanes) for each lane's words; lanes at one address come as one.
template <typename Visit>
void for_each_place(u32 mask, const Access& access, const u64* place, Visit visit) {
  const u32 words = access.size / kWord;
  if (access.pattern == Pattern::Uniform) {
    return visit(static_cast<u32>(place[0]) / kWord, words, kFullMask);
  }
  for (u32 rest = mask; rest != 0; rest &= rest - 1) {
    const int lane = std::countr_zero(rest);
    visit(static_cast<u32>(place[lane]) / kWord, words, 1u << lane);
  }
}

}  // namespace

LaneOrder::LaneOrder(u32 shared_bytes, std::size_t warps)
    : words_(shared_bytes / kWord), interval_(warps, 0), touched_(warps, 0) {}

LaneOrder::~LaneOrder() {
  if (!table_) return;
  const std::lock_guard<std::mutex> lock(pool_mutex);
  pool.push_back(std::move(table_));
}

u32 LaneOrder::interval(u32 warp) {
  if (interval_[warp] != 0) return interval_[warp];
  if (!table_) {
    table_ = take_table();
    if (table_->words.size() < words_) table_->words.resize(words_);
  }
  if (table_->intervals == ~0u) {  // every word forgets, then every warp begins anew
    std::fill(table_->words.begin(), table_->words.end(), LaneTable::Word{});
    std::fill(interval_.begin(), interval_.end(), 0);
    table_->intervals = 0;
  }
  return interval_[warp] = ++table_->intervals;
}

std::optional<LaneOrder::Finding> LaneOrder::access(u32 warp, u32 pc, u32 mask,
                                                    const Access& access, const u64* place) {
  touched_[warp] |= mask;
  if (access.size % kWord != 0 || access.kind == AccessKind::ReadWrite) return std::nullopt;
  const u32 now = interval(warp);
  const bool writes = access.kind == AccessKind::Write;
  LaneTable::Word* table = table_->words.data();
  std::optional<Finding> found;
  for_each_place(mask, access, place, [&](u32 first, u32 words, u32 lanes) {
    for (u32 at = first; at < std::min(first + words, words_); ++at) {
      const LaneTable::Word& word = table[at];
      if (writes ? word.read == now && (word.readers & ~lanes) != 0
                 : word.written == now && (word.writers & lanes) != lanes) {
        found = Finding{at * kWord, writes ? word.read_pc : word.write_pc,
                        (writes ? word.readers : word.writers) & ~lanes, !writes};
      }
    }
  });
  for_each_place(mask, access, place, [&](u32 first, u32 words, u32 lanes) {
    for (u32 at = first; at < std::min(first + words, words_); ++at) {
      LaneTable::Word& word = table[at];
      if (writes) {
        if (word.written != now || word.write_pc != pc) word.writers = 0;
        word.written = now, word.write_pc = pc;
        word.writers |= lanes;
      } else {
        if (word.read != now) word.readers = 0;
        word.read = now, word.read_pc = pc;
        word.readers |= lanes;
      }
    }
  });
  return found;
}

std::optional<LaneOrder::Finding> LaneOrder::source(u32 warp, u32 lane, u32 offset,
                                                    u32 bytes) const {
  const u32 now = interval_[warp];
  if (now == 0) return std::nullopt;
  for (u32 at = offset / kWord; at < std::min((offset + bytes) / kWord, words_); ++at) {
    const LaneTable::Word& word = table_->words[at];
    if (word.written == now && (word.writers >> lane & 1) == 0) {
      return Finding{at * kWord, word.write_pc, word.writers, true};
    }
  }
  return std::nullopt;
}

}  // namespace dsk::emu::check
