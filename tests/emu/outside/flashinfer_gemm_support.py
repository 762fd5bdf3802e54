"""FlashInfer's FP8 block-scale GEMM for Hopper as the emulator's arguments: instances, maps, memory.

Letters: m rows (tokens), n columns, k depth. The headers are those of PyPI `flashinfer-python`,
which compiles them at run time, one kernel for each (n, k); here nvcc compiles the same templates.
Below 32 rows it swaps the operands: weights on wgmma's M side, tokens on its N side.
"""

import functools
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from deepgemm_support import scale_rows
from outside_support import package_folder, ptx_of

from dskernels import emu

FOLDER = package_folder("flashinfer")
SWAPPED_BELOW = 32  # rows
TMA_THREADS = 128
ALL_SMS = 132
SHARED_BYTES = 232448


@dataclass(frozen=True)
class Instance:
    """Template arguments of a dense kernel. tile: rows on wgmma's M side, columns on its N side."""

    n: int
    k: int
    swapped: bool
    tile: tuple[int, int]
    stages: int

    @property
    def numbers(self) -> list[int]:
        return [self.n, self.k, *self.tile, 128, 1, self.stages, TMA_THREADS, 128, 1]

    @property
    def kernel(self) -> str:
        return "fp8_gemm_kernel_swapAB" if self.swapped else "fp8_gemm_kernel"

    @property
    def source(self) -> str:
        swap = "SwapAB" if self.swapped else ""
        scheduler = f"NormalScheduler{swap}<{self.n}, {self.tile[0]}, {self.tile[1]}, 1, 1>"
        given = f"NormalSchedulerInput{swap}"
        numbers = ", ".join(map(str, self.numbers))
        maps = ", ".join(["const __grid_constant__ CUtensorMap"] * 4)
        return (
            f"template __global__ void {self.kernel}<{numbers}, {scheduler}, {given}>"
            f"(__nv_bfloat16*, float*, {given}, {maps});"
        )

    @property
    def threads(self) -> int:
        return TMA_THREADS + 128 * (1 if self.tile[0] == 64 else 2)

    @property
    def shared(self) -> int:
        """Bytes of dynamic shared memory."""
        return shared_bytes(self.k, self.swapped, self.tile, self.stages)


def shared_bytes(k: int, swapped: bool, tile: tuple[int, int], stages: int) -> int:
    rows, columns = tile
    scales = -(-columns * 4 // 128) * 128 if swapped else rows * 4
    per_tile = -(-k // 128) * 4 * (1 if swapped or 128 % columns == 0 else 2)
    stage = (rows + columns) * 128 + scales + 16
    return rows * columns * 2 + stages * stage + -(-per_tile // 8) * 8


def choose(m: int, n: int, k: int) -> Instance:
    """Their choice for a dense product on 132 SMs: the fewest waves of tiles, then the fullest last
    wave, then the narrowest tile; then as many stages as fit."""
    swapped = m < SWAPPED_BELOW
    rows, columns = (n, m) if swapped else (m, n)
    high = 64 if rows <= 64 else 128

    def waves(width: int) -> tuple[int, int, int]:
        tiles = -(-rows // high) * -(-columns // width)
        return -(-tiles // ALL_SMS), -(tiles % ALL_SMS or ALL_SMS), width

    wide = min(range(16, 129, 8), key=waves)
    most = 8 if 128 % wide == 0 else 6
    fits = (
        s for s in range(most, 3, -1) if shared_bytes(k, swapped, (high, wide), s) <= SHARED_BYTES
    )
    return Instance(n, k, swapped, (high, wide), next(fits))


def source(instances: tuple[Instance, ...]) -> str:
    lines = ["#include <string>", "#include <cuda.h>", "#include <cuda_bf16.h>"]
    lines += ["#include <cuda_fp8.h>", "#include <deep_gemm/nvrtc_cutlass.cuh>"]
    lines += ["#include <deep_gemm/fp8_gemm_impl.cuh>", "namespace deep_gemm {"]
    return "\n".join([*lines, *(i.source for i in instances), "}"]) + "\n"


@functools.cache
def build(instances: tuple[Instance, ...]) -> emu.Module:
    """One module of several instances: nvcc reads the headers once."""
    include = FOLDER / "data" / "csrc" / "nv_internal" / "tensorrt_llm"
    with tempfile.TemporaryDirectory() as folder:
        return emu.Module(ptx_of(Path(folder), source(instances), (include,)), "flashinfer_gemm")


def run(module: emu.Module, instance: Instance, a, b, *, seed=None, check=True):
    """a [m, k] in blocks (1, 128) times b [n, k] in (128, 128) -> (D bf16 [m, n], stats)."""
    (m, k), n = a.shape, b.shape[0]
    assert (n, k) == (instance.n, instance.k)
    d = torch.full((m, n), torch.nan, dtype=torch.bfloat16)
    rows, columns = instance.tile
    act, weight = (columns, rows) if instance.swapped else (rows, columns)
    operands = [
        emu.tensor_map(a.data, (act, 128), swizzle=128),
        emu.tensor_map(b.data, (weight, 128), swizzle=128),
    ]
    maps = [
        *(reversed(operands) if instance.swapped else operands),
        emu.tensor_map(scale_rows(a.scale), (1, act)),
        emu.tensor_map(d, (min(act, m), min(weight, n))),
    ]
    numbers = "".join(f"Lj{v}E" for v in instance.numbers)
    mangled = f"{len(instance.kernel)}{instance.kernel}ILj"
    (name,) = (x for x in module.kernels if mangled in x and numbers in x)
    # The scheduler's input: rows, and a pointer that the dense scheduler does not read.
    given = m.to_bytes(8, "little") + bytes(8)
    stats = module.kernel(name)[ALL_SMS, instance.threads](
        d, b.scale.contiguous(), given, *maps, shared=instance.shared, seed=seed, check=check
    )
    return d, stats
