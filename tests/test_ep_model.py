"""The exchange's protocol, exhaustively for small sizes: no run deadlocks, loses, doubles or
overwrites anything, and every planted fault is found."""

import pytest
from ep_model import Broken, explore, low_latency, normal

from dskernels import _C

RULES = dict(
    depth=_C.comm.low_latency_depth,
    must_be_received=_C.comm.must_be_received,
    copy=_C.comm.low_latency_copy,
)


@pytest.mark.parametrize("calls", ["dd", "dp", "ds", "pp", "ss", "dpd", "dsd"])
def test_two_ranks_in_every_order(calls):
    assert explore(normal(2, calls)) > 100


def test_repeated_deliveries():
    assert explore(normal(2, "dp"), repeats=True) > explore(normal(2, "dp"))


@pytest.mark.parametrize("late", [[0, 0], [0, 1], [1, 1], [2, 1]])
def test_low_latency_hooks_as_late_as_allowed(late):
    assert explore(low_latency(2, 4, late, **RULES)) > 100


@pytest.mark.slow
@pytest.mark.parametrize("calls", ["d", "p", "s"])
def test_three_ranks(calls):
    assert explore(normal(3, calls), most_states=6_000_000) > 1000


@pytest.mark.parametrize(
    "calls, bug",
    [
        ("d", "notice without a fence"),
        ("d", "rows without a fence"),
        ("d", "rows before notices"),
        ("d", "no wait for rows"),
        ("pp", "no wait for readers"),
    ],
)
def test_planted_faults_are_found(calls, bug):
    with pytest.raises(Broken) as caught:
        explore(normal(2, calls, bug))
    assert caught.value.trace


@pytest.mark.parametrize("bug", ["count without a fence", "one call too many under way"])
def test_planted_low_latency_faults_are_found(bug):
    with pytest.raises(Broken):
        explore(low_latency(2, 4, [2, 2], bug=bug, combine=False, **RULES))


def test_fewer_copies_are_not_enough():
    with pytest.raises(Broken, match="slot"):
        explore(low_latency(2, 4, [1, 1], depth=1, must_be_received=lambda c: max(0, c - 1),
                            copy=lambda c: 0, combine=False))  # fmt: skip


def test_a_missing_notification_is_a_deadlock():
    programs = normal(2, "d")
    programs[1][1].send.pop()
    with pytest.raises(Broken, match="deadlock"):
        explore(programs)
