"""A pipeline schedule as data: what every rank does, in order.

The same list is validated (`validate`), priced (`simulate`), drawn (`draw`) and executed
(`runtime`). Nothing here knows how a schedule was made: by a generator of `schedules`, read from
a CSV file of torch.distributed.pipelining, or typed by hand.

Vocabulary
    rank        one device (one process) of the pipeline.
    stage       one contiguous slice of the model; stage 0 takes the input, the last one the loss.
    micro-batch 0 .. num_microbatches-1, numbered over the whole step.
    direction   bidirectional schedules (Chimera, DualPipe) run two copies of the model through
                the same ranks: direction 0 enters at rank 0, direction 1 at the last rank. The
                first half of the micro-batches belongs to direction 0, the second to direction 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import NamedTuple


class Op(str, Enum):
    """What an action does. The values are torch.distributed.pipelining's own spelling."""

    F = "F"  # forward
    B = "B"  # full backward: input gradient and weight gradient
    BI = "I"  # backward of the input only; its weight gradient follows later as W
    W = "W"  # weight gradient that an earlier BI left behind
    FB = "OVERLAP_F_B"  # one F and one B (or BI) whose computation and communication overlap
    SEND_F = "SEND_F"  # activation to the rank of the next stage
    RECV_F = "RECV_F"  # activation from the rank of the previous stage
    SEND_B = "SEND_B"  # gradient to the rank of the previous stage
    RECV_B = "RECV_B"  # gradient from the rank of the next stage

    def __str__(self) -> str:
        return self.value


COMPUTE = frozenset({Op.F, Op.B, Op.BI, Op.W, Op.FB})
SENDS = frozenset({Op.SEND_F, Op.SEND_B})
RECVS = frozenset({Op.RECV_F, Op.RECV_B})


class Action(NamedTuple):
    """One entry of a rank's list. Of an FB pair, `parts` holds the forward, then the backward;
    its own stage, micro-batch and direction repeat the forward's."""

    rank: int
    op: Op
    stage: int
    microbatch: int
    direction: int = 0
    parts: tuple[Action, ...] = ()

    @property
    def atoms(self) -> tuple[Action, ...]:
        """The elementary actions: itself, or the two halves of an overlapped pair."""
        return self.parts or (self,)

    def __str__(self) -> str:
        if self.parts:
            return "(" + ";".join(map(str, self.parts)) + ")" + self.op.value
        return f"{self.stage}{self.op.value}{self.microbatch}"


class ScheduleError(ValueError):
    """A schedule, or a request for one, that breaks a rule. The message names rule and values."""


@dataclass(frozen=True)
class Schedule:
    """Per-rank action lists and the placement of the stages.

    placement[d][s] is the rank that holds stage s of direction d. `virtual_stages` is the number
    of stages of one direction per rank (2 for the V-shaped schedules).
    """

    name: str
    num_ranks: int
    num_stages: int
    num_microbatches: int
    placement: tuple[tuple[int, ...], ...]
    actions: tuple[tuple[Action, ...], ...]
    forward_only: bool = False

    @property
    def num_directions(self) -> int:
        return len(self.placement)

    @property
    def virtual_stages(self) -> int:
        return max(1, self.num_stages // self.num_ranks)

    @property
    def has_comms(self) -> bool:
        return any(a.op in SENDS or a.op in RECVS for acts in self.actions for a in acts)

    @property
    def num_actions(self) -> int:
        return sum(map(len, self.actions))

    def direction_of(self, microbatch: int) -> int:
        return microbatch * self.num_directions // self.num_microbatches

    def rank_of(self, stage: int, microbatch: int) -> int:
        return self.placement[self.direction_of(microbatch)][stage]

    def stages_of(self, rank: int) -> list[tuple[int, int]]:
        """(stage, direction) of every model slice that a rank holds, by direction then stage."""
        return [
            (s, d)
            for d, place in enumerate(self.placement)
            for s, r in enumerate(place)
            if r == rank
        ]

    def microbatches_of(self, direction: int) -> range:
        d, m = self.num_directions, self.num_microbatches
        return range(-(-direction * m // d), -(-(direction + 1) * m // d))

    def compute_only(self) -> Schedule:
        """The same schedule without its sends and receives."""
        kept = tuple(tuple(a for a in acts if a.op in COMPUTE) for acts in self.actions)
        return replace(self, actions=kept)

    def forwards(self) -> Schedule:
        """The forward passes alone (inference), in the same order, without communication."""
        kept = tuple(
            tuple(a for act in acts for a in act.atoms if a.op is Op.F) for acts in self.actions
        )
        return replace(self, actions=kept, forward_only=True)

    def with_actions(self, actions: Iterable[Sequence[Action]]) -> Schedule:
        return replace(self, actions=tuple(tuple(a) for a in actions))


def straight_placement(num_ranks: int, virtual_stages: int = 1) -> tuple[int, ...]:
    """Stage s on rank s mod ranks: the loop of interleaved schedules."""
    return tuple(s % num_ranks for s in range(num_ranks * virtual_stages))


def v_placement(num_ranks: int) -> tuple[int, ...]:
    """Two stages a rank, going down the ranks and back up: the last rank holds the turn."""
    return tuple(range(num_ranks)) + tuple(reversed(range(num_ranks)))
