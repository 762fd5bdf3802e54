"""What exchange behind computation gains, MODELLED: python -m bench.ep_overlap [--out DIR]

One rank's share of V3's decode (d 7168, expert width 2048, FP8 dispatch, BF16 back, 8 experts a
token), two micro-batches. The kernels run in the emulator, whose timing model prices every launch
by itself, on the SMs it is given; the link and the flags are two numbers (--link GB/s one way, 1.5
us a flag), and the schedule is put together here from those prices:

apart      every launch on all SMs, one after the other
behind     two streams as in tests/test_ep_overlap.py: dispatch B behind the experts of A, combine A
           behind the experts of B; the exchange has --sms SMs, the experts the rest, and are made
           longer by the HBM traffic of what runs beside them
on arrival the same, and an expert starts when its own rows lie packed

Nothing was measured on a GPU. Two virtual GPUs stand for --ranks: the rows that a rank sends and
receives are the same when 1/ranks of the experts live on each, and only traffic over the link is
counted for the ranks that there would be. Writes overlap.svg, the schedules above each other.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

import torch

from bench.moe import weights
from dskernels import emu
from dskernels.cuda.ep import PeerGroup
from dskernels.cuda.gemm import GemmKernels
from dskernels.types import ScaledTensor

PART, SMS = "h800", 132
D, WIDTH, TOPK = 7168, 2048, 8
FLAG_US = 1.5  # until a signal is seen on another GPU
STEPS = ("ep_low_send", "ep_low_receive", "ep_low_return", "ep_low_reduce_bf16")


class Prices(NamedTuple):
    """us of one micro-batch's launches, and HBM bytes of the exchange's."""

    send: float
    receive: float
    experts: float
    give_back: float
    reduce: float
    bytes: float


class Bar(NamedTuple):
    stream: str
    name: str
    batch: int
    begin: float
    end: float


def exchange_prices(tokens: int, experts: int, sms: int) -> tuple[dict[str, float], float]:
    """Modelled us of a rank's four launches; HBM bytes of all."""
    group = PeerGroup(
        "emu", 2, num_experts=2 * experts, max_tokens=tokens, hidden=D, topk=TOPK, num_sms=sms
    )
    random = torch.Generator().manual_seed(0)
    xs = [torch.randn(tokens, D, generator=random).bfloat16() for _ in range(2)]
    scores = torch.rand(2, tokens, 2 * experts, generator=random)
    idxs = list(scores.topk(TOPK, dim=2).indices)
    with emu.profiling(part=PART, sample_ctas=2, complete=True) as profile:
        got, hook = group.low_latency_dispatch(xs, idxs)
        hook()
        ys = [torch.zeros(experts, 2 * tokens, D).bfloat16() for _ in range(2)]
        _, hook = group.low_latency_combine(ys, idxs, [torch.rand(tokens, TOPK)] * 2, got)
        hook()
    group.close()
    times, traffic = {}, 0.0
    for launch in profile.launches:
        if launch.kernel not in times:  # one rank's
            times[launch.kernel] = launch.modelled_us
            traffic += launch.timing.hbm_bytes
    return {name: times[name] for name in STEPS}, traffic


def experts_price(rows: int, experts: int, sms: int) -> float:
    """Modelled us of the two products (the second quantised input is the first's epilogue)."""
    kernels = GemmKernels("emu")
    w13, w2 = weights(experts, D, WIDTH)
    count = torch.full((experts,), rows, dtype=torch.int32)

    def tokens(k: int) -> ScaledTensor:
        data = torch.zeros(experts, rows, k, dtype=torch.uint8).view(torch.float8_e4m3fn)
        planes = torch.ones(experts, k // 128, -(-rows // 4) * 4)
        return ScaledTensor(data, planes.transpose(1, 2)[:, :rows], (1, 128))

    options = dict(masked_m=count, expected_m=rows, num_sms=sms)
    with emu.profiling(part=PART, sample_ctas=1) as profile:
        kernels.grouped_gemm(tokens(D), w13, epilogue="swiglu_quant", **options)
        kernels.grouped_gemm(tokens(WIDTH), w2, **options)
    return profile.modelled_us


def prices(tokens: int, experts: int, ranks: int, exchange_sms: int, expert_sms: int) -> Prices:
    times, traffic = exchange_prices(tokens, experts, exchange_sms)
    rows = ranks * tokens * TOPK // (ranks * experts)
    return Prices(
        *(times[name] for name in STEPS[:2]), experts_price(rows, experts, expert_sms),
        *(times[name] for name in STEPS[2:]), traffic,
    )  # fmt: skip


def link_us(tokens: int, ranks: int, row_bytes: int, gbytes: float) -> float:
    return tokens * TOPK * (ranks - 1) / ranks * row_bytes / gbytes / 1e3


def apart(p: Prices, there: float, back: float) -> list[Bar]:
    bars, now = [], 0.0
    for batch in range(2):
        for name, us, link in (
            ("send", p.send, there), ("receive", p.receive, 0), ("experts", p.experts, 0),
            ("return", p.give_back, back), ("reduce", p.reduce, 0),
        ):  # fmt: skip
            stream = "experts" if name == "experts" else "exchange"
            bars.append(Bar(stream, name, batch, now, now + us))
            # A kernel that stores to peers is no faster than the link.
            now += max(us, link) + (FLAG_US if link else 0)
    return bars


def behind(p: Prices, there: float, back: float, experts: int, on_arrival: bool) -> list[Bar]:
    """The exchange's stream: dispatch A, dispatch B, combine A, combine B; the experts' beside."""
    beside = p.bytes / emu.PARTS[PART]["hbm_gbytes"] / 1e3
    work = p.experts + beside
    bars, exchange, compute = [], 0.0, 0.0
    ends = []
    for batch in range(2):
        sent = exchange + p.send
        bars.append(Bar("exchange", "send", batch, exchange, sent))
        arrived = max(sent, exchange + there) + FLAG_US
        packed = arrived + p.receive
        bars.append(Bar("exchange", "receive", batch, arrived, packed))
        exchange = packed
        begin = max(compute, packed)
        compute = begin + work
        if on_arrival:
            # Expert e lies packed after (e + 1) / experts of the receive kernel.
            begin = max(ends[-1] if ends else 0.0, arrived + p.receive / experts)
            compute = begin
            for e in range(experts):
                compute = max(compute, arrived + p.receive * (e + 1) / experts) + work / experts
        bars.append(Bar("experts", "experts", batch, begin, compute))
        ends.append(compute)
    for batch in range(2):
        begin = max(exchange, ends[batch])
        sent = begin + p.give_back
        bars.append(Bar("exchange", "return", batch, begin, sent))
        arrived = max(sent, begin + back) + FLAG_US
        exchange = arrived + p.reduce
        bars.append(Bar("exchange", "reduce", batch, arrived, exchange))
    return bars


def length(bars: list[Bar]) -> float:
    return max(bar.end for bar in bars)


def draw(schedules: dict[str, list[Bar]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colours = {"send": "#e8862e", "receive": "#f6cf9f", "experts": "#3f6fb5", "return": "#c8402f",
               "reduce": "#e9a59d"}  # fmt: skip
    figure, axes = plt.subplots(len(schedules), 1, figsize=(13, 1.7 * len(schedules)), sharex=True,
                                layout="constrained")  # fmt: skip
    for axis, (title, bars) in zip(axes, schedules.items()):
        rows = ("exchange", "experts")
        for bar in bars:
            row = rows.index(bar.stream)
            span = (bar.begin, bar.end - bar.begin)
            colour = dict(facecolors=colours[bar.name], edgecolor="white", linewidth=0.5)
            axis.broken_barh([span], (row - 0.4, 0.8), **colour)
            axis.text(bar.begin + span[1] / 2, row, f"{bar.name} {'AB'[bar.batch]}", fontsize=7,
                      ha="center", va="center", clip_on=True)  # fmt: skip
        axis.set_yticks(range(2), rows)
        axis.set_ylim(1.5, -0.5)
        axis.set_title(f"{title}: {length(bars):.0f} us (modelled)", loc="left", fontsize=9)
    axes[-1].set_xlabel("us, modelled; white: the link, a flag, or nothing to do")
    figure.savefig(path)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=128, help="of a rank and micro-batch")
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--experts", type=int, default=32, help="of a rank")
    parser.add_argument("--link", type=float, default=450.0, help="GB/s one way")
    parser.add_argument("--sms", type=int, default=20, help="of the exchange, behind the experts")
    parser.add_argument("--out", type=Path, default=Path("out"))
    args = parser.parse_args()
    there = link_us(args.tokens, args.ranks, D + D // 128 * 4 + 8, args.link)
    back = link_us(args.tokens, args.ranks, 2 * D, args.link)
    shape = (args.tokens, args.experts, args.ranks)
    alone, shared = prices(*shape, SMS, SMS), prices(*shape, args.sms, SMS - args.sms)
    schedules = {
        "apart": apart(alone, there, back),
        "behind": behind(shared, there, back, args.experts, False),
        "on arrival": behind(shared, there, back, args.experts, True),
    }
    print(f"modelled, {PART}; link {there:.1f} us there, {back:.1f} us back")
    for name, p in (("all SMs", alone), (f"{args.sms} SMs | the rest", shared)):
        print(f"{name:20}", " ".join(f"{f} {v:.1f}" for f, v in zip(p._fields[:5], p)))
    for name, bars in schedules.items():
        print(f"{name:12} {length(bars):8.1f} us  {length(schedules['apart']) / length(bars):.2f}x")
    args.out.mkdir(parents=True, exist_ok=True)
    draw(schedules, args.out / "overlap.svg")
    print(args.out / "overlap.svg")


if __name__ == "__main__":
    main()
