"""CUB's block algorithms, from the toolkit's own headers, in the emulator: exact on integers."""

import functools
import tempfile
from pathlib import Path

import numpy as np
import pytest
from outside_support import findings, need_nvcc, ptx_of, seeds_by_tier

emu = pytest.importorskip("dskernels.emu")
pytestmark = need_nvcc()

THREADS, ITEMS = 128, 4
SOURCE = """
#include <cub/block/block_radix_sort.cuh>
#include <cub/block/block_reduce.cuh>
#include <cub/block/block_scan.cuh>

constexpr int threads = 128, items = 4;

extern "C" __global__ void radix_sort(const unsigned* keys, const int* values, unsigned* sorted,
                                      int* permuted) {
  using Sort = cub::BlockRadixSort<unsigned, threads, items, int>;
  __shared__ typename Sort::TempStorage storage;
  const int first = (blockIdx.x * threads + threadIdx.x) * items;
  unsigned k[items];
  int v[items];
  for (int i = 0; i < items; ++i) k[i] = keys[first + i], v[i] = values[first + i];
  Sort(storage).Sort(k, v);
  for (int i = 0; i < items; ++i) sorted[first + i] = k[i], permuted[first + i] = v[i];
}

template <cub::BlockScanAlgorithm algorithm>
__device__ void scan(const int* x, int* prefix, int* total) {
  using Scan = cub::BlockScan<int, threads, algorithm>;
  __shared__ typename Scan::TempStorage storage;
  const int first = (blockIdx.x * threads + threadIdx.x) * items;
  int v[items], sum;
  for (int i = 0; i < items; ++i) v[i] = x[first + i];
  Scan(storage).ExclusiveSum(v, v, sum);
  for (int i = 0; i < items; ++i) prefix[first + i] = v[i];
  if (threadIdx.x == 0) total[blockIdx.x] = sum;
}
extern "C" __global__ void scan_raking(const int* x, int* prefix, int* total) {
  scan<cub::BLOCK_SCAN_RAKING>(x, prefix, total);
}
extern "C" __global__ void scan_warps(const int* x, int* prefix, int* total) {
  scan<cub::BLOCK_SCAN_WARP_SCANS>(x, prefix, total);
}

template <cub::BlockReduceAlgorithm algorithm>
__device__ void reduce(const int* x, int* out, int n) {
  using Reduce = cub::BlockReduce<int, threads, algorithm>;
  __shared__ typename Reduce::TempStorage storage;
  const int valid = min(threads, n - static_cast<int>(blockIdx.x) * threads);
  const int v = threadIdx.x < valid ? x[blockIdx.x * threads + threadIdx.x] : 0;
  const int sum = Reduce(storage).Sum(v, valid);
  if (threadIdx.x == 0) out[blockIdx.x] = sum;
}
extern "C" __global__ void reduce_raking(const int* x, int* out, int n) {
  reduce<cub::BLOCK_REDUCE_RAKING>(x, out, n);
}
extern "C" __global__ void reduce_warps(const int* x, int* out, int n) {
  reduce<cub::BLOCK_REDUCE_WARP_REDUCTIONS>(x, out, n);
}
"""


@functools.cache
def module():
    with tempfile.TemporaryDirectory() as folder:
        return emu.Module(ptx_of(Path(folder), SOURCE), "cub")


@pytest.mark.parametrize("seed", seeds_by_tier())
def test_radix_sort(seed):
    rng = np.random.default_rng(seed)
    blocks = 2
    keys = rng.integers(0, 2**32, (blocks, THREADS * ITEMS), dtype=np.uint32)
    keys[1] %= 17  # many equal keys: the sort is stable
    values = np.arange(keys.size, dtype=np.int32).reshape(keys.shape)
    out, permuted = np.zeros_like(keys), np.zeros_like(values)
    stats = module().kernel("radix_sort")[blocks, THREADS](keys, values, out, permuted, seed=seed)
    order = np.argsort(keys, axis=1, kind="stable")
    assert np.array_equal(out, np.take_along_axis(keys, order, 1))
    assert np.array_equal(permuted, np.take_along_axis(values, order, 1))
    findings(stats, "cub radix sort")


@pytest.mark.parametrize("seed", seeds_by_tier())
@pytest.mark.parametrize("name", ["scan_raking", "scan_warps"])
def test_scan(name, seed):
    x = np.random.default_rng(seed).integers(-1000, 1000, (3, THREADS * ITEMS), dtype=np.int32)
    prefix, total = np.full_like(x, -1), np.full(3, -1, np.int32)
    stats = module().kernel(name)[3, THREADS](x, prefix, total, seed=seed)
    assert np.array_equal(prefix, np.cumsum(x, axis=1) - x)
    assert np.array_equal(total, x.sum(axis=1))
    findings(stats, "cub " + name)


@pytest.mark.parametrize("seed", seeds_by_tier())
@pytest.mark.parametrize("name", ["reduce_raking", "reduce_warps"])
def test_reduce(name, seed):
    n = 2 * THREADS + 45  # the last block is partly filled
    x = np.random.default_rng(seed).integers(-1000, 1000, n, dtype=np.int32)
    out = np.full(3, -1, np.int32)
    stats = module().kernel(name)[3, THREADS](x, out, n, seed=seed)
    assert out.tolist() == [int(x[i : i + THREADS].sum()) for i in range(0, n, THREADS)]
    findings(stats, "cub " + name)
