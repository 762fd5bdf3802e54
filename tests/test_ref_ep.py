"""The expert-parallel reference: what arrives where, in which order, and what comes back."""

import pytest
import torch

from dskernels.ref import ep, moe, rowwise
from dskernels.testing import assert_bitwise_equal

E, K, H = 12, 3, 160


def problem(num_tokens=(5, 0, 7), seed=0, dtype=torch.bfloat16):
    """Three ranks of four experts; distinct experts a row, some slots -1, some rows all -1."""
    torch.manual_seed(seed)
    xs = [torch.randn(t, H).to(dtype) for t in num_tokens]
    idxs = [torch.stack([torch.randperm(E)[:K] for _ in range(t)] or [torch.zeros(K).long()])[:t]
            for t in num_tokens]  # fmt: skip
    idxs = [torch.where(torch.rand(idx.shape) < 0.2, -1, idx) for idx in idxs]
    for idx in idxs:
        idx[1:2] = -1
    return xs, idxs, [torch.rand(idx.shape) for idx in idxs]


def test_layout_counts_a_token_once_per_rank_and_node():
    idx = torch.tensor([[0, 1, 11], [3, 4, 8], [-1, -1, -1], [5, -1, 5]])
    layout = ep.dispatch_layout(idx, E, 6, ranks_per_node=4)
    assert layout.tokens_per_rank.tolist() == [1, 1, 2, 0, 1, 1]
    assert layout.tokens_per_node.tolist() == [3, 2]
    assert layout.tokens_per_expert.tolist() == [1, 1, 0, 1, 1, 2, 0, 0, 1, 0, 0, 1]
    want = torch.zeros(4, 6, dtype=torch.bool)
    want[0, 0] = want[0, 5] = want[1, 1] = want[1, 2] = want[1, 4] = want[3, 2] = True
    assert torch.equal(layout.is_token_in_rank, want)
    assert layout.tokens_per_rank.dtype == layout.tokens_per_expert.dtype == torch.int32
    assert not ep.dispatch_layout(idx[:0], E, 6).is_token_in_rank.numel()


def test_dispatch_rows_and_their_order():
    xs, idxs, weights = problem()
    received = ep.dispatch(xs, idxs, weights, num_experts=E, expert_alignment=4)
    for rank, got in enumerate(received):
        want = [
            (src, t)
            for src in range(3)
            for t, row in enumerate(idxs[src].tolist())
            if any(e // 4 == rank for e in row if e >= 0)
        ]
        assert got.source.tolist() == [list(pair) for pair in want]
        assert_bitwise_equal(got.x, torch.stack([xs[s][t] for s, t in want]))
        counts = [0] * 4
        for n, (src, t) in enumerate(want):
            for slot, expert in enumerate(idxs[src][t].tolist()):
                if expert >= 0 and expert // 4 == rank:
                    assert got.topk_idx[n, slot] == expert % 4
                    assert got.topk_weights[n, slot] == weights[src][t, slot]
                    counts[expert % 4] += 1
                else:
                    assert got.topk_idx[n, slot] == -1 and got.topk_weights[n, slot] == 0
        assert got.tokens_per_expert == [-(-c // 4) * 4 for c in counts]
        _, sizes, _ = moe.moe_permute(got.x, got.topk_idx, 4, alignment=4)
        assert sizes.tolist() == got.tokens_per_expert


def test_dispatch_of_quantised_tokens():
    xs, idxs, _ = problem()
    scaled = ep.dispatch([rowwise.quantize(x) for x in xs], idxs, num_experts=E)
    plain = ep.dispatch(xs, idxs, num_experts=E)
    for got, want in zip(scaled, plain):
        quantized = rowwise.quantize(want.x)
        assert_bitwise_equal(got.x.data, quantized.data)
        assert_bitwise_equal(got.x.scale.contiguous(), quantized.scale.contiguous())
        assert got.topk_weights is None


def test_combine_sums_ranks_in_order_in_fp32():
    xs, idxs, weights = problem()
    received = ep.dispatch(xs, idxs, weights, num_experts=E)
    ys = [got.x * (rank + 1) for rank, got in enumerate(received)]
    bias = [torch.randn_like(x) for x in xs]
    sent_back = [got.topk_weights for got in received]
    got, got_weights = ep.combine(ys, received, [5, 0, 7], topk_weights=sent_back, bias=bias)
    plain, none = ep.combine(ys, received, [5, 0, 7])
    assert none is None
    for src in range(3):
        for t, row in enumerate(idxs[src].tolist()):
            total = torch.zeros(H)
            for rank in sorted({e // 4 for e in row if e >= 0}):
                total = total + (xs[src][t] * (rank + 1)).float()
            assert_bitwise_equal(plain[src][t], total.bfloat16())
            assert_bitwise_equal(got[src][t], (total + bias[src][t].float()).bfloat16())
        assert torch.equal(got_weights[src], torch.where(idxs[src] >= 0, weights[src], 0.0))
    big = 2.0**24  # (1 + big) - big loses the 1, (big - big) + 1 does not
    x, idx = [torch.ones(1, 1)] * 3, [torch.tensor([[0, 4, 8]])] + [torch.full((1, 3), -1)] * 2
    one = ep.dispatch(x, idx, num_experts=E)
    rows = [torch.tensor([[v]]) for v in (1.0, big, -big)]
    assert ep.combine(rows, one, [1, 1, 1])[0][0].item() == 0.0
    assert ep.combine(rows[1:] + rows[:1], one, [1, 1, 1])[0][0].item() == 1.0
    with pytest.raises(ValueError, match=r"ys: expected \[1, 1, 1\] rows, as received, got"):
        ep.combine([rows[0][:0], *rows[1:]], one, [1, 1, 1])


def test_combine_over_nodes_sums_each_node_first():
    idx = [torch.tensor([[0, 1, 2, 3]])] + [torch.full((1, 4), -1)] * 3

    def total(values, token_rank=0, **options):
        idxs = idx[-token_rank:] + idx[:-token_rank] if token_rank else idx
        xs = [torch.ones(1, 1, dtype=values.dtype)] * 4
        received = ep.dispatch(xs, idxs, num_experts=4)
        ys = [value.view(1, 1) for value in values]
        weights = [value.float().expand(1, 4) for value in ys]
        out, back = ep.combine(ys, received, [1] * 4, topk_weights=weights, **options)
        return out[token_rank].item(), back[token_rank][0, 0].item()

    big = 2.0**24
    values = torch.tensor([big, 1.0, 1.0, -big])
    assert total(values) == (0.0, 0.0)
    assert total(values, ranks_per_node=2) == (1.0, 1.0)
    # Nodes by number, not backwards: (1 + big) - big loses the 1.
    assert total(torch.tensor([1.0, big, -big, 0.0]), ranks_per_node=1) == (0.0, 0.0)
    # 1 + 2^-8 is no bf16: kept in the token's own node, rounded on its way from another.
    small = 2.0**-8
    values = torch.tensor([1.0, small, 0.0, small]).bfloat16()
    assert total(values, ranks_per_node=2) == (1 + 2 * small, 1 + 2 * small)
    assert total(values, 2, ranks_per_node=2) == (1.0, 1 + 2 * small)
    assert total(values, 2, ranks_per_node=2, alive=[True, True, True, False])[1] == 1 + small
    with pytest.raises(ValueError, match="ranks_per_node: expected 0 or a divisor of 4 ranks"):
        total(values, ranks_per_node=3)
    with pytest.raises(ValueError, match="alive: expected 4 entries, got 1"):
        total(values, alive=[True])


def test_experts_over_ranks_equal_experts_on_one():
    xs, idxs, weights = problem(dtype=torch.float32)
    w13, w2 = torch.randn(E, 24, H) * 0.1, torch.randn(E, H, 12)
    want = [moe.moe_experts(*args) for args in
            [(x, w13, w2, i, w) for x, i, w in zip(xs, idxs, weights)]]  # fmt: skip
    ranks = [slice(4 * r, 4 * r + 4) for r in range(3)]
    received = ep.dispatch(xs, idxs, weights, num_experts=E)
    ys = [
        moe.moe_experts(got.x, w13[mine], w2[mine], got.topk_idx, got.topk_weights)
        for got, mine in zip(received, ranks)
    ]
    for got, whole in zip(ep.combine(ys, received, [5, 0, 7])[0], want):
        torch.testing.assert_close(got, whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("use_fp8", [False, True])
def test_low_latency_slots(use_fp8):
    xs, idxs, _ = problem()
    received = ep.low_latency_dispatch(
        xs, idxs, max_tokens=8, num_experts=E, use_fp8=use_fp8, round_scale=True
    )
    for rank, got in enumerate(received):
        assert got.x.shape == (4, 24, H) and got.count.dtype == torch.int32
        for expert in range(4):
            rows = [(src, t) for src in range(3) for t, row in enumerate(idxs[src].tolist())
                    if rank * 4 + expert in row]  # fmt: skip
            assert got.count[expert] == len(rows)
            assert got.source[expert, : len(rows)].tolist() == [src * 8 + t for src, t in rows]
            assert (got.source[expert, len(rows) :] == -1).all()
            want = torch.stack([xs[s][t] for s, t in rows] or [torch.zeros(H).bfloat16()])
            if use_fp8:
                quantized = rowwise.quantize(want, scale_format="ue8m0")
                data, scale = got.x.data[expert], got.x.scale[expert]
                assert_bitwise_equal(data[: len(rows)], quantized.data[: len(rows)])
                assert torch.equal(scale[: len(rows)], quantized.scale[: len(rows)])
                assert scale.stride() == (1, 24)
            else:
                assert_bitwise_equal(got.x[expert, : len(rows)], want[: len(rows)])
            begin = 0
            for src in range(3):
                size = sum(s == src for s, _ in rows)
                assert got.layout_range[expert, src].item() == (begin << 32 | size)
                begin += size


def test_low_latency_combine_weights_in_slot_order():
    xs, idxs, weights = problem()
    received = ep.low_latency_dispatch(xs, idxs, max_tokens=8, num_experts=E, use_fp8=False)
    ys = [got.x * 2 for got in received]
    for y, got in zip(ys, received):
        for expert, count in enumerate(got.count.tolist()):
            y[expert, count:] = torch.nan
    back = ep.low_latency_combine(ys, idxs, weights, received, max_tokens=8)
    for src in range(3):
        for t, row in enumerate(idxs[src].tolist()):
            total = torch.zeros(H)
            for slot, expert in enumerate(row):
                if expert >= 0:
                    total = total + weights[src][t, slot] * (xs[src][t] * 2).float()
            assert_bitwise_equal(back[src][t], total.bfloat16())


def test_dead_ranks_neither_send_nor_receive():
    xs, idxs, weights = problem(num_tokens=(5, 4, 7))
    alive = [True, False, True]
    without = [torch.where((idx // 4 == 1) & (idx >= 0), -1, idx) for idx in idxs]
    without[1] = torch.full_like(without[1], -1)
    got = ep.dispatch(xs, idxs, weights, num_experts=E, alive=alive)
    want = ep.dispatch(xs, without, weights, num_experts=E)
    fast = ep.low_latency_dispatch(xs, idxs, max_tokens=8, num_experts=E, alive=alive)
    for rank in range(3):
        assert torch.equal(got[rank].source, want[rank].source)
        assert torch.equal(got[rank].topk_idx, want[rank].topk_idx)
    assert not len(got[1].source) and not fast[1].count.any()
    ys = [r.x.dequantize() for r in fast]
    back = ep.low_latency_combine(ys, idxs, weights, fast, max_tokens=8)
    keep = torch.where(without[0] >= 0, weights[0], 0.0).sum(1, keepdim=True)
    exact = rowwise.quantize(xs[0]).dequantize() * keep
    torch.testing.assert_close(back[0], exact, atol=1e-5, rtol=1e-5)


def test_errors_name_the_argument():
    xs, idxs, _ = problem()
    fast = dict(max_tokens=8, num_experts=E)
    twice = [torch.zeros_like(idx) for idx in idxs]
    cases = [
        (
            lambda: ep.dispatch(xs, idxs, num_experts=13),
            "num_experts: expected a positive",
        ),
        (lambda: ep.dispatch(xs, idxs[:2], num_experts=E), "topk_idxs: expected 3 entries, got 2"),
        (lambda: ep.dispatch(xs, [i + 1 for i in idxs], num_experts=9), r"values in \[-1, 9\)"),
        (lambda: ep.dispatch(xs, [i.int() for i in idxs], num_experts=E), "expected int64"),
        (lambda: ep.dispatch(xs, [i[:3] for i in idxs], num_experts=E), "expected 5 rows, as xs"),
        (lambda: ep.dispatch(xs, idxs, num_experts=E, alive=[True]), "alive: expected 3 entries"),
        (
            lambda: ep.low_latency_dispatch(xs, idxs, max_tokens=6, num_experts=E),
            r"xs\[2\]: expected at most 6 tokens, got 7",
        ),
        (
            lambda: ep.low_latency_dispatch(xs, twice, **fast),
            r"topk_idxs\[0\]\[0\]: expected distinct experts, got \[0, 0, 0\]",
        ),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
