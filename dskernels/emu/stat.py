"""Profiles of launches: counts, traffic, and a modelled time with its bracket.

    with emu.profiling(part="h800", sample_ctas=2) as profile:
        dsk.gemm(a, b, backend="emu")  # or module.kernel(name)[grid, block](...)
    print(profile.launches[0].report())

Works for every launch of the emulator, whoever makes it: kernels of a Module, the ops' "emu"
backend, outside kernels. Nothing here was measured on a GPU: every time is printed as "modelled".
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from dskernels._C import emu as _emu
from dskernels._C import emu_timing as _timing

if TYPE_CHECKING:
    from dskernels.emu.trace import Timeline

PARTS: dict[str, dict[str, float]] = {
    "h100": {"num_sms": 132, "hbm_gbytes": 3350, "l2_bytes": 5500},
    "h800": {"num_sms": 132, "hbm_gbytes": 3350, "l2_bytes": 5500},
    "h200": {"num_sms": 132, "hbm_gbytes": 4800, "l2_bytes": 5500},
    "h100-pcie": {"num_sms": 114, "hbm_gbytes": 2000, "l2_bytes": 4750},
}
"""What differs between parts; bytes per second of HBM are the datasheets'."""

CALIBRATION = (
    "four parameters fitted on FP8 GEMM of one H800 family: 5.6 % mean held-out error there "
    "(15 % at worst, grouped masked); other kernels were never compared with a GPU: use their "
    "times for comparisons only"
)
"""What a modelled time is worth (python -m bench.emu_timing)."""

# How wrong each assumption may be, in its optimistic and its pessimistic direction.
_OPTIMIST = {
    "issue_scale": 0.85, "tensor_scale": 0.98, "hbm_efficiency": 1.05, "l2_bytes": 1.1, "l2": 0.8,
    "hbm": 0.8, "tma": 0.8, "launch_us": 0.8,
}  # fmt: skip
_PESSIMIST = {
    "issue_scale": 1.15, "tensor_scale": 1.05, "hbm_efficiency": 0.9, "l2_bytes": 0.88, "l2": 1.25,
    "hbm": 1.25, "tma": 1.25, "launch_us": 2,
}  # fmt: skip


@dataclass(frozen=True)
class Timing:
    """The modelled time of one launch.

    modelled_us with its bracket [low_us, high_us]; floors of HBM, L2 and tensor cores in us;
    busy: fraction of the simulated time by resource; waits: cycles by (state, detail) summed over
    the warps of the sample; bottleneck: the busiest resource, or "latency" if none is at 60 %.
    """

    modelled_us: float
    low_us: float
    high_us: float
    part: str
    clock_ghz: float
    cycles: float
    floors_us: dict[str, float]
    busy: dict[str, float]
    waits: dict[tuple[str, int], tuple[int, float]]
    warp_cycles: float
    bottleneck: str
    ctas_per_sm: int
    waves: float
    hbm_bytes: float
    l2_bytes: float

    def __str__(self) -> str:
        return (
            f"modelled {self.modelled_us:.1f} us [{self.low_us:.1f}, {self.high_us:.1f}] "
            f"on {self.part} at {self.clock_ghz:.3f} GHz, bound by {self.bottleneck}"
        )


def model_of(part: str, **overrides: float) -> dict[str, float]:
    """The model's parameters for a part, with `overrides`. Raises ValueError for unknown names."""
    if part not in PARTS:
        raise ValueError(f"part: expected one of {', '.join(PARTS)}, got {part!r}")
    model = _timing.model_defaults()
    unknown = sorted(set(overrides) - set(model))
    if unknown:
        raise ValueError(f"model: no parameter {unknown[0]!r}; there are {', '.join(model)}")
    return {**model, **PARTS[part], **overrides}


def _bracket(model: dict[str, float]) -> tuple[dict[str, float], dict[str, float]]:
    """The model with its assumptions at their most optimistic and most pessimistic."""
    low, high = (
        {name: value * by.get(name, 1.0) for name, value in model.items()}
        for by in (_OPTIMIST, _PESSIMIST)
    )
    # Bandwidth that one SM leaves unused may serve another, as far as SMs are out of step.
    return {**low, "burst": max(model["burst"], 1000)}, high


@dataclass
class LaunchProfile:
    """One recorded launch. Figures of the grid are scaled up from the CTAs that ran (`sampled`)."""

    _recording: Any
    part: str
    overrides: dict[str, float] = field(default_factory=dict)

    @property
    def kernel(self) -> str:
        """The kernel's (mangled) name."""
        return self._recording.kernel

    @property
    def grid(self) -> tuple[int, int, int]:
        return self._recording.grid

    @property
    def block(self) -> tuple[int, int, int]:
        return self._recording.block

    @property
    def sampled(self) -> tuple[int, int]:
        """(clusters that ran, clusters of the grid)."""
        return self._recording.clusters_recorded, self._recording.clusters_total

    @property
    def hazards(self) -> list:
        """Formal findings in the CTAs that ran, as LaunchStats.hazards; none without check=True."""
        return self._recording.hazards

    @cached_property
    def instructions(self) -> list[dict]:
        """One dict per PTX instruction that ran: where it is, how often it ran, shared-memory
        wavefronts (and the fewest possible), global sectors (and the fewest possible)."""
        return self._recording.instructions()

    @cached_property
    def bytes(self) -> dict[str, float]:
        """Bytes of the whole grid by level: L2 (total and unique lines), shared memory, wgmma
        operands, distributed shared memory."""
        return self._recording.bytes()

    @cached_property
    def mix(self) -> dict[str, int]:
        """Warp-instructions of the sample by kind, most frequent first."""
        count = Counter()
        for i in self.instructions:
            count[i["group"]] += i["executed"]
        return dict(count.most_common())

    @property
    def bank_conflict_ways(self) -> float:
        """Cycles of the shared-memory port for each one that a conflict-free kernel needs."""
        taken = sum(i["wavefronts"] for i in self.instructions)
        least = sum(i["least_wavefronts"] for i in self.instructions)
        return taken / least if least else 1.0

    @property
    def sectors_per_request(self) -> float:
        """32-byte sectors touched by one global memory instruction of a warp."""
        touched = [i for i in self.instructions if i["sectors"]]
        requests = sum(i["requests"] for i in touched)
        return sum(i["sectors"] for i in touched) / requests if requests else 0.0

    def replay(self, *, trace: bool = False, **model: float) -> dict:
        """Raw result of one replay of the recording, under `model` overrides."""
        full = model_of(self.part, **{**self.overrides, **model})
        return self._recording.replay(full, trace=trace)

    def time(self, part: str | None = None, **overrides: float) -> Timing:
        """The modelled time on `part`; overrides: parameters of the model (see model_of)."""
        part = part or self.part
        model = model_of(part, **{**self.overrides, **overrides})
        nominal = self._recording.replay(model)
        others = [self._recording.replay(m)["us"] for m in _bracket(model)]
        us = nominal["us"]
        return Timing(
            modelled_us=us,
            low_us=min(us, *others),
            high_us=max(us, *others),
            part=part,
            clock_ghz=model["clock_ghz"],
            cycles=nominal["cycles"],
            floors_us={k: nominal[f"floor_{k}_us"] for k in ("hbm", "l2", "tensor")},
            busy=nominal["busy"],
            waits={(s, d): (n, c) for s, d, n, c in nominal["waits"]},
            warp_cycles=nominal["warp_cycles"],
            bottleneck=nominal["bottleneck"],
            ctas_per_sm=nominal["ctas_per_sm"],
            waves=nominal["waves"],
            hbm_bytes=nominal["hbm_bytes"],
            l2_bytes=nominal["l2_bytes"],
        )

    @cached_property
    def timing(self) -> Timing:
        """The modelled time on the part that the profile was made for."""
        return self.time()

    @property
    def modelled_us(self) -> float:
        return self.timing.modelled_us

    def to_dict(self) -> dict:
        """Everything that report() says, for JSON."""
        t = self.timing
        return {
            "kernel": self.kernel,
            "grid": list(self.grid),
            "block": list(self.block),
            "clusters": {"recorded": self.sampled[0], "total": self.sampled[1]},
            "modelled_us": t.modelled_us,
            "bracket_us": [t.low_us, t.high_us],
            "part": t.part,
            "clock_ghz": t.clock_ghz,
            "bottleneck": t.bottleneck,
            "busy": t.busy,
            "floors_us": t.floors_us,
            "waits": [
                {"state": s, "detail": d, "times": n, "cycles": c}
                for (s, d), (n, c) in t.waits.items()
            ],
            "warp_cycles": t.warp_cycles,
            "ctas_per_sm": t.ctas_per_sm,
            "waves": t.waves,
            "hbm_bytes": t.hbm_bytes,
            "bytes": self.bytes,
            "mix": self.mix,
            "bank_conflict_ways": self.bank_conflict_ways,
            "sectors_per_request": self.sectors_per_request,
            "bank_conflicts": self.conflicts(),
            "uncoalesced": self.uncoalesced(),
        }

    def conflicts(self, at_most: int = 5) -> list[dict]:
        """The instructions that lose most cycles to bank conflicts."""
        lost = [i for i in self.instructions if i["wavefronts"] > i["least_wavefronts"]]
        lost.sort(key=lambda i: i["least_wavefronts"] - i["wavefronts"])
        return lost[:at_most]

    def uncoalesced(self, at_most: int = 5) -> list[dict]:
        """The global accesses that touch most sectors in vain."""
        lost = [i for i in self.instructions if i["sectors"] > i["least_sectors"]]
        lost.sort(key=lambda i: i["least_sectors"] - i["sectors"])
        return lost[:at_most]

    def timeline(self, cta: int = 0, **model: float) -> Timeline:
        """What each warp of one CTA (of the first cluster that ran) did when, as modelled."""
        from dskernels.emu.trace import Timeline

        clock = model_of(self.part, **{**self.overrides, **model})["clock_ghz"]
        return Timeline(self.replay(trace=True, **model)["trace"], self.kernel, clock, cta)

    def report(self) -> str:
        """The profile in words and figures."""
        from dskernels.emu.report import launch_report

        return launch_report(self)


class Profile:
    """What `profiling` yields; `launches` in the order in which they were made."""

    def __init__(self, part: str, overrides: dict[str, float]):
        self._part, self._overrides = part, overrides
        self._recordings: list = []

    @cached_property
    def launches(self) -> list[LaunchProfile]:
        """The finished launches. Empty inside the `with` block."""
        return [LaunchProfile(r, self._part, self._overrides) for r in self._recordings]

    @property
    def modelled_us(self) -> float:
        """Of all launches, one after the other."""
        return sum(launch.modelled_us for launch in self.launches)


class profiling:
    """Context manager: records every launch of the emulator inside it.

    part: "h100", "h800", "h200" or "h100-pcie". sample_ctas: how many CTAs of each grid run and
    are recorded (whole clusters, evenly spread, the first among them); None takes the whole grid.
    complete=True runs the whole grid nevertheless, and records only the sample; False runs the
    sample only; None does so for kernels with wgmma, which are the costly ones. What runs in part
    has INCOMPLETE RESULTS, a later launch that depends on them goes astray, and a kernel whose CTAs
    wait for each other across clusters stops with DeadlockError. numerics: of the tensor cores,
    "fast" or "exact". check: look for hazards, as slow as ever. overrides: parameters of the
    model, e.g. clock_ghz. One profile at a time, process-wide.
    """

    def __init__(
        self,
        part: str = "h800",
        *,
        sample_ctas: int | None = 2,
        complete: bool | None = None,
        check: bool = False,
        numerics: str = "fast",
        **overrides: float,
    ):
        if sample_ctas is not None and sample_ctas < 1:
            raise ValueError(f"sample_ctas: expected at least 1, or None, got {sample_ctas}")
        if numerics not in ("exact", "fast"):
            raise ValueError(f"numerics must be 'exact' or 'fast', got {numerics!r}")
        self._sms = int(model_of(part, **overrides)["num_sms"])
        self._profile = Profile(part, overrides)
        self._profiler = _timing.Profiler(sample_ctas or 0, complete, check, numerics == "fast")

    def __enter__(self) -> Profile:
        self._profiler.start()
        _emu.set_num_sms(0, self._sms)
        return self._profile

    def __exit__(self, kind, value, trace) -> None:
        try:
            if kind is None:
                _emu.synchronize(0)
        finally:
            self._profiler.stop()
            _emu.set_num_sms(0, 132)
        self._profile._recordings = [r for r in self._profiler.recordings() if r.complete]
