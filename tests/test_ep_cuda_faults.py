"""GPUs that stay away, or die in the middle of a kernel: the others give up in time, say whom they
missed, and go on without it.

Seed 1 throughout: one host thread takes turns, so how often a wait polls does not depend on the
machine. Delays and reordering are what the seeds of tests/test_ep_cuda.py draw.
"""

import os

import pytest
from ep_workers import routing
from test_ep_cuda import K, T, compare_low_latency, compare_normal

import dskernels as dsk
from dskernels import emu
from dskernels.cuda.ep import PeerGroup

pytestmark = pytest.mark.timeout(300)
VICTIM = 1


class Faulty(PeerGroup):
    """absent: a rank that does not launch. cut: the address of a tensor that kernels may not touch:
    the one that reads it dies there."""

    absent = cut = None

    def _order(self):
        return [r for r in super()._order() if r != self.absent]

    def _lend(self, tensors):
        super()._lend([t for t in tensors if t is None or t.data_ptr() != self.cut])


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setitem(os.environ, "DSK_EMU_SEED", "1")


def make(ranks, **options):
    group = Faulty(
        "emu", ranks, num_experts=4 * ranks, max_tokens=T, hidden=256, topk=K, num_sms=2,
        max_polls=5000, **options,
    )  # fmt: skip
    case = routing("even", ranks, 4 * ranks, K, T, 256, 0)
    return group, case


def goes_on(group, case):
    alive = group.alive = [r != VICTIM for r in range(group.num_ranks)]
    group.absent = group.cut = None
    compare_normal(group, case, 256, alive=alive)
    compare_low_latency(group, case, use_fp8=True, alive=alive)


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_a_stalled_rank(ranks):
    group, case = make(ranks)
    compare_normal(group, case, 256)
    group.absent = VICTIM
    with pytest.raises(dsk.ep.PeerSilent, match=f"rank {VICTIM} is silent") as caught:
        group.dispatch(*case)
    assert caught.value.report["phase"] == "notice"
    goes_on(group, case)


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_a_stalled_rank_in_the_low_latency_mode(ranks):
    group, case = make(ranks)
    group.absent = VICTIM
    _, hook = group.low_latency_dispatch(case[0], case[1])
    with pytest.raises(dsk.ep.PeerSilent, match=f"rank {VICTIM} is silent") as caught:
        hook()
    assert caught.value.report["phase"] == "low-latency rows"
    goes_on(group, case)


@pytest.mark.parametrize("ranks, nodes", [(2, 0), (4, 0), (8, 0), (8, 4)])
def test_death_in_the_middle_of_a_dispatch(ranks, nodes):
    """The victim has told everybody how many rows will come, and dies at its first row."""
    group, case = make(ranks, ranks_per_node=nodes)
    compare_normal(group, case, 256)
    group.cut = case[0][VICTIM].data_ptr()
    with pytest.raises(emu.HazardError, match="ep_dispatch"):  # the victim's end
        group.dispatch(*case)
    with pytest.raises(dsk.ep.PeerSilent, match=f"rank {VICTIM} is silent") as caught:
        group._check()  # what the others have left in their status
    assert caught.value.report["phase"] in ("rows", "rows to forward")
    failed = caught.value.report["rank"]
    assert failed != VICTIM
    goes_on(group, case)
