"""The exchange's protocol, exhaustively for small sizes: no run deadlocks, loses, doubles or
overwrites anything, and every planted fault is found."""

import random

import pytest
from ep_model import Broken, Notify, Phase, Put, explore, low_latency, normal, over_nodes

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


# ---- over nodes, in fewer orders ----


@pytest.mark.parametrize("nodes, per_node", [(2, 2), (3, 2), (2, 4)])
@pytest.mark.parametrize("calls", ["dd", "dp", "pp", "pd", "dpdp"])
def test_over_nodes_in_every_order(nodes, per_node, calls):
    assert explore(over_nodes(nodes, per_node, calls), reduced=True) > 100


@pytest.mark.parametrize("calls", ["dd", "dp", "pd", "pp"])
def test_over_nodes_in_the_full_search_too(calls):
    assert explore(over_nodes(2, 1, calls)) > 100


@pytest.mark.slow  # 30 s; two nodes of two have more than 4 million states
@pytest.mark.parametrize("calls", ["d", "p"])
def test_three_nodes_in_the_full_search(calls):
    assert explore(over_nodes(3, 1, calls)) > 40_000


@pytest.mark.parametrize(
    "calls, bug",
    [
        ("d", "rows before notices"),
        ("dd", "notices read once more behind rows"),
        ("d", "rows to pass on without a fence"),
        ("d", "rows passed on without a fence"),
        ("d", "no wait for rows to pass on"),
        ("d", "no wait for rows passed on"),
        ("dp", "sums before their owner is ready"),
        ("p", "sums without a fence"),
        ("p", "no wait for sums"),
        ("pp", "no wait for readers"),
    ],
)
def test_planted_faults_over_nodes_are_found(calls, bug):
    with pytest.raises(Broken, match="slot"):
        explore(over_nodes(2, 2, calls, bug), reduced=True)


def test_a_missing_notification_over_nodes_is_a_deadlock():
    programs = over_nodes(2, 2, "d")
    passes_on = next(phase for phase in programs[1] if phase.name == "passes rows on")
    passes_on.send.pop()
    with pytest.raises(Broken, match="deadlock"):
        explore(programs, reduced=True)


def some_programs(r):
    """Small random programs, right or wrong: what is read was put there, or was to be, or not."""
    programs, puts = [], []
    for rank in range(r.choice([2, 2, 3])):
        phases = []
        for number in range(r.randint(1, 3)):
            phase = Phase(f"phase {number}")
            for _ in range(r.randint(0, 2)):
                put = Put(r.randrange(2), (r.randrange(2),), (rank, number))
                puts.append(put)
                phase.send.append(put)
                phase.send.append(Notify(put.to, (rank,), number + 1, r.random() < 0.8))
            phases.append(phase)
        programs.append(phases)
    for rank, phases in enumerate(programs[:2]):
        for number, phase in enumerate(phases):
            if number and r.random() < 0.15:
                phase.wait.append(((1 - rank,), r.randint(1, 2)))
            mine = [put for put in puts if put.to == rank]
            if mine and r.random() < 0.5:
                put = r.choice(mine)
                phase.read.append((rank, put.slot, put.value))
                if r.random() < 0.9:
                    source, sent = put.value
                    phase.wait.append(((source,), sent + 1))
            if r.random() < 0.2:
                phase.write.append(((r.randrange(2),), (rank, "own", number)))
    return programs


def verdict(programs, reduced):
    try:
        explore(programs, reduced=reduced)
        return "right"
    except Broken as broken:
        return "deadlock" if "deadlock" in broken.what else "wrong read"


def num_puts(programs):
    return sum(isinstance(x, Put) for phases in programs for phase in phases for x in phase.send)


@pytest.mark.parametrize(
    "most_puts, draws", [(6, 400), pytest.param(12, 100, marks=pytest.mark.slow)]
)
def test_fewer_orders_give_the_same_verdict(most_puts, draws):
    """What the full search takes grows with every message that can be under way."""
    r = random.Random(0)
    seen = []
    for programs in (some_programs(r) for _ in range(draws)):
        if num_puts(programs) > most_puts:
            continue
        seen.append(verdict(programs, False))
        found = verdict(programs, True)
        # A program with both faults may show either first.
        assert (found == "right") == (seen[-1] == "right"), programs
    assert all(seen.count(kind) > 10 for kind in ("right", "deadlock", "wrong read")), seen
