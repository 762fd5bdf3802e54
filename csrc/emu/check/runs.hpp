// A warp's access to shared memory as runs of bytes.
#pragma once

#include <algorithm>

#include "emu/observer.hpp"

namespace dsk::emu::check {

// visit(CTA, first offset, bytes) for what the lanes of `mask` touch.
// Lanes at consecutive addresses, or at the same one, are one run.
template <typename Visit>
void for_each_run(std::size_t num_ctas, u32 mask, const Access& access, const u64* place,
                  const u32* rank, Visit visit) {
  const u32 size = access.size;
  if (access.pattern != Pattern::Scattered) {
    return visit(rank[0], static_cast<u32>(place[0]),
                 access.pattern == Pattern::Uniform ? size : size * kLanes);
  }
  u32 run_cta = 0, run_begin = 0, run_end = 0;
  bool open = false;
  for (u32 lane = 0; lane < kLanes; ++lane) {
    if (!(mask >> lane & 1)) continue;
    const u32 offset = static_cast<u32>(place[lane]);
    if (rank[lane] >= num_ctas) continue;
    if (open && rank[lane] == run_cta && offset >= run_begin && offset <= run_end) {
      run_end = std::max(run_end, offset + size);
      continue;
    }
    if (open) visit(run_cta, run_begin, run_end - run_begin);
    run_cta = rank[lane];
    run_begin = offset;
    run_end = offset + size;
    open = true;
  }
  if (open) visit(run_cta, run_begin, run_end - run_begin);
}

}  // namespace dsk::emu::check
