// Sizes of the GEMMs' tiles, known to the kernel (which asserts them) and to the launcher.
#pragma once

namespace dsk {

constexpr int gemm_round_up(int bytes, int unit) { return (bytes + unit - 1) / unit * unit; }

// bf16 columns of D that one TMA store of a tile this wide takes; its rows are swizzled whole.
constexpr int gemm_panel_columns(int block_n) { return block_n % 64 == 0 ? 64 : 32; }

// Barriers of the ring, and the queue of tiles: 4 of 32 bytes with their barriers.
constexpr int gemm_barrier_bytes(int num_stages) { return num_stages * 2 * 8 + 4 * (32 + 2 * 8); }

// Bytes of GemmFp8Smem: ring stages of A, B and their scales, the bf16 result tile, the barriers.
constexpr int gemm_fp8_shared_bytes(int block_m, int block_n, int num_stages) {
  const int stages = num_stages * (block_m + block_n) * 128;
  const int result = block_m * block_n * 2;
  const int scales = num_stages * (block_m * 4 + (128 % block_n == 0 ? 1 : 2) * 128);
  return gemm_round_up(stages + result + scales + gemm_barrier_bytes(num_stages), 1024);
}

// Bytes of GemmFp8ColumnSmem: the same with a column of scales for B in each stage.
constexpr int gemm_fp8_column_shared_bytes(int block_m, int block_n, int num_stages) {
  const int stages = num_stages * (block_m + block_n) * (128 + 4);
  const int result = block_m * block_n * 2;
  return gemm_round_up(stages + result + gemm_barrier_bytes(num_stages), 1024);
}

// Bytes of GemmFp8SwappedSmem: tiles of 128 rows of B by `tokens` rows of A.
constexpr int gemm_fp8_swapped_shared_bytes(int tokens, int num_stages) {
  const int stages = num_stages * (128 + tokens) * 128;
  const int result = 128 * tokens * 2;
  const int scales = num_stages * (gemm_round_up(tokens * 4, 128) + 128);
  return gemm_round_up(stages + result + scales + gemm_barrier_bytes(num_stages), 1024);
}

// Bytes of GemmSwigluSmem: tiles of 64 rows by 128 columns of D, from 256 rows of B.
constexpr int gemm_fp8_swiglu_shared_bytes(int num_stages) {
  const int stages = num_stages * ((64 + 256) * 128 + 64 * 4 + 3 * 128);
  const int result = 64 * 128 * 2;
  const int maxima = 2 * 64 * 4;
  return gemm_round_up(stages + result + maxima + gemm_barrier_bytes(num_stages), 1024);
}

// Bytes of GemmBf16Smem: ring stages of A and B, the bf16 result tile, the barriers.
constexpr int gemm_bf16_shared_bytes(int block_m, int block_n, int num_stages) {
  const int stages = num_stages * (block_m + block_n) * 128;
  const int result = block_m * block_n * 2;
  return gemm_round_up(stages + result + gemm_barrier_bytes(num_stages), 1024);
}

}  // namespace dsk
