// A persistent thread pool. Kernels compiled for any instruction set call it through plain
// functions, so this header holds nothing that could be emitted twice with different flags.
#pragma once

#include <cstdint>

namespace dsk::cpu {

// Runs body(context, task, thread) for every task in [0, tasks), at most `threads` at a time and
// including the caller; thread is in [0, threads). Tasks are handed out in order, one by one, so
// uneven ones balance, and a thread that comes late finds none left and is not waited for. Returns
// when all are done. A call made from inside a task, or while another caller holds the pool, runs
// its tasks on the calling thread.
using TaskBody = void (*)(void* context, int64_t task, int thread);
void run_tasks(int64_t tasks, int threads, TaskBody body, void* context);

// threads <= 0 -> the CPUs this process may run on; never more than kMaxThreads.
constexpr int kMaxThreads = 512;
int resolve_threads(int threads);

// Number of worker threads alive (the callers not counted): for tests and info().
int pool_size();

// Scratch memory of the calling thread, 64-byte aligned, kept between calls and grown on demand.
// `slot` tells apart buffers that live at the same time. Contents are unspecified.
constexpr int kScratchSlots = 8;
void* scratch(int slot, uint64_t bytes);

}  // namespace dsk::cpu
