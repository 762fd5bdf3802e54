// Loops whose turns the threads of a warp or a CTA share out: thread i takes i, i + threads, ...
#pragma once

#include "cuda/tile/quantize.cuh"

namespace dsk {

template <class Body>
__device__ __forceinline__ void each_in_warp(int count, Body&& body) {
  for (int i = threadIdx.x % kWarp; i < count; i += kWarp) body(i);
}

template <int kThreads, class Body>
__device__ __forceinline__ void each_in_cta(int count, Body&& body) {
  for (int i = threadIdx.x; i < count; i += kThreads) body(i);
}

// body(column, left): runs of four of a row's `count` values, of which `left` are still to come.
template <class Body>
__device__ __forceinline__ void each_run_in_warp(int count, Body&& body) {
  each_in_warp((count + 3) / 4, [&](int run) { body(run * 4, count - run * 4); });
}

}  // namespace dsk
