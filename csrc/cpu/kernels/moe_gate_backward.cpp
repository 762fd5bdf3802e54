// The router's gradient. From the gradients of the chosen weights and of the scores to that of the
// logits, token by token; then dx = dlogits weight and dweight = dlogits^T x, in fp32.
//
// A task is 64 columns of d: it widens that panel of the weights once for all tokens, and each
// stretch of 64 tokens of x once, so x and weight are read once and never copied whole.
#include "cpu/kernels/block_units.hpp"
#include "cpu/kernels/table.hpp"

namespace dsk::cpu::DSK_CPU_NS {
namespace {

constexpr float kWeightSumFloor = 1e-20f;  // as in the forward

// What the tasks share. Tokens are padded to blocks of 64 with zeros.
struct LogitGrads {
  int64_t blocks, width;  // of 64 tokens; experts rounded up to 64
  float* rows;            // [blocks * 64][width]
  float* turned;          // [blocks][width][64]
};

// dlogits [e] of one token; ds [e] is the gradient of its scores.
void logit_row(const GateBackwardParams& p, int64_t t, float* ds) {
  const float* scores = p.scores + t * p.e;
  const int64_t* idx = p.topk_idx + t * p.k;
  const float* grad = p.grad_weights + t * p.k;
  std::memcpy(ds, p.grad_scores + t * p.e, static_cast<size_t>(p.e) * sizeof(float));
  float total = 1, mean = 0;
  if (p.renormalize) {
    total = kWeightSumFloor;
    for (int64_t k = 0; k < p.k; ++k) total += scores[idx[k]];
    for (int64_t k = 0; k < p.k; ++k) mean += grad[k] * p.scale * scores[idx[k]];
    mean /= total;
  }
  for (int64_t k = 0; k < p.k; ++k) ds[idx[k]] += (grad[k] * p.scale - mean) / total;
  float dot = 0;
  if (!p.sigmoid) {
    for (int64_t i = 0; i < p.e; ++i) dot += ds[i] * scores[i];
  }
  for (int64_t i = 0; i < p.e; ++i) {
    ds[i] = p.sigmoid ? ds[i] * scores[i] * (1 - scores[i]) : scores[i] * (ds[i] - dot);
  }
}

void fill_block(const GateBackwardParams& p, const LogitGrads& grads, int64_t block) {
  float* rows = grads.rows + block * kSide * grads.width;
  std::memset(rows, 0, static_cast<size_t>(kSide * grads.width) * sizeof(float));
  const int64_t count = min_of(kSide, p.t - block * kSide);
  for (int64_t i = 0; i < count; ++i) logit_row(p, block * kSide + i, rows + i * grads.width);
  WideBlocks::turn(rows, grads.width, grads.width, grads.turned + block * kSide * grads.width);
}

void store_columns(const MutableMatrix& to, int64_t r0, int64_t n, int64_t d0, int64_t columns,
                   const float* sums) {
  const int64_t element = to.type == Type::kF32 ? 4 : 2;
  char* first = static_cast<char*>(to.data) + (r0 * to.stride + d0) * element;
  write_rows({first, to.stride * element, columns, to.type}, {0, n}, sums, kSide, 1.0f);
}

SourceRows columns_of(const Matrix& from, int64_t d0, int64_t columns) {
  const int64_t element = from.type == Type::kF32 ? 4 : 2;
  return {static_cast<const char*>(from.data) + d0 * element, from.stride * element, columns,
          from.type};
}

void differentiate_columns(const GateBackwardParams& p, const LogitGrads& grads, int64_t d0) {
  const int64_t columns = min_of(kSide, p.d - d0), area = grads.width * kSide;
  float* weight =
      static_cast<float*>(scratch(3, static_cast<uint64_t>(2 * area + 2 * 64 * 64) * 4));
  float* sums = weight + area;
  float* x = sums + area;
  float* dx = x + kSide * kSide;
  for (int64_t e = 0; e < p.e; e += kSide) {
    const int64_t n = min_of(kSide, p.e - e);
    WideBlocks::load_rows(columns_of(p.weight, d0, columns), e, n, kSide, weight + e * kSide);
  }
  std::memset(sums, 0, static_cast<size_t>(area) * sizeof(float));
  for (int64_t block = 0; block < grads.blocks; ++block) {
    const int64_t t0 = block * kSide, n = min_of(kSide, p.t - t0);
    std::memset(dx, 0, static_cast<size_t>(kSide * kSide) * sizeof(float));
    WideBlocks::multiply(grads.rows + t0 * grads.width, grads.width, n, weight, p.e, dx, kSide);
    store_columns(p.dx, t0, n, d0, columns, dx);
    WideBlocks::load_rows(columns_of(p.x, d0, columns), t0, n, kSide, x);
    WideBlocks::multiply(grads.turned + block * area, kSide, p.e, x, kSide, sums, kSide);
  }
  store_columns(p.dweight, 0, p.e, d0, columns, sums);
}

}  // namespace

void moe_gate_backward(const GateBackwardParams& p) {
  LogitGrads grads;
  grads.blocks = ceil_div(p.t, kSide);
  grads.width = round_up(p.e, kSide);
  const int64_t floats = grads.blocks * kSide * grads.width;
  grads.rows = static_cast<float*>(scratch(0, static_cast<uint64_t>(2 * floats) * sizeof(float)));
  grads.turned = grads.rows + floats;
  parallel_for(grads.blocks, p.threads, [&](int64_t block, int) { fill_block(p, grads, block); });
  parallel_for(ceil_div(p.d, kSide), p.threads,
               [&](int64_t task, int) { differentiate_columns(p, grads, task * kSide); });
}

}  // namespace dsk::cpu::DSK_CPU_NS
