// Parameters of the latent-attention kernels. Letters: b requests, s query tokens of a request,
// h heads; a request's rows are its s * h queries, token by token.
#pragma once

#include <cstdint>

#include "cuda/params/tensor_map.hpp"

namespace dsk {

// A part is the work of one CTA (and, for more than 64 rows, of its neighbours with the same
// tokens): from block begin_block of request begin_request up to, not including, block end_block of
// request end_request. A block is 64 tokens. Laid out as FlashMLA's tile_scheduler_metadata is: one
// row of eight int32.
struct MlaPart {
  int32_t begin_request;
  int32_t begin_block;
  int32_t end_request;
  int32_t end_block;
  int32_t begin_split;  // which split of begin_request this part starts with
  int32_t unused[3];
};

struct MlaScheduleParams {
  const int32_t* seq_lens;  // [b]
  MlaPart* parts;           // [num_parts], written
  int32_t* num_splits;      // [b + 1], written: splits of requests before i
  int32_t b;
  int32_t num_parts;
  int32_t split_blocks;  // 0: cut where the load balances; else cut every so many blocks
  int32_t piece_cost;    // of a piece of a request beside its blocks, in blocks
};

struct MlaDecodeParams {
  TensorMapBytes q;        // [b, s * h, 576] bf16, box [1, 64, 64], 128B swizzle
  TensorMapBytes kv;       // [pages, page, 576] bf16, box [1, min(page, 64), 64], 128B swizzle
  TensorMapBytes out;      // [b, s * h, 512] bf16, box [1, 64, 64], 128B swizzle
  const uint8_t* kv_rows;  // FP8 cache instead: [pages, page, 656] bytes, strides ld_page, ld_token
  int64_t ld_page;         // bytes
  int64_t ld_token;        // bytes
  const int32_t* block_table;  // [b, max_pages], row stride ld_table
  const int32_t* seq_lens;     // [b]
  const MlaPart* parts;        // [grid.y]
  const int32_t* num_splits;   // [b + 1]
  float* lse;                  // [b, h, s], natural logarithm
  float* out_partial;  // [splits, s * h, 512], each normalised; unused where a request has one
  float* lse_partial;  // [splits, s * h], base 2; -inf where nothing was attended
  int32_t ld_table;
  int32_t page;  // tokens of a page
  int32_t s;
  int32_t h;
  int32_t causal;
  int32_t split_blocks;  // as in the schedule
  float scale_log2;      // softmax scale * log2(e)
};

struct MlaCombineParams {
  const int32_t* num_splits;  // [b + 1]
  const float* out_partial;   // [splits, s * h, 512]
  const float* lse_partial;   // [splits, s * h]
  void* out;                  // [b, s * h, 512] bf16
  float* lse;                 // [b, h, s]
  int32_t b;
  int32_t s;
  int32_t h;
};

}  // namespace dsk
