"""DeepGEMM's mega-MoE for SM90 (PyPI's sgl-deep-gemm) as the emulator's arguments: a whole layer of
one rank in one kernel, behind a small one that quantises the tokens.

Its launcher is compiled C++; what is here follows the kernels' headers: which template arguments
fit together, where the parts of the symmetric buffer lie, which tensor maps are read. With one rank
the buffer is ordinary memory. Letters: t tokens, k choices, e experts, d width, i expert width.
"""

import functools
import struct
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from deepgemm_support import FOLDER
from outside_support import ptx_of

from dskernels import emu
from dskernels.types import ScaledTensor

SMS, THREADS, SHARED = 132, 384, 227 * 1024
BLOCK_N = 256


def align(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


@dataclass(frozen=True)
class Shape:
    """A layer, and the tile: 64 rows with two warpgroups side by side (below 64 rows an expert on
    average), or 128 in pairs of CTAs that share the weights."""

    tokens: int
    topk: int
    experts: int
    d: int
    i: int

    @property
    def block_m(self) -> int:
        return 64 if self.tokens * self.topk < 64 * self.experts else 128

    @property
    def cluster(self) -> int:
        return self.block_m // 64

    @property
    def pool(self) -> int:
        """Rows that all experts may need, each up to a multiple of 128."""
        most = self.tokens * min(self.topk, self.experts)
        return align(most + self.experts * 127, 128)

    @property
    def scale_pool(self) -> int:
        return self.pool * 128 // self.block_m

    @property
    def workspace(self) -> int:
        """Bytes of layout::SM90Workspace for one rank and no ring."""
        e, blocks = self.experts, self.pool // 8
        words = 2 * e + 2
        flags = align(words * 4, 8) + 2 * e * 8 + words * 4
        size = 32 + 3 * e * 8 + align(blocks, 2) * 4 + blocks * 16
        size += e * self.tokens * 4 + self.pool * 12 + align(flags, 1024)
        return align(size, 1024)

    @property
    def parts(self) -> dict[str, int]:
        """Bytes of the symmetric buffer's parts, in order."""
        slots = self.tokens * self.topk
        return {
            "workspace": self.workspace,
            "x": self.tokens * self.d,
            "x_scale": self.tokens * self.d // 32,
            "topk_idx": slots * 8,
            "topk_weights": slots * 4,
            "rows": self.pool * self.d,
            "rows_scale": self.scale_pool * self.d // 32,
            "rows_weight": self.pool * 4,
            "hidden": self.pool * self.i,
            "hidden_scale": self.scale_pool * self.i // 32,
            "combine": slots * self.d * 2,
        }

    @property
    def source(self) -> str:
        """CUDA C++ that instantiates both kernels."""
        tma = "const __grid_constant__ cute::TmaDescriptor"
        wide = self.block_m == 128
        # Stages as many as fit; the result leaves in four passes of columns, or (64 rows) in two.
        numbers = [self.tokens, self.d, self.i, self.experts, self.topk, self.experts, self.block_m,
                   BLOCK_N, 128, self.pool, self.scale_pool, self.pool, 4, 64, 64, 256, SMS, 1]  # fmt: skip
        flags = "true, true, false, false, 2, true, 0, 4" if wide else \
            "true, true, true, true, 1, false, 0, 0"  # fmt: skip
        return f"""
#include <deep_gemm/impls/sm90_fp8_mega_moe.cuh>
#include <deep_gemm/impls/sm90_mega_moe_pre_dispatch.cuh>
template __global__ void deep_gemm::sm90_mega_moe_pre_dispatch_kernel<128, false>(
    const __nv_bfloat16*, const int32_t*, const float*, __nv_fp8_e4m3*, float*, int64_t*, float*,
    const uint32_t, const uint32_t, const uint32_t, const uint32_t, const uint32_t, const float);
template __global__ void deep_gemm::sm90_fp8_mega_moe_impl<
    {", ".join(map(str, numbers))}, cute::numeric_limits<float>::infinity(), true, 0, {flags}>(
    void*, int*, const uint32_t, const __grid_constant__ deep_gemm::layout::SymBuffer<1>,
    {tma}, {tma}, {tma}, const float* __restrict__, {tma}, {tma}, {tma}, {tma},
    const float* __restrict__, uint64_t*);
"""


@functools.cache
def build(shape: Shape) -> emu.Module:
    with tempfile.TemporaryDirectory() as folder:
        text = ptx_of(Path(folder), shape.source, (FOLDER / "include",))
    # atomicAdd_block: nvcc writes the space before the scope, our reader knows the other order.
    return emu.Module(text.replace("atom.shared.cta.add", "atom.cta.shared.add"), "mega_moe")


def interleaved(w13: torch.Tensor) -> torch.Tensor:
    """[gate; up] of bytes [e, 2i, d] -> eight rows of the one, eight of the other, ..."""
    gate, up = (half.unflatten(1, (-1, 8)) for half in w13.chunk(2, dim=1))
    return torch.stack([gate, up], dim=2).flatten(0, 3).contiguous()


def run(x, w13: ScaledTensor, w2: ScaledTensor, topk_idx, topk_weights) -> torch.Tensor:
    """The layer on x bf16 [t, d]; results are not checked for hazards, nor exact to the bit."""
    (tokens, d), (experts, _, i) = x.shape, w2.shape
    shape = Shape(tokens, topk_idx.shape[1], experts, d, i)
    module, total = build(shape), sum(shape.parts.values())
    whole = torch.zeros(total + 1024, dtype=torch.uint8)
    whole = whole[-whole.data_ptr() % 1024 :][:total]
    part = dict(zip(shape.parts, whole.split(list(shape.parts.values()))))
    quantise, layer = (
        module.kernel(next(n for n in module.kernels if name in n))
        for name in ("pre_dispatch", "mega_moe_impl")
    )
    options = dict(check=False, numerics="fast")
    quantise[tokens, d // 8](
        x, topk_idx.int(), topk_weights, part["x"], part["x_scale"], part["topk_idx"],
        part["topk_weights"], tokens, tokens, d, d // 128, shape.topk, 1.0, **options,
    )  # fmt: skip
    y = torch.empty_like(x)
    weights = (w.data.view(torch.uint8) for w in (w13, w2))
    first, second = interleaved(next(weights)), next(weights).flatten(0, 1)
    scales = [part[name].view(torch.float32).view(-1, shape.scale_pool)
              for name in ("rows_scale", "hidden_scale")]  # fmt: skip
    hidden = part["hidden"].view(-1, i)
    tile = (shape.block_m, 128)
    buffer = struct.pack("<q", whole.data_ptr())  # its address; no offsets to other ranks
    buffer += bytes(layer.info["params"][3]["size"] - len(buffer))
    layer[SMS, THREADS](
        y, None, tokens, buffer,
        emu.tensor_map(part["rows"].view(-1, d), tile, swizzle=128),
        emu.tensor_map(scales[0], (1, shape.block_m)),
        emu.tensor_map(first, (BLOCK_N, 128), swizzle=128),
        w13.scale.contiguous(),
        emu.tensor_map(hidden, (64, 128), swizzle=128 if shape.block_m == 128 else 0),
        emu.tensor_map(hidden, tile, swizzle=128),
        emu.tensor_map(scales[1], (1, shape.block_m)),
        emu.tensor_map(second, (BLOCK_N, 128), swizzle=128),
        w2.scale.contiguous(),
        whole,  # the trace's place, which is not written: so the buffer is lent
        cluster=shape.cluster, shared=SHARED, **options,
    )  # fmt: skip
    return y
