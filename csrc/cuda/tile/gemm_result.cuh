// What happens to a tile's fp32 sums: C and the bias are added, and the result goes to memory, bf16
// through shared memory and TMA, fp32 straight from the registers.
#pragma once

#include <cuda_bf16.h>

#include <cuda/ptx>

#include <cstdint>

#include "cuda/gemm_shape.hpp"
#include "cuda/params/gemm.hpp"
#include "cuda/ptx/control.cuh"
#include "cuda/ptx/matrix.cuh"
#include "cuda/tile/gemm_roles.cuh"
#include "cuda/tile/smem_layout.cuh"

namespace dsk {

constexpr int kPanelColumns = 64;  // bf16 columns of a TMA store, but for odd widths of tiles

// One warpgroup's 64 x kN result on its way to D: panels of 64 swizzled rows, a TMA store each.
template <int kN>
struct ResultPanels {
  static constexpr int kColumns = gemm_panel_columns(kN);
  static_assert(kN % kColumns == 0);
  uint8_t panel[kN / kColumns][kMmaM * kColumns * 2];
};

// Byte offset of 16-byte chunk `chunk` of a panel's row.
template <int kPanel>
__device__ __forceinline__ uint32_t panel_offset(uint32_t row, uint32_t chunk) {
  static_assert(kPanel == 64 || kPanel == 32);
  return kPanel == 64 ? swizzle128(row, chunk) : swizzle64(row, chunk);
}

// Where one warpgroup's 64 x kN sums lie in D.
struct ResultPlace {
  int64_t row;    // first row of D
  int rows_left;  // rows from there on that exist, of these 64 and behind; at most 0 when none does
  int column;     // first column of D
  int group;      // whose bias to add
  bool clipped;   // D ends where the tensor map ends: TMA itself drops the rows behind
};

__device__ __forceinline__ float2 load_pair(const float* from) {
  return *reinterpret_cast<const float2*>(from);
}
__device__ __forceinline__ float2 load_pair(const __nv_bfloat16* from) {
  return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(from));
}

// Calls visit(i, row, column) for every pair of accumulators sum[i], sum[i + 1] of this thread that
// lies in D; row and column are relative to `at`. Column pairs never straddle D's edge: 8 | n.
template <int kN, class Visit>
__device__ __forceinline__ void for_each_pair(const ResultPlace& at, int n, Visit visit) {
  const int lane = threadIdx.x % 32;
  const int first_row = threadIdx.x % kWarpgroup / 32 * 16 + lane / 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {  // rows r and r + 8 of the fragment
    const int row = first_row + half * 8;
    if (row >= at.rows_left) continue;
#pragma unroll
    for (int column = 0; column < kN; column += 8) {
      if (at.column + column < n) visit(column / 2 + half * 2, row, column + lane % 4 * 2);
    }
  }
}

template <int kN, class T>
__device__ __forceinline__ void add_matrix(const T* c, int n, const ResultPlace& at,
                                           float (&sum)[kN / 2]) {
  const T* corner = c + at.row * n + at.column;
  for_each_pair<kN>(at, n, [&](int i, int row, int column) {
    const float2 value = load_pair(corner + int64_t(row) * n + column);
    sum[i] = __fadd_rn(sum[i], value.x);
    sum[i + 1] = __fadd_rn(sum[i + 1], value.y);
  });
}

template <int kN, class T>
__device__ __forceinline__ void add_bias(const T* bias, int n, const ResultPlace& at,
                                         float (&sum)[kN / 2]) {
  const T* corner = bias + int64_t(at.group) * n + at.column;
  for_each_pair<kN>(at, n, [&](int i, int, int column) {
    const float2 value = load_pair(corner + column);
    sum[i] = __fadd_rn(sum[i], value.x);
    sum[i + 1] = __fadd_rn(sum[i + 1], value.y);
  });
}

// sum + C, then + bias: the reference's order.
template <int kN>
__device__ __forceinline__ void add_terms(const GemmResult& to, int n, const ResultPlace& at,
                                          float (&sum)[kN / 2]) {
  if (to.c) {
    if (to.c_type == ElementType::kFloat32)
      add_matrix<kN>(static_cast<const float*>(to.c), n, at, sum);
    else
      add_matrix<kN>(static_cast<const __nv_bfloat16*>(to.c), n, at, sum);
  }
  if (to.bias) {
    if (to.bias_type == ElementType::kFloat32)
      add_bias<kN>(static_cast<const float*>(to.bias), n, at, sum);
    else
      add_bias<kN>(static_cast<const __nv_bfloat16*>(to.bias), n, at, sum);
  }
}

// Four neighbouring lanes write one 32-byte sector, so nothing is gained by a detour through TMA.
template <int kN>
__device__ __forceinline__ void store_f32(const GemmResult& to, int n, const ResultPlace& at,
                                          const float (&sum)[kN / 2]) {
  float* corner = static_cast<float*>(to.d) + at.row * n + at.column;
  for_each_pair<kN>(at, n, [&](int i, int row, int column) {
    float* d = corner + int64_t(row) * n + column;
    *reinterpret_cast<float2*>(d) = make_float2(sum[i], sum[i + 1]);
  });
}

// bf16 panels -> the rows of D that exist, 16 bytes at a time. panel(i) is the i-th of them.
template <int kColumns, class Panel>
__device__ __forceinline__ void copy_panel_rows(const GemmResult& to, int n, const ResultPlace& at,
                                                Panel panel) {
  constexpr int kChunks = kColumns / 8;  // 16-byte chunks of a row
  constexpr int kPanel = gemm_panel_columns(kColumns);
  constexpr int kPanelChunks = kPanel / 8;
  auto* d = static_cast<__nv_bfloat16*>(to.d);
  for (int i = threadIdx.x % kWarpgroup; i < at.rows_left * kChunks; i += kWarpgroup) {
    const int row = i / kChunks;
    const int chunk = i % kChunks;
    const int column = at.column + chunk * 8;
    if (column >= n) continue;
    const uint8_t* from =
        panel(chunk / kPanelChunks) + panel_offset<kPanel>(row, chunk % kPanelChunks);
    *reinterpret_cast<uint4*>(d + (at.row + row) * n + column) =
        *reinterpret_cast<const uint4*>(from);
  }
}

template <int kN>
__device__ __forceinline__ void write_panels(ResultPanels<kN>& to, const float (&sum)[kN / 2]) {
  constexpr int kPanel = ResultPanels<kN>::kColumns;
  // Matrices 0..3 of one stmatrix: rows 0-7 and 8-15 of columns 0-7, then of columns 8-15.
  const int lane = threadIdx.x % 32;
  const int row = threadIdx.x % kWarpgroup / 32 * 16 + lane % 16;
#pragma unroll
  for (int column = 0; column < kN; column += 16) {
    uint32_t packed[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const __nv_bfloat162 pair =
          __floats2bfloat162_rn(sum[column / 2 + 2 * i], sum[column / 2 + 2 * i + 1]);
      packed[i] = *reinterpret_cast<const uint32_t*>(&pair);
    }
    const uint32_t chunk = column % kPanel / 8 + lane / 16;
    const uint32_t panel = shared_address(to.panel[column / kPanel]);
    ptx::stmatrix_x4(panel + panel_offset<kPanel>(row, chunk), packed[0], packed[1], packed[2],
                     packed[3]);
  }
}

// The previous tile's store must have read the panels before they are written again. Costs nothing
// while the tile's last products are still under way.
__device__ __forceinline__ void await_panels(int warpgroup) {
  if (threadIdx.x % kWarpgroup == 0)
    cuda::ptx::cp_async_bulk_wait_group_read(cuda::ptx::n32_t<0>{});
  ptx::named_barrier_sync(kEpilogueBarrier + warpgroup, kWarpgroup);
}

template <int kN>
__device__ __forceinline__ void store_bf16(const GemmResult& to, int n, const ResultPlace& at,
                                           ResultPanels<kN>& panels, uint32_t barrier,
                                           const float (&sum)[kN / 2]) {
  using namespace cuda::ptx;
  const bool issuer = threadIdx.x % kWarpgroup == 0;
  write_panels<kN>(panels, sum);

  // TMA drops what hangs over the end of D, but not what hangs over the end of a group within it.
  const bool whole = at.rows_left >= kMmaM || at.clipped;
  if (whole) fence_proxy_async(space_shared);
  ptx::named_barrier_sync(barrier, kWarpgroup);
  if (!whole) {
    copy_panel_rows<kN>(to, n, at, [&](int i) { return panels.panel[i]; });
  } else if (issuer) {
    constexpr int kPanel = ResultPanels<kN>::kColumns;
#pragma unroll
    for (int column = 0; column < kN; column += kPanel) {
      const int32_t d_at[2] = {at.column + column, int32_t(at.row)};
      if (d_at[0] < n) {
        cp_async_bulk_tensor(space_global, space_shared, &to.map, d_at,
                             panels.panel[column / kPanel]);
      }
    }
    cp_async_bulk_commit_group();
  }
}

// All of it, by the 128 threads of math warpgroup `warpgroup`, after await_panels.
template <int kN>
__device__ __forceinline__ void finish_tile(const GemmResult& to, int n, const ResultPlace& at,
                                            ResultPanels<kN>& panels, int warpgroup,
                                            float (&sum)[kN / 2]) {
  if (!to.plain()) {
    add_terms<kN>(to, n, at, sum);
    if (to.d_type == ElementType::kFloat32) return store_f32<kN>(to, n, at, sum);
  }
  store_bf16<kN>(to, n, at, panels, kEpilogueBarrier + warpgroup, sum);
}

// Before a math warpgroup exits: shared memory must outlive the last store's reads. Its writes need
// not be waited for: the grid is not complete before they are.
__device__ __forceinline__ void drain_stores() {
  if (threadIdx.x % kWarpgroup == 0)
    cuda::ptx::cp_async_bulk_wait_group_read(cuda::ptx::n32_t<0>{});
}

}  // namespace dsk
