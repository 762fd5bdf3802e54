"""Discrete-event simulation of a schedule: when every action runs, and what that costs.

The simulator walks the very lists that the runtime executes, communication included. A rank's
computation runs in list order on one lane. A SEND hands its message to the directed link, which
carries one at a time in list order; a RECV only posts a buffer. A compute action starts when its
rank is free and its inputs are there. Since each link has one sender, no event queue is needed:
the times follow from one pass over the actions in dependency order, so the cost is linear.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from . import formulas
from .actions import RECVS, SENDS, Action, Op, Schedule, ScheduleError
from .costs import Costs, _at
from .lower import add_comms, needs
from .schedules import FAMILIES


@dataclass(frozen=True)
class Result:
    """Times of all actions and what follows from them. All lists are indexed by rank.

    start[r][i], end[r][i]: when action i of schedule.actions[r] runs. Of a SEND: its time on the
    link; of a RECV: when it is posted and when the message is there.
    """

    schedule: Schedule
    costs: Costs
    start: list[list[float]]
    end: list[list[float]]
    makespan: float
    busy: list[float]
    exposed_p2p: list[float]
    exposed_ep: list[float]

    @cached_property
    def bubble(self) -> list[float]:
        """Makespan minus busy time: the idle time of a device in one step."""
        return [self.makespan - b for b in self.busy]

    @cached_property
    def span_bubble(self) -> list[float]:
        """Idle time between a rank's own first and last computation (zero-bubble papers)."""
        out = []
        for rank, acts in enumerate(self.schedule.actions):
            times = [
                (self.start[rank][i], self.end[rank][i])
                for i, a in enumerate(acts)
                if a.op not in SENDS and a.op not in RECVS
            ]
            out.append(times[-1][1] - times[0][0] - self.busy[rank] if times else 0.0)
        return out

    @cached_property
    def memory(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Per rank (times, bytes in use after that time), static memory included."""
        return [self._memory_curve(rank, count=False) for rank in range(self.schedule.num_ranks)]

    @cached_property
    def activations(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Per rank (times, micro-batch activations held, in chunks)."""
        return [self._memory_curve(rank, count=True) for rank in range(self.schedule.num_ranks)]

    @property
    def peak_activations(self) -> list[int]:
        """Most chunks held at once; a chunk is one micro-batch on one stage, freed by its W."""
        return [int(round(curve.max(initial=0))) for _, curve in self.activations]

    @property
    def peak_memory(self) -> list[float]:
        return [float(curve.max(initial=0)) for _, curve in self.memory]

    @property
    def peak_memory_time(self) -> list[float]:
        return [float(t[curve.argmax()]) if len(t) else 0.0 for t, curve in self.memory]

    @property
    def bubble_formula(self) -> float | None:
        """The published closed form for these sizes and mean costs, if there is one."""
        s = self.schedule
        if s.name not in FAMILIES or s.forward_only:
            return None
        c = self.costs.means(s.num_stages)
        try:
            return formulas.bubble(
                s.name, s.num_ranks, s.num_microbatches, f=c["f"], b=c["b"], w=c["w"], fb=c["fb"]
            )
        except ScheduleError:  # an imported or edited list may carry a name it does not obey
            return None

    def _memory_curve(self, rank: int, *, count: bool) -> tuple[np.ndarray, np.ndarray]:
        """F allocates at its start; B frees at its end; Bi frees what W does not need."""
        times: list[float] = [0.0]
        deltas: list[float] = [0.0 if count else _at(self.costs.static, rank)]
        kept = 1.0 if count else self.costs.retained
        forward_only = self.schedule.forward_only
        for action, start, end in zip(
            self.schedule.actions[rank], self.start[rank], self.end[rank]
        ):
            if action.op in SENDS or action.op in RECVS:
                continue
            for atom in action.atoms:
                size = 1.0 if count else _at(self.costs.activation, atom.stage)
                if atom.op is Op.F:
                    times.append(start)
                    deltas.append(size)
                    share = 1.0 if forward_only else 0.0
                else:
                    share = {Op.B: 1.0, Op.BI: 1.0 - kept, Op.W: kept}[atom.op]
                if share:
                    times.append(end)
                    deltas.append(-size * share)
        t, d = np.asarray(times), np.asarray(deltas)
        # In an F&B pair the new activation is there before the old one is freed; at equal times
        # a free (end of the action before) precedes the allocation that follows it.
        order = np.lexsort((d > 0, t))
        curve = np.cumsum(d[order])
        if not count:
            # Sums of floats that cancel leave rounding: memory is never below zero.
            curve[np.abs(curve) < 1e-9 * max(1.0, float(np.abs(d).max()))] = 0.0
        return t[order], curve

    def summary(self) -> dict:
        """Everything a report needs, as plain JSON values."""
        s = self.schedule
        return {
            "schedule": s.name,
            "ranks": s.num_ranks,
            "stages": s.num_stages,
            "virtual_stages": s.virtual_stages,
            "directions": s.num_directions,
            "microbatches": s.num_microbatches,
            "actions": s.num_actions,
            "costs": self.costs.means(s.num_stages),
            "makespan": self.makespan,
            "busy": self.busy,
            "bubble": self.bubble,
            "bubble_definition": "makespan - busy",
            "bubble_span": self.span_bubble,
            "bubble_formula": self.bubble_formula,
            "bubble_formula_text": formulas.bubble_text(s.name) if s.name in FAMILIES else None,
            "bubble_ratio": max(self.bubble) / self.makespan if self.makespan else 0.0,
            "exposed_p2p": self.exposed_p2p,
            "exposed_all_to_all": self.exposed_ep,
            "peak_activations": self.peak_activations,
            "peak_activations_unit": "chunks (one micro-batch on one stage)",
            "peak_memory": self.peak_memory,
            "peak_memory_time": self.peak_memory_time,
            "parameter_copies": s.num_directions,
        }


class _Pricer:
    """Durations by kind of action, cached: a schedule has millions of actions of few kinds."""

    def __init__(self, costs: Costs):
        self._costs = costs
        self._cache: dict[tuple, tuple[float, float]] = {}

    def __call__(self, action: Action) -> tuple[float, float]:
        """(duration, exposed all-to-all) of a compute action."""
        parts = action.parts
        key = (action.op, action.stage)
        if parts:
            key = (action.op, parts[0].stage, parts[1].stage, parts[1].op)
        hit = self._cache.get(key)
        if hit is None:
            line = self._costs.timeline(action)
            hit = (self._costs.duration(action), line.exposed if line else 0.0)
            self._cache[key] = hit
        return hit


def simulate(schedule: Schedule, costs: Costs | None = None) -> Result:
    """Price a schedule.

    Args:
        schedule: with or without communication; the latter gets it from `lower.add_comms`.
        costs: all ones, free transfers, if not given.
    Returns:
        Result; its `schedule` is the list that was priced, communication included.
    Raises:
        ScheduleError: cost tables of the wrong length, or lists that wait for each other.
    """
    costs = costs or Costs()
    costs.check(schedule)
    return _Simulation(add_comms(schedule), costs).run()


class _Simulation:
    def __init__(self, schedule: Schedule, costs: Costs):
        self.schedule, self.costs = schedule, costs
        self.price = _Pricer(costs)
        ranks = schedule.num_ranks
        self.start: list[list[float]] = [[0.0] * len(a) for a in schedule.actions]
        self.end: list[list[float]] = [[0.0] * len(a) for a in schedule.actions]
        self.clock = [0.0] * ranks
        self.busy = [0.0] * ranks
        self.exposed_p2p = [0.0] * ranks
        self.exposed_ep = [0.0] * ranks
        self.cursor = [0] * ranks
        self.link_free: dict[tuple[int, int], float] = {}
        # When an output is there for its consumer: made here, or arrived over a link.
        self.made: dict[tuple[bool, int, int], float] = {}
        self.arrived: dict[tuple[bool, int, int], float] = {}
        self.waiting: dict[tuple[bool, int, int, bool], list[int]] = {}
        self.noise = self._noise()

    def _noise(self) -> list[np.ndarray] | None:
        if not self.costs.jitter:
            return None
        out = []
        for rank, acts in enumerate(self.schedule.actions):
            rng = np.random.default_rng([self.costs.seed, rank])
            # Kernels are never much faster than usual: cut the lower tail.
            out.append(np.maximum(rng.normal(1.0, self.costs.jitter, len(acts)), 0.1))
        return out

    def run(self) -> Result:
        runnable = list(range(self.schedule.num_ranks))
        while runnable:
            self._advance(runnable.pop(), runnable)
        for rank, acts in enumerate(self.schedule.actions):
            if self.cursor[rank] < len(acts):
                raise ScheduleError(
                    f"schedule {self.schedule.name!r} stops: rank {rank} waits for ever at action "
                    f"{self.cursor[rank]}, {acts[self.cursor[rank]]}"
                )
        self._fill_receives()
        makespan = max(self.clock, default=0.0)
        return Result(
            self.schedule,
            self.costs,
            self.start,
            self.end,
            makespan,
            self.busy,
            self.exposed_p2p,
            self.exposed_ep,
        )

    def _advance(self, rank: int, runnable: list[int]) -> None:
        """Run a rank's list until its end or until an input is missing."""
        acts = self.schedule.actions[rank]
        i = self.cursor[rank]
        starts, ends = self.start[rank], self.end[rank]
        factor = self.costs.rank_factor.get(rank, 1.0)
        noise = self.noise[rank] if self.noise else None
        clock = self.clock[rank]
        while i < len(acts):
            action = acts[i]
            if action.op in SENDS:
                self._send(action, i, runnable)
            elif action.op in RECVS:
                starts[i] = clock  # posted; its end is known when the message is
            else:
                ready = self._inputs(action, rank)
                if ready is None:
                    break
                here, there = ready
                free = clock if clock > here else here
                begin = free if free > there else there
                self.exposed_p2p[rank] += begin - free
                duration, exposed = self.price(action)
                scale = factor * noise[i] if noise is not None else factor
                starts[i] = begin
                clock = ends[i] = begin + duration * scale
                self.busy[rank] += duration * scale
                self.exposed_ep[rank] += exposed * scale
                for atom in action.parts or (action,):
                    if atom.op is not Op.W:
                        key = (atom.op is not Op.F, atom.stage, atom.microbatch)
                        self.made[key] = clock
            i += 1
            self.clock[rank] = clock
        self.cursor[rank] = i

    def _inputs(self, action: Action, rank: int) -> tuple[float, float] | None:
        """(when the producers of this action had finished, when the data were here).

        None, and the rank registered as waiting, if an input does not exist yet.
        """
        made_at = here_at = 0.0
        schedule = self.schedule
        for atom in action.parts or (action,):
            need = needs(atom, schedule.num_stages)
            if need is None:
                continue
            key = (need[0], need[1], atom.microbatch)
            local = schedule.placement[atom.direction][need[1]] == rank
            at = (self.made if local else self.arrived).get(key)
            if at is None:
                self.waiting.setdefault((*key, local), []).append(rank)
                return None
            if at > here_at:
                here_at = at
            if self.made[key] > made_at:
                made_at = self.made[key]
        return made_at, here_at

    def _send(self, action: Action, index: int, runnable: list[int]) -> None:
        backward = action.op is Op.SEND_B
        stage, rank = action.stage, action.rank
        place = self.schedule.placement[action.direction]
        link = (rank, place[stage - 1 if backward else stage + 1])
        key = (backward, stage, action.microbatch)
        made = self.made.get(key)
        if made is None:
            raise ScheduleError(f"rank {rank}, action {index} ({action}): sent before computed")
        slow = self.costs.link_factor.get(link, 1.0)
        begin = max(made, self.link_free.get(link, 0.0))
        on_wire = begin + self.costs.transfer() * slow
        self.link_free[link] = on_wire
        there = on_wire + self.costs.p2p_latency * slow
        self.start[rank][index], self.end[rank][index] = begin, there
        self.arrived[key] = there
        runnable.extend(self.waiting.pop((*key, False), ()))

    def _fill_receives(self) -> None:
        for rank, acts in enumerate(self.schedule.actions):
            starts, ends = self.start[rank], self.end[rank]
            for i, action in enumerate(acts):
                if action.op in RECVS:
                    backward = action.op is Op.RECV_B
                    source = action.stage + (1 if backward else -1)
                    arrival = self.arrived.get((backward, source, action.microbatch))
                    if arrival is None:
                        raise ScheduleError(
                            f"rank {rank}, action {i} ({action}): nothing was ever sent"
                        )
                    ends[i] = max(starts[i], arrival)
