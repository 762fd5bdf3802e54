"""Ranks that die, stop, stay away, leave and join: errors in time, and life goes on."""

import os
import random
import signal
import threading
import time

import pytest
import torch
import torch.distributed as dist
from ep_workers import (
    H,
    K,
    T,
    compare_low_latency,
    compare_normal,
    make_group,
    problem,
    run_ranks,
    same,
)

import dskernels as dsk
from dskernels.ref import ep as ref

pytestmark = pytest.mark.timeout(180)
TIMEOUT = 1.0  # of calls that shall run into it
PATIENCE = 60.0  # of all others: no rank is late on a busy machine


def options(ranks):
    return dict(num_experts=4 * ranks, max_tokens=T, hidden=H, topk=K, timeout=PATIENCE)


def until_stopped(group, rank):
    while group.peer_state(rank) == "alive":
        time.sleep(0.005)


def worker_victim(store, rank, ranks, victim, how, when):
    """The victim goes before its dispatch, or between dispatch and combine. Its death is noticed
    long before any timeout; a stopped rank is only silent."""
    stops = how == signal.SIGSTOP and rank != victim
    timeout = TIMEOUT if stops else PATIENCE
    group = make_group(store, rank, ranks, **options(ranks))
    xs, idxs, weights = case = problem("even", ranks, 7)
    compare_normal(group, case)
    if rank == victim:
        store.set("victim", str(os.getpid()))
    error = got = None
    began = time.monotonic()
    try:
        if rank == victim and when == "dispatch":
            os.kill(os.getpid(), how)
        elif stops and when == "dispatch":
            until_stopped(group, victim)
        got = dsk.ep.dispatch(
            group, xs[rank], idxs[rank], weights[rank],
            timeout=timeout if when == "dispatch" else PATIENCE,
        )  # fmt: skip
        if rank == victim:
            os.kill(os.getpid(), how)
        elif stops:
            until_stopped(group, victim)
        dsk.ep.combine(group, got.x, got, timeout=timeout)
    except dsk.ep.PeerSilent as caught:
        error = caught
    waited = time.monotonic() - began
    if rank == victim:  # stopped, then woken: the others have gone on without it
        assert error is not None and "aborted" in error.report["reason"]
        with pytest.raises(ValueError, match="has given up on this rank"):
            group.recover()
        return "given up"
    assert error is not None, "no error although a rank is gone"
    assert waited < PATIENCE, waited
    with pytest.raises(ValueError, match=r"call recover\(\) on every surviving rank first"):
        dsk.ep.dispatch(group, xs[rank], idxs[rank])
    alive = group.recover()
    assert alive == group.alive == [r != victim for r in range(ranks)]
    if got is not None:  # results of before stay readable, but cannot be brought back
        with pytest.raises(ValueError, match="dispatch again"):
            dsk.ep.combine(group, got.x, got)
    for seed in (8, 9):
        compare_normal(group, problem("even", ranks, seed), alive=alive)
        compare_low_latency(group, problem("holes", ranks, seed), use_fp8=True, alive=alive)
    if how == signal.SIGSTOP and rank == (victim + 1) % ranks:
        os.kill(int(store.get("victim")), signal.SIGCONT)
    return waited, error.report


@pytest.mark.parametrize("when", ["dispatch", "combine"])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_goes_is_named_and_masked(how, when):
    victim, ranks = 2, 4
    dead = [victim] if how == signal.SIGKILL else []
    results = run_ranks(worker_victim, ranks, victim, how, when, expect_dead=dead)
    survivors = [r for i, r in enumerate(results) if i != victim]
    named = [p for _, report in survivors for p in report["silent"] if p["rank"] == victim]
    # Whoever gave up first names the victim and its state; the others may have been aborted.
    assert named and {p["state"] for p in named} == {"dead" if dead else "stopped"}
    reasons = [report["reason"] for _, report in survivors]
    assert f"rank {victim} died" in reasons if dead else "timeout" in reasons, reasons
    assert all(f"rank {victim} died" == r or r == "timeout" or "aborted" in r for r in reasons)
    if not dead:
        assert results[victim] == "given up"
        assert max(waited for waited, _ in survivors) >= TIMEOUT


def worker_mid_flight(store, rank, ranks, victim, how, seed):
    """Rank 0 shoots at a random moment while all are exchanging large batches.

    A death is noticed by itself; a stopped rank by a timeout, which a busy machine may reach
    without a shot: then all recover, the victim too, and go on.
    """
    timeout = TIMEOUT if how == signal.SIGSTOP else PATIENCE
    group = dsk.ep.Group.from_store(
        dist.PrefixStore("group", store), rank, ranks, num_experts=ranks, max_tokens=256,
        hidden=4096, topk=ranks // 2, timeout=PATIENCE,
    )  # fmt: skip
    store.set(f"pid{rank}", str(os.getpid()))
    x = torch.full((256, 4096), float(rank + 1)).bfloat16()
    idx = torch.stack([torch.randperm(ranks)[: ranks // 2] for _ in range(256)])
    if rank == 0:
        pid = int(store.get(f"pid{victim}"))
        delay = random.Random(seed).uniform(0.02, 0.2)
        threading.Timer(delay, os.kill, (pid, how)).start()
    steps, alive = 0, [True] * ranks
    while all(alive):
        try:
            got = dsk.ep.dispatch(group, x, idx, timeout=timeout)
            assert torch.equal(got.x[:, 0].long(), got.source[:, 0] + 1)
            assert torch.equal(got.x[:, -1].long(), got.source[:, 0] + 1)
            out, _ = dsk.ep.combine(group, got.x, got, timeout=timeout)
            assert torch.equal(out, x * (ranks // 2))
            del got
            steps += 1
        except dsk.ep.PeerSilent as caught:
            error = caught
            try:
                alive = group.recover()
            except ValueError as given_up:  # the victim: stopped and woken
                assert rank == victim and "has given up on this rank" in str(given_up)
                return None
    assert alive == [r != victim for r in range(ranks)]
    reached = torch.stack([(idx == r).any(1) & (r != victim) for r in range(ranks)]).sum(0)
    if how == signal.SIGSTOP and rank == 1:  # its stores now go nowhere
        os.kill(int(store.get(f"pid{victim}")), signal.SIGCONT)
    for _ in range(5):
        got = dsk.ep.dispatch(group, x, idx)
        out, _ = dsk.ep.combine(group, got.x, got)
        assert torch.equal(out, x * reached[:, None])
        del got
    return steps, victim in error.ranks or "aborted" in error.report["reason"]


@pytest.mark.parametrize(
    "how, seed",
    [(signal.SIGKILL, 0), (signal.SIGSTOP, 1)]
    + [pytest.param(how, s, marks=pytest.mark.slow)
       for how in (signal.SIGKILL, signal.SIGSTOP) for s in range(2, 12)],
)  # fmt: skip
def test_shot_in_mid_flight(how, seed):
    dead = [3] if how == signal.SIGKILL else []
    results = run_ranks(worker_mid_flight, 4, 3, how, seed, expect_dead=dead)
    assert all(named for _, named in results[:3])


def worker_absent(store, rank, ranks):
    """A rank that lives but does not come: a timeout, with what it does instead."""
    group = make_group(store, rank, ranks, **options(ranks))
    xs, idxs, _ = problem("even", ranks, 3)
    if rank == 1:
        store.wait(["gave up 0", "gave up 2"])
        with pytest.raises(dsk.ep.PeerSilent):  # it was aborted before it came
            dsk.ep.dispatch(group, xs[rank], idxs[rank])
    else:
        began = time.monotonic()
        with pytest.raises(dsk.ep.PeerSilent) as caught:
            dsk.ep.dispatch(group, xs[rank], idxs[rank], timeout=TIMEOUT)
        took = time.monotonic() - began
        store.set(f"gave up {rank}", "")
        error = caught.value
        if error.report["reason"] == "timeout":
            assert 1 in error.ranks and error.dead == []
            assert error.report["phase"] == "notice" and took >= TIMEOUT
            assert 0 < error.report["waited_seconds"] < took  # of the call, what was this wait
            assert "rank 1 is silent: alive, at 0" in str(error)
    assert group.recover() == [True] * ranks  # all are there: nobody is masked
    compare_normal(group, problem("even", ranks, 4))
    alive = group.recover(exclude=[2]) if rank != 2 else None
    if rank == 2:
        with pytest.raises(ValueError, match="has given up on this rank"):
            group.recover()
        return True
    compare_normal(group, problem("even", ranks, 5), alive=alive)
    return True


def test_late_ranks_and_exclusion():
    assert all(run_ranks(worker_absent, 3))


def worker_still_in_the_call(store, rank, ranks):
    """Rank 2 goes on to recover without rank 1 while rank 0 is still in a call, waiting for 1."""
    group = make_group(store, rank, ranks, **options(ranks))
    xs, idxs, _ = problem("even", ranks, 3)
    if rank == 1:
        store.wait(["rank 2 has left"])
    got, hook = dsk.ep.low_latency_dispatch(group, xs[rank], idxs[rank], return_recv_hook=True)
    if rank == 2:
        group._transport.leave()  # what recover() begins with
        store.set("rank 2 has left", "")
    else:
        hook()  # complete, whatever rank 2 does meanwhile
        want = ref.low_latency_dispatch(xs, idxs, max_tokens=T, num_experts=4 * ranks)
        same(got.count, want[rank].count, "count")
    if rank == 1:  # does not know, and is not waited for any more
        with pytest.raises(dsk.ep.PeerSilent, match="left the call to recover"):
            dsk.ep.dispatch(group, xs[rank], idxs[rank])
        with pytest.raises(ValueError, match="has given up on this rank"):
            group.recover()
        return True
    alive = group.recover(exclude=[1])
    assert alive == [True, False, True]
    compare_normal(group, problem("even", ranks, 5), alive=alive)
    return True


def test_recovery_lets_calls_in_progress_finish():
    assert all(run_ranks(worker_still_in_the_call, 3))


def worker_membership(store, rank, ranks):
    """2 ranks, then 4, then 3 with other numbers."""
    from dskernels.ep.group import store_gather

    def gather(step, me, count):
        return store_gather(dist.PrefixStore(f"step{step}", store), me, count, PATIENCE)

    group = None
    if rank < 2:
        group = make_group(store, rank, 2, **options(2))
        compare_normal(group, problem("even", 2, 1))
        group.reform(rank, 4, gather(1, rank, 4), num_experts=16)
    else:
        group = dsk.ep.Group(rank, 4, gather(1, rank, 4), **options(4))
    compare_normal(group, problem("even", 4, 2))
    if rank == 1:
        return True  # leaves
    number = [0, None, 1, 2][rank]
    group.reform(number, 3, gather(2, number, 3), num_experts=12)
    compare_normal(group, problem("skewed", 3, 3))
    compare_low_latency(group, problem("skewed", 3, 3), use_fp8=True)
    return True


def test_ranks_join_and_leave_between_steps():
    assert all(run_ranks(worker_membership, 4))


def worker_options_differ(store, rank, ranks):
    with pytest.raises(ValueError, match="expected the same options on every rank"):
        make_group(store, rank, ranks, **{**options(ranks), "max_tokens": T + rank})
    return True


def test_groups_that_differ_are_refused():
    assert all(run_ranks(worker_options_differ, 2))


def test_doctor_says_what_works():
    report = dsk.ep.doctor(num_ranks=2, num_experts=8, max_tokens=16, hidden=128, topk=2)
    assert report.transports["shm"] and report.transports["shm"].reason
    assert not report.transports["rdma"] and "not written yet" in report.transports["rdma"].reason
    assert set(report.checks) == {"memfd", "proc_fd", "pidfd", "memory", "ranks"}
    assert "transports" in str(report) and report.window_bytes > 0
    big = dsk.ep.doctor(max_tokens=10**9)
    assert not big.transports["shm"] and "GiB needed" in big.transports["shm"].reason
    assert not dsk.ep.doctor(num_ranks=128).checks["ranks"]
