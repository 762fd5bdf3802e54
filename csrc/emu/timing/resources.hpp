// What warps compete for. A Port serves one request after the other.
#pragma once

#include <algorithm>

#include "emu/timing/cost.hpp"

namespace dsk::emu::timing {

struct Port {
  double free = 0, busy = 0;
  // Holds the port for `cycles` as soon as it is free; returns when it is done.
  double take(double time, double cycles) {
    free = std::max(free, time) + cycles;
    busy += cycles;
    return free;
  }
  // Counts the use without a place in the queue.
  void use(double cycles) { busy += cycles; }
};

struct Partition {
  double issue_free = 0, issued = 0;
  double pipe_free[kPipes] = {}, pipe_busy[kPipes] = {};
};

struct Sm {
  Partition parts[4];
  Port shared, tensor, tma, l2, hbm, port, dsmem;
  double l2_rate = 34, hbm_rate = 14;  // this SM's share, bytes per cycle

  // Bytes through L2, a fraction of them from or to HBM; returns when the last one has gone by.
  double memory(double time, double bytes, double miss) {
    const double near = l2.take(time, bytes / l2_rate);
    const double far = hbm.take(time, bytes * miss / hbm_rate);
    return std::max(near, far);
  }
};

}  // namespace dsk::emu::timing
