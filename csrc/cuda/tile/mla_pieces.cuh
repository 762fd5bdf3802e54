// What one CTA of MLA decode works on: its part of the schedule, cut into pieces of one request.
#pragma once

#include <cstdint>

#include "cuda/params/mla.hpp"

namespace dsk {

constexpr int kMlaBlock = 64;  // tokens

struct MlaPiece {
  int request;
  int length;  // tokens of the request
  int begin;   // first block
  int end;     // one past the last block
  int slot;    // where its partial result goes; -1: it is the whole request

  // A request of one block is never split.
  __device__ __forceinline__ bool is_one_block() const { return length <= kMlaBlock; }
};

__device__ __forceinline__ int mla_num_blocks(int length) {
  return (length + kMlaBlock - 1) / kMlaBlock;
}

// Every role of the CTA walks the same pieces. A request without tokens is one piece of no blocks.
class MlaPieces {
 public:
  __device__ explicit MlaPieces(const MlaDecodeParams& p)
      : p_(p),
        part_(p.parts[blockIdx.y]),
        request_(part_.begin_request),
        block_(part_.begin_block),
        split_(part_.begin_split) {}

  __device__ bool more() const {
    return request_ < part_.end_request ||
           (request_ == part_.end_request && block_ < part_.end_block);
  }

  // Of the next piece, where there is one: known before the request's length has been read.
  __device__ int next_request() const { return request_; }
  __device__ int next_block() const { return block_; }

  __device__ bool next(MlaPiece& piece) {
    if (!more()) return false;
    piece.request = request_;
    piece.length = __ldg(p_.seq_lens + request_);
    piece.begin = block_;
    const int whole = mla_num_blocks(piece.length);
    const int last = request_ < part_.end_request ? whole : part_.end_block;
    piece.end = p_.split_blocks ? min(last, block_ + p_.split_blocks) : last;
    const int first_split = __ldg(p_.num_splits + request_);
    const bool alone = __ldg(p_.num_splits + request_ + 1) - first_split == 1;
    piece.slot = alone ? -1 : first_split + split_;
    block_ = piece.end;
    ++split_;
    if (block_ >= whole) {
      ++request_;
      block_ = 0;
      split_ = 0;
    }
    return true;
  }

 private:
  const MlaDecodeParams& p_;
  MlaPart part_;
  int request_;
  int block_;
  int split_;
};

}  // namespace dsk
