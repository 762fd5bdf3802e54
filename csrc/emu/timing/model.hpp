// What the timing model assumes about a part. Cycles are SM clocks; the figures are microbenchmarks
// of Hopper as published (Luo et al. 2024 and the like), the four marked "fitted" come from
// bench/emu_timing.py.
#pragma once

#include "emu/types.hpp"

namespace dsk::emu::timing {

struct Model {
  // The part.
  u32 num_sms = 132;
  double clock_ghz = 1.755;      // sustained, not the boost of the datasheet
  double hbm_gbytes = 3350;      // per second, datasheet
  double hbm_efficiency = 0.90;  // fitted: what streams reach of it
  double l2_bytes = 5500;        // fitted: per cycle, all SMs
  double l2_port = 64;           // per cycle, one SM
  double burst = 0;              // cycles for which an SM's unused share of L2 and HBM keeps
  u32 shared_per_sm = 233472;
  u32 registers_per_sm = 65536;
  u32 max_threads_per_sm = 2048;
  u32 max_blocks_per_sm = 32;
  double launch_us = 0.5;  // fitted: launch, first instruction fetches, completion

  // Latencies.
  double alu = 4, predicate = 6, convert = 6, special = 20, fp64 = 8, shuffle = 23;
  double shared = 29, l1 = 41, l2 = 336, hbm = 560;
  double dsmem = 180, dsmem_bytes = 21;  // per cycle and SM
  double tma = 170, tma_gap = 32;
  double mbar_arrive = 29, mbar_wait = 32, barrier = 15, cluster_barrier = 190;
  double wgmma_tail = 64;
  double branch = 6;
  double fence_gpu = 500, fence_cta = 12, fence_async = 20;
  double cta_start = 600;  // from one CTA's end to the next one's first instruction

  // Instructions.
  double issue_scale = 1.1;   // fitted: machine instructions for one of PTX's arithmetic
  double tensor_scale = 1.0;  // tensor-core cycles against the documented rate
  u32 window = 32;            // how far the assembler reorders independent instructions
};

}  // namespace dsk::emu::timing
