// Parameters of the mixture-of-experts kernels. A slot is one (token, choice) pair, numbered
// token * topk + choice; -1 as its expert means that it has none.
#pragma once

#include <cstdint>

#include "cuda/params/rowwise.hpp"

namespace dsk {

constexpr int kMoeMaxExperts = 512;  // of the gate; a permutation takes twice as many
constexpr int kMoeMaxGroups = 2 * kMoeMaxExperts;
constexpr int kMoeChunk = 256;                              // slots that one CTA sorts
constexpr int kGateTokens = 32;                             // tokens of a cluster of the gate
constexpr int kGateExperts = 64;                            // its experts
constexpr int kGateCluster = 8;                             // its CTAs
constexpr int kHiddenThreads = 512;                         // of moe_hidden_quantize
constexpr int kHiddenSharedBytes = 3 * 128 * 128 * 4 + 16;  // dgate, dup and act of a tile
constexpr int kGateSharedBytes =
    8 * kGateTokens * (kGateExperts + 8) * 4 + kGateTokens * kGateExperts * 4 + 16;

struct MoeGateParams {
  const void* x;        // [tokens, depth] of x_type, row stride ld_x
  const void* weight;   // [experts, depth] of weight_type, contiguous
  const float* bias;    // [experts], or null
  int64_t* topk_idx;    // [tokens, topk]
  float* topk_weights;  // [tokens, topk]
  float* scores;        // [tokens, experts], unbiased
  int32_t* finished;    // [tokens / 32, 8], 0 from the caller: CTAs that are done with a token
  int64_t* counts;      // [sequences, experts], 0 from the caller: choices; or null
  int64_t* affinity;    // [sequences, experts + 1], likewise: sums of normalised scores in units of
                        // 2^-40, then how many tokens have a NaN; null if counts is
  int64_t ld_x;         // elements
  int32_t tokens;
  int32_t depth;
  int32_t experts;
  int32_t num_groups;
  int32_t topk_group;
  int32_t topk;
  int32_t softmax;      // else sigmoid
  int32_t top2;         // a group is as good as its two best experts' sum, else as its best one
  int32_t renormalize;  // divide the chosen weights by their sum
  int32_t sequence;     // tokens of one, if counts is given
  float scale;
  WideType x_type;
  WideType weight_type;
};

// Where each chunk of slots goes: counts first, then, by the last CTA to finish, first rows. A
// token has `topk` slots of its choice and then one for each shared expert.
struct MoeLayoutParams {
  const int64_t* topk_idx;    // [tokens, topk], values in [-1, experts), or rows of expert_map
  const int64_t* expert_map;  // [.., replicas]: experts that stand for a choice, or -1; or null
  int64_t* chosen;            // [slots]: the experts sorted by; null where they are topk_idx
  int32_t* first_row;         // [chunks, experts]
  int64_t* group_sizes;       // [experts], multiples of alignment
  int32_t* group_sizes_i32;   // the same for a kernel that reads them there; or null
  int32_t* finished;          // [1], zeroed by the caller: CTAs that have counted
  int32_t slots;              // tokens * (topk + shared)
  int32_t topk;
  int32_t shared;  // so many of the last experts have every token
  int32_t replicas;
  int32_t experts;
  int32_t alignment;
  int32_t capacity;  // masked: rows between the groups' first ones; 0: one follows the other
};

// Where each slot's row is.
struct MoePlaceParams {
  const int64_t* chosen;     // [slots]
  const int32_t* first_row;  // [chunks, experts], from the layout kernel
  int64_t* row_map;          // [slots]
  int32_t* slot_of_row;      // [rows], -1 from the caller where there is none; or null
  int32_t slots;
  int32_t topk;  // slots of a token, shared experts included
  int32_t experts;
};

struct MoePermuteParams {
  MoePlaceParams place;
  const void* x;  // [tokens] rows of row_bytes, ld_x bytes apart
  void* x_perm;   // [rows] of row_bytes, contiguous
  int64_t ld_x;
  int64_t row_bytes;
};

struct MoePermuteQuantizeParams {
  MoePlaceParams place;
  const void* x;  // [tokens, depth] of type, row stride ld_x
  uint8_t* data;  // [rows, depth] e4m3, contiguous
  float* scale;   // [planes][ceil(depth / 128), plane_rows], row stride ld_scale
  int64_t ld_x;   // elements
  int64_t ld_scale;
  int32_t depth;
  int32_t plane_rows;  // a row belongs to plane row / plane_rows
  WideType type;
  ScaleFormat format;
};

struct MoeUnpermuteParams {
  const void* y;           // [rows, depth], contiguous
  const int64_t* row_map;  // [tokens, topk], -1 where there is no row
  const float* weights;    // [tokens, topk - shared], or null for plain sums
  void* out;               // [tokens, depth] of y's type, contiguous
  int32_t tokens;
  int32_t topk;
  int32_t shared;  // so many of a token's last rows have the weight 1
  int32_t depth;
  WideType type;
};

struct MoeUnpermuteBackwardParams {
  const void* grad;        // [tokens, depth] of y's type, contiguous
  const void* y;           // [rows, depth], contiguous
  const int64_t* row_map;  // [tokens, topk], every row at most once; -1 where there is none
  const float* weights;    // [tokens, topk], or null for plain sums
  void* dy;                // [rows, depth], rows without a name zeroed by the caller
  float* dweights;         // [tokens, topk], likewise
  int32_t tokens;
  int32_t topk;
  int32_t depth;
  WideType type;
};

// The middle of the experts' backward, all of bf16 but weights; a row is one copy of a token.
struct MoeHiddenBackwardParams {
  const void* h;           // [rows, 2 width] = [gate; up], contiguous
  const void* back;        // [rows, width]: gradient of the output, times W2; without the weight
  const int64_t* row_map;  // [slots], every row at most once; -1 where there is none
  const float* weights;    // [slots]
  void* dh;                // [rows, 2 width], rows without a name zeroed by the caller
  void* act;               // [rows, width]: weight * SwiGLU, likewise
  float* dweights;         // [slots], likewise
  int64_t slots;
  int32_t width;
};

// The same middle in FP8: every result is quantised for the product that takes it. rows and width
// are multiples of 128; what no slot has in a block of 128 rows counts as 0, and blocks without any
// slot are neither read nor written.
struct MoeHiddenQuantizeParams {
  const void* h;               // [rows, 2 width] bf16 = [gate; up], contiguous
  const void* back;            // [rows, width] bf16
  const int32_t* slot_of_row;  // [rows], -1 where there is none; blocks begin with their slots
  const float* weights;        // [slots]
  uint8_t* dh;                 // [rows, 2 width] e4m3, in 1 x 128
  float* dh_scale;             // [2 width / 128, rows]
  uint8_t* dh_t;               // [2 width, rows] e4m3, in 1 x 128: 128 rows share a scale
  float* dh_t_scale;           // [rows / 128, 2 width]
  uint8_t* act_t;              // [width, rows] e4m3 likewise: weight * SwiGLU
  float* act_t_scale;          // [rows / 128, width]
  float* dot;                  // [width / 128, rows]: parts of <back, SwiGLU>
  float* dweights;             // [slots], 0 from the caller where a slot has no row
  int32_t* finished;           // [rows / 128], 0 from the caller: CTAs that are done with a block
  int32_t rows;
  int32_t width;
  int32_t transposed;  // whether dh_t and act_t are wanted
};

struct MoeGateBackwardParams {
  const float* grad_weights;  // [tokens, topk]
  const float* grad_scores;   // [tokens, experts]
  const float* scores;        // [tokens, experts]
  const int64_t* topk_idx;    // [tokens, topk], values in [0, experts)
  float* dlogits;             // [tokens, experts]
  int32_t tokens;
  int32_t experts;
  int32_t topk;
  int32_t softmax;      // else sigmoid
  int32_t renormalize;  // as in the forward
  float scale;
};

// out [m, n] = A [m, k] b [k, n], in fp32, rounded once.
struct MoeGateProductParams {
  const float* a;  // [m, k], or [k, m] if transposed; contiguous
  const void* b;   // [k, n] of b_type, row stride ld_b
  void* out;       // [m, n] of out_type, contiguous
  int64_t ld_b;    // elements
  int32_t m;
  int32_t n;
  int32_t k;
  int32_t a_transposed;
  WideType b_type;
  WideType out_type;
};

}  // namespace dsk
