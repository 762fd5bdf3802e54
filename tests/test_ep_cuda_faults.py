"""GPUs that stay away, come late, or die in the middle of a kernel, in every mode: right results or
an error that names whom the others missed, and no hang; then the others go on without it.

Seed 1 throughout: one host thread takes turns, so how often a wait polls does not depend on the
machine. Reordering is what the seeds of tests/test_ep_cuda.py draw.
"""

import os
import struct
import warnings

import pytest
import torch
from ep_workers import routing, same
from test_ep_cuda import K, T, compare_low_latency, compare_normal

import dskernels as dsk
from dskernels import emu
from dskernels.cuda.ep import PeerGroup
from dskernels.ref import ep as ref

pytestmark = pytest.mark.timeout(300)
VICTIM, H = 1, 256


class Faulty(PeerGroup):
    """absent: a rank that does not launch. cut: the address of a tensor that kernels may not touch:
    the one that reads it dies there. late: a rank whose GPU is busy with something else first."""

    absent = late = None

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        lend, cut = self._machine.lend, []
        self._cut = cut  # the machine outlives the group: it must not refer to it
        self._machine.lend = lambda tensors: lend(
            [t for t in tensors if t is None or t.data_ptr() not in cut]
        )

    @property
    def cut(self):
        return self._cut[0] if self._cut else None

    @cut.setter
    def cut(self, address):
        self._cut[:] = [] if address is None else [address]

    def _order(self):
        return [r for r in super()._order() if r != self.absent]

    def _queue(self, launch, tensors):
        if self.late is not None:
            keep_busy(*self.late)
        super()._queue(launch, tensors)


BUSY = """
.version 8.6
.target sm_90a
.address_size 64
.visible .entry busy(.param .u32 turns) {
  .reg .pred %p<2>; .reg .b32 %r<2>;
  ld.param.u32 %r1, [turns];
AGAIN:
  sub.u32 %r1, %r1, 1;
  setp.ne.u32 %p1, %r1, 0;
  @%p1 bra AGAIN;
  ret;
}
"""


def keep_busy(rank, turns):
    from dskernels import _C

    module, one = emu.Module(BUSY), (1, 1, 1)
    kept.append(module)
    _C.emu.launch(rank, module._handle, "busy", one, one, one, 0, struct.pack("I", turns), 1,
                  False, 0, False)  # fmt: skip


TOO_LATE = 10**6  # turns, far more than the others' polls take
kept = []  # modules of queued kernels


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setitem(os.environ, "DSK_EMU_SEED", "1")
    yield
    kept.clear()


def make(ranks, **options):
    group = Faulty(
        "emu", ranks, num_experts=4 * ranks, max_tokens=T, hidden=H, topk=K, num_sms=2,
        **{"max_polls": 5000, **options},
    )  # fmt: skip
    return group, routing("even", ranks, 4 * ranks, K, T, H, 0)


def goes_on(group, case, alive=None):
    """Everybody but the victim, or `alive`, exchanges as if nothing had been."""
    if alive is None:
        alive = [r != VICTIM for r in range(group.num_ranks)]
    group.alive = alive
    group.absent = group.cut = group.late = None
    compare_normal(group, case, H, alive=alive)
    compare_low_latency(group, case, use_fp8=True, alive=alive)


# Each half of an exchange: (group, case) to the call; what a victim's kernel dies of if it may
# not be touched; what the call should give on every rank.


def dispatching(group, case):
    xs, idxs, weights = case
    want = ref.dispatch(xs, idxs, weights, num_experts=4 * group.num_ranks)
    return (
        lambda: [got.x.clone() for got in group.dispatch(*case)],
        case[0][VICTIM],
        [w.x for w in want],
    )


def results_of(group, case):
    want = ref.dispatch(*case, num_experts=4 * group.num_ranks)
    ys = [(w.x.float() * (r + 1.25)).bfloat16() for r, w in enumerate(want)]
    tokens = [len(idx) for idx in case[1]]
    return ys, ref.combine(ys, want, tokens, ranks_per_node=group.ranks_per_node)[0]


def combining(group, case):
    received = group.dispatch(*case)
    ys, back = results_of(group, case)
    biases = [torch.zeros(len(idx), H).bfloat16() for idx in case[1]]
    call = lambda: group.combine(ys, received, bias=biases)[0]  # noqa: E731
    return call, biases[VICTIM], back


def summing_for_others(group, case):
    received = group.dispatch(*case)
    ys, back = results_of(group, case)
    assert int(received[VICTIM].num_forwarded.sum())
    return lambda: group.combine(ys, received)[0], received[VICTIM].forwarded, back


def low_case(group, case):
    options = dict(max_tokens=T, num_experts=4 * group.num_ranks, use_fp8=False)
    want = ref.low_latency_dispatch(case[0], case[1], **options)
    return want, [(w.x.float() * (r + 1.25)).bfloat16() for r, w in enumerate(want)]


def packed(received):
    return [
        torch.cat([x[: int(n)] for x, n in zip(got.x, got.count)]) if len(got.count) else got.x
        for got in received
    ]


def sending(group, case):
    def call():
        received, hook = group.low_latency_dispatch(case[0], case[1], use_fp8=False)
        hook()
        return packed(received)

    return call, case[0][VICTIM], packed(low_case(group, case)[0])


def receiving(group, case):
    received, hook = group.low_latency_dispatch(case[0], case[1], use_fp8=False)

    def call():
        hook()
        return packed(received)

    return call, received[VICTIM].source, packed(low_case(group, case)[0])


def low_combining(group, case, cut):
    received, hook = group.low_latency_dispatch(case[0], case[1], use_fp8=False)
    hook()
    want, ys = low_case(group, case)

    def call():
        outs, hook = group.low_latency_combine(ys, case[1], case[2], received)
        hook()
        return outs

    return call, cut(ys), ref.low_latency_combine(ys, case[1], case[2], want, max_tokens=T)


def returning(group, case):
    return low_combining(group, case, lambda ys: ys[VICTIM])


def reducing(group, case):
    return low_combining(group, case, lambda ys: case[2][VICTIM])


SIZES = [2, 4, pytest.param(8, marks=pytest.mark.slow)]


def everywhere(*steps):
    """Each (step, ...) on 2, 4 and 8 ranks; the normal mode over nodes, too."""
    cases = []
    for step, *more in steps:
        for ranks, nodes in ((2, 0), (4, 0), (4, 2), (8, 0), (8, 4)):
            low = step in (sending, returning)
            if (nodes and low) or (ranks, nodes, low) == (4, 0, False):
                continue
            marks = [pytest.mark.slow] * (ranks == 8)
            label = f"{step.__name__}-{ranks}-{nodes}"
            cases.append(pytest.param(step, *more, ranks, nodes, marks=marks, id=label))
    return cases


@pytest.mark.parametrize(
    "step, phase, ranks, nodes",
    everywhere(
        (dispatching, "notice"),
        (combining, "results"),
        (sending, "low-latency rows"),
        (returning, "low-latency results"),
    ),
)
def test_a_rank_that_stays_away(step, phase, ranks, nodes):
    group, case = make(ranks, ranks_per_node=nodes)
    call, _, _ = step(group, case)
    group.absent = VICTIM
    with pytest.raises(dsk.ep.PeerSilent, match=f"rank {VICTIM} is silent") as caught:
        call()
    assert caught.value.report["phase"] == phase
    goes_on(group, case)


@pytest.mark.parametrize(
    "step, ranks, nodes", everywhere((dispatching,), (combining,), (sending,), (returning,))
)
def test_a_rank_that_comes_late(step, ranks, nodes):
    """In time: right results. Too late: an error that names it, and then all go on, it too."""
    group, case = make(ranks, ranks_per_node=nodes)
    call, _, want = step(group, case)
    group.late = (VICTIM, 3000)
    for got, right in zip(call(), want):
        same(got, right, "late, but in time")
    group.late = None
    call, _, _ = step(group, case)
    group.late = (VICTIM, TOO_LATE)
    with pytest.raises(dsk.ep.PeerSilent, match="is silent") as caught:
        call()
    assert caught.value.report["rank"] != VICTIM
    assert caught.value.report["silent"][0]["rank"] == VICTIM
    goes_on(group, case, [True] * ranks)


@pytest.mark.parametrize(
    "step, phases, ranks, nodes",
    everywhere(
        (dispatching, ("rows", "rows to forward")),
        (combining, ("reading done",)),
        (sending, ("low-latency rows",)),
        (returning, ("low-latency results",)),
    ),
)
def test_death_in_the_middle_of_a_kernel(step, phases, ranks, nodes):
    """The victim has told everybody that it takes part, and dies at its first row."""
    group, case = make(ranks, ranks_per_node=nodes)
    call, cut, _ = step(group, case)
    group.cut = cut.data_ptr()
    with pytest.raises(emu.HazardError, match="ep_"):  # the victim's end
        call()
    with pytest.raises(dsk.ep.PeerSilent, match=f"rank {VICTIM} is silent") as caught:
        group._check()  # what the others have left in their status
    assert caught.value.report["phase"] in phases
    assert caught.value.report["rank"] != VICTIM
    goes_on(group, case)


@pytest.mark.parametrize("ranks, nodes", [(4, 2), pytest.param(8, 4, marks=pytest.mark.slow)])
def test_death_while_summing_for_another_node(ranks, nodes):
    group, _ = make(ranks, ranks_per_node=nodes)
    case = routing("even", ranks, 4 * ranks, K, T, H, 1)
    call, cut, _ = summing_for_others(group, case)
    group.cut = cut.data_ptr()
    with pytest.raises(emu.HazardError, match="ep_combine"):
        call()
    with pytest.raises(dsk.ep.PeerSilent, match=f"rank {VICTIM} is silent") as caught:
        group._check()
    assert caught.value.report["phase"] in ("sums of a node", "reading done")
    goes_on(group, case)


@pytest.mark.parametrize("step", [receiving, reducing])
@pytest.mark.parametrize("ranks", SIZES)
def test_death_that_the_others_need_not_notice(step, ranks):
    """A rank that dies while it only reads what it got: nobody waits for it in this call."""
    group, case = make(ranks)
    call, cut, _ = step(group, case)
    group.cut = cut.data_ptr()
    with pytest.raises(emu.HazardError, match="ep_low"):
        call()
    group._check()  # nobody was missed
    goes_on(group, case)


# ---- a group that is dropped ----


def queued(group, case):
    """Combine, queued and not waited for: (its results, what they should be)."""
    received = group.dispatch(*case)
    ys, back = results_of(group, case)
    return group.combine(ys, received, wait=False)[0], back


def test_a_group_dropped_with_work_under_way_waits_for_it():
    group, case = make(2)
    outs, back = queued(group, case)
    with pytest.warns(ResourceWarning, match="with work under way; its kernels ended"):
        del group
    for out, want in zip(outs, back):
        same(out, want, "combined")


def test_a_group_dropped_while_a_rank_is_silent_says_so():
    group, case = make(2)
    received = group.dispatch(*case)
    ys, _ = results_of(group, case)
    group.absent = VICTIM
    group.combine(ys, received, wait=False)
    with pytest.warns(ResourceWarning, match=f"rank {VICTIM} is silent"):
        del group
    group, case = make(2)  # nothing is left that could disturb the next one
    compare_normal(group, case, H)


def test_a_closed_group():
    group, case = make(2)
    with group:
        outs, back = queued(group, case)
    for out, want in zip(outs, back):
        same(out, want, "combined")
    group.close()  # again: nothing to do
    with pytest.raises(RuntimeError, match="expected one that is in use, got one that was closed"):
        group.dispatch(*case)
    group, case = make(2)
    received = group.dispatch(*case)
    group.absent = VICTIM
    group.combine(results_of(group, case)[0], received, wait=False)
    with pytest.raises(dsk.ep.PeerSilent, match=f"rank {VICTIM} is silent"):
        group.close()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        del group
