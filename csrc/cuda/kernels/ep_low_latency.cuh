// The low-latency mode, in four launches: send | receive, experts, return | reduce. Between send
// and receive, and between return and reduce, no SM is occupied: that is where other work goes.
//
// Bound by latency: 128 tokens to 8 experts each are 1024 messages of 7.4 KB (FP8), 7.6 MB or 17 us
// of NVLink at 450 GB/s; the flags cost 1-2 us a trip. FP8 halves the bytes, so the cast is done
// here, in flight, one warp a message: 56 groups of 128 values.
//
// A message's slot at its expert is (source rank, place), place being how many earlier tokens of
// this rank name the expert: known without asking anybody, and the same whatever runs first.
// Results go to (token, slot) at the token's rank. Depth and hooks: proto/ep_epoch.hpp.
#pragma once

#include "cuda/kernels/ep_combine.cuh"
#include "cuda/tile/ep_signals.cuh"
#include "cuda/tile/quantize.cuh"

namespace dsk {

constexpr int kEpLowWarps = 8;

// Base of the low-latency slots in a rank's window.
__device__ __forceinline__ uint8_t* low_base(const EpGroup& g, int owner) {
  return g.windows[owner] + proto::WindowLayout::of(g.shape).low_latency;
}

// ---- send ----

// How many of entries [0, end) of topk_idx name `expert`; by one warp.
__device__ __forceinline__ int count_mentions(const int64_t* topk_idx, int end, int64_t expert) {
  int count = 0;
  for (int i = threadIdx.x % kEpWarp; i < end; i += kEpWarp) count += topk_idx[i] == expert;
  return int(__reduce_add_sync(0xffffffffu, unsigned(count)));
}

__device__ __forceinline__ void cast_row(const EpLowSendParams& p, int token, uint8_t* data,
                                         float* scales) {
  const int lane = threadIdx.x % kEpWarp;
  const auto* x = reinterpret_cast<const __nv_bfloat16*>(p.x) + int64_t(token) * p.elements;
  for (int group = 0; group * kQuantGroup < p.elements; ++group) {
    const int column = group * kQuantGroup + lane * kValuesPerLane;
    float value[kValuesPerLane];
    load_run(x + column, p.elements - column, value);
    const float scale = block_scale(warp_max(largest(value)), kE4m3Max,
                                    p.ue8m0 ? ScaleFormat::kUe8m0 : ScaleFormat::kFp32);
    store_e4m3(data + column, p.elements - column, value, scale);
    if (lane == 0) scales[group] = scale;
  }
}

__device__ __forceinline__ void send_message(const EpLowSendParams& p, const EpNow& now, int entry,
                                             int copy, const proto::LowLatencyLayout& low) {
  const EpGroup& g = p.group;
  const int64_t expert = p.topk_idx[entry];
  if (expert < 0) return;
  const int peer = g.experts.rank_of(expert);
  if (!proto::is_alive(now.alive, peer)) return;
  const int token = entry / p.row.topk;
  const int place = count_mentions(p.topk_idx, token * p.row.topk, expert);
  const uint64_t slot =
      proto::receive_slot(g.shape, copy, int(expert) - g.experts.begin[peer], g.rank, place);
  uint8_t* base = low_base(g, peer);
  uint8_t* data = base + low.x + slot * uint64_t(g.shape.max_row_bytes);
  if (p.row.scale_bytes > 0) {
    cast_row(p, token, data,
             reinterpret_cast<float*>(base + low.scale + slot * uint64_t(g.shape.max_scale_bytes)));
  } else {
    copy_row(data, p.x + token * p.row.row_bytes, p.row.row_bytes);
  }
  if (threadIdx.x % kEpWarp == 0) {
    reinterpret_cast<uint64_t*>(base + low.source)[slot] =
        uint64_t(token) << 32 | uint64_t(entry % p.row.topk);
  }
}

__device__ __forceinline__ void low_latency_send(const EpLowSendParams& p) {
  const EpGroup& g = p.group;
  const EpNow now = begin_call(g, kEpLowSend);
  const proto::LowLatencyLayout low = proto::LowLatencyLayout::of(g.shape);
  const int copy = proto::low_latency_copy(now.epoch), entries = p.tokens * p.row.topk;
  const int warp = blockIdx.x * kEpLowWarps + threadIdx.x / kEpWarp;
  const int warps = gridDim.x * kEpLowWarps;
  for (int entry = warp; entry < entries; entry += warps) send_message(p, now, entry, copy, low);
  for (int expert = warp; expert < g.experts.total; expert += warps) {
    const int peer = g.experts.rank_of(expert);
    if (!proto::is_alive(now.alive, peer)) continue;
    const int count = count_mentions(p.topk_idx, entries, expert);
    if (threadIdx.x % kEpWarp == 0) {
      const int64_t at = (int64_t(copy) * g.shape.ranks + g.rank) * g.shape.max_local_experts +
                         expert - g.experts.begin[peer];
      reinterpret_cast<uint32_t*>(low_base(g, peer) + low.count)[at] = uint32_t(count);
    }
  }
  if (last_to_arrive(g, now, 0)) raise_everywhere(g, now, proto::kLowSent);
  end_call(g, now);
}

// ---- receive ----

// The last CTA of an expert tells who waits for its rows. None at all if a source stayed silent:
// the waiting kernel ends, too, and the host reads in the status what happened.
__device__ __forceinline__ void say_arrived(const EpLowReceiveParams& p, int expert, int parts,
                                            int64_t rows) {
  if (p.arrived == nullptr) return;
  __syncthreads();
  if (threadIdx.x != 0) return;
  int32_t* word = p.arrived + expert;
  cuda::atomic_thread_fence(cuda::memory_order_acq_rel, cuda::thread_scope_device);
  if (atomicSub(word, 1) != 1 - parts) return;  // counts down from 0 while CTAs are at work
  cuda::atomic_thread_fence(cuda::memory_order_acq_rel, cuda::thread_scope_device);
  const bool failed = atomicAdd(&p.group.status->failed, 0u) != 0;
  cuda::atomic_ref<int32_t, cuda::thread_scope_device>(*word).store(failed ? 1 : int32_t(rows) + 1,
                                                                    cuda::memory_order_release);
}

// CTAs share an expert's rows, and come expert by expert: blockIdx.x = expert * parts + part.
__device__ __forceinline__ void receive_call(const EpLowReceiveParams& p, const EpNow& now) {
  const EpGroup& g = p.group;
  const int experts = max(1, g.experts.count(g.rank)), parts = gridDim.x / experts;
  const int expert = blockIdx.x / parts, part = blockIdx.x % parts;
  if (!await_everyone(g, now, proto::kLowSent)) return say_arrived(p, expert, parts, 0);
  if (g.experts.count(g.rank) == 0) return;  // waits all the same: what it sends next overwrites
  const proto::LowLatencyLayout low = proto::LowLatencyLayout::of(g.shape);
  const int copy = proto::low_latency_copy(now.epoch);
  const int lane = threadIdx.x % kEpWarp, warp = threadIdx.x / kEpWarp;
  const int64_t slots = g.shape.ranks * g.shape.max_tokens;
  const uint8_t* base = low_base(g, g.rank);
  const auto* counts = reinterpret_cast<const uint32_t*>(base + low.count);
  int64_t begin = 0;
  for (int source = 0; source < g.shape.ranks; ++source) {
    const int64_t at =
        (int64_t(copy) * g.shape.ranks + source) * g.shape.max_local_experts + expert;
    const int64_t count = proto::is_alive(now.alive, source) ? counts[at] : 0;
    if (part == 0 && threadIdx.x == 0) {
      p.layout_range[expert * g.shape.ranks + source] = begin << 32 | count;
    }
    for (int64_t i = part * kEpLowWarps + warp; i < count; i += parts * kEpLowWarps) {
      const uint64_t slot = proto::receive_slot(g.shape, copy, expert, source, i);
      const int64_t row = expert * slots + begin + i;
      copy_row(p.x + row * p.row.row_bytes, base + low.x + slot * uint64_t(g.shape.max_row_bytes),
               p.row.row_bytes);
      const auto* scale = reinterpret_cast<const float*>(base + low.scale +
                                                         slot * uint64_t(g.shape.max_scale_bytes));
      const int scales = int(p.row.scale_bytes / 4);
      for (int c = lane; c < scales; c += kEpWarp) {
        p.scale[(int64_t(expert) * scales + c) * p.ld_scale + begin + i] = scale[c];
      }
      if (lane == 0) {
        const uint64_t word = reinterpret_cast<const uint64_t*>(base + low.source)[slot];
        p.words[row] = word;
        p.source[row] = source * g.shape.max_tokens + int64_t(word >> 32);
      }
    }
    begin += count;
  }
  if (part == 0 && threadIdx.x == 0) p.count[expert] = int32_t(begin);
  for (int64_t i = begin + part * int64_t(blockDim.x) + threadIdx.x; i < slots;
       i += int64_t(parts) * blockDim.x) {
    p.source[expert * slots + i] = -1;
  }
  say_arrived(p, expert, parts, begin);
}

__device__ __forceinline__ void low_latency_receive(const EpLowReceiveParams& p) {
  const EpNow now = begin_call(p.group, kEpLowReceive);
  receive_call(p, now);
  end_call(p.group, now);
}

// ---- return ----

__device__ __forceinline__ void low_latency_return(const EpLowReturnParams& p) {
  const EpGroup& g = p.group;
  const EpNow now = begin_call(g, kEpLowReturn);
  const proto::LowLatencyLayout low = proto::LowLatencyLayout::of(g.shape);
  const int copy = proto::low_latency_copy(now.epoch), ranks = g.shape.ranks;
  const int64_t slots = ranks * g.shape.max_tokens;
  const int warp = blockIdx.x * kEpLowWarps + threadIdx.x / kEpWarp;
  for (int run = 0; run < g.experts.count(g.rank) * ranks; ++run) {
    const int expert = run / ranks, source = run % ranks;
    const int64_t range = p.layout_range[run], begin = range >> 32, count = range & 0xffffffff;
    if (!proto::is_alive(now.alive, source)) continue;
    for (int64_t i = warp; i < count; i += int64_t(gridDim.x) * kEpLowWarps) {
      const int64_t row = expert * slots + begin + i;
      const uint64_t word = p.words[row];
      const uint64_t slot =
          proto::return_slot(g.shape, copy, int64_t(word >> 32), int(word & 0xffffffffu));
      copy_row(low_base(g, source) + low.returned + slot * uint64_t(g.shape.max_row_bytes),
               p.y + row * p.row_bytes, p.row_bytes);
    }
  }
  if (last_to_arrive(g, now, 0)) raise_everywhere(g, now, proto::kLowReturned);
  end_call(g, now);
}

// ---- reduce ----

__device__ __forceinline__ void add_weighted(float (&total)[kEpValues], const uint4& piece,
                                             float weight) {
  const uint32_t words[4] = {piece.x, piece.y, piece.z, piece.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float low = __uint_as_float(words[i] << 16);
    const float high = __uint_as_float(words[i] & 0xffff0000u);
    total[2 * i] = __fadd_rn(total[2 * i], __fmul_rn(weight, low));
    total[2 * i + 1] = __fadd_rn(total[2 * i + 1], __fmul_rn(weight, high));
  }
}

__device__ __forceinline__ void reduce_call(const EpLowReduceParams& p, const EpNow& now) {
  const EpGroup& g = p.group;
  if (!await_everyone(g, now, proto::kLowReturned)) return;
  const proto::LowLatencyLayout low = proto::LowLatencyLayout::of(g.shape);
  const int copy = proto::low_latency_copy(now.epoch);
  const int64_t row_bytes = int64_t(p.elements) * 2;
  const uint8_t* returned = low_base(g, g.rank) + low.returned;
  for (int token = blockIdx.x * kEpLowWarps + threadIdx.x / kEpWarp; token < p.tokens;
       token += gridDim.x * kEpLowWarps) {
    for (int64_t at = threadIdx.x % kEpWarp * 16; at < row_bytes; at += kEpWarp * 16) {
      float total[kEpValues] = {};
      for (int k = 0; k < p.topk; ++k) {
        const int64_t entry = int64_t(token) * p.topk + k, expert = p.topk_idx[entry];
        if (expert < 0 || !proto::is_alive(now.alive, g.experts.rank_of(expert))) continue;
        const uint64_t slot = proto::return_slot(g.shape, copy, token, k);
        add_weighted(
            total,
            *reinterpret_cast<const uint4*>(returned + slot * uint64_t(g.shape.max_row_bytes) + at),
            p.topk_weights[entry]);
      }
      *reinterpret_cast<uint4*>(p.out + token * row_bytes + at) = round_piece(total);
    }
  }
}

__device__ __forceinline__ void low_latency_reduce(const EpLowReduceParams& p) {
  const EpNow now = begin_call(p.group, kEpLowReduce);
  reduce_call(p, now);
  end_call(p.group, now);
}

}  // namespace dsk
