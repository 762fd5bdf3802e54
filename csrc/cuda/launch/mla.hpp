// Host launchers of latent attention.
#pragma once

#include <cstdint>

#include "cuda/launch/context.hpp"
#include "cuda/params/mla.hpp"

namespace dsk::launch {

// How many parts (rows of the schedule) fill `num_sms` SMs (0: all) when a request has `rows` query
// rows: CTAs that share tokens count as one.
int mla_num_parts(const Context& context, int rows, int num_sms);

struct MlaScheduleArgs {
  const int32_t* seq_lens = nullptr;  // [b]
  int32_t* parts = nullptr;           // [num_parts, 8], written
  int32_t* num_splits = nullptr;      // [b + 1], written
  int b = 0;
  int num_parts = 0;
  int split_blocks = 0;  // 0: cut where it balances; else every so many blocks of 64 tokens
  int rows = 1;          // query rows of a request
};

struct MlaDecodeArgs {
  const void* q = nullptr;               // [b, s, h, 576] bf16, contiguous
  const void* kv = nullptr;              // [pages, page, 576] bf16, or [pages, page, 656] bytes
  const int32_t* block_table = nullptr;  // [b, max_pages], contiguous
  const int32_t* seq_lens = nullptr;     // [b]
  const int32_t* parts = nullptr;        // [num_parts, 8] of mla_schedule
  const int32_t* num_splits = nullptr;   // [b + 1]
  void* out = nullptr;                   // [b, s, h, 512] bf16, contiguous
  float* lse = nullptr;                  // [b, h, s]
  float* out_partial = nullptr;          // workspace [max_splits, s * h, 512]
  float* lse_partial = nullptr;          // workspace [max_splits, s * h]
  int b = 0, s = 0, h = 0;
  int pages = 0, page = 0, max_pages = 0;
  int64_t ld_page = 0, ld_token = 0;  // of kv, in its elements: multiples of 16 bytes
  int num_parts = 0, max_splits = 0;
  int split_blocks = 0;
  bool fp8 = false;  // kv is an FP8 cache
  bool causal = true;
  float softmax_scale = 0;  // positive
};

// On the emulator a call returns when the kernels have run, on a GPU they are queued on `stream`.
// Empty problems (no requests, or no query rows) launch nothing. Throw DeviceError.
void mla_schedule(Context& context, const MlaScheduleArgs& args, device::cu::Stream stream);
void mla_decode(Context& context, const MlaDecodeArgs& args, device::cu::Stream stream);

}  // namespace dsk::launch
