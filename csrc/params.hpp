// What the launchers and the CPU kernels are given: plain structs, a shape on every pointer.
// Strides count elements; the last dimension of every matrix is contiguous unless it has a stride.
#pragma once

#include <cstdint>

namespace dsk {

enum class Type : int { kF32, kBF16, kF16, kE4M3 };

struct Matrix {
  const void* data = nullptr;  // [rows, columns]
  int64_t stride = 0;          // between rows
  Type type = Type::kF32;
};

struct MutableMatrix {
  void* data = nullptr;  // [rows, columns]
  int64_t stride = 0;
  Type type = Type::kF32;
};

struct Scales {
  float* data = nullptr;  // [ceil(m / block_m), ceil(k / block_k)]
  int64_t stride_m = 0;
  int64_t stride_k = 0;
};

// One struct for every op that ends in a row: quantise, RMSNorm, SwiGLU and their fusions.
struct RowwiseParams {
  int64_t m = 0, k = 0;  // of the result
  Matrix x;              // [m, k]; SwiGLU [m, 2 k] = [gate; up]
  Matrix residual;       // [m, k] or null
  Matrix weight;         // [k]
  float eps = 0;
  MutableMatrix y;          // [m, k] or null
  MutableMatrix sum;        // [m, k] or null: x + residual
  uint8_t* data = nullptr;  // e4m3 [m, k] or null
  int64_t data_stride = 0;
  Scales scale;
  int64_t block_m = 1, block_k = 128;
  bool pow2 = false;
  int threads = 1;
};

struct RopeParams {
  int64_t t = 0, h = 0, r = 0;
  const void* x = nullptr;  // [t, h, r], strides x_t, x_h, 1
  int64_t x_t = 0, x_h = 0;
  const float* cos = nullptr;  // [t, r / 2]
  const float* sin = nullptr;  // [t, r / 2]
  int64_t angle_t = 0;
  void* y = nullptr;  // [t, h, r], strides y_t, y_h, 1
  int64_t y_t = 0, y_h = 0;
  Type type = Type::kF32;
  bool interleaved = true, inverse = false;
  int threads = 1;
};

// y [m, n] = x [m, k] times weights [n, k] transposed, + c, + bias.
struct GemmParams {
  int64_t m = 0, n = 0, k = 0;
  Matrix x;                             // [m, k]: e4m3, bf16, fp16 or fp32
  Scales scale_x;                       // [m, ceil(k / 128)] for e4m3
  const uint8_t* weights = nullptr;     // packed (csrc/cpu/packed.hpp)
  const uint8_t* nan_blocks = nullptr;  // [ceil(n / 64), ceil(k / 128)]
  Scales scale_w;                       // [ceil(n / 128), ceil(k / 128)], or [n, ceil(k / 128)]
  bool column_scales = false;           // the latter
  Matrix c;                             // [m, n] or null
  Matrix bias;                          // [n] or null
  MutableMatrix y;                      // [m, n]
  int threads = 1;
};

// The routed experts of x: sum over k of weight * w2 swiglu(w13 x).
struct PackedExperts {
  const uint8_t* weights = nullptr;     // [e][packed bytes]
  const uint8_t* nan_blocks = nullptr;  // [e][marks]
  const float* scale = nullptr;         // [e][ceil(n / 128)][ceil(k / 128)], strides below
  int64_t scale_e = 0, scale_n = 0, scale_k = 0;
};

struct MoeParams {
  int64_t t = 0, k = 0, e = 0, d = 0, i = 0;
  Matrix x;                             // [t, d]
  PackedExperts w13;                    // [e, 2 i, d] = [gate; up]
  PackedExperts w2;                     // [e, d, i]
  const int64_t* topk_idx = nullptr;    // [t, k], -1: none
  const float* topk_weights = nullptr;  // [t, k]
  bool quantize = true;  // W8A8: x and the hidden rows become e4m3 in blocks (1, 128)
  MutableMatrix out;     // [t, d], x's type
  int threads = 1;
};

// The router: scores of experts, and the best k of a token within its best groups.
struct GateParams {
  int64_t t = 0, d = 0, e = 0, k = 0;
  Matrix x;                     // [t, d]
  Matrix weight;                // [e, d]
  const float* bias = nullptr;  // [e] or null
  int64_t groups = 1, top_groups = 1;
  bool sigmoid = true;  // else softmax
  bool by_sum = true;   // a group's rank: the sum of its two best, else its best
  bool renormalize = true;
  float scale = 1;
  int64_t* topk_idx = nullptr;    // [t, k]
  float* topk_weights = nullptr;  // [t, k]
  float* scores = nullptr;        // [t, e]
  int threads = 1;
};

// Its gradients: of the weights and scores to those of x and weight.
struct GateBackwardParams {
  int64_t t = 0, d = 0, e = 0, k = 0;
  Matrix x;                             // [t, d]
  Matrix weight;                        // [e, d]
  const int64_t* topk_idx = nullptr;    // [t, k]
  const float* scores = nullptr;        // [t, e]
  const float* grad_weights = nullptr;  // [t, k]
  const float* grad_scores = nullptr;   // [t, e]
  bool sigmoid = true, renormalize = true;
  float scale = 1;
  MutableMatrix dx;       // [t, d]
  MutableMatrix dweight;  // [e, d]
  int threads = 1;
};

// Copies of tokens sorted by expert. Rows are bytes: their type does not matter.
struct PermuteParams {
  int64_t t = 0, k = 0, e = 0, row_bytes = 0;
  const char* x = nullptr;  // [t], stride x_row bytes
  int64_t x_row = 0;
  const int64_t* row_map = nullptr;      // [t, k], -1: none
  const int64_t* counts = nullptr;       // [e] rows of an expert without padding
  const int64_t* group_sizes = nullptr;  // [e] with padding
  char* out = nullptr;                   // [sum of group_sizes], contiguous
  int threads = 1;
};

// out [t] = sum over k of weight times y [row_map [t, k]].
struct UnpermuteParams {
  int64_t t = 0, k = 0, d = 0;
  Matrix y;                          // [m, d]
  const int64_t* row_map = nullptr;  // [t, k], -1: none
  const float* weights = nullptr;    // [t, k] or null: ones
  MutableMatrix out;                 // [t, d], y's type
  // The gradients instead: of y (rows that row_map does not name are left alone) and of weights.
  Matrix grad;                // [t, d], y's type
  MutableMatrix dy;           // [m, d], y's type
  float* dweights = nullptr;  // [t, k]
  int threads = 1;
};

// Attention of query rows over keys and values that lie in pages: MLA decode over the latent cache
// (a value is the head of its key) and prefill (one "page" per request) are the same loop.
enum class CacheKind : int { kBF16, kF16, kF32, kFP8Rows };

struct KeyValues {
  CacheKind kind = CacheKind::kBF16;
  const char* keys = nullptr;    // [pages][page][row]: bytes, see the strides
  const char* values = nullptr;  // the same pages; keys for a latent cache
  int64_t key_page = 0, key_row = 0, value_page = 0, value_row = 0;  // strides in bytes
  int64_t page = 1;                                                  // tokens of a page
  int64_t dk = 0;                                                    // width of a key
  int64_t dv = 0;                                                    // width of a value
};

struct DecodeParams {
  int64_t b = 0, s = 0, h = 0;
  const void* q = nullptr;  // [b, s, h, dk], contiguous
  Type type = Type::kBF16;  // of q and out
  KeyValues cache;
  const int32_t* block_table = nullptr;  // [b, max_pages]
  int64_t table_stride = 0;
  const int32_t* seq_lens = nullptr;  // [b]
  float scale = 1;
  bool causal = true;
  void* out = nullptr;   // [b, s, h, dv], contiguous
  float* lse = nullptr;  // [b, h, s], contiguous
  int threads = 1;
};

// Tokens into the cache. Of tokens that share a slot the last one stays.
struct AppendParams {
  int64_t t = 0, dl = 0, r = 0;
  Matrix latent;          // [t, dl]
  Matrix rope;            // [t, r]
  char* cache = nullptr;  // [pages][page][row], strides in bytes below
  CacheKind kind = CacheKind::kBF16;
  int64_t page = 1, page_bytes = 0, row_bytes = 0;
  const int64_t* slots = nullptr;  // [t]: page * page size + offset, -1: none
  int threads = 1;
};

struct PrefillParams {
  int64_t requests = 0, h = 0;
  const char* q = nullptr;               // [t, h, dk]
  int64_t q_token = 0, q_head = 0;       // strides in bytes
  Type type = Type::kBF16;               // of q, k, v and out
  KeyValues kv;                          // of head 0; page is unused
  int64_t key_head = 0, value_head = 0;  // bytes from one head to the next
  const int32_t* starts_q = nullptr;     // [requests + 1]
  const int32_t* starts_k = nullptr;     // [requests + 1]
  float scale = 1;
  bool causal = true;
  void* out = nullptr;   // [t, h, dv], contiguous
  float* lse = nullptr;  // [h, t]
  int64_t lse_head = 0;
  int threads = 1;
};

// The gradients of q, k and v. forward.out and forward.lse are what the forward left.
struct PrefillBackwardParams {
  PrefillParams forward;
  const char* grad = nullptr;             // [t, h, dv], forward.type
  int64_t grad_token = 0, grad_head = 0;  // strides in bytes
  const float* grad_lse = nullptr;        // [h, t] or null
  int64_t grad_lse_head = 0;
  void *dq = nullptr, *dk = nullptr, *dv = nullptr;  // of q's, k's and v's shape, contiguous
};

}  // namespace dsk
