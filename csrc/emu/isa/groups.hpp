// The groups of handlers that make up the table: lane arithmetic once per host instruction set, the
// rest once.
#pragma once

#include <span>
#include <vector>

#include "emu/table.hpp"

namespace dsk::emu {

using EntryGroups = std::vector<std::span<const Entry>>;

#define DSK_LANE_GROUPS(level)                                       \
  namespace level {                                                  \
  std::span<const Entry> integer_entries();                          \
  std::span<const Entry> logic_entries();                            \
  std::span<const Entry> compare_entries();                          \
  std::span<const Entry> float_entries();                            \
  std::span<const Entry> convert_entries();                          \
  std::span<const Entry> memory_entries();                           \
  inline EntryGroups lane_groups() {                                 \
    return {integer_entries(), logic_entries(),   compare_entries(), \
            float_entries(),   convert_entries(), memory_entries()}; \
  }                                                                  \
  }
DSK_LANE_GROUPS(portable)
#if defined(DSK_EMU_X86_LEVELS)
DSK_LANE_GROUPS(avx2)
DSK_LANE_GROUPS(avx512)
#endif
#undef DSK_LANE_GROUPS

std::span<const Entry> half_entries();
std::span<const Entry> address_entries();
std::span<const Entry> atomic_entries();
std::span<const Entry> control_entries();
std::span<const Entry> warp_entries();
std::span<const Entry> sync_entries();
std::span<const Entry> mbarrier_entries();
std::span<const Entry> async_entries();
std::span<const Entry> tensor_entries();
std::span<const Entry> wgmma_entries();
std::span<const Entry> mma_entries();

inline EntryGroups common_groups() {
  return {half_entries(),   address_entries(), atomic_entries(),   control_entries(),
          warp_entries(),   sync_entries(),    mbarrier_entries(), async_entries(),
          tensor_entries(), wgmma_entries(),   mma_entries()};
}

}  // namespace dsk::emu
