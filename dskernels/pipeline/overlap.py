"""Inside one action: computation on one lane, all-to-all on another, sharing the SMs.

A mixture-of-experts layer computes attention, sends every token to its experts (dispatch),
computes the experts (mlp) and brings the results home (combine). On a GPU the two all-to-alls run
on a communication lane whose kernels hold `comm_sms` of `sms` multiprocessors, so computation
beside them runs at (sms - comm_sms)/sms of its speed.

One micro-batch alone can hide little: its parts wait for each other. A forward and a backward of
different micro-batches have no such tie, and DualPipe's pair interleaves them so that each one's
all-to-all runs beside the other's computation (DeepSeek-V3 report, figure 4).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import NamedTuple

from .actions import Op


class Task(NamedTuple):
    """One piece of work on a lane; `after` are indices of earlier tasks it waits for."""

    name: str
    lane: int  # 0 computation, 1 communication
    cost: float
    after: tuple[int, ...]


class Segment(NamedTuple):
    """Where a task ran, relative to its action's start."""

    name: str
    lane: int
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """A timed action: its segments, its length, and how long only communication ran."""

    segments: tuple[Segment, ...]
    duration: float
    exposed: float


def run_lanes(tasks: Sequence[Task], slowdown: float, *, always: bool = False) -> Timeline:
    """Run both lanes in the order of `tasks`; computation takes `slowdown` (>= 1) times longer
    while communication is in flight, or `always`."""
    queues = [[i for i, t in enumerate(tasks) if t.lane == lane] for lane in (0, 1)]
    left = [t.cost for t in tasks]
    start: dict[int, float] = {}
    end: dict[int, float] = {}
    head = [0, 0]
    now = exposed = 0.0
    while head[0] < len(queues[0]) or head[1] < len(queues[1]):
        running: list[int | None] = []
        for lane in (0, 1):
            task = queues[lane][head[lane]] if head[lane] < len(queues[lane]) else None
            if task is not None and all(a in end for a in tasks[task].after):
                start.setdefault(task, now)
                running.append(task)
            else:
                running.append(None)
        compute, comm = running
        if compute is None and comm is None:
            raise ValueError("both lanes wait: the tasks' order contradicts their dependencies")
        rate = 1 / slowdown if always or comm is not None else 1.0
        times = []
        if compute is not None:
            times.append(left[compute] / rate)
        if comm is not None:
            times.append(left[comm])
        step = min(times)
        if compute is None:
            exposed += step
        now += step
        for lane, task in enumerate(running):
            if task is None:
                continue
            pace = rate if lane == 0 else 1.0
            # Compare times, not remainders: a remainder of rounding must not stall the loop.
            if left[task] / pace <= step:
                end[task] = now
                head[lane] += 1
            else:
                left[task] -= step * pace
    segments = tuple(Segment(t.name, t.lane, start[i], end[i]) for i, t in enumerate(tasks))
    return Timeline(segments, now, exposed)


@dataclass(frozen=True)
class Work:
    """Costs of the parts of one stage, summed over its layers, each without any overlap.

    attn, mlp           forward computation before and after the dispatch;
    attn_bi, mlp_bi     their input gradients;  attn_w, mlp_w: their weight gradients;
    dispatch, combine   the forward's all-to-alls;
    combine_b           the backward's first all-to-all (gradient to the experts),
    dispatch_b          and its second one (gradient back to the tokens);
    tail, tail_b        work outside of the layers (embedding, output head, loss);
    layers              layers of the stage: the granularity of the overlap;
    sms, comm_sms       multiprocessors of the device, and those the all-to-all kernels hold;
    reserved            in a pair, computation never uses the communication SMs: persistent
                        kernels are launched for a fixed number of SMs, whatever runs beside them.
    """

    attn: float = 0.0
    mlp: float = 0.0
    dispatch: float = 0.0
    combine: float = 0.0
    attn_bi: float = 0.0
    attn_w: float = 0.0
    mlp_bi: float = 0.0
    mlp_w: float = 0.0
    combine_b: float = 0.0
    dispatch_b: float = 0.0
    tail: float = 0.0
    tail_b: float = 0.0
    layers: int = 1
    sms: int = 132
    comm_sms: int = 20
    reserved: bool = False

    def __post_init__(self) -> None:
        for f in fields(self):
            if f.name != "reserved" and not getattr(self, f.name) >= 0:
                raise ValueError(f"Work.{f.name} must be >= 0; got {getattr(self, f.name)!r}")
        if self.layers < 1 or not 0 <= self.comm_sms < self.sms:
            raise ValueError(
                f"Work needs layers >= 1 and 0 <= comm_sms < sms; got layers={self.layers}, "
                f"comm_sms={self.comm_sms}, sms={self.sms}"
            )

    @property
    def slowdown(self) -> float:
        return self.sms / (self.sms - self.comm_sms)

    def alone(self, op: Op) -> Timeline:
        """Timeline of F, B, Bi or W by itself."""
        return _alone(self, op)

    def pair(self, backward: Work, split: bool) -> Timeline:
        """Timeline of this stage's forward overlapped with another stage's backward."""
        return _pair(self, backward, split)


class _Lanes:
    """Collects tasks; `add` returns the index that later ones wait for."""

    def __init__(self) -> None:
        self.tasks: list[Task] = []

    def add(self, name: str, lane: int, cost: float, *after: int | None) -> int:
        self.tasks.append(Task(name, lane, cost, tuple(a for a in after if a is not None)))
        return len(self.tasks) - 1


@lru_cache(maxsize=4096)
def _alone(work: Work, op: Op) -> Timeline:
    lanes = _Lanes()
    n = work.layers
    if op is Op.W:
        lanes.add("W", 0, work.attn_w + work.mlp_w)
        return run_lanes(lanes.tasks, work.slowdown)
    last: int | None = None
    if op is Op.F:
        for _ in range(n):
            attn = lanes.add("attn", 0, work.attn / n, last)
            sent = lanes.add("dispatch", 1, work.dispatch / n, attn)
            mlp = lanes.add("mlp", 0, work.mlp / n, sent)
            last = lanes.add("combine", 1, work.combine / n, mlp)
        lanes.add("tail", 0, work.tail, last)
        return run_lanes(lanes.tasks, work.slowdown)
    full = op is Op.B
    last = lanes.add("tail B", 0, work.tail_b)
    for _ in range(n):
        sent = lanes.add("combine B", 1, work.combine_b / n, last)
        mlp = lanes.add("mlp B", 0, work.mlp_bi / n, sent)
        home = lanes.add("dispatch B", 1, work.dispatch_b / n, mlp)
        if full:  # the weight gradient needs nothing from the all-to-all beside it
            lanes.add("mlp W", 0, work.mlp_w / n, mlp)
        last = lanes.add("attn B", 0, work.attn_bi / n, home)
        if full:
            lanes.add("attn W", 0, work.attn_w / n, last)
    return run_lanes(lanes.tasks, work.slowdown)


@lru_cache(maxsize=65536)
def _pair(fwd: Work, bwd: Work, split: bool) -> Timeline:
    """Layer by layer, computation MLP(B) MLP(W) MLP(F) ATTN(B) ATTN(W) ATTN(F) beside
    communication DISPATCH(F) DISPATCH(B) COMBINE(F) COMBINE(B)."""
    lanes = _Lanes()
    n, m = fwd.layers, bwd.layers
    attn: int | None = lanes.add("F attn", 0, fwd.attn / n)  # primes the first dispatch
    combined: int | None = None
    grad: int | None = lanes.add("B tail", 0, bwd.tail_b)
    grad = lanes.add("B combine", 1, bwd.combine_b / m, grad)
    for i in range(max(n, m)):
        has_f, has_b = i < n, i < m
        sent = lanes.add("F dispatch", 1, fwd.dispatch / n, attn) if has_f else None
        if has_b:
            mlp_b = lanes.add("B mlp", 0, bwd.mlp_bi / m, grad)
            home = lanes.add("B dispatch", 1, bwd.dispatch_b / m, mlp_b)
            if not split:
                lanes.add("W mlp", 0, bwd.mlp_w / m, mlp_b)
        if has_f:
            mlp = lanes.add("F mlp", 0, fwd.mlp / n, sent)
            combined = lanes.add("F combine", 1, fwd.combine / n, mlp)
        if has_b:
            attn_b = lanes.add("B attn", 0, bwd.attn_bi / m, home)
            if i + 1 < m:
                grad = lanes.add("B combine", 1, bwd.combine_b / m, attn_b)
            if not split:
                lanes.add("W attn", 0, bwd.attn_w / m, attn_b)
        if i + 1 < n:
            attn = lanes.add("F attn", 0, fwd.attn / n, combined)
    lanes.add("F tail", 0, fwd.tail, combined)
    return run_lanes(lanes.tasks, fwd.slowdown, always=fwd.reserved)
