// What warps compete for. A Port serves one request after the other.
#pragma once

#include <algorithm>

#include "emu/timing/cost.hpp"

namespace dsk::emu::timing {

struct Port {
  double free = 0, busy = 0;
  // Holds the port for `cycles` as soon as it is free; returns when it is done. What was left
  // unused in the last `saved` cycles may be used now: the other SMs had it, and are quieter in
  // turn.
  double take(double time, double cycles, double saved = 0) {
    free = std::max(free, time - saved) + cycles;
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
  double port_rate = 64, burst = 0;

  // Bytes through L2, a fraction of them from or to HBM; returns when the last one has gone by.
  double memory(double time, double bytes, double miss) {
    const double near = l2.take(time, bytes / l2_rate, burst);
    const double far = hbm.take(time, bytes * miss / hbm_rate, burst);
    return std::max({near, far, port.take(time, bytes / port_rate)});
  }
};

}  // namespace dsk::emu::timing
