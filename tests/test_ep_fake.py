"""The same exchange over a network that delays, reorders, repeats and loses, ranks as threads."""

import threading

import pytest
import torch
from ep_workers import KINDS, H, K, T, compare_low_latency, compare_normal, problem

import dskernels as dsk
from dskernels import _C
from dskernels.ep.group import Group

pytestmark = pytest.mark.timeout(120)


class FakeGroup(Group):
    """A Group on an endpoint of a fake network."""

    def __init__(self, network, rank, ranks, shape, timeout):
        self.rank, self.num_ranks, self.timeout = rank, ranks, timeout
        self.ranks_per_node = 0
        self.max_tokens, self.hidden, self.topk = T, H, K
        self.dtype, self.buffers = torch.float32, shape[-1]
        self.experts_of_rank = [4] * ranks
        self._transport = network.endpoint(rank)
        self._exchange = _C.comm.Exchange(self._transport, *shape, False)


def run_threads(ranks, body, *, timeout=60.0, **faults):
    """body(group) on every rank of a fake network; what each returned or raised. timeout: of all
    ranks, or a number for every rank."""
    timeouts = [timeout] * ranks if isinstance(timeout, float) else timeout
    shape = (T, H * 4, -(-H // 128) * 4, K, [4 * r for r in range(ranks + 1)], 3)
    network = _C.comm.FakeNetwork(ranks, _C.comm.window_bytes(*shape), **faults)
    results = [None] * ranks

    def run(rank):
        try:
            results[rank] = body(FakeGroup(network, rank, ranks, shape, timeouts[rank]))
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(r,), daemon=True) for r in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(100)
        assert not thread.is_alive(), "a rank hangs"
    return results


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("seed", [0, 1, pytest.param(range(2, 40), marks=pytest.mark.slow)])
def test_equal_to_the_reference_over_a_shuffling_network(ranks, seed):
    for s in [seed] if isinstance(seed, int) else seed:

        def body(group, s=s):
            for i, kind in enumerate(KINDS):
                case = problem(kind, ranks, 10 * s + i)
                compare_normal(group, case, in_place=False)
                compare_low_latency(group, case, use_fp8=False)
            return True

        results = run_threads(ranks, body, seed=s, repeat=0.2)
        assert results == [True] * ranks, results


def test_a_missing_fence_is_noticed():
    """The planted fault: notifications overtake the data. Some run must go wrong."""

    def body(group):
        for i in range(4):
            compare_normal(group, problem("even", 3, i), in_place=False)
        return True

    outcomes = [run_threads(3, body, seed=s, forget_fences=True, timeout=2.0) for s in range(6)]
    assert any(results != [True] * 3 for results in outcomes)


def exchange(group):
    xs, idxs, weights = problem("even", group.num_ranks, 0)
    got = dsk.ep.dispatch(group, xs[group.rank], idxs[group.rank], weights[group.rank])
    return dsk.ep.combine(group, got.x, got)


def test_lost_messages_end_in_a_report():
    # Rank 0 gives up first, and the others with it.
    results = run_threads(
        3, exchange, seed=1, lost_source=2, lost_target=0, timeout=[0.5, 60.0, 60.0]
    )
    assert all(isinstance(r, dsk.ep.PeerSilent) for r in results)
    assert results[0].report["reason"] == "timeout" and 2 in results[0].ranks
    assert {r.report["reason"] for r in results[1:]} == {"aborted by rank 0"}


@pytest.mark.parametrize("after", [0, 5, 17, 40])
def test_death_at_any_put_ends_in_a_report(after):
    results = run_threads(3, exchange, seed=after, dying_rank=1, dying_after=after)
    if isinstance(results[1], _C.comm.FakeDeath):
        for rank in (0, 2):
            assert isinstance(results[rank], dsk.ep.PeerSilent), results[rank]
        reasons = [results[r].report["reason"] for r in (0, 2)]
        assert "rank 1 died" in reasons
