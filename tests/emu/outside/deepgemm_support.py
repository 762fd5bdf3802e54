"""DeepGEMM's SM90 kernels as the emulator's arguments: template instances, tensor maps, memory.

Letters: m rows, n columns, k depth, g groups. The maps, the shared-memory sizes and the scale
layouts are what the kernels' headers expect of their launcher.
"""

import functools
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from outside_support import package_folder, ptx_of

from dskernels import emu

NORMAL, CONTIGUOUS, MASKED, K_GROUPED = 0, 1, 2, 3
TYPE_NAMES = ("Normal", "MGroupedContiguous", "MGroupedMasked", "KGroupedContiguous")
TMA_THREADS = 128
FOLDER = package_folder("deep_gemm")


@dataclass(frozen=True)
class Instance:
    """Template arguments of one GEMM kernel. recipe: "1d2d" or "1d1d"; shape: n and k (m) known to
    the compiler, 0 for run time; multicast: CTAs of a cluster that share a tile of A (on_a) or B.
    """

    recipe: str
    block_m: int
    block_n: int
    kind: int = NORMAL
    groups: int = 1
    stages: int = 3
    multicast: int = 1
    on_a: bool = False
    sms: int = 4
    shape: tuple[int, int, int] = (0, 0, 0)

    @property
    def math_threads(self) -> int:
        return 128 if self.block_m <= 64 else 256

    @property
    def swizzle_d(self) -> int:
        row = self.block_n * 2
        return next(s for s in (128, 64, 32) if row % s == 0)

    @property
    def numbers(self) -> list[int]:
        swizzles = [128, 128] + ([self.swizzle_d] if self.recipe == "1d2d" else [])
        tile = [self.groups, self.block_m, self.block_n, 128]
        return [*self.shape, *tile, *swizzles, self.stages, TMA_THREADS, self.math_threads]

    @property
    def arguments(self) -> str:
        """Template arguments as C++ text."""
        numbers = ", ".join(map(str, self.numbers))
        on_a = "true" if self.on_a else "false"
        tail = f"{self.multicast}, {on_a}, {self.sms}, GemmType::{TYPE_NAMES[self.kind]}"
        if self.recipe == "1d2d":
            return f"cute::UMMA::Major::K, {numbers}, {tail}, cutlass::bfloat16_t"
        return f"{numbers}, {tail}, float"

    @property
    def mangled(self) -> tuple[str, str]:
        """What the kernel's mangled name contains: function and arguments."""
        numbers = [*self.numbers, self.multicast]
        text = "".join(f"Lj{v}E" for v in numbers)
        kind = f"LNS_8GemmTypeE{self.kind}E"
        return f"{self.recipe}_impl", f"{text}Lb{int(self.on_a)}ELj{self.sms}E{kind}"

    @property
    def shared_fixed(self) -> int:
        """Bytes of dynamic shared memory, but for the kernel's copy of B's scales (1d2d)."""
        maps = 256 if self.kind == K_GROUPED else 0
        d = self.block_m * self.block_n * (2 if self.recipe == "1d2d" else 4)
        a_b = (self.block_m + self.block_n) * 128
        scales = -(-self.block_m * 4 // 128) * 128
        if self.recipe == "1d1d":
            scales += -(-self.block_n * 4 // 128) * 128
        return maps + -(-d // 1024) * 1024 + self.stages * (a_b + scales + 16)


def source(instances: tuple[Instance, ...]) -> str:
    """CUDA C++ that instantiates the kernels."""
    tma = "const __grid_constant__ cute::TmaDescriptor"
    types = {
        "1d2d": f"float*, int*, uint32_t, uint32_t, uint32_t, {tma}, {tma}, {tma}, {tma}",
        "1d1d": "__nv_fp8_e4m3*, __nv_fp8_e4m3*, int*, cute::TmaDescriptor*, "
        f"uint32_t, uint32_t, uint32_t, {tma}, {tma}, {tma}, {tma}, {tma}",
    }
    recipes = sorted({i.recipe for i in instances})
    lines = [f"#include <deep_gemm/impls/sm90_fp8_gemm_{r}.cuh>" for r in recipes]
    lines.append("using deep_gemm::GemmType;")
    for i in instances:
        name = f"deep_gemm::sm90_fp8_gemm_{i.recipe}_impl<{i.arguments}>"
        lines.append(f"template __global__ void {name}({types[i.recipe]});")
    return "\n".join(lines) + "\n"


@functools.cache
def build(instances: tuple[Instance, ...]) -> emu.Module:
    """One module of several instances: nvcc reads the headers once."""
    with tempfile.TemporaryDirectory() as folder:
        text = ptx_of(Path(folder), source(instances), (FOLDER / "include",))
    return emu.Module(text, "deep_gemm")


def kernel(module: emu.Module, instance: Instance) -> emu.Kernel:
    impl, arguments = instance.mangled
    (name,) = (n for n in module.kernels if impl in n and arguments in n)
    return module.kernel(name)


def scale_rows(scale: torch.Tensor) -> torch.Tensor:
    """Scales [..., m, c] as TMA reads them: [... * c, align(m, 4)], each column of blocks a row."""
    m, c = scale.shape[-2:]
    rows = scale.new_zeros(*scale.shape[:-2], c, -(-m // 4) * 4)
    rows[..., :m] = scale.transpose(-2, -1)
    return rows.flatten(0, -2)


def run_1d2d(module, instance, a, b, layout=None, *, seed=None, check=True):
    """a, b ScaledTensors ([m, k] or masked [g, m, k]; [n, k] or [g, n, k]) -> (D bf16, stats).

    layout: int32 row groups or group sizes of the grouped kinds. D starts as NaN: what stays NaN
    was not written.
    """
    m, k = a.shape[-2:]
    n = b.shape[-2]
    rows = a.data.flatten(0, -2).shape[0]
    d = torch.full((rows, n), torch.nan, dtype=torch.bfloat16)
    sfa, sfb = scale_rows(a.scale), b.scale.contiguous()
    width = instance.swizzle_d // 2
    maps = [
        emu.tensor_map(a.data.flatten(0, -2), (instance.block_m, 128), swizzle=128),
        emu.tensor_map(b.data.flatten(0, -2), (instance.block_n, 128), swizzle=128),
        emu.tensor_map(d, (instance.block_m, width), swizzle=instance.swizzle_d),
        emu.tensor_map(sfa, (1, instance.block_m)),
    ]
    per_row = 1 if 128 % instance.block_n == 0 else 2
    shared = instance.shared_fixed + -(-(-(-k // 128) * per_row * 4) // 8) * 8
    stats = kernel(module, instance)[instance.sms, TMA_THREADS + instance.math_threads](
        sfb, layout, m, n, k, *maps,
        cluster=instance.multicast, shared=shared, seed=seed, check=check,
    )  # fmt: skip
    return d.view(*a.shape[:-1], n), stats


def run_1d1d(module, instance, a, b, d, *, seed=None):
    """a [m, k] times b [n, k], both scaled (1, 128), is added to d fp32 [m, n]; returns stats."""
    (m, k), n = a.shape, b.shape[0]
    maps = [
        emu.tensor_map(a.data, (instance.block_m, 128), swizzle=128),
        emu.tensor_map(b.data, (instance.block_n, 128), swizzle=128),
        emu.tensor_map(scale_rows(a.scale), (1, instance.block_m)),
        emu.tensor_map(scale_rows(b.scale), (1, instance.block_n)),
        emu.tensor_map(d, (64, instance.block_n)),
    ]
    return kernel(module, instance)[instance.sms, TMA_THREADS + instance.math_threads](
        a.data, b.data, None, None, m, n, k, *maps,
        cluster=instance.multicast, shared=instance.shared_fixed, seed=seed,
    )  # fmt: skip


def run_k_grouped(module, instance, groups, d, *, seed=None):
    """groups: (a [m, k_i], b [n, k_i]) by group, each added to d[i] [m, n]; returns stats.

    The kernel rewrites its tensor maps of A and B for every group (tensormap.replace), in memory
    of its own: two maps a CTA.
    """
    m, n = d.shape[1:]
    sizes = torch.tensor([a.shape[1] for a, _ in groups], dtype=torch.int32)
    flat_a = torch.cat([a.data.flatten() for a, _ in groups])
    flat_b = torch.cat([b.data.flatten() for _, b in groups])
    sfa = torch.cat([scale_rows(a.scale) for a, _ in groups])
    sfb = torch.cat([scale_rows(b.scale) for _, b in groups])
    total = int(sizes.sum())
    maps = [
        emu.tensor_map(flat_a.view(m, total), (instance.block_m, 128), swizzle=128),
        emu.tensor_map(flat_b.view(n, total), (instance.block_n, 128), swizzle=128),
        emu.tensor_map(sfa, (1, instance.block_m)),
        emu.tensor_map(sfb, (1, instance.block_n)),
        emu.tensor_map(d.view(-1, n), (64, instance.block_n)),
    ]
    buffer = torch.zeros(instance.sms * 256 + 128, dtype=torch.uint8)
    buffer = buffer[-buffer.data_ptr() % 128 :][: instance.sms * 256]
    return kernel(module, instance)[instance.sms, TMA_THREADS + instance.math_threads](
        flat_a, flat_b, sizes, buffer, m, n, 0, *maps,
        cluster=instance.multicast, shared=instance.shared_fixed, seed=seed,
    )  # fmt: skip
