// parallel_for over the pool, inside the target's namespace (see simd.hpp for why).
#pragma once

#include "cpu/simd.hpp"
#include "cpu/threads.hpp"

namespace dsk::cpu::DSK_CPU_NS {

// body(task, thread) for every task in [0, tasks).
template <typename Body>
DSK_INLINE void parallel_for(int64_t tasks, int threads, Body&& body) {
  auto call = [](void* context, int64_t task, int thread) {
    (*static_cast<std::remove_reference_t<Body>*>(context))(task, thread);
  };
  run_tasks(tasks, threads, call, &body);
}

// body(begin, end, thread) over [0, n) in pieces of at least `grain`, a few per thread.
template <typename Body>
DSK_INLINE void parallel_ranges(int64_t n, int64_t grain, int threads, Body&& body) {
  const int64_t pieces = max_of<int64_t>(1, min_of<int64_t>(ceil_div(n, grain), threads * 4));
  const int64_t size = ceil_div(n, pieces);
  parallel_for(ceil_div(n, max_of<int64_t>(size, 1)), threads, [&](int64_t task, int thread) {
    body(task * size, min_of(n, (task + 1) * size), thread);
  });
}

}  // namespace dsk::cpu::DSK_CPU_NS
