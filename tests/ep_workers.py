"""Processes of the exchange's tests, and the routings they share.

Processes are forked from a server that has imported torch once. They meet at a TCPStore of the
test's process; nothing else connects them but the group under test.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import sys
import time
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

import dskernels as dsk
from dskernels.ref import ep as ref

HERE = str(Path(__file__).resolve().parent)


def run_ranks(function, ranks: int, *args, timeout: float = 150.0, expect_dead=()) -> list:
    """Run function(store, rank, ranks, *args) in `ranks` processes; results by rank, None for the
    ranks in expect_dead. A process that raises fails the test with its traceback."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ep_workers"])
    if HERE not in os.environ.get("PYTHONPATH", "").split(os.pathsep):
        os.environ["PYTHONPATH"] = os.pathsep.join([HERE, os.environ.get("PYTHONPATH", "")])
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    results = context.Queue()
    processes = [
        context.Process(target=_child, args=(function, r, ranks, store.port, results, args))
        for r in range(ranks)
    ]
    for process in processes:
        process.start()
    got: dict[int, object] = {}
    deadline = time.monotonic() + timeout
    try:
        while len(got) < ranks - len(expect_dead):
            try:
                rank, ok, value = results.get(timeout=0.5)
            except queue.Empty:
                assert time.monotonic() < deadline, f"only ranks {sorted(got)} of {ranks} answered"
                gone = {r for r, p in enumerate(processes) if p.exitcode not in (None, 0)}
                lost = gone - set(got) - set(expect_dead)
                assert not lost, f"ranks {lost} died"
                continue
            assert ok, f"rank {rank}:\n{value}"
            got[rank] = value
        return [got.get(r) for r in range(ranks)]
    finally:
        for process in processes:
            process.kill()
            process.join(10)


def _child(function, rank, ranks, port, results, args) -> None:
    torch.set_num_threads(1)
    try:
        store = dist.TCPStore("127.0.0.1", port, is_master=False)
        results.put((rank, True, function(store, rank, ranks, *args)))
    except BaseException:
        results.put((rank, False, traceback.format_exc()))
    results.close()
    results.join_thread()
    sys.stdout.flush()
    os._exit(0)  # no destructors: another rank may still read our memory through the test


def make_group(store, rank, ranks, prefix="group", **options) -> dsk.ep.Group:
    return dsk.ep.Group.from_store(dist.PrefixStore(prefix, store), rank, ranks, **options)


def routing(kind: str, ranks: int, experts: int, k: int, tokens: int, hidden: int, seed: int):
    """xs bf16, topk_idxs, topk_weights of every rank, distinct experts a row."""
    g = torch.Generator().manual_seed(seed)
    counts = [int(n) for n in torch.randint(0, tokens + 1, (ranks,), generator=g)]
    if kind == "empty":
        counts[::2] = [0] * len(counts[::2])
    if kind == "none":
        counts = [0] * ranks
    xs, idxs, weights = [], [], []
    for t in counts:
        xs.append(torch.randn(t, hidden, generator=g).bfloat16())
        scores = torch.rand(t, experts, generator=g)
        if kind == "skewed":
            scores += torch.arange(experts) < k + 1
        if kind == "one":  # all tokens to the experts of the last rank, as far as they suffice
            scores += 2 * (torch.arange(experts) >= experts - max(1, experts // ranks))
        idx = scores.topk(k, dim=1).indices
        if kind in ("holes", "skewed"):
            idx = torch.where(torch.rand(t, k, generator=g) < 0.3, -1, idx)
            idx[1:2] = -1
        idxs.append(idx)
        weights.append(torch.rand(t, k, generator=g))
    return xs, idxs, weights


KINDS = ("even", "skewed", "one", "empty", "none", "holes")


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.uint8).clone() if x.numel() else torch.empty(0)


def same(got: torch.Tensor, want: torch.Tensor, what: str) -> None:
    assert got.shape == want.shape and got.dtype == want.dtype, (what, got.shape, want.shape)
    assert torch.equal(bits(got), bits(want)), what


K, H, T = 3, 160, 9


def problem(kind, ranks, seed, experts_per_rank=4):
    return routing(kind, ranks, ranks * experts_per_rank, K, T, H, seed)


def compare_normal(group, case, *, fp8=False, dtype=torch.bfloat16, alive=None,
                   in_place=True):  # fmt: skip
    """One dispatch and one combine of this rank against the reference of all."""
    xs, idxs, weights = case
    me, experts = group.rank, group.num_experts
    xs = [dsk.quantize(x) if fp8 else x.to(dtype) for x in xs]
    want = ref.dispatch(xs, idxs, weights, num_experts=experts, expert_alignment=4, alive=alive)
    got = dsk.ep.dispatch(group, xs[me], idxs[me], weights[me], expert_alignment=4)
    if fp8:
        same(got.x.data, want[me].x.data, "data")
        same(got.x.scale, want[me].x.scale.contiguous(), "scale")
    else:
        same(got.x, want[me].x, "x")
    same(got.topk_idx, want[me].topk_idx, "topk_idx")
    same(got.topk_weights, want[me].topk_weights, "topk_weights")
    same(got.source, want[me].source, "source")
    assert got.tokens_per_expert == want[me].tokens_per_expert

    # Every rank scales what it received by its own number: exact in bf16.
    plain = [w.x.dequantize(torch.bfloat16) if fp8 else w.x for w in want]
    ys = [(p.float() * (r + 1)).to(dtype) for r, p in enumerate(plain)]
    biases = [torch.full((len(i), H), 0.5, dtype=dtype) for i in idxs]
    tokens = [len(i) for i in idxs]
    back, back_weights = ref.combine(
        ys, want, tokens, topk_weights=[w.topk_weights for w in want], bias=biases,
        ranks_per_node=group.ranks_per_node,
    )  # fmt: skip
    out, out_weights = dsk.ep.combine(
        group, ys[me], got, topk_weights=got.topk_weights, bias=biases[me]
    )
    same(out, back[me], "combined")
    same(out_weights, back_weights[me], "combined weights")
    if not in_place:
        return
    # In place: results written into the window.
    y = group.result_buffer(len(ys[me]), H, dtype)
    y.copy_(ys[me])
    out, none = dsk.ep.combine(group, y, got)
    assert none is None
    back, _ = ref.combine(ys, want, tokens, ranks_per_node=group.ranks_per_node)
    same(out, back[me], "combined in place")


def compare_low_latency(group, case, *, use_fp8, round_scale=False, alive=None):
    xs, idxs, weights = case
    me = group.rank
    options = dict(use_fp8=use_fp8, round_scale=round_scale)
    want = ref.low_latency_dispatch(
        xs, idxs, max_tokens=T, num_experts=group.num_experts, alive=alive, **options
    )
    got, hook = dsk.ep.low_latency_dispatch(
        group, xs[me], idxs[me], return_recv_hook=True, **options
    )
    hook()
    same(got.count, want[me].count, "count")
    same(got.source, want[me].source, "source")
    same(got.layout_range, want[me].layout_range, "layout_range")
    for expert, n in enumerate(got.count.tolist()):
        if use_fp8:
            same(got.x.data[expert, :n], want[me].x.data[expert, :n], "data")
            same(got.x.scale[expert, :n], want[me].x.scale[expert, :n], "scale")
        else:
            same(got.x[expert, :n], want[me].x[expert, :n], "x")
    ys = [(w.x.dequantize() if use_fp8 else w.x.float()).bfloat16() * 2 for w in want]
    y = ys[me].clone()
    for expert, n in enumerate(got.count.tolist()):
        y[expert, n:] = torch.nan
    back = ref.low_latency_combine(ys, idxs, weights, want, max_tokens=T)
    out, hook = dsk.ep.low_latency_combine(group, y, weights[me], got, return_recv_hook=True)
    hook()
    same(out, back[me], "combined")
