// Liveness and packing: PTX has thousands of virtual registers, of which few live at once. A small
// register file stays in the host's L1 cache.
#include <algorithm>
#include <queue>

#include "emu/decode.hpp"

namespace dsk::emu {
namespace {

constexpr u32 kSlot = 64;  // bytes; one cache line, one AVX-512 register

u32 slot_bytes(int register_bytes) {
  return register_bytes == 0 ? kSlot : std::max<u32>(kSlot, kLanes * register_bytes);
}

using Bits = std::vector<u64>;

bool ends_block(const Inst& i) { return i.kind == Kind::Branch || i.kind == Kind::Exit; }

struct Block {
  u32 begin = 0, end = 0;
  std::vector<u32> successors;
  Bits live_in, live_out, uses, kills;
};

std::vector<Block> build_blocks(Program& p, std::size_t words) {
  const u32 n = static_cast<u32>(p.code.size());
  std::vector<u8> leader(n + 1, 0);
  leader[0] = 1;
  for (u32 k = 0; k < n; ++k) {
    if (p.code[k].kind == Kind::Branch) leader[p.code[k].target] = 1;
    if (ends_block(p.code[k])) leader[k + 1] = 1;
  }
  std::vector<Block> blocks;
  for (u32 k = 0; k < n; ++k) {
    if (leader[k]) blocks.push_back({k, k, {}, Bits(words), Bits(words), Bits(words), Bits(words)});
    blocks.back().end = k + 1;
    p.info[k].block = static_cast<u32>(blocks.size()) - 1;
  }
  for (Block& b : blocks) {
    const Inst& last = p.code[b.end - 1];
    const bool falls_through = !ends_block(last) || last.pred != kNoReg;
    if (falls_through && b.end < n) b.successors.push_back(p.info[b.end].block);
    if (last.kind == Kind::Branch) b.successors.push_back(p.info[last.target].block);
    for (u32 k = b.begin; k < b.end; ++k) {
      for (u32 r : p.info[k].reads) {
        if (!(b.kills[r / 64] >> (r % 64) & 1)) b.uses[r / 64] |= u64{1} << (r % 64);
      }
      for (u32 r : p.info[k].writes) b.kills[r / 64] |= u64{1} << (r % 64);
    }
  }
  return blocks;
}

void solve_liveness(std::vector<Block>& blocks, std::size_t words) {
  for (bool changed = true; changed;) {
    changed = false;
    for (auto b = blocks.rbegin(); b != blocks.rend(); ++b) {
      for (std::size_t w = 0; w < words; ++w) {
        u64 out = 0;
        for (u32 s : b->successors) out |= blocks[s].live_in[w];
        b->live_out[w] = out;
        const u64 in = b->uses[w] | (out & ~b->kills[w]);
        if (in != b->live_in[w]) {
          b->live_in[w] = in;
          changed = true;
        }
      }
    }
  }
}

struct Interval {
  u32 reg = 0;
  u32 first = ~0u, last = 0;  // in half-steps: 2k reads of instruction k, 2k + 1 its writes
  bool used = false;
};

void extend(Interval& v, u32 at) {
  v.used = true;
  v.first = std::min(v.first, at);
  v.last = std::max(v.last, at);
}

std::vector<Interval> live_intervals(const Program& p, const std::vector<Block>& blocks,
                                     std::size_t num_regs) {
  std::vector<Interval> intervals(num_regs);
  for (std::size_t r = 0; r < num_regs; ++r) intervals[r].reg = static_cast<u32>(r);
  const auto extend_all = [&](const Bits& bits, u32 at) {
    for (std::size_t w = 0; w < bits.size(); ++w) {
      for (u64 rest = bits[w]; rest != 0; rest &= rest - 1) {
        extend(intervals[w * 64 + static_cast<std::size_t>(__builtin_ctzll(rest))], at);
      }
    }
  };
  for (const Block& b : blocks) {
    extend_all(b.live_in, 2 * b.begin);
    extend_all(b.live_out, 2 * b.end - 1);
    for (u32 k = b.begin; k < b.end; ++k) {
      for (u32 r : p.info[k].reads) extend(intervals[r], 2 * k);
      for (u32 r : p.info[k].writes) extend(intervals[r], 2 * k + 1);
    }
  }
  return intervals;
}

}  // namespace

void Decoder::allocate_registers() {
  const std::size_t num_regs = function_.registers.size();
  const std::size_t words = (num_regs + 63) / 64;
  program_.num_virtual = static_cast<u32>(num_regs);
  virtual_offset_.assign(num_regs, kNoReg);
  std::vector<Block> blocks = build_blocks(program_, words);
  solve_liveness(blocks, words);
  std::vector<Interval> intervals = live_intervals(program_, blocks, num_regs);
  std::sort(intervals.begin(), intervals.end(),
            [](const Interval& a, const Interval& b) { return a.first < b.first; });

  u32 top = 0;
  // By bytes of a lane (0: a predicate's bit). Slots never change their kind: lanes of a split warp
  // may hold a register live while other lanes run code where its slot is reused, and those write
  // their own lanes of it only as long as both registers lay lanes out alike.
  std::map<int, std::vector<u32>> free_slots;
  using Active = std::tuple<u32, u32, int>;  // last use, offset, bytes of a lane
  std::priority_queue<Active, std::vector<Active>, std::greater<>> active;
  u32 live_words = 0;
  const auto release_until = [&](u32 at) {
    while (!active.empty() && std::get<0>(active.top()) < at) {
      const auto [last, offset, lane_bytes] = active.top();
      active.pop();
      free_slots[lane_bytes].push_back(offset);
      live_words -= slot_bytes(lane_bytes) / 128;
    }
  };
  for (const Interval& v : intervals) {
    const ptx::Register& r = function_.registers[v.reg];
    if (!v.used || r.special) continue;
    release_until(v.first);
    const int lane_bytes = type_size(r.type);
    const u32 bytes = slot_bytes(lane_bytes);
    auto& slots = free_slots[lane_bytes];
    live_words += bytes / 128;
    program_.peak_registers = std::max(program_.peak_registers, live_words);
    // The results of an asynchronous wgmma arrive after the last use that liveness can see.
    if (is_matrix_[v.reg] || slots.empty()) {
      virtual_offset_[v.reg] = top;
      top += bytes;
    } else {
      virtual_offset_[v.reg] = slots.back();
      slots.pop_back();
    }
    if (!is_matrix_[v.reg]) active.emplace(v.last, virtual_offset_[v.reg], lane_bytes);
  }
  for (const Interval& v : intervals) {
    const ptx::Register& r = function_.registers[v.reg];
    if (!v.used || !r.special) continue;
    SpecialReg special;
    Type type;
    parse_special(r.name, &special.which, &type);  // known: the operand was accepted
    special.size = static_cast<u8>(type_size(type));
    special.offset = virtual_offset_[v.reg] = top;
    top += slot_bytes(special.size);
    program_.specials.push_back(special);
    program_.uses_grid_workspace |= special.which == Special::Envreg2;
  }
  for (ConstantReg& c : program_.constants) {
    c.offset = top;
    top += slot_bytes(c.size);
  }
  program_.register_bytes = std::max(top, kSlot);
}

}  // namespace dsk::emu
