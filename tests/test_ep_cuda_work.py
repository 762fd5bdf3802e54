"""What the expert-parallel kernels execute, counted by the emulator: one access for each piece of a
row, and no turn in which nothing is there."""

import pytest
import torch
from executed_work import instructions_of, times

import dskernels as dsk

emu = pytest.importorskip("dskernels.emu")
if not emu.available():
    pytest.skip(emu.available().reason, allow_module_level=True)
from dskernels.cuda.ep import PeerGroup  # noqa: E402

TOPK = 3


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setenv("DSK_EMU_SEED", "0")  # others part lanes of a warp


def make(tokens, experts, hidden, **options):
    return PeerGroup(
        "emu", 1, num_experts=experts, max_tokens=tokens, hidden=hidden, topk=TOPK, num_sms=1,
        **options,
    )  # fmt: skip


def tokens_of(tokens, hidden):
    x = torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(0)).bfloat16()
    return x, torch.arange(TOPK).expand(tokens, TOPK).contiguous(), torch.ones(tokens, TOPK)


def exchange(tokens, experts, hidden, **options):
    """Work of the four launches of the low-latency mode, on one rank."""
    group, (x, idx, weights) = make(tokens, experts, hidden), tokens_of(tokens, hidden)

    def call():
        got, hook = group.low_latency_dispatch([x], [idx], **options)
        hook()
        y = torch.zeros(experts, tokens, hidden).bfloat16()
        group.low_latency_combine([y], [idx], [weights], got)[1]()

    return instructions_of(call)


def test_a_token_is_sent_by_whole_runs():
    experts, hidden = 5, 256
    work = exchange(1, experts, hidden, use_fp8=True)["ep_low_send"]
    assert times(work, "redux.sync.add") == TOPK + experts  # places of a token, counts of experts
    # Where a choice goes, three words, is asked for with the row and once more for its source.
    assert times(work, "shfl.sync.idx") == 2 * TOPK * 3
    assert times(work, "ld.global.nc.v2") == hidden // 128
    opcodes = [text.split()[0] for text, _ in work]
    assert not [name for name in opcodes if name.startswith("ld") and name.endswith("16")]


@pytest.mark.parametrize("hidden", [256, 512, 2320])
def test_a_row_is_copied_once(hidden):
    """A warp moves 512 bytes by a load and a store, and the rest of a row by one more of each."""
    work = exchange(1, TOPK, hidden, use_fp8=False)
    pieces = -(-2 * hidden // 512)
    for kernel in ("ep_low_send", "ep_low_receive", "ep_low_return"):
        for access in ("ld.global.v4", "st.global.v4"):
            assert times(work[kernel], access) == TOPK * pieces, (kernel, access)


def test_results_of_as_many_runs_as_a_warp_has_lanes():
    """32 experts' rows are found by one sum over a warp: five steps for each of 32 warps."""
    work = exchange(1, 32, 16, use_fp8=False)["ep_low_return"]
    assert times(work, "shfl.sync.up") == 5 * 32


def test_as_many_tokens_as_a_warp_has_lanes_are_one_vote():
    group, (x, idx, weights) = make(32, TOPK, 16), tokens_of(32, 16)
    work = instructions_of(lambda: group.dispatch([x], [idx], [weights]))["ep_dispatch"]
    assert times(work, "vote.sync") == 1


def test_a_wait_that_may_not_look_gives_up():
    """Not even its own signal is seen."""
    group, (x, idx, weights) = make(1, TOPK, 16, max_polls=0), tokens_of(1, 16)
    with pytest.raises(dsk.ep.PeerSilent, match="rank 0 is silent"):
        group.dispatch([x], [idx], [weights])
