#include "emu/seeds.hpp"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "emu/memory.hpp"

namespace dsk::emu {
namespace {

struct Contents {
  Allocation range;
  std::vector<u8> bytes;
};

u8* at(u64 address) { return reinterpret_cast<u8*>(address); }

std::vector<Contents> save() {
  std::vector<Contents> all;
  for (const Allocation& range : AddressSpace::instance().writable()) {
    all.push_back({range, {at(range.base), at(range.end())}});
  }
  return all;
}

void restore(const std::vector<Contents>& all) {
  for (const Contents& c : all) std::memcpy(at(c.range.base), c.bytes.data(), c.bytes.size());
}

std::string hex(const u8* bytes, u64 count) {
  std::string text = "0x";
  char digits[3];
  for (u64 k = std::min<u64>(count, 4); k-- > 0;) {
    std::snprintf(digits, sizeof digits, "%02x", bytes[k]);
    text += digits;
  }
  return text;
}

void compare(const std::vector<Contents>& first, const std::string& kernel, u64 seed) {
  for (const Contents& c : first) {
    const u8* now = at(c.range.base);
    const auto [a, b] = std::mismatch(c.bytes.begin(), c.bytes.end(), now);
    if (a == c.bytes.end()) continue;
    u64 differ = 0;
    for (u64 k = 0; k < c.bytes.size(); ++k) differ += c.bytes[k] != now[k];
    const u64 offset = static_cast<u64>(a - c.bytes.begin()) / 4 * 4;
    const u64 rest = c.bytes.size() - offset;
    Hazard h;
    h.kind = "order-dependent-result";
    h.kernel = kernel;
    h.message = (c.range.name.empty() ? "an allocation" : "'" + c.range.name + "'") +
                " depends on the schedule: " + std::to_string(differ) + " of its " +
                std::to_string(c.bytes.size()) +
                " bytes differ between the fixed schedule and seed " + std::to_string(seed) +
                ", the first at byte " + std::to_string(offset) + " (" +
                hex(c.bytes.data() + offset, rest) + " and " + hex(now + offset, rest) + ")";
    restore(first);
    throw HazardError({h});
  }
}

}  // namespace

u32 seeds_wanted() {
  static const u32 wanted = [] {
    const char* text = std::getenv("DSK_EMU_SEEDS");
    return text == nullptr ? 0u : static_cast<u32>(std::strtoul(text, nullptr, 10));
  }();
  return wanted;
}

u64 launch_over_seeds(System& system, StreamId s, const std::shared_ptr<const Module>& m,
                      const std::string& kernel, LaunchConfig config, const void* params,
                      std::size_t param_bytes, u32 seeds) {
  system.synchronize();
  const std::vector<Contents> before = save();
  const u64 number = system.launch_once(s, m, kernel, config, params, param_bytes);
  system.synchronize(s);
  const std::vector<Contents> first = save();
  for (u32 k = 1; k <= seeds; ++k) {
    restore(before);
    config.seed = k;
    system.launch_once(s, m, kernel, config, params, param_bytes);
    system.synchronize(s);
    compare(first, kernel, k);
  }
  restore(first);
  return number;
}

}  // namespace dsk::emu
