"""What one action costs: durations per stage, transfers, memory, and what disturbs them.

Times are in any one unit (the cost model uses seconds). Every duration is either one number for
all stages or a sequence with one entry per stage.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from .actions import Action, Op, Schedule, ScheduleError
from .overlap import Timeline, Work

PerStage = float | Sequence[float]


def _at(value: PerStage, stage: int) -> float:
    return value[stage] if isinstance(value, Sequence) else value


def _mean(value: PerStage) -> float:
    return sum(value) / len(value) if isinstance(value, Sequence) else float(value)


@dataclass(frozen=True)
class Costs:
    """Prices of a schedule's actions.

    f, bi, w        forward, input gradient, weight gradient of one stage.
    b               full backward; bi + w if not given.
    fb              overlapped pair; f + b (no gain) if not given. One number, or a mapping from
                    (stage of the forward, stage of the backward).
    work            instead of the numbers above: compute and all-to-all parts of each stage
                    (`overlap.Work`); the durations then follow from the two lanes' timelines.
    p2p_latency     time units before the first byte of a transfer arrives.
    p2p_bytes       bytes of one activation (and of one gradient).
    p2p_bandwidth   bytes per time unit on each directed link; transfers of one link queue.
    activation      memory of one micro-batch's activations on one stage (any unit).
    retained        share of `activation` that a split backward keeps until its W.
    static          memory that each rank holds throughout (parameters, optimiser).
    rank_factor     {rank: slowdown} of all its computation: stragglers.
    link_factor     {(source, destination): slowdown} of transfers.
    jitter, seed    relative standard deviation of every duration, and the seed of its stream.
    """

    f: PerStage = 1.0
    bi: PerStage = 1.0
    w: PerStage = 1.0
    b: PerStage | None = None
    fb: float | Mapping[tuple[int, int], float] | None = None
    work: Sequence[Work] | None = None
    p2p_latency: float = 0.0
    p2p_bytes: float = 0.0
    p2p_bandwidth: float = float("inf")
    activation: PerStage = 1.0
    retained: float = 1.0
    static: PerStage = 0.0
    rank_factor: Mapping[int, float] = field(default_factory=dict)
    link_factor: Mapping[tuple[int, int], float] = field(default_factory=dict)
    jitter: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("f", "bi", "w", "b", "activation", "static"):
            value = getattr(self, name)
            if hasattr(value, "tolist"):  # a NumPy array or scalar
                value = value.tolist()
                object.__setattr__(self, name, value)
            numbers = value if isinstance(value, Sequence) else (value,)
            if value is not None and any(not x >= 0 for x in numbers):
                raise ScheduleError(f"{name} must be >= 0; got {value!r}")
        if isinstance(self.fb, (int, float)) and not self.fb >= 0:
            raise ScheduleError(f"fb must be >= 0; got {self.fb!r}")
        for name in ("p2p_latency", "p2p_bytes", "jitter"):
            if not getattr(self, name) >= 0:
                raise ScheduleError(f"{name} must be >= 0; got {getattr(self, name)!r}")
        if not self.p2p_bandwidth > 0:
            raise ScheduleError(f"p2p_bandwidth must be > 0; got {self.p2p_bandwidth!r}")
        if not 0 <= self.retained <= 1:
            raise ScheduleError(f"retained must be in 0..1; got {self.retained!r}")
        for name in ("rank_factor", "link_factor"):
            for key, factor in getattr(self, name).items():
                if not factor > 0:
                    raise ScheduleError(f"{name}[{key}] must be > 0; got {factor!r}")

    def check(self, schedule: Schedule) -> None:
        """Refuse tables whose length is not the schedule's number of stages (ranks for static)."""
        for name in ("f", "bi", "w", "b", "activation", "work", "static"):
            value = getattr(self, name)
            want = schedule.num_ranks if name == "static" else schedule.num_stages
            if isinstance(value, Sequence) and len(value) != want:
                raise ScheduleError(f"{name} needs {want} entries; got {len(value)}")

    # --- durations of one stage ---

    def timeline(self, action: Action) -> Timeline | None:
        """The two lanes inside a compute action, if the costs are given as `work`."""
        if self.work is None:
            return None
        if action.op is Op.FB:
            fwd, bwd = action.parts
            return self.work[fwd.stage].pair(self.work[bwd.stage], bwd.op is Op.BI)
        return self.work[action.stage].alone(action.op)

    def duration(self, action: Action) -> float:
        """Undisturbed duration of a compute action."""
        line = self.timeline(action)
        if line is not None:
            return line.duration
        if action.op is Op.FB:
            return self._pair(*action.parts)
        if action.op is Op.B:
            return self._full_backward(action.stage)
        return _at({Op.F: self.f, Op.BI: self.bi, Op.W: self.w}[action.op], action.stage)

    def _full_backward(self, stage: int) -> float:
        return _at(self.bi, stage) + _at(self.w, stage) if self.b is None else _at(self.b, stage)

    def _pair(self, fwd: Action, bwd: Action) -> float:
        if isinstance(self.fb, Mapping):
            try:
                return self.fb[fwd.stage, bwd.stage]
            except KeyError:
                raise ScheduleError(
                    f"fb has no entry for the pair {(fwd.stage, bwd.stage)} of {fwd} and {bwd}"
                ) from None
        # A pair whose backward is only Bi leaves its W for later.
        deferred = _at(self.w, bwd.stage) if bwd.op is Op.BI else 0.0
        if self.fb is not None:
            return max(0.0, self.fb - deferred)
        return _at(self.f, fwd.stage) + self._full_backward(bwd.stage) - deferred

    def transfer(self) -> float:
        """Time on the wire of one activation, without latency."""
        return self.p2p_bytes / self.p2p_bandwidth

    def means(self, num_stages: int) -> dict[str, float]:
        """Average f, bi, w, b, fb over the stages: what a closed formula is fed with."""
        if self.work is not None:
            lines = {
                key: [work.alone(op).duration for work in self.work]
                for key, op in (("f", Op.F), ("bi", Op.BI), ("w", Op.W), ("b", Op.B))
            }
            pairs = [work.pair(work, False).duration for work in self.work]
            return {**{k: _mean(v) for k, v in lines.items()}, "fb": _mean(pairs)}
        f, bi, w = _mean(self.f), _mean(self.bi), _mean(self.w)
        b = bi + w if self.b is None else _mean(self.b)
        if isinstance(self.fb, Mapping):
            fb = _mean(list(self.fb.values()))
        else:
            fb = f + b if self.fb is None else self.fb
        return {"f": f, "bi": bi, "w": w, "b": b, "fb": fb}
