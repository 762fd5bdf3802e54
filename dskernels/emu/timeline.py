"""A picture of one CTA's modelled timeline: where a kernel stalls, at a glance.

Above, the whole run: what share of the warps does what. Below, a window of it: a row per warp, the
tensor cores, and the slots of shared memory as TMA fills and the warps empty them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from dskernels.emu.trace import Timeline

# (key, legend, colour), in the order of the legend.
_KINDS = (
    ("issue", "issues instructions", "#3b9b57"),
    ("wgmma", "waits for wgmma", "#3f6fb5"),
    ("data", "waits for data (mbarrier that TMA completes)", "#e8862e"),
    ("slot", "waits for a free slot or a signal (other mbarrier)", "#c8402f"),
    ("barrier", "waits at a barrier", "#8a5bb0"),
    ("memory", "waits for a load", "#8c6239"),
    ("result", "waits for arithmetic", "#b9d9a0"),
    ("busy", "held back by other warps", "#e9d66b"),
    ("copies", "waits for its stores (copy groups)", "#3aa6a6"),
    ("fence", "waits for a fence", "#7a7a7a"),
)
_COLOURS = {key: colour for key, _, colour in _KINDS}
_TENSOR = ("#274b85", "#6c9bd9")  # by warpgroup, in turn
_LOADING, _FULL = "#f6cf9f", "#e8862e"
_BINS = 400


def _kind(timeline: Timeline, state: str, detail: int) -> str:
    if state == "mbarrier":
        return "data" if detail in timeline.filled_by_copies else "slot"
    return "barrier" if state == "cluster barrier" else state


def _share(timeline: Timeline) -> dict[str, np.ndarray]:
    """By kind, the mean number of warps in each bin of the run."""
    width = timeline.cycles / _BINS
    out = {key: np.zeros(_BINS + 1) for key, _, _ in _KINDS}
    for _, state, detail, _, begin, end in timeline.spans:
        row = out[_kind(timeline, state, detail)]
        first, last = int(begin / width), min(int(end / width), _BINS)
        if first == last:
            row[first] += (end - begin) / width
            continue
        row[first] += first + 1 - begin / width
        row[first + 1 : last] += 1
        row[last] += end / width - last
    return {key: row[:_BINS] for key, row in out.items()}


def default_window(timeline: Timeline) -> tuple[float, float]:
    """All of a short run, else 6000 cycles from its middle."""
    if timeline.cycles <= 9000:
        return 0, timeline.cycles
    middle = timeline.cycles / 2
    return middle - 3000, middle + 3000


def _bars(axis, row: float, spans: list[tuple[float, float]], colour: str, height=0.8) -> None:
    if spans:
        pieces = [(begin, end - begin) for begin, end in spans]
        axis.broken_barh(pieces, (row - height / 2, height), facecolors=colour, linewidth=0)


def _clip(spans, low: float, high: float) -> list[tuple[float, float]]:
    return [(max(b, low), min(e, high)) for b, e in spans if e > low and b < high]


def _draw_overview(axis, timeline: Timeline, window: tuple[float, float]) -> None:
    share = _share(timeline)
    edges = np.linspace(0, timeline.cycles, _BINS)
    axis.stackplot(
        edges, *(share[key] for key, _, _ in _KINDS), colors=_COLOURS.values(), linewidth=0
    )
    axis.axvspan(*window, facecolor="none", edgecolor="black", linewidth=1.2)
    axis.set_xlim(0, timeline.cycles)
    axis.set_ylim(0, timeline.num_warps)
    axis.set_ylabel("warps")
    axis.set_title("whole run (the box is the window below)", loc="left", fontsize=9)


def _draw_warps(axis, timeline: Timeline, low: float, high: float) -> None:
    rows: dict[tuple[int, str], list] = {}
    for warp, state, detail, _, begin, end in timeline.spans:
        if end > low and begin < high:
            rows.setdefault((warp, _kind(timeline, state, detail)), []).append((begin, end))
    for (warp, key), spans in rows.items():
        _bars(axis, warp, _clip(spans, low, high), _COLOURS[key])
    bottom = timeline.num_warps
    groups = sorted({op["warp"] // 4 for op in timeline.tensor})
    for k, group in enumerate(groups):
        spans = [(op["begin"], op["end"]) for op in timeline.tensor if op["warp"] // 4 == group]
        _bars(axis, bottom, _clip(spans, low, high), _TENSOR[k % 2])
    names = [f"warp {w}" for w in range(timeline.num_warps)] + (["tensor"] if groups else [])
    axis.set_yticks(range(len(names)), names, fontsize=7)
    axis.set_ylim(len(names) - 0.4, -0.6)
    for edge in range(4, timeline.num_warps + 1, 4):
        axis.axhline(edge - 0.5, color="black", linewidth=0.6)
    axis.set_title("one row per warp; lines divide warpgroups", loc="left", fontsize=9)


def _draw_slots(axis, timeline: Timeline, low: float, high: float) -> None:
    for k, slot in enumerate(timeline.slots):
        _bars(axis, k, _clip(slot.loading, low, high), _LOADING)
        _bars(axis, k, _clip(slot.full, low, high), _FULL)
    names = [f"{slot.bytes / 1024:.1f} KiB @{slot.barrier}" for slot in timeline.slots]
    axis.set_yticks(range(len(names)), names, fontsize=7)
    axis.set_ylim(len(names) - 0.4, -0.6)
    axis.set_title(
        "slots of shared memory by their mbarrier: light = loading, dark = full, white = empty",
        loc="left", fontsize=9,
    )  # fmt: skip


def draw(
    timeline: Timeline,
    path: str | Path,
    *,
    window: tuple[float, float] | None = None,
    title: str = "",
) -> None:
    """Draws the timeline into `path` (.png, .svg or .pdf).

    window: cycles shown in detail; default: all of a short run, else 6000 cycles from its middle.
    Needs matplotlib. Raises ValueError for an empty window.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    low, high = window or default_window(timeline)
    if not 0 <= low < high:
        raise ValueError(f"window: expected 0 <= begin < end, got {low}, {high}")
    slots = len(timeline.slots)
    heights = [1.6, 0.22 * (timeline.num_warps + 2), 0.22 * (slots + 1)]
    panels = 3 if slots else 2
    figure, axes = plt.subplots(
        panels, 1, figsize=(16, sum(heights[:panels]) + 2.2), height_ratios=heights[:panels],
        layout="constrained",
    )  # fmt: skip
    _draw_overview(axes[0], timeline, (low, high))
    _draw_warps(axes[1], timeline, low, high)
    if slots:
        _draw_slots(axes[2], timeline, low, high)
    for axis in axes[1:]:
        axis.set_xlim(low, high)
        axis.grid(axis="x", linewidth=0.3)
    axes[-1].set_xlabel(f"modelled cycles at {timeline.clock_ghz:.3f} GHz")
    used = {_kind(timeline, s, d) for _, s, d, *_ in timeline.spans}
    handles = [plt.Rectangle((0, 0), 1, 1, color=c, label=t) for k, t, c in _KINDS if k in used]
    figure.legend(handles=handles, loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    figure.suptitle(title or f"{timeline.kernel}: modelled timeline of one CTA", fontsize=11)
    figure.savefig(path, dpi=110)
    plt.close(figure)
