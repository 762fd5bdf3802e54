"""The emulator's speed against its bars: `python -m bench.emu_speed [--full]`.

SGEMM      warp-instructions per second of a 32x32-tile SGEMM, unchecked and with the
           happens-before checker; bar: 100 M/s on two cores, unchecked
tile       the package's FP8 GEMM, one row of 128x128 tiles, exact tensor cores; what the checker
           adds to it
wgmma      microseconds of one m64n128k32 of e4m3; bars: 8 fast, 25 exact, one core
GEMM       the FP8 GEMM in full (4096x4096x7168 with --full), checked and exact; bar: 60 s

Processor time is per core, of this process; the wall clock is that of two host threads and says
little on a machine that others use: the load average is printed with it.
"""

import argparse
import os
import platform
import time
from pathlib import Path

import numpy as np
import torch

import dskernels as dsk
from bench.emu_num import measure
from dskernels import emu

SGEMM = """
extern "C" __global__ void sgemm(const float* a, const float* b, float* c, int m, int n, int k) {
  __shared__ float tile_a[32][33], tile_b[32][33];
  const int x = threadIdx.x, y = threadIdx.y, column = blockIdx.x * 32 + x;
  float sum[4] = {0, 0, 0, 0};
  for (int k0 = 0; k0 < k; k0 += 32) {
    for (int i = 0; i < 4; ++i) {
      const int row = blockIdx.y * 32 + y + i * 8, depth = k0 + y + i * 8;
      tile_a[y + i * 8][x] = row < m && k0 + x < k ? a[row * k + k0 + x] : 0.f;
      tile_b[y + i * 8][x] = depth < k && column < n ? b[depth * n + column] : 0.f;
    }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < 32; ++j) {
      for (int i = 0; i < 4; ++i) sum[i] += tile_a[y + i * 8][j] * tile_b[j][x];
    }
    __syncthreads();
  }
  for (int i = 0; i < 4; ++i) {
    const int row = blockIdx.y * 32 + y + i * 8;
    if (row < m && column < n) c[row * n + column] = sum[i];
  }
}
"""


def machine() -> str:
    """Processor name, processors, load average."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        name = lines[0].split(":")[1].strip() if lines else name
    load = ", ".join(f"{x:.1f}" for x in os.getloadavg())
    return f"{name}, {os.cpu_count()} processors, load {load}"


def timed(call) -> tuple[float, float, object]:
    """Processor seconds, wall seconds, result."""
    used, begin = time.process_time(), time.perf_counter()
    result = call()
    return time.process_time() - used, time.perf_counter() - begin, result


def sgemm(kernel, n: int, check: bool) -> tuple[float, float]:
    """M warp-instructions a second, of processor time (one core) and of the wall. Best of 3."""
    rng = np.random.default_rng(0)
    a, b = (rng.integers(-8, 8, (n, n)).astype(np.float32) for _ in range(2))
    c = np.zeros((n, n), np.float32)
    tiles = -(-n // 32)
    core = wall = 0.0
    for _ in range(3):
        used, clock, stats = timed(
            lambda: kernel[(tiles, tiles), (32, 8)](a, b, c, n, n, n, check=check)
        )
        assert (c == a @ b).all()
        core = max(core, stats.warp_instructions / used / 1e6)
        wall = max(wall, stats.warp_instructions / clock / 1e6)
    return core, wall


def gemm(m: int, n: int, k: int, check: bool, numerics: str = "exact") -> tuple[float, float]:
    """Processor and wall seconds of one FP8 GEMM through the op layer."""
    rng = torch.Generator().manual_seed(0)
    a = dsk.quantize(torch.randn(m, k, generator=rng), backend="cpu")
    b = dsk.quantize(torch.randn(n, k, generator=rng), (128, 128), backend="cpu")
    os.environ["DSK_EMU_CHECK"] = "1" if check else "0"
    os.environ["DSK_EMU_NUMERICS"] = numerics
    used, clock, _ = timed(lambda: dsk.gemm(a, b, backend="emu"))
    return used, clock


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="the GEMM at 4096x4096x7168")
    parser.add_argument("--n", type=int, default=512, help="SGEMM's size")
    args = parser.parse_args()
    print(machine())
    kernel = emu.Module(emu.compile(SGEMM)).kernel("sgemm")
    for check in (False, True):
        core, wall = sgemm(kernel, args.n, check)
        print(
            f"SGEMM {args.n}, {'checked' if check else 'unchecked'}: {core:.1f} M "
            f"warp-instructions/s a core, {wall:.1f} of the wall clock"
        )
    gemm(128, 128, 128, True)  # loads the kernels
    tile = {check: gemm(128, 1024, 7168, check)[0] for check in (False, True)}
    print(
        f"FP8 GEMM 128x1024x7168, processor time: {tile[False]:.3f} s unchecked, "
        f"{tile[True]:.3f} s checked, {tile[True] / tile[False]:.2f} times"
    )
    for mode in ("fast", "exact"):
        alone, reused = (measure("e4m3", 32, 128, mode, reuse, 2000) for reuse in (False, True))
        print(f"wgmma m64n128k32 e4m3, {mode}: {alone:.1f} us, {reused:.1f} us with B unpacked")
    shape = (4096, 4096, 7168) if args.full else (512, 1024, 7168)
    used, clock = gemm(*shape, check=True)
    print(f"FP8 GEMM {'x'.join(map(str, shape))}, checked, exact: {used:.1f} s used, {clock:.1f} s")


if __name__ == "__main__":
    main()
