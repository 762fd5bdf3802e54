// Shared-memory layouts: the 128-byte swizzle and the wgmma descriptors that read it.
#pragma once

#include <cstdint>

#include "cuda/ptx/control.cuh"

namespace dsk {

constexpr int kSwizzleBytes = 128;  // width of one swizzled row
constexpr int kSwizzleRows = 8;     // rows after which the pattern repeats (1024 bytes)

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// The same object, by an address that stays in a register instead of being computed anew.
template <class T>
__device__ __forceinline__ T& kept(T& shared) {
  return *static_cast<T*>(__cvta_shared_to_generic(ptx::keep(shared_address(&shared))));
}

// Byte offset of 16-byte chunk `chunk` (0..7) of `row` in a 128B-swizzled tile whose base is
// aligned to 1024 bytes: the chunk index is XORed with the row index modulo 8.
__device__ __forceinline__ uint32_t swizzle128(uint32_t row, uint32_t chunk) {
  return row * kSwizzleBytes + ((chunk ^ (row % kSwizzleRows)) * 16);
}

// The same for rows of 64 bytes, in the 64B swizzle: two rows share a pattern of 4 chunks.
__device__ __forceinline__ uint32_t swizzle64(uint32_t row, uint32_t chunk) {
  return row * 64 + ((chunk ^ (row / 2 % 4)) * 16);
}

// Descriptor of a K-major operand in 128B-swizzled rows (PTX ISA, "Matrix descriptor format"):
// bits 0-13 address / 16; 16-29 unused in this layout; 32-45 stride between groups of 8 rows / 16;
// 62-63 swizzle mode, 1 for 128B.
__device__ __forceinline__ uint64_t k_major_descriptor(const void* tile) {
  constexpr uint64_t kStride = (kSwizzleRows * kSwizzleBytes) >> 4;
  const uint64_t address = (shared_address(tile) & 0x3ffffu) >> 4;
  return address | (kStride << 32) | (uint64_t(1) << 62);
}

// The same operand, `bytes` further along K within the swizzled row (a multiple of 32).
__device__ __forceinline__ uint64_t advance_k(uint64_t descriptor, int bytes) {
  return descriptor + (bytes >> 4);
}

// The descriptors of one K-major operand in each stage of a ring. Stages are equally far apart, and
// only the address in the low word changes: one addition. The shuffle tells the compiler that the
// word is the same in the whole warp, and keeps it from being computed anew each time.
class StageDescriptors {
 public:
  // first, second: the operand in stages 0 and 1.
  __device__ __forceinline__ StageDescriptors(const void* first, const void* second)
      : high_(uint32_t(k_major_descriptor(first) >> 32)),
        low_(__shfl_sync(0xffffffffu, uint32_t(k_major_descriptor(first)), 0)),
        step_((shared_address(second) - shared_address(first)) >> 4) {}

  // `bytes` along K within the swizzled row (a multiple of 32).
  __device__ __forceinline__ uint64_t at(int stage, int bytes) const {
    return ptx::join_words(low_ + stage * step_ + (bytes >> 4), high_);
  }

 private:
  uint32_t high_;
  uint32_t low_;
  uint32_t step_;
};

// Descriptor of an MN-major operand (PTX: transposed) of 16-bit values: tiles of 64 MN values in
// 128B-swizzled rows, one row for each k, `tile_bytes` apart along MN. Bits 16-29 hold that
// distance, 32-45 the 1024 bytes between groups of 8 k.
__device__ __forceinline__ uint64_t mn_major_descriptor(const void* tile, uint32_t tile_bytes) {
  constexpr uint64_t kStride = (kSwizzleRows * kSwizzleBytes) >> 4;
  const uint64_t address = (shared_address(tile) & 0x3ffffu) >> 4;
  return address | (uint64_t(tile_bytes >> 4) << 16) | (kStride << 32) | (uint64_t(1) << 62);
}

// The same operand, `rows` further along K (a multiple of 8).
__device__ __forceinline__ uint64_t advance_k_rows(uint64_t descriptor, int rows) {
  return descriptor + ((rows * kSwizzleBytes) >> 4);
}

}  // namespace dsk
