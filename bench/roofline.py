"""The roofline of this machine, measured, and a picture of operations under it."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch


@dataclass(frozen=True)
class Ceilings:
    """read_gbs  GB/s at which plain sums read memory that no cache holds
    gflops    GF/s of the fastest product seen in the run, `product`"""

    read_gbs: float
    gflops: float
    product: str


def best_rate(amount: float, call, rounds: int) -> float:
    """The largest amount per second over some calls."""
    call()
    rate = 0.0
    for _ in range(rounds):
        begin = time.perf_counter()
        call()
        rate = max(rate, amount / (time.perf_counter() - begin))
    return rate


def measure(threads: int, *, small: bool = False) -> Ceilings:
    torch.set_num_threads(threads)
    words = torch.ones((8 if small else 800) << 17, dtype=torch.int64)
    read = best_rate(words.nbytes / 1e9, words.sum, 5)
    ceilings = Ceilings(read, 0.0, "none")
    size = 256 if small else 2048
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.randn(size, size).to(dtype)
        rate = best_rate(2 * size**3 / 1e9, lambda a=a: a @ a, 3)
        if rate > ceilings.gflops:
            ceilings = replace(ceilings, gflops=rate, product=f"torch {dtype} {size}^3")
    return ceilings


def raised(ceilings: Ceilings, rows: list[dict]) -> Ceilings:
    """No measured row may lie above the roof: the fastest one is the roof then."""
    for row in rows:
        if row["gflops"] > ceilings.gflops:
            ceilings = replace(ceilings, gflops=row["gflops"], product=row["candidate"])
    return ceilings


def attainable(ceilings: Ceilings, intensity: float) -> float:
    """GF/s of an operation that does `intensity` operations per byte from memory."""
    return min(ceilings.gflops, intensity * ceilings.read_gbs)


def draw(ceilings: Ceilings, results: list[dict], path: Path) -> bytes:
    """Every candidate of every result under the roof; writes a PNG and returns it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(11, 6.5))
    ridge = ceilings.gflops / ceilings.read_gbs
    axes.plot(
        [0.1, ridge, 1e4],
        [0.1 * ceilings.read_gbs, ceilings.gflops, ceilings.gflops],
        color="black",
    )
    colours = {"dskernels": "tab:green", "vllm": "tab:red", "torch": "tab:blue"}
    seen = set()
    for result in results:
        for row in result.get("rows", ()):
            owner = row["candidate"].split()[0]
            x = row["gflops"] / row["weight_gbs"]
            axes.scatter(
                x,
                row["gflops"],
                color=colours.get(owner, "grey"),
                marker={"gemm": "o", "moe": "s", "mla": "^"}[result["op"]],
                label=None if owner in seen else owner,
                alpha=0.7,
            )
            seen.add(owner)
        if result.get("rows"):
            name = result["row"]["arguments"].removeprefix("--op ").replace("--", "")
            top = max(result["rows"], key=lambda r: r["gflops"])
            at = top["gflops"] / top["weight_gbs"], top["gflops"]
            axes.annotate(name, at, fontsize=7, xytext=(4, 4), textcoords="offset points")
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="operations per byte of weights (FP8) or cache (BF16)",
        ylabel="GF/s",
        title=f"{ceilings.read_gbs:.1f} GB/s, {ceilings.gflops:.0f} GF/s "
        "(circle gemm, square experts, triangle attention)",
    )
    axes.grid(True, which="both", alpha=0.2)
    axes.legend()
    figure.savefig(path, dpi=130, bbox_inches="tight")
    pyplot.close(figure)
    return path.read_bytes()
