// Signals between GPUs: raise a counter at a peer, wait for one's own, and let the last CTA of a
// launch speak for all. Orders are system-wide release and acquire; the waits give up.
#pragma once

#include <cuda/atomic>

#include "cuda/params/ep.hpp"

namespace dsk {

constexpr int kEpWarp = 32;

using SystemWord = cuda::atomic_ref<uint64_t, cuda::thread_scope_system>;

__device__ __forceinline__ uint64_t* signal_of(const EpGroup& g, int owner, proto::Counter kind,
                                               int source) {
  return g.signals[owner] + proto::counter_index(kind, source);
}

// Which call a launch is.
struct EpNow {
  uint64_t alive, epoch;
  EpKind kind;
};

// All threads read the same: nobody changes it before every CTA has come to end_call.
__device__ __forceinline__ EpNow begin_call(const EpGroup& g, EpKind kind) {
  return {g.control->alive, g.control->calls[kind] + 1, kind};
}

// Called by one thread; what its CTA, and those before it, stored must have been brought together
// by a barrier or last_to_arrive: the release takes all of it along.
__device__ __forceinline__ void raise_at(const EpGroup& g, const EpNow& now, int peer,
                                         proto::Counter kind, int source) {
  SystemWord(*signal_of(g, peer, kind, source)).store(now.epoch, cuda::memory_order_release);
}

// Every alive peer learns that this rank has come so far. Called by one whole CTA whose earlier
// stores must be visible first; thread r serves peer r.
__device__ __forceinline__ void raise_everywhere(const EpGroup& g, const EpNow& now,
                                                 proto::Counter kind) {
  __syncthreads();
  const int peer = threadIdx.x;
  if (proto::is_alive(now.alive, peer)) raise_at(g, now, peer, kind, g.rank);
}

// Whether this signal of ours reaches this call within the polls allowed.
__device__ __forceinline__ bool poll_signal(const EpGroup& g, const EpNow& now, proto::Counter kind,
                                            int source) {
  SystemWord word(*signal_of(g, g.rank, kind, source));
  for (uint32_t poll = 0; poll < g.max_polls; ++poll) {
    if (word.load(cuda::memory_order_acquire) >= now.epoch) return true;
    __nanosleep(64);
  }
  if (atomicExch(&g.status->failed, 1u) == 0) {
    g.status->counter = kind;
    g.status->source = source;
    g.status->call = static_cast<uint32_t>(now.epoch);
  }
  return false;
}

// Until all of `sources` have raised `kind` here. True for the whole CTA or for none of it; what
// the sources stored before is visible to every thread then.
__device__ __forceinline__ bool await_ranks(const EpGroup& g, const EpNow& now, proto::Counter kind,
                                            uint64_t sources) {
  const int source = threadIdx.x;
  const bool reached = !proto::has_rank(sources, source) || poll_signal(g, now, kind, source);
  return __syncthreads_and(reached);
}
__device__ __forceinline__ bool await_everyone(const EpGroup& g, const EpNow& now,
                                               proto::Counter kind) {
  return await_ranks(g, now, kind, now.alive);
}

// True in all threads of the CTA that arrives last; phases of a launch count apart; the stores of
// all CTAs happened before.
__device__ __forceinline__ bool last_to_arrive(const EpGroup& g, const EpNow& now, int phase) {
  __shared__ bool last;
  uint32_t* arrivals = g.control->arrivals[now.kind] + phase;
  __syncthreads();
  if (threadIdx.x == 0) {
    cuda::atomic_thread_fence(cuda::memory_order_acq_rel, cuda::thread_scope_device);
    last = atomicAdd(arrivals, 1u) + 1 == gridDim.x;
    cuda::atomic_thread_fence(cuda::memory_order_acq_rel, cuda::thread_scope_device);
  }
  __syncthreads();
  return last;
}

// Every CTA comes here, whether its waits were answered or not; the last one counts the call.
__device__ __forceinline__ void end_call(const EpGroup& g, const EpNow& now) {
  if (!last_to_arrive(g, now, kEpPhases - 1) || threadIdx.x != 0) return;
  for (int phase = 0; phase < kEpPhases; ++phase) g.control->arrivals[now.kind][phase] = 0;
  g.control->calls[now.kind] = now.epoch;
}

constexpr int kEpChunk = kEpWarp * 16;  // bytes that a warp moves by one instruction
constexpr int kEpInFlight = 4;          // how many of them are on their way at a time
constexpr int kEpRowInFlight = 7;       // and of a row: V3's are 14 or 28 chunks, whole turns

// Calls use(i, the 16 bytes at where(i)) for i of [0, count) in order, and leaves out where it is
// null. Loads first, several of them, since what `use` stores might be what the next one reads, for
// all the compiler knows.
template <class Where, class Use>
__device__ __forceinline__ void each_load(int count, Where where, Use use) {
  for (int begin = 0; begin < count; begin += kEpInFlight) {
    uint4 piece[kEpInFlight] = {};
    const uint8_t* from[kEpInFlight];
#pragma unroll
    for (int i = 0; i < kEpInFlight; ++i) {
      from[i] = i == 0 || begin + i < count ? where(begin + i) : nullptr;
      if (from[i] != nullptr) piece[i] = *reinterpret_cast<const uint4*>(from[i]);
    }
#pragma unroll
    for (int i = 0; i < kEpInFlight; ++i) {
      if (from[i] != nullptr) use(begin + i, piece[i]);
    }
  }
}

// One warp reads `count` items that lie side by side, kInFlight a lane at a time, and calls
// use(each) when they are there: each(store) calls store(i, item) for those of this lane.
template <int kInFlight, class T, class Use>
__device__ __forceinline__ void each_batch(const T* from, int count, Use use) {
  __syncwarp();  // lanes that parted on the way here load together again
  for (int first = threadIdx.x % kEpWarp; first < count; first += kInFlight * kEpWarp) {
    T item[kInFlight];
    const auto there = [&](int i) { return i == 0 || first + i * kEpWarp < count; };
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      if (there(i)) item[i] = from[first + i * kEpWarp];
    }
    use([&](auto store) {
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        if (there(i)) store(first + i * kEpWarp, item[i]);
      }
    });
  }
}
template <int kInFlight, class T, class Store>
__device__ __forceinline__ void each_item(const T* from, int count, Store store) {
  each_batch<kInFlight>(from, count, [&](auto each) { each(store); });
}

// The same for rows of 16-byte pieces, a whole number of them.
template <class Use>
__device__ __forceinline__ void each_row_batch(const uint8_t* row, int64_t bytes, Use use) {
  each_batch<kEpRowInFlight>(reinterpret_cast<const uint4*>(row), int(bytes / 16), use);
}
template <int kInFlight = kEpRowInFlight>
__device__ __forceinline__ void copy_row(uint8_t* to, const uint8_t* from, int64_t bytes) {
  each_item<kInFlight>(reinterpret_cast<const uint4*>(from), int(bytes / 16),
                       [&](int i, const uint4& piece) { reinterpret_cast<uint4*>(to)[i] = piece; });
}

}  // namespace dsk
