"""Schedules: legality, the validator's five proofs, files, and torch's own schedules."""

import csv
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dskernels.pipeline import (
    NAMES,
    Action,
    Op,
    ScheduleError,
    add_comms,
    make,
    problems,
    validate,
)
from dskernels.pipeline.files import from_csv, from_json, parse_cell, to_csv, to_json
from dskernels.pipeline.schedules import FAMILIES


@st.composite
def sizes(draw, max_ranks=6):
    """(name, ranks, microbatches, virtual stages) for which a schedule is defined."""
    name = draw(st.sampled_from(NAMES))
    fam = FAMILIES[name]
    ranks = draw(st.integers(1, max_ranks))
    ranks += fam.even_ranks and ranks % 2
    step, least = fam.microbatch_multiple(ranks), fam.min_microbatches(ranks)
    microbatches = -(-least // step) * step + step * draw(st.integers(0, 2 * ranks))
    virtual = draw(st.integers(1, 3)) if name == "interleaved" else None
    return name, ranks, microbatches, virtual


@settings(max_examples=80, deadline=None)
@given(sizes())
def test_every_legal_schedule_is_sound(size):
    schedule = make(*size)
    assert problems(schedule) == []
    with_comms = add_comms(schedule)
    assert problems(with_comms) == []
    assert with_comms.compute_only() == schedule
    assert problems(add_comms(schedule.forwards())) == []


@pytest.mark.parametrize(
    "args, words",
    [
        (("dualpipe", 7, 20), ["even number of ranks", "ranks=7", "6 or 8"]),
        (("dualpipe", 8, 14), ["at least 16", "multiple of 2", "microbatches=14", "legal: 16"]),
        (("dualpipe", 8, 21), ["multiple of 2", "20 or 22"]),
        (("dualpipev", 4, 7), ["at least 8", "nearest legal: 8"]),
        (("interleaved", 4, 10, 2), ["multiple of 4", "8 or 12"]),
        (("interleaved", 4, 2, 2), ["multiple of 4", "nearest legal: 4"]),
        (("interleaved", 4, 8, 0), ["virtual_stages", ">= 1", "0"]),
        (("zbv", 4, 8, 3), ["2 stage", "virtual_stages=3"]),
        (("chimera", 4, 5), ["multiple of 2", "4 or 6"]),
        (("chimera", 1, 4), ["even number of ranks", "nearest legal: 2"]),
        (("1f1b", 0, 4), ["ranks", ">= 1", "0"]),
        (("gpipe", 2, -3), ["microbatches", ">= 1", "-3"]),
        (("1f1b", 2.5, 4), ["ranks", "2.5"]),
        (("zbx", 2, 4), ["must be one of", "'zbx'"]),
    ],
)
def test_illegal_sizes_name_rule_value_and_nearest(args, words):
    with pytest.raises(ScheduleError) as caught:
        make(*args)
    for word in words:
        assert word in str(caught.value)


def test_dualpipe_follows_the_published_phases():
    """The list of rank 0 and of a middle rank at 4 ranks, 8 micro-batches, by hand."""
    schedule = make("dualpipe", 4, 8)
    assert " ".join(map(str, schedule.actions[0])) == (
        "0F0 0F1 0F2 3F4 3I4 3W4 3F5 "
        "(0F3;3B5)OVERLAP_F_B (3F6;0B0)OVERLAP_F_B 3B6 (3F7;0B1)OVERLAP_F_B "
        "3B7 0I2 0W2 0I3 0W3"
    )
    assert " ".join(map(str, schedule.actions[1])) == (
        "1F0 2F4 1F1 2F5 1F2 2B4 (2F6;1B0)OVERLAP_F_B (1F3;2B5)OVERLAP_F_B (2F7;1B1)OVERLAP_F_B "
        "2B6 1B2 2I7 1I3 2W7 1W3"
    )


# --- the validator catches every kind of damage ---------------------------------------------------


def _edit(schedule, rank, change):
    lists = [list(a) for a in schedule.actions]
    change(lists[rank])
    return schedule.with_actions(lists)


def _find(acts, op, nth=0):
    return [i for i, a in enumerate(acts) if a.op is op][nth]


def _swap(acts, i, j):
    acts[i], acts[j] = acts[j], acts[i]


DAMAGE = {
    "a forward is missing": (lambda a: a.pop(_find(a, Op.F, 1)), "F happens 0 times"),
    "a forward happens twice": (lambda a: a.append(a[_find(a, Op.F)]), "F happens 2 times"),
    "a backward is missing": (lambda a: a.pop(_find(a, Op.B)), "needs one B"),
    "a weight gradient alone": (
        lambda a: a.append(a[_find(a, Op.B)]._replace(op=Op.W)),
        "needs one B",
    ),
    "another rank's action": (lambda a: a.append(a[0]._replace(rank=0)), "belongs to rank 0"),
    "no such stage": (lambda a: a.append(a[0]._replace(stage=9)), "stage 9 is not in"),
    "no such micro-batch": (lambda a: a.append(a[0]._replace(microbatch=99)), "micro-batch 99"),
    "wrong direction": (lambda a: a.append(a[0]._replace(direction=1)), "has direction 0"),
    "stage of another rank": (lambda a: a.append(a[0]._replace(stage=0)), "lives on rank 0"),
    "pair without parts": (lambda a: a.append(a[0]._replace(op=Op.FB)), "two parts"),
    "send is missing": (lambda a: a.pop(_find(a, Op.SEND_F)), "never sends"),
    "send happens twice": (lambda a: a.append(a[_find(a, Op.SEND_F)]), "sent twice"),
    "receive is missing": (lambda a: a.pop(_find(a, Op.RECV_F, 1)), "no RECV_F before it"),
    "receive happens twice": (lambda a: a.append(a[_find(a, Op.RECV_F)]), "received twice"),
    "send before compute": (
        lambda a: a.insert(0, a.pop(_find(a, Op.SEND_F))),
        "sends before it is computed",
    ),
    "sends out of order": (
        lambda a: _swap(a, _find(a, Op.SEND_B, -2), _find(a, Op.SEND_B, -1)),
        "",
    ),
    "receives out of order": (
        lambda a: _swap(a, _find(a, Op.RECV_F, 0), _find(a, Op.RECV_F, 1)),
        "order them alike",
    ),
    "send to nowhere": (
        lambda a: a.append(Action(1, Op.SEND_B, 0, 0)),
        "lives on rank 0",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_validator_catches(name):
    change, words = DAMAGE[name]
    schedule = add_comms(make("1f1b", 3, 6))
    damaged = _edit(schedule, 1, change)
    with pytest.raises(ScheduleError, match="not sound") as caught:
        validate(damaged)
    assert words in str(caught.value)


def test_validator_catches_backward_before_forward():
    schedule = make("zb1p", 2, 4)
    early = _edit(schedule, 1, lambda a: a.insert(0, a.pop(_find(a, Op.BI))))
    assert any("its forward has not run" in p for p in problems(early))
    early = _edit(schedule, 0, lambda a: a.insert(0, a.pop(_find(a, Op.W))))
    assert any("its input gradient has not run" in p for p in problems(early))


def test_validator_catches_pair_that_leans_on_itself():
    fwd, bwd = Action(0, Op.F, 0, 0), Action(0, Op.B, 0, 0)
    schedule = make("gpipe", 1, 1).with_actions([[fwd._replace(op=Op.FB, parts=(fwd, bwd))]])
    assert any("its forward has not run" in p for p in problems(schedule))


def test_validator_catches_circular_wait_of_compute():
    """Rank 0 wants gradient 0 before it sends forward 1; the last rank wants it the other way."""
    schedule = make("gpipe", 2, 2)
    first = [schedule.actions[0][i] for i in (0, 2, 1, 3)]  # F0 B0 F1 B1
    assert problems(schedule.with_actions([first, schedule.actions[1]]))[0].count("circular wait")
    with pytest.raises(ScheduleError, match="cannot run"):
        add_comms(schedule.with_actions([first, schedule.actions[1]]))


def test_validator_catches_deadlock_that_asynchronous_transfers_would_hide():
    """Both ranks send first: fine with buffers, a deadlock if a SEND waits for its RECV."""
    schedule = make("1f1b", 2, 2)
    meet = "0F0 0SEND_F0 0F1 0SEND_F1 0RECV_B0 0B0 0RECV_B1 0B1"
    clash = "1RECV_F0 1F0 1B0 1SEND_B0 1RECV_F1 1F1 1B1 1SEND_B1"
    agree = "1RECV_F0 1F0 1B0 1RECV_F1 1SEND_B0 1F1 1B1 1SEND_B1"
    rank0, rank1, other = (
        [parse_cell(cell, rank) for cell in text.split()]
        for rank, text in ((0, meet), (1, clash), (1, agree))
    )
    assert problems(schedule.with_actions([rank0, other])) == []
    found = problems(schedule.with_actions([rank0, rank1]))
    assert any("deadlock under blocking P2P" in p and "waits for rank" in p for p in found)


def test_random_edits_never_pass_unless_harmless():
    """Move one action anywhere: either the validator complains or the list still runs."""
    from dskernels.pipeline import simulate

    rng = random.Random(0)
    schedule = add_comms(make("dualpipe", 4, 8))
    rejected = 0
    for _ in range(300):
        rank = rng.randrange(4)
        acts = list(schedule.actions[rank])
        acts.insert(rng.randrange(len(acts)), acts.pop(rng.randrange(len(acts))))
        lists = [list(a) for a in schedule.actions]
        lists[rank] = acts
        edited = schedule.with_actions(lists)
        if problems(edited):
            rejected += 1
        else:
            assert simulate(edited).makespan > 0
    assert 150 < rejected < 300


# --- files ----------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(sizes(max_ranks=4), st.booleans())
def test_files_round_trip(size, comms):
    schedule = make(*size)
    if comms:
        schedule = add_comms(schedule)
    assert from_json(to_json(schedule)) == schedule
    if schedule.num_directions == 1:
        text = to_csv(schedule, "compute_comms" if comms else "compute_only")
        assert from_csv(text, schedule.name) == schedule
    else:
        with pytest.raises(ScheduleError, match="2 directions"):
            to_csv(schedule)


@pytest.mark.parametrize(
    "text, words",
    [
        ("0F0,bogus\n", "cannot read action 'bogus'"),
        ("0F0\n0B0\n", "computes on rank 0 and on rank 1"),
        ("1F0\n", r"stages \[0\] compute on no rank"),
        ("\n", "no compute action"),
        ("(0F0;0W0)OVERLAP_F_B\n", "not a pair"),
    ],
)
def test_bad_csv_is_refused(text, words):
    with pytest.raises(ScheduleError, match=words):
        from_csv(text)


@pytest.mark.parametrize("name", ["1f1b", "zbv", "dualpipev"])
def test_each_stage_reduces_its_gradients_once_after_its_last_weight_gradient(name):
    schedule = make(name, 3, 7)
    rows = list(csv.reader(to_csv(schedule, "compute_comms").splitlines()))
    cells = [cell for row in rows for cell in row if "REDUCE_GRAD" in cell]
    assert sorted(cells) == sorted(f"{s}REDUCE_GRAD" for s in range(schedule.num_stages))
    for row in rows:
        for i, cell in enumerate(row):
            if cell.endswith("REDUCE_GRAD"):
                stage = cell.removesuffix("REDUCE_GRAD")
                later = [p for c in row[i:] for p in c.strip("()").split(";")]
                assert not any(p.startswith((f"{stage}B", f"{stage}W")) for p in later)
    assert "REDUCE_GRAD" not in to_csv(schedule, "compute_only")


def test_bad_json_is_refused():
    with pytest.raises(ScheduleError, match="not a schedule"):
        from_json("{}")
    with pytest.raises(ScheduleError, match="not a schedule"):
        from_json("0F0,1F0")


# --- code that nobody here wrote: torch.distributed.pipelining ------------------------------------


def _torch_csv(cls, ranks, microbatches, per_rank, tmp_path, *, comms):
    """Let torch build its schedule without processes and write its CSV."""
    schedules = pytest.importorskip("torch.distributed.pipelining.schedules")

    class Stage:
        def __init__(self, index):
            self.stage_index, self.num_stages = index, ranks * per_rank
            self.group_size, self.group_rank = ranks, 0
            self.submod = None
            self.has_backward = True

    stages = [Stage(i) for i in range(per_rank)]
    made = getattr(schedules, cls)(stages, microbatches)
    path = tmp_path / f"{cls}.csv"
    made._dump_csv(str(path), "compute_comms" if comms else "compute_only")
    return path.read_text()


TORCH = [
    ("ScheduleInterleaved1F1B", "interleaved", 4, 8, 2),
    ("ScheduleInterleaved1F1B", "interleaved", 2, 6, 3),
    ("ScheduleInterleavedZeroBubble", None, 4, 8, 2),
    ("ScheduleZBVZeroBubble", "zbv", 4, 10, 2),
    ("ScheduleZBVZeroBubble", "zbv", 4, 5, 2),
    ("ScheduleDualPipeV", "dualpipev", 4, 10, 2),
    ("ScheduleDualPipeV", "dualpipev", 3, 7, 2),
]


@pytest.mark.parametrize("cls, ours, ranks, microbatches, per_rank", TORCH)
def test_torch_schedules_validate_and_price_as_ours(
    cls, ours, ranks, microbatches, per_rank, tmp_path
):
    from dskernels.pipeline import Costs, simulate

    text = _torch_csv(cls, ranks, microbatches, per_rank, tmp_path, comms=False)
    theirs = from_csv(text, cls)
    assert problems(theirs) == []
    lowered = from_csv(_torch_csv(cls, ranks, microbatches, per_rank, tmp_path, comms=True), cls)
    assert problems(lowered) == []
    for costs in (Costs(fb=3), Costs(fb=2.4), Costs(f=1, bi=1.5, w=0.9, fb=3)):
        priced = simulate(lowered, costs)
        assert priced.makespan == pytest.approx(simulate(theirs, costs).makespan)
        if ours:
            mine = simulate(make(ours, ranks, microbatches, per_rank), costs)
            assert mine.makespan == pytest.approx(priced.makespan)
            assert mine.bubble == pytest.approx(priced.bubble)


@pytest.mark.parametrize(
    "name, ranks, microbatches",
    [("1f1b", 4, 6), ("zbv", 3, 8), ("dualpipev", 3, 8), ("zb1p", 4, 8)],
)
def test_torch_reads_our_csv(name, ranks, microbatches, tmp_path):
    """torch's own parser and validation accept our lists, cell by cell."""
    schedules = pytest.importorskip("torch.distributed.pipelining.schedules")
    schedule = make(name, ranks, microbatches)
    for form in ("compute_only", "compute_comms"):
        rows = list(csv.reader(to_csv(schedule, form).splitlines()))
        parsed = {r: [schedules._Action.from_str(c) for c in row] for r, row in enumerate(rows)}
        for rank, row in enumerate(rows):
            assert [str(a) for a in parsed[rank]] == row
        if form == "compute_only":
            place = schedules._validate_schedule(parsed, ranks, schedule.num_stages, microbatches)
            assert [place[s] for s in range(schedule.num_stages)] == list(schedule.placement[0])
