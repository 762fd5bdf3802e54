"""What Hopper's FP8 tensor core does to long sums: `python -m bench.fp8_accumulation [--out FILE]`.

Plots the largest relative error of a product over k, for sums that stay in the tensor core, sums
that leave it every 128 (what the kernels do), and exact partial sums; all from the reference's
model of the arithmetic, which agrees with MMA-Sim bit for bit. The V3 report's figure 7b and its
"nearly 2%" at k = 4096 are the claim it illustrates.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from dskernels import ScaledTensor
from dskernels.ref import gemm as ref

DEPTHS = (128, 256, 512, 1024, 2048, 4096, 8192)
SIZE = 32  # rows and columns of the product: 1024 elements a point
MODES = {
    "tensor core alone": "hopper_no_promotion",
    "tensor core, promoted every 128": "hopper",
    "exact sums, promoted every 128": "fp32",
}
DATA = {
    "uniform in [0, 1)": torch.rand,
    "absolute normal": lambda *shape: torch.randn(*shape).abs(),
    "normal": torch.randn,
}
BF16_ROUNDING = 2.0**-8


def whole_row_scales(x: torch.Tensor, rows: int) -> ScaledTensor:
    """e4m3 with one scale for all of k: what a tensor-core sum without promotion allows."""
    k = x.shape[1]
    data = (x * (448.0 / x.abs().max())).to(torch.float8_e4m3fn)
    scale = torch.full((-(-x.shape[0] // rows), 1), float(x.abs().max()) / 448.0)
    return ScaledTensor(data, scale, (rows, k))


def errors(draw, k: int) -> dict[str, float]:
    """Mode -> largest error; of data of mixed sign, whose results may be near 0, over the largest
    result."""
    a, b = whole_row_scales(draw(SIZE, k), 1), whole_row_scales(draw(SIZE, k), 1)
    truth = ref.gemm(a, b, accumulate="fp64", out_dtype=torch.float64)
    unit = truth.abs().max() if draw is torch.randn else truth.abs()
    return {
        name: float(
            ((ref.gemm(a, b, accumulate=mode, out_dtype=torch.float64) - truth).abs() / unit).max()
        )
        for name, mode in MODES.items()
    }


def draw_figure(table: dict[str, dict[int, dict[str, float]]], out: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), layout="constrained")
    for axes, (kind, rows) in zip(figure.subplots(1, len(table), sharey=True), table.items()):
        for name in MODES:
            axes.plot(list(rows), [row[name] for row in rows.values()], marker="o", label=name)
        axes.axhline(BF16_ROUNDING, color="gray", linestyle="--", label="rounding to bf16 (2^-8)")
        axes.axhline(0.02, color="black", linestyle=":", label="2 % (V3 report, k = 4096)")
        axes.set(xscale="log", yscale="log", title=kind, xlabel="k")
        axes.set_xticks(list(rows), [str(k) for k in rows], rotation=45)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("largest relative error")
    figure.axes[0].legend(fontsize=8)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs/fp8_accumulation.png"))
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    table = {kind: {k: errors(draw, k) for k in DEPTHS} for kind, draw in DATA.items()}
    print(f"{'data':20} {'k':>6}  " + "  ".join(MODES))
    for kind, rows in table.items():
        for k, row in rows.items():
            print(f"{kind:20} {k:6}  " + "  ".join(f"{row[n]:{len(n)}.1e}" for n in MODES))
    draw_figure(table, options.out)
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
