"""deep_ep's names and the model, expert-parallel over processes."""

import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from ep_workers import H, T, make_group, problem, run_ranks, same

import dskernels as dsk
from dskernels.ref import ep as ref

pytestmark = pytest.mark.timeout(180)


def init(store, rank, ranks):
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo", store=dist.PrefixStore("gloo", store), rank=rank, world_size=ranks
    )


def worker_elastic(store, rank, ranks):
    from dskernels.compat.deep_ep import ElasticBuffer

    init(store, rank, ranks)
    experts = 4 * ranks
    buffer = ElasticBuffer(
        dist.group.WORLD, num_max_tokens_per_rank=T, hidden=H, num_topk=3, num_cpu_timeout_secs=60
    )
    for seed, fp8 in ((0, False), (1, True)):
        xs, idxs, weights = problem("holes", ranks, seed)
        sent = [dsk.quantize(x) if fp8 else x for x in xs]
        want = ref.dispatch(sent, idxs, weights, num_experts=experts, expert_alignment=4)
        x = (sent[rank].data, sent[rank].scale) if fp8 else sent[rank]
        stats = torch.zeros(4, dtype=torch.int32)
        recv, recv_idx, recv_weights, handle, event = buffer.dispatch(
            x, idxs[rank], weights[rank], stats, num_experts=experts, expert_alignment=4,
            use_tma_aligned_col_major_sf=True,
        )  # fmt: skip
        event.current_stream_wait()
        mine = want[rank]
        same(recv[0] if fp8 else recv, mine.x.data if fp8 else mine.x, "recv_x")
        if fp8:
            same(recv[1].contiguous(), mine.x.scale.contiguous(), "scales")
            assert recv[1].stride(0) == 1 and recv[1].stride(1) % 4 == 0
        same(recv_idx, mine.topk_idx, "recv_topk_idx")
        same(recv_weights, mine.topk_weights, "recv_topk_weights")
        assert handle.num_recv_tokens_per_expert_list == mine.tokens_per_expert
        assert int(handle.psum_num_recv_tokens_per_scaleup_rank[-1]) == len(mine.source)
        assert stats.sum() == (mine.topk_idx >= 0).sum()
        ys = [(w.x.dequantize(torch.bfloat16) if fp8 else w.x) * (r + 1)
              for r, w in enumerate(want)]  # fmt: skip
        pairs = [(torch.full((len(i), H), 0.3).bfloat16(), torch.full((len(i), H), -7.0).bfloat16())
                 for i in idxs]  # fmt: skip
        back, back_weights = ref.combine(
            ys, want, [len(i) for i in idxs], topk_weights=[w.topk_weights for w in want],
            bias=pairs,
        )  # fmt: skip
        out, out_weights, _ = buffer.combine(ys[rank], handle, recv_weights, bias=pairs[rank])
        same(out, back[rank], "combined")
        same(out_weights, back_weights[rank], "weights")
        again, again_idx, none, same_handle, _ = buffer.dispatch(
            x, handle=handle, do_cpu_sync=False
        )
        rows = len(mine.source)
        assert same_handle is handle and none is None and len(again_idx) == ranks * T
        same((again[0] if fp8 else again)[:rows], recv[0] if fp8 else recv, "by handle")
        assert (again_idx[rows:] == -1).all()
    for call, message in (
        (lambda: buffer.dispatch(x, idxs[rank], do_expand=True), "do_expand"),
        (lambda: buffer.engram_fetch, "Engram"),
        (lambda: buffer.pp_send, "pipeline sends"),
        (lambda: ElasticBuffer(dist.group.WORLD, num_cpu_bytes=1), "num_cpu_bytes"),
    ):
        with pytest.raises(NotImplementedError, match=message):
            call()
    with pytest.raises(ValueError, match="topk_idx, handle: expected one of them"):
        buffer.dispatch(x)
    with pytest.raises(ValueError, match="num_experts, num_max_tokens_per_rank: expected both"):
        buffer.dispatch(x, idxs[rank])
    assert not hasattr(buffer, "no_such_thing")
    buffer.destroy()
    dist.destroy_process_group()
    return True


def test_elastic_buffer():
    assert all(run_ranks(worker_elastic, 2))


def worker_deep_ep(store, rank, ranks):
    from dskernels.compat.deep_ep import Buffer, Config

    init(store, rank, ranks)
    buffer = Buffer(dist.group.WORLD, num_nvl_bytes=1 << 20, low_latency_mode=True)
    experts = 4 * ranks
    for seed, fp8 in ((0, False), (1, True)):
        xs, idxs, weights = problem("even", ranks, seed)
        sent = [dsk.quantize(x) if fp8 else x for x in xs]
        want = ref.dispatch(sent, idxs, weights, num_experts=experts, expert_alignment=4)
        per_rank, per_node, per_expert, in_rank, _ = buffer.get_dispatch_layout(idxs[rank], experts)
        assert per_node is None
        x = (sent[rank].data, sent[rank].scale) if fp8 else sent[rank]
        recv, recv_idx, recv_weights, counts, handle, event = buffer.dispatch(
            x, num_tokens_per_rank=per_rank, is_token_in_rank=in_rank, expert_alignment=4,
            num_tokens_per_expert=per_expert, topk_idx=idxs[rank], topk_weights=weights[rank],
            config=Config(20),
        )  # fmt: skip
        event.current_stream_wait()
        same(recv[0] if fp8 else recv, want[rank].x.data if fp8 else want[rank].x, "recv_x")
        same(recv_idx, want[rank].topk_idx, "recv_topk_idx")
        assert counts == want[rank].tokens_per_expert
        ys = [(w.x.dequantize(torch.bfloat16) if fp8 else w.x) * (r + 1)
              for r, w in enumerate(want)]  # fmt: skip
        out, out_weights, _ = buffer.combine(ys[rank], handle, topk_weights=recv_weights)
        tokens = [len(i) for i in idxs]
        back, back_weights = ref.combine(
            ys, want, tokens, topk_weights=[w.topk_weights for w in want]
        )
        same(out, back[rank], "combined")
        same(out_weights, back_weights[rank], "weights")
        again, none, *_ = buffer.dispatch(x, handle=handle)
        assert none is None
        same(again[0] if fp8 else again, recv[0] if fp8 else recv, "by handle")
        worst = len(want[rank].source) + 3
        padded, padded_idx, _, none, *_ = buffer.dispatch(
            x, num_tokens_per_expert=per_expert, topk_idx=idxs[rank], num_worst_tokens=worst
        )
        assert len(padded_idx) == worst and (padded_idx[-3:] == -1).all() and none == []

    xs, idxs, weights = problem("holes", ranks, 2)
    low = ref.low_latency_dispatch(xs, idxs, max_tokens=T, num_experts=experts)
    stats = torch.zeros(4, dtype=torch.int32)
    (data, scale), count, handle, _, hook = buffer.low_latency_dispatch(
        xs[rank], idxs[rank], T, experts, cumulative_local_expert_recv_stats=stats,
        return_recv_hook=True,
    )  # fmt: skip
    hook()
    same(count, low[rank].count, "count")
    same(stats, low[rank].count, "stats")
    assert data.shape == (4, ranks * T, H) and scale.stride()[1] == 1
    ys = [x.x.dequantize(torch.bfloat16) for x in low]
    want = ref.low_latency_combine(ys, idxs, weights, low, max_tokens=T)
    out, _, _ = buffer.low_latency_combine(ys[rank], idxs[rank], weights[rank], handle)
    same(out, want[rank], "low-latency combined")

    # Scales as packed exponents.
    rounded = ref.low_latency_dispatch(
        xs, idxs, max_tokens=T, num_experts=experts, round_scale=True
    )
    (data, packed), count, handle, *_ = buffer.low_latency_dispatch(
        xs[rank], idxs[rank], T, experts, round_scale=True, use_ue8m0=True
    )
    assert packed.dtype == torch.int32 and packed.shape == (4, ranks * T, 1)
    assert packed.stride()[1] == 1
    for expert, n in enumerate(count.tolist()):
        same(data[expert, :n], rounded[rank].x.data[expert, :n], "data")
        for group in range(rounded[rank].x.scale.shape[2]):
            scale = 2.0 ** ((packed[expert, :n, 0] >> 8 * group & 255) - 127).float()
            same(scale, rounded[rank].x.scale[expert, :n, group], "scale")
    buffer.low_latency_combine(ys[rank], idxs[rank], weights[rank], handle)
    with pytest.raises(ValueError, match="use_ue8m0: expected use_fp8 and round_scale"):
        buffer.low_latency_dispatch(xs[rank], idxs[rank], T, experts, use_ue8m0=True)

    # One rank masked, then all of them again.
    if rank != 1:
        buffer.low_latency_update_mask_buffer(1)
        status = torch.zeros(ranks, dtype=torch.int32)
        buffer.low_latency_query_mask_buffer(status)
        assert status.tolist() == [int(r == 1) for r in range(ranks)]
        alive = [r != 1 for r in range(ranks)]
        low = ref.low_latency_dispatch(xs, idxs, max_tokens=T, num_experts=experts, alive=alive)
        _, count, handle, *_ = buffer.low_latency_dispatch(xs[rank], idxs[rank], T, experts)
        same(count, low[rank].count, "masked count")
        buffer.low_latency_combine(ys[rank], idxs[rank], weights[rank], handle)
    buffer.low_latency_clean_mask_buffer()
    if rank == 1:  # the masked rank starts anew, as the others do
        buffer.destroy()
    low = ref.low_latency_dispatch(xs, idxs, max_tokens=T, num_experts=experts)
    _, count, *_ = buffer.low_latency_dispatch(xs[rank], idxs[rank], T, experts)
    same(count, low[rank].count, "unmasked count")
    return True


def test_deep_ep_by_its_own_names():
    assert all(run_ranks(worker_deep_ep, 3))


def worker_gradients(store, rank, ranks):
    """Experts over ranks, backward included, equal experts on one rank."""
    torch.manual_seed(0)
    experts, hidden, tokens = 2 * ranks, 32, 6
    w13, w2 = torch.randn(experts, 16, hidden) * 0.2, torch.randn(experts, hidden, 8) * 0.2
    xs = torch.randn(ranks, tokens, hidden)
    idx = torch.rand(ranks, tokens, experts).topk(2, -1).indices
    weights = torch.rand(ranks, tokens, 2)
    grads = torch.randn(ranks, tokens, hidden)
    group = make_group(
        store, rank, ranks, num_experts=experts, max_tokens=tokens, hidden=hidden, topk=2,
        dtype=torch.float32,
    )  # fmt: skip

    def leaf(t):
        return t.clone().requires_grad_()

    mine = slice(2 * rank, 2 * rank + 2)
    x, w, a, b = leaf(xs[rank]), leaf(weights[rank]), leaf(w13[mine]), leaf(w2[mine])
    for _ in range(4):  # more steps than buffers: nothing is left behind
        for t in (x, w, a, b):
            t.grad = None
        got = dsk.ep.dispatch(group, x, idx[rank], w)
        y = dsk.moe_experts(got.x, a, b, got.topk_idx, got.topk_weights)
        out, _ = dsk.ep.combine(group, y, got)
        out.backward(grads[rank])
    whole = [leaf(t) for t in (xs.flatten(0, 1), weights.flatten(0, 1), w13, w2)]
    want = dsk.moe_experts(whole[0], whole[2], whole[3], idx.flatten(0, 1), whole[1])
    want.backward(grads.flatten(0, 1))
    rows = slice(tokens * rank, tokens * (rank + 1))
    close = dict(atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out, want[rows].detach(), **close)
    torch.testing.assert_close(x.grad, whole[0].grad[rows], **close)
    torch.testing.assert_close(w.grad, whole[1].grad[rows], **close)
    torch.testing.assert_close(a.grad, whole[2].grad[mine], **close)
    torch.testing.assert_close(b.grad, whole[3].grad[mine], **close)
    return True


def test_gradients_cross_the_exchange():
    assert all(run_ranks(worker_gradients, 2))


def worker_model(store, rank, ranks):
    from model_support import random_ours

    from model.moe import MoE

    init(store, rank, ranks)
    model = random_ours().eval()  # the same weights everywhere
    ids = torch.randint(0, model.config.vocab_size, (ranks, 2, 7 + rank))[rank]
    with torch.no_grad():
        want = model(ids)
        layers = [m for m in model.modules() if isinstance(m, MoE)]
        config = model.config
        group = dsk.ep.Group.from_process_group(
            num_experts=config.n_routed_experts, max_tokens=2 * (7 + ranks),
            hidden=config.hidden_size, topk=config.num_experts_per_tok, dtype=torch.float32,
        )  # fmt: skip
        before = layers[0].experts.w13.weight.shape[0]  # with the shared one, which all keep
        for layer in layers:
            layer.experts.distribute(group)
        assert layers and layers[0].experts.w13.weight.shape[0] == (before - 1) // ranks + 1
        got = model(ids)
    torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)
    return True


def worker_fp8_experts(store, rank, ranks):
    from model import DeepseekConfig
    from model.moe import Experts

    config = DeepseekConfig.tiny()
    torch.manual_seed(0)
    experts = Experts(config)
    for weight in (experts.w13, experts.w2):
        weight.use_fp8()
        weight.weight.copy_(torch.randn(weight.weight.shape).to(torch.float8_e4m3fn))
        weight.zero_padding()
        weight.weight_scale_inv.copy_(torch.rand(weight.weight_scale_inv.shape) * 0.1)
    k, e = config.num_experts_per_tok, config.n_routed_experts
    xs = torch.randn(ranks, 5, config.hidden_size).bfloat16()
    idx = torch.rand(ranks, 5, e).topk(k, -1).indices
    weights = torch.rand(ranks, 5, k)
    group = make_group(
        store, rank, ranks, num_experts=e, max_tokens=5, hidden=config.hidden_size, topk=k
    )
    with torch.no_grad():
        want = experts(xs[rank], idx[rank], weights[rank])
        experts.distribute(group)
        got = experts(xs[rank], idx[rank], weights[rank])
    # Per-rank partial sums are rounded to bf16 on their way.
    torch.testing.assert_close(got.float(), want.float(), rtol=2**-6, atol=2**-6 * want.abs().max())
    return True


def test_fp8_experts_over_ranks():
    assert all(run_ranks(worker_fp8_experts, 2))


def test_the_model_runs_expert_parallel():
    assert all(run_ranks(worker_model, 2))


@pytest.mark.slow
def test_processes_of_torchrun_exchange():
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
               "--standalone", "-m", "dskernels.ep", "--exchange", "--max-tokens", "16",
               "--hidden", "256"]  # fmt: skip
    env = {"GLOO_SOCKET_IFNAME": "lo", **os.environ}
    result = subprocess.run(command, capture_output=True, text=True, timeout=150, env=env)
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.count("equal to the reference") == 2
