"""Dispatch and combine between processes over shared memory: exactly the reference."""

import pytest
import torch
from ep_workers import (
    KINDS,
    H,
    K,
    T,
    compare_low_latency,
    compare_normal,
    make_group,
    problem,
    routing,
    run_ranks,
    same,
)

import dskernels as dsk

pytestmark = pytest.mark.timeout(180)


def worker_all_cases(store, rank, ranks, per_node):
    group = make_group(
        store, rank, ranks, num_experts=4 * ranks, max_tokens=T, hidden=H, topk=K,
        dtype=torch.float32, ranks_per_node=per_node, timeout=30.0,
    )  # fmt: skip
    for seed, kind in enumerate(KINDS):
        case = problem(kind, ranks, seed)
        compare_normal(group, case)
        compare_normal(group, case, fp8=True)
        compare_normal(group, case, dtype=torch.float32)
        compare_normal(group, case, dtype=torch.float16)
        for options in ({"use_fp8": False}, {"use_fp8": True},
                        {"use_fp8": True, "round_scale": True}):  # fmt: skip
            compare_low_latency(group, case, **options)
    return True


@pytest.mark.parametrize("ranks, per_node", [(2, 0), (4, 2), (8, 4)])
def test_equal_to_the_reference(ranks, per_node):
    assert all(run_ranks(worker_all_cases, ranks, per_node))


def worker_many_routings(store, rank, ranks, seeds):
    group = make_group(
        store, rank, ranks, num_experts=4 * ranks, max_tokens=T, hidden=H, topk=K, timeout=60.0
    )
    for seed in range(seeds):
        case = problem(KINDS[seed % len(KINDS)], ranks, 100 + seed)
        compare_normal(group, case, fp8=seed % 2 == 1)
        compare_low_latency(group, case, use_fp8=seed % 2 == 0)
    return True


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_fifty_random_routings(ranks):
    assert all(run_ranks(worker_many_routings, ranks, 50, timeout=150))


def worker_uneven(store, rank, ranks, counts):
    """Experts in unequal shares: the reference has none, so rows are derived here."""
    group = make_group(
        store, rank, ranks, num_experts=counts, max_tokens=T, hidden=H, topk=K, timeout=30.0
    )
    xs, idxs, weights = routing("holes", ranks, sum(counts), K, T, H, 5)
    begin = [sum(counts[:r]) for r in range(ranks + 1)]
    got = dsk.ep.dispatch(group, xs[rank], idxs[rank], weights[rank])
    mine = range(begin[rank], begin[rank + 1])
    rows = [(s, t) for s in range(ranks) for t, row in enumerate(idxs[s].tolist())
            if any(e in mine for e in row)]  # fmt: skip
    assert got.source.tolist() == [list(row) for row in rows]
    for n, (s, t) in enumerate(rows):
        same(got.x[n], xs[s][t], "x")
        local = [e - begin[rank] if e in mine else -1 for e in idxs[s][t].tolist()]
        assert got.topk_idx[n].tolist() == local
    out, _ = dsk.ep.combine(group, got.x, got)
    for t, row in enumerate(idxs[rank].tolist()):
        hosts = {r for r in range(ranks) for e in row if begin[r] <= e < begin[r + 1]}
        total = torch.zeros(H)
        for _ in hosts:
            total = total + xs[rank][t].float()
        same(out[t], total.bfloat16(), "combined")
    return True


def test_unequal_and_missing_experts():
    assert all(run_ranks(worker_uneven, 4, [3, 0, 7, 1]))


def worker_errors(store, rank, ranks):
    options = dict(num_experts=4, max_tokens=4, hidden=32, topk=2, timeout=20.0, buffers=2)
    group = make_group(store, rank, ranks, **options)
    x, idx = torch.ones(3, 32).bfloat16(), torch.tensor([[0, 3], [1, -1], [2, 0]])
    cases = [
        (lambda: dsk.ep.dispatch(group, torch.ones(5, 32), idx), "topk_idx: expected shape"),
        (lambda: dsk.ep.dispatch(group, torch.ones(5, 32).bfloat16(), torch.zeros(5, 2).long()),
         "x: expected at most 4 tokens"),
        (lambda: dsk.ep.dispatch(group, torch.ones(3, 64).bfloat16(), idx),
         "x: expected rows of at most 64 bytes"),
        (lambda: dsk.ep.dispatch(group, x, idx + 1), r"topk_idx: .* \[-1, 4\), got 4"),
        (lambda: dsk.ep.dispatch(group, x, idx.int()), "topk_idx: expected int64, got int32"),
        (lambda: dsk.ep.dispatch(group, x.double(), idx), "x: expected float32 or bfloat16"),
        (lambda: dsk.ep.dispatch(group, x, idx, timeout=0), "timeout: expected a positive"),
        (lambda: dsk.ep.low_latency_dispatch(group, x, torch.zeros(3, 2).long()),
         r"topk_idx\[0\]: expected distinct experts"),
        (lambda: dsk.ep.dispatch(group, x, idx, expert_alignment=0), "expert_alignment: expected"),
        (lambda: group.result_buffer(99, 32, torch.bfloat16), "rows, hidden, dtype: expected at"),
    ]  # fmt: skip
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
    # Two results alive: no buffer is left for a third, and nothing is overwritten.
    first = dsk.ep.dispatch(group, x, idx)
    second = dsk.ep.dispatch(group, x + 1, idx)
    with pytest.raises(ValueError, match="buffers: expected a free receive buffer, got all 2"):
        dsk.ep.dispatch(group, x, idx)
    kept = first.x.clone()
    keep, first = first.x, None
    with pytest.raises(ValueError, match="buffers"):
        dsk.ep.dispatch(group, x, idx)
    assert torch.equal(keep, kept)
    del keep, second
    third = dsk.ep.dispatch(group, x, idx)
    with pytest.raises(ValueError, match="y: expected shape"):
        dsk.ep.combine(group, third.x[:-1], third)
    # Hooks in order, and not too many calls under way.
    for call in (1, 2):
        got, hook = dsk.ep.low_latency_dispatch(group, x, idx, use_fp8=False, return_recv_hook=True)
        if call == 1:
            with pytest.raises(ValueError, match="expected the hook of call 1 to have run"):
                dsk.ep.low_latency_dispatch(group, x, idx, use_fp8=False)
            with pytest.raises(ValueError, match="expected one whose receive hook has run"):
                dsk.ep.low_latency_combine(group, got.x, torch.ones(3, 2), got)
        hook()
        with pytest.raises(ValueError, match="hook: expected call"):
            hook()
        out = dsk.ep.low_latency_combine(group, got.x, torch.ones(3, 2), got)
        assert torch.equal(out, x * (idx >= 0).sum(1, keepdim=True))
    return True


def test_errors_name_the_argument_and_leave_the_group_usable():
    assert all(run_ranks(worker_errors, 2))


def worker_shapes_differ(store, rank, ranks):
    group = make_group(
        store, rank, ranks, num_experts=4, max_tokens=4, hidden=32, topk=2, timeout=20.0
    )
    x = torch.ones(2, 16 if rank else 32).bfloat16()
    with pytest.raises((ValueError, dsk.ep.PeerSilent)) as caught:
        dsk.ep.dispatch(group, x, torch.zeros(2, 2).long())
    return str(caught.value)


def test_calls_that_differ_between_ranks_are_refused():
    assert any(
        "expected the same call on every rank" in e for e in run_ranks(worker_shapes_differ, 2)
    )
