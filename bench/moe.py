"""A mixture-of-experts layer in launches, bytes and modelled time: python -m bench.moe

V3's dimensions (d 7168, expert width 2048, FP8 weights), the experts of one rank, in the emulator,
whose timing model prices each launch; nothing here was measured on a GPU. Beside our layer stand
the same steps unfused, on our kernels, and with the two products taken from DeepGEMM (PyPI's
sgl-deep-gemm, where it is installed); and DeepGEMM's mega-MoE, the layer in one kernel, one rank.
Fills and transposed copies by torch are in none of the sums.

    python -m bench.moe [--tokens 128] [--experts 8] [--topk 1] [--no-outside] [--json]
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import re
import sys
from functools import partial
from pathlib import Path

import torch

from dskernels import emu
from dskernels.emu import gemm, moe, rowwise
from dskernels.types import ScaledTensor

OUTSIDE = Path(__file__).resolve().parent.parent / "tests" / "emu" / "outside"
PART = "h800"
ALIGNED = 128  # rows that DeepGEMM's contiguous groups are multiples of
SMS, SHARED_BYTES = 132, 227 * 1024
OUTSIDE_NAME = re.compile(r"_ZN9deep_gemm\d+(\w+?)I[A-Z].*")  # mangled, with its arguments
MASKED_ROWS = 64  # of an expert, on average: above them the masked layout is not tried


def weights(experts: int, d: int, i: int) -> tuple[ScaledTensor, ScaledTensor]:
    """Zeros with scales of one: the time of a product does not depend on its values here."""

    def zeros(*shape: int) -> ScaledTensor:
        data = torch.zeros(shape, dtype=torch.uint8).view(torch.float8_e4m3fn)
        scale = torch.ones(*shape[:-2], -(-shape[-2] // 128), -(-shape[-1] // 128))
        return ScaledTensor(data, scale, (128, 128))

    return zeros(experts, 2 * i, d), zeros(experts, d, i)


class Layer:
    """One rank's share of a layer: every token has topk choices among its experts."""

    def __init__(self, tokens: int, experts: int, topk: int, d: int, i: int) -> None:
        self.x = torch.randn(tokens, d).bfloat16()
        self.grad = torch.randn(tokens, d).bfloat16()
        self.w13, self.w2 = weights(experts, d, i)
        self.topk_idx = torch.stack([torch.randperm(experts)[:topk] for _ in range(tokens)])
        self.topk_weights = torch.rand(tokens, topk)
        self.routing = self.topk_idx, self.topk_weights

    def fused(self, layout: str = "contiguous") -> None:
        moe.moe_experts(self.x, self.w13, self.w2, *self.routing, layout=layout)

    def shared(self, own_launches: bool) -> None:
        """The last expert has every token: in the same launches, or by itself behind the others."""
        if not own_launches:
            moe.moe_experts(self.x, self.w13, self.w2, *self.routing, num_shared=1)
            return
        self.fused()
        hidden = gemm.gemm(rowwise.quantize(self.x), last(self.w13), epilogue="swiglu_quant")
        gemm.gemm(hidden, last(self.w2))

    def unfused(self, products=None) -> None:
        """Copy, quantise, product, SwiGLU, quantise, product, weighted sum, each by itself."""
        alignment = ALIGNED if products else 1
        rows, sizes, row_map = moe.moe_permute(
            self.x, self.topk_idx, self.w13.shape[0], alignment=alignment
        )
        multiply = products or (lambda a, b: gemm.grouped_gemm(a, b, group_sizes=sizes))
        h = multiply(rowwise.quantize(rows), self.w13)
        y = multiply(rowwise.quantize(rowwise.swiglu(h)), self.w2)
        moe.moe_unpermute(y, row_map, self.topk_weights)

    def outside(self) -> None:
        self.unfused(
            deepgemm(torch.bincount(self.topk_idx.flatten(), minlength=len(self.w13.data)))
        )

    def mega(self) -> None:
        """DeepGEMM's mega-MoE for SM90, the whole layer in two launches, at one rank."""
        outside("megamoe_support").run(self.x, self.w13, self.w2, *self.routing)

    def fused_backward(self) -> None:
        moe.moe_experts_backward(self.grad, self.x, self.w13, self.w2, *self.routing)

    def unfused_backward(self) -> None:
        """The same products on bf16 copies of the tokens, the hidden layer in bf16, and a launch
        for each step; the routing weight and its gradient, torch's, are left out."""
        args = self.topk_idx, self.w13.shape[0]
        rows, sizes, row_map = moe.moe_permute(self.x, *args, alignment=128)
        grads, _, _ = moe.moe_permute(self.grad, *args, alignment=128)
        x8, g8 = rowwise.quantize(rows), rowwise.quantize(grads, scale_format="pow2")
        h = gemm.grouped_gemm(x8, self.w13, group_sizes=sizes)
        back = gemm.grouped_gemm(g8, turned(self.w2), group_sizes=sizes)
        act = rowwise.swiglu(h)
        dh = rowwise.swiglu_backward(back, h)
        dx = gemm.grouped_gemm(rowwise.quantize(dh), turned(self.w13), group_sizes=sizes)
        dh, x8, g8, act = (rowwise.quantize(v, transpose=True) for v in (dh, x8, g8, act))
        gemm.grouped_gemm_k(dh, x8, sizes)
        gemm.grouped_gemm_k(g8, act, sizes)
        moe.moe_unpermute(dx, row_map, None)


def last(w: ScaledTensor) -> ScaledTensor:
    return ScaledTensor(w.data[-1], w.scale[-1], w.block)


def turned(w: ScaledTensor) -> ScaledTensor:
    """The transpose, for the gradients of a product's left side."""
    data = w.data.view(torch.uint8).transpose(1, 2).contiguous().view(w.data.dtype)
    return ScaledTensor(data, w.scale.transpose(1, 2).contiguous(), w.block)


def outside(module: str):
    """A module of tests/emu/outside, where DeepGEMM is installed."""
    sys.path.insert(0, str(OUTSIDE))
    import deepgemm_support

    if deepgemm_support.FOLDER is None:
        raise SystemExit("needs PyPI's sgl-deep-gemm: pip install --no-deps sgl-deep-gemm==0.2.5")
    return importlib.import_module(module)


def their_tile(dg, kind: int, block_m: int, m_blocks: int, groups: int, n: int, k: int):
    """DeepGEMM's instance for m_blocks of block_m rows by its published rule: fewest waves, then
    the fullest last wave, of the widths that its kernel takes; as many stages as fit."""
    widths = [w for w in range(16, 208, 16) if w <= 128 or math.gcd(w, 128) == w - 128]

    def order(width: int) -> tuple[int, int]:
        tiles = m_blocks * -(-n // width)
        return -(-tiles // SMS), -((tiles - 1) % SMS)

    pairs = 2 if kind == dg.CONTIGUOUS and m_blocks % 2 == 0 else 1
    best = None
    for stages in range(2, 20):
        instance = dg.Instance(
            "1d2d", block_m, min(widths, key=order), kind, groups=groups, stages=stages,
            multicast=pairs, on_a=False, sms=SMS, shape=(0, n, k),
        )  # fmt: skip
        if instance.shared_fixed + 2 * 4 * -(-k // 128) + 16 <= SHARED_BYTES:
            best = instance
    return best


def deepgemm(counts: torch.Tensor):
    """DeepGEMM's product of rows grouped by `counts`, each group at multiples of 128 rows: masked
    with tiles of 64 rows where every group has one block of those 128, else contiguous."""
    dg = outside("deepgemm_support")
    groups, blocks = counts.numel(), (counts + ALIGNED - 1) // ALIGNED
    masked = bool((blocks == 1).all()) and int(counts.max()) <= 64
    layout = counts.int()
    if not masked:
        layout = torch.arange(groups, dtype=torch.int32).repeat_interleave(blocks * ALIGNED)

    def multiply(a: ScaledTensor, b: ScaledTensor) -> torch.Tensor:
        n, k = b.shape[1:]
        if masked:
            instance = their_tile(dg, dg.MASKED, 64, groups, groups, n, k)
            planes = a.scale.view(groups, ALIGNED, -1)
            a = ScaledTensor(a.data.view(groups, ALIGNED, k), planes, a.block)
        else:
            instance = their_tile(dg, dg.CONTIGUOUS, ALIGNED, int(blocks.sum()), groups, n, k)
        d, _ = dg.run_1d2d(dg.build((instance,)), instance, a, b, layout, check=False)
        return d.view(-1, n).nan_to_num()

    return multiply


def priced(run) -> list[dict]:
    """Every launch of run(): kernel, modelled microseconds with their bracket, HBM megabytes.

    Two CTAs of each are sampled, but all of a kernel whose CTAs wait for each other."""
    everyone = getattr(run, "__name__", "") == "mega"
    with emu.profiling(PART, sample_ctas=None if everyone else 2) as profile:
        run()
    return [
        {
            "kernel": OUTSIDE_NAME.sub(r"\1", launch.kernel),
            "us": launch.timing.modelled_us,
            "bracket_us": [launch.timing.low_us, launch.timing.high_us],
            "hbm_mb": launch.timing.hbm_bytes / 1e6,
            "bound_by": launch.timing.bottleneck,
        }
        for launch in profile.launches
    ]


def print_launches(name: str, launches: list[dict]) -> None:
    print(f"\n{name}")
    for launch in launches:
        low, high = launch["bracket_us"]
        print(
            f"  {launch['kernel']:32} {launch['us']:8.1f} us [{low:.1f}, {high:.1f}]"
            f" {launch['hbm_mb']:9.1f} MB  {launch['bound_by']}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.moe", description=__doc__)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--experts", type=int, default=8, help="of this rank")
    parser.add_argument("--topk", type=int, default=1, help="choices of a token on this rank")
    parser.add_argument("--no-outside", action="store_true", help="leave DeepGEMM's products out")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(0)
    layer = Layer(options.tokens, options.experts, options.topk, d=7168, i=2048)
    runs = {"forward, ours": layer.fused}
    if options.tokens * options.topk <= MASKED_ROWS * options.experts:
        runs["forward, ours, masked"] = partial(layer.fused, "masked")
    runs["forward, unfused"] = layer.unfused
    runs["with a shared expert, ours"] = partial(layer.shared, False)
    runs["with a shared expert, by itself"] = partial(layer.shared, True)
    if not options.no_outside:
        runs["forward, DeepGEMM's products, unfused"] = layer.outside
        runs["forward, DeepGEMM's mega-MoE"] = layer.mega
    runs |= {"backward, ours": layer.fused_backward, "backward, unfused": layer.unfused_backward}
    results = {name: priced(run) for name, run in runs.items()}
    if options.json:
        print(json.dumps(results))
        return
    for name, launches in results.items():
        print_launches(name, launches)
    print(
        f"\n{options.tokens} tokens, {options.topk} choices each among {options.experts} experts,"
        f" d 7168, i 2048; modelled on {PART}"
    )
    print(f"{'':40} {'launches':>8} {'HBM MB':>9} {'us':>9}")
    for name, launches in results.items():
        total = [sum(launch[key] for launch in launches) for key in ("hbm_mb", "us")]
        print(f"{name:40} {len(launches):8} {total[0]:9.1f} {total[1]:9.1f}")


if __name__ == "__main__":
    main()
