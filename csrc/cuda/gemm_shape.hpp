// Sizes of the FP8 GEMM's tiles, known to the kernel (which asserts them) and to the launcher.
#pragma once

namespace dsk {

// Bytes of GemmFp8Smem: ring stages of A, B and A's scales, the result tile, the barriers.
constexpr int gemm_fp8_shared_bytes(int block_m, int block_n, int num_stages) {
  const int stages = num_stages * (block_m + block_n) * 128;
  const int result = block_m * block_n * 2;
  const int scales = num_stages * block_m * 4;
  const int barriers = num_stages * 2 * 8;
  return (stages + result + scales + barriers + 1023) / 1024 * 1024;
}

}  // namespace dsk
