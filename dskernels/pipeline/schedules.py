"""Generators of pipeline schedules: compute actions only; `lower.add_comms` adds the P2P.

    gpipe        Huang et al. 2019: all forwards, then all backwards.
    1f1b         Narayanan et al. 2019 (PipeDream-flush): one forward, one backward in steady state.
    interleaved  Narayanan et al. 2021: 1F1B over V stages a rank.
    zb1p         Qi et al. 2023 (ZB-H1): 1F1B's order; weight gradients deferred by the rank index.
    zbv          Qi et al. 2024 (ZB-V): two stages a rank in a V, no bubble if F = Bi = W.
    chimera      Li and Hoefler 2021: two directions, each a 1F1B of ranks/2 micro-batches a unit.
    dualpipe     DeepSeek-V3 report, 3.2.1: two directions, overlapped F&B pairs.
    dualpipev    its half, folded in a V: one copy of the parameters, half the ranks.

Units: `num_microbatches` counts all micro-batches of one step (of both directions).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from .actions import Action, Op, Schedule, ScheduleError, straight_placement, v_placement

Chunk = tuple[int, int, int]  # (stage, direction, first micro-batch)


class _RankList:
    """Writes one rank's list; a chunk counts its own forwards and backwards, W is a FIFO."""

    def __init__(self, rank: int, *chunks: Chunk, limit: int | None = None):
        self.rank = rank
        self.limit = limit  # micro-batches at or above it are left out (short runs)
        self.actions: list[Action] = []
        self._chunks = chunks
        self._forwards = [first for _, _, first in chunks]
        self._backwards = [first for _, _, first in chunks]
        self._pending: deque[Action] = deque()

    def _next(self, op: Op, chunk: int, counter: list[int]) -> Action:
        stage, direction, _ = self._chunks[chunk]
        action = Action(self.rank, op, stage, counter[chunk], direction)
        counter[chunk] += 1
        return action

    def _emit(self, action: Action) -> None:
        if self.limit is None or action.microbatch < self.limit:
            self.actions.append(action)

    def f(self, chunk: int = 0) -> None:
        self._emit(self._next(Op.F, chunk, self._forwards))

    def b(self, chunk: int = 0, *, split: bool = False) -> None:
        """A full backward, or with `split` its input half, whose W joins the queue."""
        action = self._next(Op.BI if split else Op.B, chunk, self._backwards)
        if split:
            self._pending.append(action._replace(op=Op.W))
        self._emit(action)

    def w(self) -> None:
        self._emit(self._pending.popleft())

    def flush(self) -> None:
        while self._pending:
            self.w()

    @property
    def pending(self) -> int:
        return len(self._pending)

    def fb(self, forward_chunk: int, backward_chunk: int) -> None:
        fwd = self._next(Op.F, forward_chunk, self._forwards)
        bwd = self._next(Op.B, backward_chunk, self._backwards)
        self.actions.append(fwd._replace(op=Op.FB, parts=(fwd, bwd)))


# --- one direction, one or more stages a rank -----------------------------------------------------


def _gpipe(ranks: int, microbatches: int, _: int) -> list[list[Action]]:
    lists = []
    for rank in range(ranks):
        out = _RankList(rank, (rank, 0, 0))
        for _i in range(microbatches):
            out.f()
        for _i in range(microbatches):
            out.b()
        lists.append(out.actions)
    return lists


def _one_f_one_b(ranks: int, microbatches: int, _: int) -> list[list[Action]]:
    lists = []
    for rank in range(ranks):
        out = _RankList(rank, (rank, 0, 0))
        warmup = min(ranks - 1 - rank, microbatches)
        for _i in range(warmup):
            out.f()
        for i in range(microbatches):
            if i < microbatches - warmup:
                out.f()
            out.b()
        lists.append(out.actions)
    return lists


def _zb1p(ranks: int, microbatches: int, _: int) -> list[list[Action]]:
    """Rank r lags r weight gradients behind its input gradients: what the later ranks save on the
    critical path (no W before the gradient leaves), they fill with W at the end."""
    lists = []
    for rank in range(ranks):
        out = _RankList(rank, (rank, 0, 0))
        warmup = min(ranks - 1 - rank, microbatches)
        for _i in range(warmup):
            out.f()
        for i in range(microbatches):
            if i < microbatches - warmup:
                out.f()
            out.b(split=True)
            if out.pending > rank:
                out.w()
        out.flush()
        lists.append(out.actions)
    return lists


def _interleaved(ranks: int, microbatches: int, virtual: int) -> list[list[Action]]:
    total = microbatches * virtual
    group = ranks * virtual  # micro-batches go in groups of `ranks` through all stages of a rank

    def slot(k: int, rank: int, backward: bool) -> tuple[int, int]:
        chunk = (k // ranks) % virtual
        stage = (virtual - 1 - chunk if backward else chunk) * ranks + rank
        return stage, (k // group) * ranks + k % ranks

    lists = []
    for rank in range(ranks):
        warmup = min((virtual - 1) * ranks + 2 * (ranks - 1 - rank), total)
        out = [Action(rank, Op.F, *slot(k, rank, False)) for k in range(warmup)]
        for k in range(total):
            if k + warmup < total:
                out.append(Action(rank, Op.F, *slot(k + warmup, rank, False)))
            out.append(Action(rank, Op.B, *slot(k, rank, True)))
        lists.append(out)
    return lists


def _zbv(ranks: int, microbatches: int, _: int) -> list[list[Action]]:
    """Down the V as chunk 0, up as chunk 1. The pattern is laid out for at least 2*ranks-1
    micro-batches; a shorter run leaves the missing ones out."""
    full = max(microbatches, 2 * ranks - 1)
    lists = []
    for rank in range(ranks):
        out = _RankList(rank, (rank, 0, 0), (2 * ranks - 1 - rank, 0, 0), limit=microbatches)
        down = 0  # forwards of chunk 0 so far
        up = 0  # forwards of chunk 1 so far
        for _i in range(2 * (ranks - rank) - 1):
            out.f(0)
        down = 2 * (ranks - rank) - 1
        for _i in range(rank):
            out.f(1)
            out.f(0)
        down, up = down + rank, up + rank
        for _i in range(ranks - rank):
            out.f(1)
            out.b(1, split=True)
            out.w()
        up += ranks - rank
        while up < down or down < full:
            if down < full:
                out.f(0)
                down += 1
            out.b(0, split=True)
            out.w()
            out.f(1)
            out.b(1, split=True)
            out.w()
            up += 1
        _zbv_cooldown(out, ranks, rank)
        lists.append(out.actions)
    return lists


def _zbv_cooldown(out: _RankList, ranks: int, rank: int) -> None:
    """Gradients first, as the ranks before wait for them; the weights of chunk 1 come last."""
    down_w: deque[Action] = deque()
    up_w: deque[Action] = deque()

    def split_b(chunk: int, queue: deque[Action]) -> None:
        out.b(chunk, split=True)
        queue.append(out._pending.pop())

    for _i in range(rank):
        split_b(0, down_w)
        split_b(1, up_w)
    for _i in range(ranks - rank):
        split_b(0, down_w)
        out._emit(down_w.popleft())
    for action in (*up_w, *down_w):
        out._emit(action)


# --- two directions -------------------------------------------------------------------------------


def _chimera(ranks: int, microbatches: int, _: int) -> list[list[Action]]:
    """Unit slots (F = B = 1): micro-batch m of a unit runs forward on stage s in slot s + 2m and
    backward in slot 2*ranks - 1 - s + 2m. The two directions then never meet on a rank, and units
    of `ranks` micro-batches tile without a gap every 2*ranks slots. A rank's list is its slots in
    order."""
    per_unit, half = ranks // 2, microbatches // 2
    lists = []
    for rank in range(ranks):
        slots: list[tuple[int, Action]] = []
        for direction, stage in ((0, rank), (1, ranks - 1 - rank)):
            for i in range(half):
                unit, m = divmod(i, per_unit)
                base = 2 * ranks * unit + 2 * m
                microbatch = direction * half + i
                fwd = Action(rank, Op.F, stage, microbatch, direction)
                slots.append((base + stage, fwd))
                slots.append((base + 2 * ranks - 1 - stage, fwd._replace(op=Op.B)))
        slots.sort(key=lambda slot: slot[0])
        lists.append([action for _, action in slots])
    return lists


def _dual_steps(out: _RankList, depth: int, h: int, per_chunk: int, *, turn: bool) -> None:
    """The eight steps shared by DualPipe and DualPipeV, for a rank `h` places from the end.

    depth: ranks of half a pipeline (ranks/2; all ranks of the V form); per_chunk: micro-batches
    of each of the two chunks; turn: this rank holds the middle (the last stage meets the first of
    the mirrored half), where the very first pair is not overlapped since its backward waits for
    this very rank's forward.
    """
    outer, inner = depth - h - 1, h + 1
    for _ in range(2 * outer):  # 1: fill
        out.f(0)
    for _ in range(inner):  # 2: both directions
        out.f(0)
        out.f(1)
    for _ in range(outer):  # 3: gradients leave early, weights fill the wait
        out.b(1, split=True)
        out.w()
        out.f(1)
    for i in range(per_chunk - 2 * depth + inner):  # 4: steady state
        if i == 0 and turn:
            out.f(0)
            out.b(1)
        else:
            out.fb(0, 1)
        out.fb(1, 0)
    for _ in range(outer):  # 5: no forward of chunk 0 is left
        out.b(1)
        out.fb(1, 0)
    split = False
    for i in range(inner):  # 6: drain; the second half of these 2*inner backwards is split
        split = split or (i == inner // 2 and h % 2 == 1)
        out.b(1, split=split)
        split = split or (i == inner // 2 and h % 2 == 0)
        out.b(0, split=split)
    for _ in range(outer):  # 7: weights fill the waits
        out.w()
        out.b(0, split=True)
    for _ in range(inner):  # 8: the weights that are left
        out.w()


def _dualpipe(ranks: int, microbatches: int, _: int) -> list[list[Action]]:
    half, per_direction = ranks // 2, microbatches // 2
    lists = []
    for rank in range(ranks):
        down = (rank, 0, 0)
        up = (ranks - 1 - rank, 1, per_direction)
        # Chunk 0 is the direction that enters nearer to this rank.
        out = _RankList(rank, *((down, up) if rank < half else (up, down)))
        h = min(rank, ranks - 1 - rank)
        _dual_steps(out, half, h, per_direction, turn=h == half - 1)
        lists.append(out.actions)
    return lists


def _dualpipev(ranks: int, microbatches: int, _: int) -> list[list[Action]]:
    lists = []
    for rank in range(ranks):
        out = _RankList(rank, (rank, 0, 0), (2 * ranks - 1 - rank, 0, 0))
        _dual_steps(out, ranks, rank, microbatches, turn=rank == ranks - 1)
        lists.append(out.actions)
    return lists


# --- the registry and its rules -------------------------------------------------------------------


@dataclass(frozen=True)
class Family:
    """One kind of schedule: its generator and the sizes for which it is defined."""

    name: str
    title: str
    build: Callable[[int, int, int], list[list[Action]]]
    stages_per_rank: int = 1  # of one direction; 0: chosen by `virtual_stages`
    directions: int = 1
    v_shaped: bool = False
    even_ranks: bool = False
    microbatch_multiple: Callable[[int], int] = lambda ranks: 1
    min_microbatches: Callable[[int], int] = lambda ranks: 1
    overlaps: bool = False  # holds F&B pairs
    splits: bool = False  # holds separate Bi and W


FAMILIES: dict[str, Family] = {
    f.name: f
    for f in (
        Family("gpipe", "GPipe", _gpipe),
        Family("1f1b", "1F1B", _one_f_one_b),
        Family(
            "interleaved",
            "Interleaved 1F1B",
            _interleaved,
            stages_per_rank=0,
            microbatch_multiple=lambda ranks: ranks,
            min_microbatches=lambda ranks: ranks,
        ),
        Family("zb1p", "ZB1P", _zb1p, splits=True),
        Family("zbv", "ZB-V", _zbv, stages_per_rank=2, v_shaped=True, splits=True),
        Family(
            "chimera",
            "Chimera",
            _chimera,
            directions=2,
            even_ranks=True,
            microbatch_multiple=lambda ranks: 2,
            min_microbatches=lambda ranks: 2,
        ),
        Family(
            "dualpipe",
            "DualPipe",
            _dualpipe,
            directions=2,
            even_ranks=True,
            microbatch_multiple=lambda ranks: 2,
            min_microbatches=lambda ranks: 2 * ranks,
            overlaps=True,
            splits=True,
        ),
        Family(
            "dualpipev",
            "DualPipeV",
            _dualpipev,
            stages_per_rank=2,
            v_shaped=True,
            min_microbatches=lambda ranks: 2 * ranks,
            overlaps=True,
            splits=True,
        ),
    )
}
NAMES = tuple(FAMILIES)


def family(name: str) -> Family:
    try:
        return FAMILIES[name]
    except KeyError:
        raise ScheduleError(f"schedule must be one of {', '.join(NAMES)}; got {name!r}") from None


def _positive(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ScheduleError(f"{name} must be an integer >= 1; got {value!r}")


def check_sizes(name: str, ranks: int, microbatches: int, virtual_stages: int | None = None) -> int:
    """Refuse sizes for which a schedule is not defined; return the stages per rank.

    Raises ScheduleError naming the rule, the value given and the nearest legal ones.
    """
    fam = family(name)
    _positive("ranks", ranks)
    _positive("microbatches", microbatches)
    if fam.even_ranks and ranks % 2:
        near = f"{ranks - 1} or {ranks + 1}" if ranks > 1 else "2"
        raise ScheduleError(
            f"{name} needs an even number of ranks (the two directions mirror each other); "
            f"got ranks={ranks}, nearest legal: {near}"
        )
    least, step = fam.min_microbatches(ranks), fam.microbatch_multiple(ranks)
    if microbatches < least or microbatches % step:
        below = microbatches // step * step
        above = max(least, -(-microbatches // step) * step)
        near = f"{below} or {above}" if below >= least and below != above else f"{above}"
        rules = [f"at least {least}"] if least > 1 else []
        rules += [f"a multiple of {step}"] if step > 1 else []
        raise ScheduleError(
            f"{name} on {ranks} ranks needs microbatches {' and '.join(rules)}; "
            f"got microbatches={microbatches}, nearest legal: {near}"
        )
    if fam.stages_per_rank:
        if virtual_stages not in (None, fam.stages_per_rank):
            raise ScheduleError(
                f"{name} holds {fam.stages_per_rank} stage(s) of a direction per rank; "
                f"got virtual_stages={virtual_stages}, nearest legal: {fam.stages_per_rank}"
            )
        return fam.stages_per_rank
    virtual = 2 if virtual_stages is None else virtual_stages
    _positive("virtual_stages", virtual)
    return virtual


def make(name: str, ranks: int, microbatches: int, virtual_stages: int | None = None) -> Schedule:
    """Build a schedule (compute actions only).

    Args:
        name: one of `NAMES`.
        ranks: devices. DualPipe needs an even number; DualPipeV covers 2*ranks stages.
        microbatches: of one step, over both directions.
        virtual_stages: stages per rank of `interleaved` (2 if not given).
    Raises:
        ScheduleError: sizes for which the schedule is not defined, with the nearest legal ones.
    """
    virtual = check_sizes(name, ranks, microbatches, virtual_stages)
    fam = FAMILIES[name]
    place = v_placement(ranks) if fam.v_shaped else straight_placement(ranks, virtual)
    placement = (place,) if fam.directions == 1 else (place, tuple(reversed(place)))
    actions = fam.build(ranks, microbatches, virtual)
    return Schedule(
        name, ranks, ranks * virtual, microbatches, placement, tuple(map(tuple, actions))
    )
