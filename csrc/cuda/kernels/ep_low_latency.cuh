// The low-latency mode, in four launches: send | receive, experts, return | reduce. Between send
// and receive, and between return and reduce, no SM is occupied: that is where other work goes.
//
// Bound by latency: 128 tokens to 8 experts each are 1024 messages of 7.4 KB (FP8), 7.6 MB or 17 us
// of NVLink at 450 GB/s; the flags cost 1-2 us a trip. FP8 halves the bytes, so the cast is done
// here, in flight: once a token, four of its 56 groups of 128 values a warp at a time.
//
// A message's slot at its expert is (source rank, place), place being how many earlier tokens of
// this rank name the expert: known without asking anybody, and the same whatever runs first.
// Results go to (token, slot) at the token's rank. Depth and hooks: proto/ep_epoch.hpp.
#pragma once

#include "cuda/kernels/ep_combine.cuh"
#include "cuda/tile/ep_signals.cuh"
#include "cuda/tile/quantize.cuh"

namespace dsk {

// Latency is hidden by warps: CTAs are large, since a launch takes one an SM (num_sms).
__device__ __forceinline__ int warps_of_cta() { return blockDim.x / kEpWarp; }

// Numbers warps across CTAs first, so that a few items occupy many SMs.
__device__ __forceinline__ int warp_of(int cta, int ctas) {
  return threadIdx.x / kEpWarp * ctas + cta;
}

// The first of `count` rows that a warp takes when `before` rows have been dealt out in turn to
// all.
__device__ __forceinline__ int first_turn(int warp, int warps, int before) {
  const int turn = warp - before % warps;
  return turn < 0 ? turn + warps : turn;
}

// Base of the low-latency slots in a rank's window.
__device__ __forceinline__ uint8_t* low_base(const EpGroup& g, int owner) {
  return g.windows[owner] + proto::WindowLayout::of(g.shape).low_latency;
}

// ---- send ----

// How many of entries [0, end) of topk_idx name `expert`; by one warp.
__device__ __forceinline__ int count_mentions(const int64_t* topk_idx, int end, int64_t expert) {
  int count = 0;
#pragma unroll 4
  for (int i = threadIdx.x % kEpWarp; i < end; i += kEpWarp) count += topk_idx[i] == expert;
  return int(__reduce_add_sync(0xffffffffu, unsigned(count)));
}

// Where a token goes: lane k knows the slot of its k-th choice, and at whom; peer -1: nowhere.
struct EpSlots {
  int peer;
  uint64_t slot;
};

__device__ __forceinline__ EpSlots slots_of(const EpLowSendParams& p, const EpNow& now, int token) {
  const EpGroup& g = p.group;
  const int lane = threadIdx.x % kEpWarp, topk = p.row.topk;
  const int64_t* choices = p.topk_idx + int64_t(token) * topk;
  const int64_t expert = lane < topk ? choices[lane] : -1;
  int place = 0;
  for (int k = 0; k < topk; ++k) {
    const int count = count_mentions(p.topk_idx, token * topk, choices[k]);
    if (lane == k) place = count;
  }
  const int peer = expert < 0 ? -1 : g.experts.rank_of(expert);
  if (!proto::is_alive(now.alive, peer)) return {-1, 0};
  return {peer, proto::receive_slot(g.shape, proto::low_latency_copy(now.epoch),
                                    int(expert) - g.experts.begin[peer], g.rank, place)};
}

// Calls use(base of the peer's slots, slot, k) for each choice that goes somewhere.
template <class Use>
__device__ __forceinline__ void each_slot(const EpLowSendParams& p, const EpSlots& to, Use use) {
  for (int k = 0; k < p.row.topk; ++k) {
    const int peer = __shfl_sync(0xffffffffu, to.peer, k);
    const uint64_t slot = __shfl_sync(0xffffffffu, to.slot, k);
    if (peer >= 0) use(low_base(p.group, peer), slot, k);
  }
}

// Rows are sent in parts of this many values, so that few messages occupy many warps.
constexpr int kPartValues = kEpInFlight * kQuantGroup;

// Cast once, stored to all that want it.
__device__ __forceinline__ void cast_part(const EpLowSendParams& p, const EpSlots& to, int token,
                                          int part) {
  const EpGroup& g = p.group;
  const proto::LowLatencyLayout low = proto::LowLatencyLayout::of(g.shape);
  const int lane = threadIdx.x % kEpWarp;
  const auto* x = reinterpret_cast<const __nv_bfloat16*>(p.x) + int64_t(token) * p.elements;
  const ScaleFormat format = p.ue8m0 ? ScaleFormat::kUe8m0 : ScaleFormat::kFp32;
  float value[kEpInFlight][kValuesPerLane], scale[kEpInFlight];
#pragma unroll
  for (int i = 0; i < kEpInFlight; ++i) {  // behind the row's end: zeros, unread
    const int column = (part * kEpInFlight + i) * kQuantGroup + lane * kValuesPerLane;
    load_run(x + column, p.elements - column, value[i]);
  }
  uint32_t word[kEpInFlight];
#pragma unroll
  for (int i = 0; i < kEpInFlight; ++i) {
    scale[i] = block_scale(warp_max(largest(value[i])), kE4m3Max, format);
#pragma unroll
    for (int j = 0; j < kValuesPerLane; ++j) value[i][j] = __fdiv_rn(value[i][j], scale[i]);
    word[i] = cast_e4m3x4(value[i]);
  }
  each_slot(p, to, [&](uint8_t* base, uint64_t slot, int) {
    uint8_t* data = base + low.x + slot * uint64_t(g.shape.max_row_bytes);
    auto* scales =
        reinterpret_cast<float*>(base + low.scale + slot * uint64_t(g.shape.max_scale_bytes));
#pragma unroll
    for (int i = 0; i < kEpInFlight; ++i) {
      const int group = part * kEpInFlight + i;
      const int column = group * kQuantGroup + lane * kValuesPerLane;
      // Rows are multiples of 16 values, so a lane's four are there or not.
      if (column < p.elements) *reinterpret_cast<uint32_t*>(data + column) = word[i];
      if (lane == 0 && group * kQuantGroup < p.elements) scales[group] = scale[i];
    }
  });
}

__device__ __forceinline__ void copy_part(const EpLowSendParams& p, const EpSlots& to, int token,
                                          int part) {
  const EpGroup& g = p.group;
  const proto::LowLatencyLayout low = proto::LowLatencyLayout::of(g.shape);
  constexpr int64_t kPart = kPartValues * 2;  // bytes of bf16
  const uint8_t* from = p.x + token * p.row.row_bytes;
  each_slot(p, to, [&](uint8_t* base, uint64_t slot, int) {
    uint8_t* data = base + low.x + slot * uint64_t(g.shape.max_row_bytes);
    copy_row<kPart / kEpChunk>(data + part * kPart, from + part * kPart,
                               min(kPart, p.row.row_bytes - part * kPart));
  });
}

// A run of parts for each warp, so that it seeks the places of few tokens.
__device__ __forceinline__ void send_tokens(const EpLowSendParams& p, const EpNow& now, int warp,
                                            int warps) {
  const proto::LowLatencyLayout low = proto::LowLatencyLayout::of(p.group.shape);
  const int parts = (p.elements + kPartValues - 1) / kPartValues;
  const int64_t items = int64_t(p.tokens) * parts;
  EpSlots to{};
  int sought = -1;
  for (int64_t item = items * warp / warps; item < items * (warp + 1) / warps; ++item) {
    const int token = int(item / parts), part = int(item % parts);
    if (token != sought) to = slots_of(p, now, sought = token);
    if (p.row.scale_bytes > 0) {
      cast_part(p, to, token, part);
    } else {
      copy_part(p, to, token, part);
    }
    if (part != 0) continue;
    each_slot(p, to, [&](uint8_t* base, uint64_t slot, int k) {
      if (threadIdx.x % kEpWarp != 0) return;
      reinterpret_cast<uint64_t*>(base + low.source)[slot] = uint64_t(token) << 32 | uint64_t(k);
    });
  }
}

__device__ __forceinline__ void low_latency_send(const EpLowSendParams& p) {
  const EpGroup& g = p.group;
  const EpNow now = begin_call(g, kEpLowSend);
  const proto::LowLatencyLayout low = proto::LowLatencyLayout::of(g.shape);
  const int copy = proto::low_latency_copy(now.epoch), entries = p.tokens * p.row.topk;
  const int warp = warp_of(blockIdx.x, gridDim.x);
  const int warps = gridDim.x * warps_of_cta();
  send_tokens(p, now, warp, warps);
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
  cuda::atomic_ref<int32_t, cuda::thread_scope_device> word(p.arrived[expert]);
  // Counts down from 0 while CTAs are at work; each takes along what those before it stored.
  if (word.fetch_sub(1, cuda::memory_order_acq_rel) != 1 - parts) return;
  cuda::atomic_ref<uint32_t, cuda::thread_scope_device> failed(p.group.status->failed);
  const bool silent = failed.load(cuda::memory_order_relaxed) != 0;
  word.store(silent ? 1 : int32_t(rows) + 1, cuda::memory_order_release);
}

// Row `i` of those that `source` sent to an expert, to where the experts want it: row `to`.
__device__ __forceinline__ void receive_row(const EpLowReceiveParams& p, int copy, int expert,
                                            int source, int64_t i, int64_t to) {
  const EpGroup& g = p.group;
  const proto::LowLatencyLayout low = proto::LowLatencyLayout::of(g.shape);
  const uint8_t* base = low_base(g, g.rank);
  const uint64_t slot = proto::receive_slot(g.shape, copy, expert, source, i);
  // On its way while the row is.
  const uint64_t word = reinterpret_cast<const uint64_t*>(base + low.source)[slot];
  const int64_t row = int64_t(expert) * g.shape.ranks * g.shape.max_tokens + to;
  copy_row(p.x + row * p.row.row_bytes, base + low.x + slot * uint64_t(g.shape.max_row_bytes),
           p.row.row_bytes);
  const auto* scale =
      reinterpret_cast<const float*>(base + low.scale + slot * uint64_t(g.shape.max_scale_bytes));
  const int scales = int(p.row.scale_bytes / 4);
  each_item<2>(scale, scales, [&](int c, float value) {
    p.scale[(int64_t(expert) * scales + c) * p.ld_scale + to] = value;
  });
  if (threadIdx.x % kEpWarp == 0) {
    p.words[row] = word;
    p.source[row] = source * g.shape.max_tokens + int64_t(word >> 32);
  }
}

// CTAs share an expert's rows, and come expert by expert: blockIdx.x = expert * parts + part.
__device__ __forceinline__ void receive_call(const EpLowReceiveParams& p, const EpNow& now) {
  const EpGroup& g = p.group;
  const int experts = max(1, g.experts.count(g.rank)), parts = gridDim.x / experts;
  const int expert = blockIdx.x / parts, part = blockIdx.x % parts;
  if (!await_everyone(g, now, proto::kLowSent)) return say_arrived(p, expert, parts, 0);
  if (g.experts.count(g.rank) == 0) return;  // waits all the same: what it sends next overwrites
  const int copy = proto::low_latency_copy(now.epoch);
  const int warps = parts * warps_of_cta(), warp = warp_of(part, parts);
  // Thread s asks for source s, so that all counts are on their way at once.
  __shared__ uint32_t counts[kEpReceiveThreads];
  const int thread = threadIdx.x;
  const int64_t at = (int64_t(copy) * g.shape.ranks + thread) * g.shape.max_local_experts + expert;
  const uint8_t* sent = low_base(g, g.rank) + proto::LowLatencyLayout::of(g.shape).count;
  counts[thread] =
      proto::is_alive(now.alive, thread) ? reinterpret_cast<const uint32_t*>(sent)[at] : 0;
  __syncthreads();
  int64_t begin = 0;
  for (int source = 0; source < g.shape.ranks; ++source) {
    const int64_t count = counts[source];
    if (part == 0 && thread == 0) {
      p.layout_range[expert * g.shape.ranks + source] = begin << 32 | count;
    }
    for (int64_t i = first_turn(warp, warps, int(begin)); i < count; i += warps) {
      receive_row(p, copy, expert, source, i, begin + i);
    }
    begin += count;
  }
  if (part == 0 && thread == 0) p.count[expert] = int32_t(begin);
  const int64_t slots = g.shape.ranks * g.shape.max_tokens;
  for (int64_t i = begin + part * int64_t(blockDim.x) + thread; i < slots;
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

// Row `i` of those that `source` sent to an expert, back to where it came from.
__device__ __forceinline__ void return_row(const EpLowReturnParams& p, int copy, int run,
                                           int64_t range, int i) {
  const EpGroup& g = p.group;
  const int ranks = g.shape.ranks, source = run % ranks;
  const int64_t row = run / ranks * (ranks * g.shape.max_tokens) + (range >> 32) + i;
  const uint64_t word = p.words[row];
  const uint64_t slot =
      proto::return_slot(g.shape, copy, int64_t(word >> 32), int(word & 0xffffffffu));
  uint8_t* returned = low_base(g, source) + proto::LowLatencyLayout::of(g.shape).returned;
  copy_row(returned + slot * uint64_t(g.shape.max_row_bytes), p.y + row * p.row_bytes, p.row_bytes);
}

// The sum of `value` over this lane and those before it.
__device__ __forceinline__ int scan_warp(int value) {
  for (int step = 1; step < kEpWarp; step *= 2) {
    const int before = __shfl_up_sync(0xffffffffu, value, step);
    if (int(threadIdx.x % kEpWarp) >= step) value += before;
  }
  return value;
}

__device__ __forceinline__ void low_latency_return(const EpLowReturnParams& p) {
  const EpGroup& g = p.group;
  const EpNow now = begin_call(g, kEpLowReturn);
  const proto::LowLatencyLayout low = proto::LowLatencyLayout::of(g.shape);
  const int copy = proto::low_latency_copy(now.epoch), ranks = g.shape.ranks;
  const int runs = g.experts.count(g.rank) * ranks, lane = threadIdx.x % kEpWarp;
  const int warp = warp_of(blockIdx.x, gridDim.x);
  const int warps = gridDim.x * warps_of_cta();
  int before = 0;
  for (int first = 0; first < runs; first += kEpWarp) {
    // A lane knows one (expert, source); the warp's rows among those of 32 are found by their ends.
    const int mine = first + lane;
    const int64_t range = mine < runs ? p.layout_range[mine] : 0;
    const int count = proto::is_alive(now.alive, mine % ranks) ? int(range & 0xffffffff) : 0;
    const int end = scan_warp(count), total = __shfl_sync(0xffffffffu, end, kEpWarp - 1);
    for (int row = first_turn(warp, warps, before); row < total; row += warps) {
      const int owner = __popc(__ballot_sync(0xffffffffu, end <= row));
      const int begin = __shfl_sync(0xffffffffu, end - count, owner);
      return_row(p, copy, first + owner, __shfl_sync(0xffffffffu, range, owner), row - begin);
    }
    before += total;
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

// 16 bytes of a token's sum, added in order of slots.
__device__ __forceinline__ void reduce_piece(const EpLowReduceParams& p, const EpNow& now,
                                             const proto::LowLatencyLayout& low, int token,
                                             int64_t at) {
  const EpGroup& g = p.group;
  const int copy = proto::low_latency_copy(now.epoch);
  const uint8_t* returned = low_base(g, g.rank) + low.returned + at;
  const int64_t choices = int64_t(token) * p.topk;
  float total[kEpValues] = {};
  const auto where = [&](int k) -> const uint8_t* {
    const int64_t expert = p.topk_idx[choices + k];
    if (expert < 0 || !proto::is_alive(now.alive, g.experts.rank_of(expert))) return nullptr;
    return returned + proto::return_slot(g.shape, copy, token, k) * uint64_t(g.shape.max_row_bytes);
  };
  each_load(p.topk, where, [&](int k, const uint4& piece) {
    add_weighted(total, piece, p.topk_weights[choices + k]);
  });
  *reinterpret_cast<uint4*>(p.out + int64_t(token) * p.elements * 2 + at) = round_piece(total);
}

__device__ __forceinline__ void reduce_call(const EpLowReduceParams& p, const EpNow& now) {
  const EpGroup& g = p.group;
  if (!await_everyone(g, now, proto::kLowReturned)) return;
  const proto::LowLatencyLayout low = proto::LowLatencyLayout::of(g.shape);
  const int chunks = (p.elements * 2 + kEpChunk - 1) / kEpChunk;
  for (int item = warp_of(blockIdx.x, gridDim.x); item < p.tokens * chunks;
       item += gridDim.x * warps_of_cta()) {
    const int at = item % chunks * kEpChunk + threadIdx.x % kEpWarp * 16;
    if (at < p.elements * 2) reduce_piece(p, now, low, item / chunks, at);
  }
}

__device__ __forceinline__ void low_latency_reduce(const EpLowReduceParams& p) {
  const EpNow now = begin_call(p.group, kEpLowReduce);
  reduce_call(p, now);
  end_call(p.group, now);
}

}  // namespace dsk
