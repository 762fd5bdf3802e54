"""Search schedule, pipeline and expert parallelism, and micro-batch size for the fastest step.

Every candidate is priced by `cost.training`, that is simulated; none is estimated. To spare
simulations, candidates are tried in the order of a lower bound that no schedule can beat (the
busiest rank's computation without any communication), and the search stops where the bound of all
the rest exceeds the best few steps found. So the winner is the true one of the grid.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

from .actions import ScheduleError
from .cost import (
    Setup,
    TrainingCost,
    optimizer_time,
    place_layers,
    stage_work,
    static_bytes,
    training,
)
from .hardware import Hardware
from .rates import Kernels, Rates
from .schedules import FAMILIES, check_sizes


@dataclass(frozen=True)
class Candidate:
    setup: Setup
    bound: float  # seconds that no order of the actions can beat


@dataclass
class Search:
    """Result of `tune`: priced candidates by step time, and why the others were left out."""

    found: list[TrainingCost]
    too_large: list[TrainingCost]  # priced, but over the memory limit
    refused: Counter
    simulated: int
    candidates: int

    @property
    def best(self) -> TrainingCost:
        if not self.found:
            raise ScheduleError(
                f"no candidate fits: {dict(self.refused)}, {len(self.too_large)} over the memory "
                "limit after simulation"
            )
        return self.found[0]


def powers_of_two(low: int, high: int) -> list[int]:
    out = []
    while low <= high:
        out.append(low)
        low *= 2
    return out


def _held(setup: Setup, stages: list, directions: int) -> list[list[int]]:
    """Stage numbers on each rank, over all directions."""
    pp, total = setup.pp, len(stages)
    held: list[list[int]] = [[] for _ in range(pp)]
    fam = FAMILIES[setup.schedule]
    for s in range(total):
        rank = 2 * pp - 1 - s if fam.v_shaped and s >= pp else s % pp
        held[rank].append(s)
        if directions == 2:
            held[pp - 1 - rank].append(s)
    return held


def _candidate(setup: Setup, hw: Hardware, rates: Rates, limit: float) -> Candidate:
    """Raises ScheduleError if the sizes do not fit, or the parameters alone exceed the memory."""
    setup.check()
    per_rank = check_sizes(setup.schedule, setup.pp, setup.microbatches, setup.virtual_stages)
    kernels = Kernels(hw, rates)
    directions = FAMILIES[setup.schedule].directions
    stages = place_layers(setup, kernels, setup.pp * per_rank)
    work = stage_work(setup, kernels, stages)
    bound = 0.0
    for numbers in _held(setup, stages, directions):
        own = [stages[s] for s in numbers]
        if static_bytes(setup, own, directions) > limit:
            raise ScheduleError("parameters alone exceed the memory limit")
        busy = sum(
            w.attn + w.mlp + w.attn_bi + w.attn_w + w.mlp_bi + w.mlp_w + w.tail + w.tail_b
            for w in (work[s] for s in numbers)
        )
        seconds = busy * setup.microbatches / directions
        bound = max(bound, seconds + optimizer_time(setup, kernels, own, directions))
    return Candidate(setup, bound)


def tune(
    base: Setup,
    hw: Hardware,
    rates: Rates | None = None,
    *,
    schedules: tuple[str, ...] = tuple(FAMILIES),
    memory: float | None = None,
    microbatches: tuple[int, ...] = (1, 2, 4),
    keep: int = 10,
) -> Search:
    """The `keep` fastest setups of the grid that fit into memory.

    Args:
        base: model, gpus, batch and sequence; its pp, ep, schedule and microbatch are varied.
        hw, rates: as for `cost.training`.
        schedules: names to try.
        memory: bytes per GPU (the device's if None).
        microbatches: sizes in sequences to try.
    """
    rates = rates or Rates()
    limit = hw.memory if memory is None else memory
    candidates, refused = [], Counter()
    for schedule in schedules:
        for pp in powers_of_two(2, min(64, base.gpus)):
            for ep in powers_of_two(8, min(base.model.experts, base.gpus // pp)):
                for size in microbatches:
                    setup = replace(base, schedule=schedule, pp=pp, ep=ep, microbatch=size)
                    try:
                        candidates.append(_candidate(setup, hw, rates, limit))
                    except ScheduleError as error:
                        reason = str(error)
                        known = "memory" if "memory" in reason else "sizes"
                        refused[f"{known} ({schedule})" if known == "sizes" else known] += 1
    candidates.sort(key=lambda c: c.bound)
    found: list[TrainingCost] = []
    too_large: list[TrainingCost] = []
    simulated = 0
    for candidate in candidates:
        if len(found) >= keep and candidate.bound > found[keep - 1].step_time:
            break
        priced = training(candidate.setup, hw, rates)
        simulated += 1
        fits = max(priced.result.peak_memory) <= limit
        (found if fits else too_large).append(priced)
        found.sort(key=lambda c: c.step_time)
    too_large.sort(key=lambda c: c.step_time)
    return Search(found[:keep], too_large[:keep], refused, simulated, len(candidates))


def row(cost: TrainingCost) -> dict:
    """One line of the table: what was chosen, and where a step's seconds go."""
    s, parts = cost.setup, cost.breakdown()
    ranks = cost.result.schedule.num_ranks
    exposed = sum(cost.result.exposed_ep) / ranks
    return {
        "schedule": s.schedule,
        "pp": s.pp,
        "ep": s.ep,
        "dp": s.dp,
        "microbatch": s.microbatch,
        "microbatches": s.microbatches,
        "step_time_s": cost.step_time,
        "gpu_hours_per_trillion_tokens": cost.hours_per_trillion,
        "mfu": cost.mfu(),
        "work_s": sum(cost.result.busy) / ranks - exposed,
        "exposed_all_to_all_s": exposed,
        "bubble_s": parts["bubble"],
        "optimizer_s": cost.optimizer,
        "peak_memory_gb": max(cost.result.peak_memory) / 1e9,
    }


def explain(search: Search) -> str:
    """Why the winner wins: the seconds that set it apart from the best of each other schedule."""
    best = row(search.best)
    lines = [
        f"{best['schedule']} with PP{best['pp']} EP{best['ep']} and micro-batches of "
        f"{best['microbatch']} takes {best['step_time_s']:.2f} s a step "
        f"({best['mfu']:.1%} MFU, {best['peak_memory_gb']:.0f} GB)."
    ]
    seen = {best["schedule"]}
    for cost in search.found[1:]:
        other = row(cost)
        if other["schedule"] in seen:
            continue
        seen.add(other["schedule"])
        gaps = {
            "work": other["work_s"] - best["work_s"],
            "exposed all-to-all": other["exposed_all_to_all_s"] - best["exposed_all_to_all_s"],
            "bubble": other["bubble_s"] - best["bubble_s"],
            "optimiser": other["optimizer_s"] - best["optimizer_s"],
        }
        parts = ", ".join(f"{name} {gap:+.2f} s" for name, gap in gaps.items() if abs(gap) > 0.01)
        lines.append(
            f"{other['schedule']} (PP{other['pp']} EP{other['ep']}) takes "
            f"{other['step_time_s'] - best['step_time_s']:+.2f} s: {parts}."
        )
    faster = [c for c in search.too_large if c.step_time < search.best.step_time]
    if faster:
        f = row(faster[0])
        lines.append(
            f"Faster but too large: {f['schedule']} PP{f['pp']} EP{f['ep']}, "
            f"{f['step_time_s']:.2f} s at {f['peak_memory_gb']:.0f} GB."
        )
    return "\n".join(lines)
