// Activation quantisation: each row's groups of 128 values share one scale (V3 report, 3.3.2).
//
// Bound by memory: 2 bytes read (bf16) and 1 + 4/128 written per value, so 4096 x 7168 moves 88 MB,
// 26 us at 3.35 TB/s; its divisions are 3 us of the CUDA cores. There is nothing to overlap by
// hand: one warp owns one group of 128 (4 values a lane: an 8- or 16-byte load, a 4-byte store),
// and occupancy hides the latency.
//
// amax is clamped to 1e-4; scale = amax / 448 (65024 for E5M6), or the next power of two; value =
// cast(x / scale), round to nearest even, saturating. A NaN does not enter its group's amax and
// stays NaN; an infinity makes the whole group NaN.
#pragma once

#include "cuda/tile/quantize.cuh"

namespace dsk {

template <typename T>
__device__ __forceinline__ void quantize_rows(const QuantizeParams& p) {
  const int lane = threadIdx.x % kWarp;
  const uint32_t groups_per_row = (p.cols + kQuantGroup - 1) / kQuantGroup;
  const int64_t num_groups = int64_t(groups_per_row) * p.planes * p.rows;
  const int64_t num_warps = int64_t(gridDim.x) * (blockDim.x / kWarp);
  const float format_max = p.type == NarrowType::kE4m3 ? kE4m3Max : kE5m6Max;

  for (int64_t group = int64_t(blockIdx.x) * (blockDim.x / kWarp) + threadIdx.x / kWarp;
       group < num_groups; group += num_warps) {
    const int64_t row = group / groups_per_row;
    const uint32_t k_group = uint32_t(group - row * groups_per_row);
    const int column = int(k_group) * kQuantGroup + lane * kValuesPerLane;
    const int left = p.cols - column;

    float value[kValuesPerLane];
    load_run(static_cast<const T*>(p.x) + row * p.ld_x + column, left, value);
    const float scale = block_scale(warp_max(largest(value)), format_max, p.format);
    const int64_t at = row * p.cols + column;
    if (p.type == NarrowType::kE4m3) {
      store_e4m3(static_cast<uint8_t*>(p.data) + at, left, value, scale);
    } else {
      store_e5m6(static_cast<uint16_t*>(p.data) + at, left, value, scale);
    }
    if (lane == 0) {
      const uint32_t plane = uint32_t(row) / uint32_t(p.rows);
      const uint32_t within = uint32_t(row) - plane * uint32_t(p.rows);
      p.scale[plane * p.plane_scale + k_group * p.ld_scale + within] = scale;
    }
  }
}

}  // namespace dsk
