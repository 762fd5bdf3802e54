"""The MoE reference against loops written from the papers' equations."""

import math

import pytest
import torch

from dskernels.ref import gemm as ref_gemm
from dskernels.ref import moe, rowwise
from dskernels.testing import assert_bitwise_equal


def gate_by_hand(x, weight, bias, n_group, topk_group, topk, scale, score, by_sum, renormalize):
    """One token at a time, in Python floats: who is chosen and with what weight."""
    idx_rows, weight_rows = [], []
    for row in x.double():
        logits = (weight.double() @ row).tolist()
        if score == "sigmoid":
            scores = [1 / (1 + math.exp(-v)) for v in logits]
        else:
            top = max(logits)
            total = sum(math.exp(v - top) for v in logits)
            scores = [math.exp(v - top) / total for v in logits]
        biased = [s + b for s, b in zip(scores, bias.tolist())]
        size = len(biased) // n_group
        groups = [sorted(biased[g * size : (g + 1) * size], reverse=True) for g in range(n_group)]
        best = [sum(g[:2]) if by_sum else g[0] for g in groups]
        chosen = sorted(range(n_group), key=lambda g: -best[g])[:topk_group]
        running = [e for e in range(len(biased)) if e // size in chosen]
        picked = sorted(running, key=lambda e: -biased[e])[:topk]
        weights = [scores[e] for e in picked]
        if renormalize:
            weights = [w / (sum(weights) + 1e-20) for w in weights]
        idx_rows.append(picked)
        weight_rows.append([w * scale for w in weights])
    return torch.tensor(idx_rows), torch.tensor(weight_rows)


V3 = dict(n_group=8, topk_group=4, topk=8, scale=2.5, score="sigmoid")
V2 = dict(n_group=8, topk_group=3, topk=6, scale=16.0, score="softmax")
V2_LITE = dict(n_group=1, topk_group=1, topk=6, scale=1.0, score="softmax")


@pytest.mark.parametrize("config", [V3, V2, V2_LITE], ids=["v3", "v2", "v2-lite"])
@pytest.mark.parametrize("shift", [0.0, -1.2], ids=["", "negative-biases"])
def test_gate_follows_the_equations(config, shift):
    torch.manual_seed(1)
    x, weight = torch.randn(64, 48), torch.randn(64, 48) * 0.3
    bias = torch.randn(64) * 0.3 + shift
    sigmoid = config["score"] == "sigmoid"
    idx, weights, scores = moe.moe_gate(x, weight, bias, **config)
    want_idx, want = gate_by_hand(x, weight, bias, by_sum=sigmoid, renormalize=sigmoid, **config)
    assert torch.equal(idx, want_idx)
    torch.testing.assert_close(weights, want, atol=1e-6, rtol=1e-5)
    assert scores.shape == (64, 64) and idx.dtype == torch.int64 and weights.dtype == torch.float32


def test_permute_then_unpermute_is_the_weighted_sum():
    torch.manual_seed(2)
    x = torch.randn(13, 5)
    idx = torch.randint(-1, 6, (13, 4))
    weights = torch.rand(13, 4)
    for alignment in (1, 8):
        x_perm, sizes, row_map = moe.moe_permute(x, idx, 6, alignment=alignment)
        assert int(sizes.sum()) == x_perm.shape[0] and not (sizes % alignment).any()
        back = moe.moe_unpermute(x_perm, row_map, weights)
        torch.testing.assert_close(back, x * (weights * (idx >= 0)).sum(1, keepdim=True))


def test_experts_equal_a_loop_over_tokens():
    torch.manual_seed(3)
    x, w13, w2 = torch.randn(7, 16), torch.randn(5, 12, 16), torch.randn(5, 16, 6)
    idx = torch.tensor([[0, 4], [4, 1], [2, -1], [-1, -1], [3, 3], [1, 0], [0, 2]])
    weights = torch.rand(7, 2)
    want = torch.zeros(7, 16)
    for t in range(7):
        for slot in range(2):
            if idx[t, slot] >= 0:
                hidden = rowwise.swiglu(w13[idx[t, slot]] @ x[t])
                want[t] += weights[t, slot] * (w2[idx[t, slot]] @ hidden)
    got = moe.moe_experts(x, w13, w2, idx, weights)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-5)


def test_gate_group_limit_holds_below_zero_too():
    """Masked groups are out even when every biased score of the chosen groups is negative."""
    torch.manual_seed(4)
    x, weight = torch.randn(32, 16), torch.randn(16, 16)
    idx, _, _ = moe.moe_gate(
        x, weight, torch.full((16,), -5.0), n_group=4, topk_group=2, topk=8, scale=1.0
    )
    assert all(len({e // 4 for e in row}) == 2 for row in idx.tolist())


def test_gate_group_score_can_be_chosen():
    """Expert 0 is the single best; group 1 has the better pair."""
    logits = torch.tensor([[4.0, -4.0, 2.0, 1.9]])
    gate = dict(n_group=2, topk_group=1, topk=2)
    x, weight = torch.ones(1, 1), logits.T.contiguous()
    pick = lambda **kw: moe.moe_gate(x, weight, None, **gate, **kw)[0].tolist()  # noqa: E731
    assert pick() == [[2, 3]]
    assert pick(group_score="max") == [[0, 1]]
    assert pick(score="softmax") == [[0, 1]]
    assert pick(score="softmax", group_score="top2") == [[0, 1]]  # softmax: 0 dwarfs the pair


def test_gate_ties_go_to_the_lowest_index():
    x, weight = torch.ones(3, 4), torch.zeros(64, 4)
    bias = torch.zeros(64)
    idx, weights, _ = moe.moe_gate(x, weight, bias, n_group=8, topk_group=4, topk=8, scale=2.5)
    assert idx.tolist() == [list(range(8))] * 3
    torch.testing.assert_close(weights, torch.full((3, 8), 2.5 / 8))
    bias[40:43] = 1.0
    idx, _, _ = moe.moe_gate(x, weight, bias, n_group=8, topk_group=4, topk=8)
    assert idx[0].tolist() == [40, 41, 42, 0, 1, 2, 3, 4]


def test_gate_with_nan_and_infinities():
    torch.manual_seed(5)
    x, weight = torch.randn(4, 8), torch.randn(16, 8)
    clean = moe.moe_gate(x, weight, None, n_group=4, topk_group=2, topk=6)
    x[1], x[2, 0] = torch.nan, torch.inf
    idx, weights, scores = moe.moe_gate(x, weight, None, n_group=4, topk_group=2, topk=6)
    for row in (0, 3):  # other tokens do not notice
        assert torch.equal(idx[row], clean[0][row]) and torch.equal(weights[row], clean[1][row])
    assert idx[1].tolist() == [0, 1, 2, 3, 4, 5] and weights[1].isnan().all()
    assert scores[2].isfinite().all(), "an infinite logit is a score of 0 or 1"
    weight[5], weight[6] = torch.nan, torch.nan
    idx, _, _ = moe.moe_gate(torch.randn(50, 8), weight, None, n_group=4, topk_group=2, topk=8)
    assert all(len({e // 4 for e in row}) == 2 for row in idx.tolist())
    idx, _, scores = moe.moe_gate(torch.randn(50, 8), weight, None, topk=14)
    assert not {5, 6} & set(idx.flatten().tolist()) and scores[:, 5].isnan().all()
    # A bias of -inf takes an expert out; one of +inf puts it first; neither shows in the weight.
    bias = torch.zeros(16)
    bias[3], bias[9] = -torch.inf, torch.inf
    idx, weights, _ = moe.moe_gate(torch.randn(50, 8), torch.randn(16, 8), bias, topk=15)
    assert (idx[:, 0] == 9).all() and not (idx == 3).any() and weights.isfinite().all()


def test_gate_gradients_flow_through_weights_and_scores():
    torch.manual_seed(6)
    x = torch.randn(5, 6, requires_grad=True)
    weight, bias = torch.randn(8, 6, requires_grad=True), torch.randn(8, requires_grad=True)
    probe = torch.randn(5, 3)
    idx, weights, _ = moe.moe_gate(x, weight, bias, topk=3, scale=2.5)
    grads = torch.autograd.grad((weights * probe).sum(), (x, weight), retain_graph=True)
    picked = torch.sigmoid(x @ weight.T).gather(1, idx)
    by_hand = 2.5 * picked / picked.sum(1, keepdim=True)
    for got, want in zip(grads, torch.autograd.grad((by_hand * probe).sum(), (x, weight))):
        torch.testing.assert_close(got, want)
    assert torch.autograd.grad(weights.sum(), bias, allow_unused=True) == (None,)


def test_gate_of_nothing_and_errors():
    weight = torch.randn(8, 4)
    idx, weights, scores = moe.moe_gate(torch.zeros(0, 4), weight, None, n_group=2, topk=2)
    assert idx.shape == weights.shape == (0, 2) and scores.shape == (0, 8)
    x, bias = torch.randn(2, 4), torch.zeros(8)
    cases = [
        (dict(topk=9), "topk: expected 1 .. 8"),
        (dict(topk=5, n_group=2), r"topk: expected 1 .. 4 \(1 groups of 4"),
        (dict(topk=1, n_group=3), "n_group: expected a divisor of 8 experts, got 3"),
        (dict(topk=1, topk_group=2), "topk_group: expected 1 .. 1, got 2"),
        (dict(topk=1, score="relu"), "score: expected 'sigmoid' or 'softmax'"),
        (dict(topk=1, group_score="sum"), "group_score: expected None"),
    ]
    for config, message in cases:
        with pytest.raises(ValueError, match=message):
            moe.moe_gate(x, weight, bias, **config)
    with pytest.raises(ValueError, match=r"bias: expected \[8\], got \(7,\)"):
        moe.moe_gate(x, weight, bias[:7], topk=1)
    with pytest.raises(ValueError, match=r"x, weight: expected"):
        moe.moe_gate(x[:, :3], weight, bias, topk=1)


def test_permute_is_a_stable_counting_sort():
    idx = torch.tensor([[2, 0], [0, 0], [-1, 2], [3, -1]])
    x = torch.arange(4.0)[:, None] + 1
    x_perm, sizes, row_map = moe.moe_permute(x, idx, 5)
    assert sizes.tolist() == [3, 0, 2, 1, 0] and sizes.dtype == torch.int64
    assert x_perm.flatten().tolist() == [1, 2, 2, 1, 3, 4]
    assert row_map.tolist() == [[3, 0], [1, 2], [-1, 4], [5, -1]]
    x_perm, sizes, row_map = moe.moe_permute(x, idx, 5, alignment=4)
    assert sizes.tolist() == [4, 0, 4, 4, 0]
    assert x_perm.flatten().tolist() == [1, 2, 2, 0, 1, 3, 0, 0, 4, 0, 0, 0]
    assert row_map.tolist() == [[4, 0], [1, 2], [-1, 5], [8, -1]]
    for empty in (torch.full((4, 2), -1), torch.zeros(4, 0, dtype=torch.int64)):
        x_perm, sizes, row_map = moe.moe_permute(x, empty, 5)
        assert x_perm.shape == (0, 1) and not sizes.any() and (row_map == -1).all()
    none = moe.moe_permute(x[:0], idx[:0], 5)
    assert none[0].shape == (0, 1) and none[2].shape == (0, 2)
    with pytest.raises(ValueError, match=r"topk_idx: expected values in \[-1, 3\), got -1 .. 3"):
        moe.moe_permute(x, idx, 3)
    with pytest.raises(ValueError, match=r"topk_idx: expected \[4, k\]"):
        moe.moe_permute(x, idx[:3], 5)
    with pytest.raises(ValueError, match="alignment"):
        moe.moe_permute(x, idx, 5, alignment=0)


def test_unpermute_sums_in_fp32_in_order_and_skips_padding():
    big = 2.0**24
    y = torch.tensor([[1.0], [big], [-big], [torch.nan]])
    row_map = torch.tensor([[1, 0, 2], [1, 2, 0], [-1, -1, -1], [0, -1, 0]])
    got = moe.moe_unpermute(y, row_map, None).flatten().tolist()
    assert got == [0.0, 1.0, 0.0, 2.0], "the order of k decides what fp32 loses"
    weights = torch.full((4, 3), torch.nan)
    weights[3, 0], weights[3, 2] = 0.25, 2.0
    assert moe.moe_unpermute(y, row_map, weights)[3].item() == 2.25
    half = moe.moe_unpermute(torch.full((2, 1), 1.0).bfloat16(), torch.tensor([[0, 1]]), None)
    assert half.dtype == torch.bfloat16
    many = torch.full((1, 1), 1 + 2**-7).bfloat16()
    tenth = torch.full((1, 8), 0.1)
    rounded_once = moe.moe_unpermute(many, torch.zeros(1, 8, dtype=torch.int64), tenth)
    assert rounded_once.item() == torch.tensor(0.8 * (1 + 2**-7)).bfloat16().item()
    with pytest.raises(ValueError, match=r"row_map: expected values in \[-1, 4\), got 0 .. 4"):
        moe.moe_unpermute(y, torch.tensor([[0, 4]]), None)


def test_experts_with_fp8_weights_quantise_where_the_gpu_does():
    torch.manual_seed(7)
    x = torch.randn(9, 192).bfloat16()
    w13 = rowwise.quantize(torch.randn(4, 320, 192), (128, 128))
    w2 = rowwise.quantize(torch.randn(4, 192, 160), (128, 128))
    idx = torch.stack([torch.randperm(4)[:2] for _ in range(9)])
    weights = torch.rand(9, 2)
    total = torch.zeros(9, 192)
    for slot in range(2):
        for t in range(9):
            e = int(idx[t, slot])
            hidden = ref_gemm.gemm(
                rowwise.quantize(x[t : t + 1]),
                ref_gemm._take_group(w13, e),
                epilogue="swiglu_quant",
            )
            y = ref_gemm.gemm(hidden, ref_gemm._take_group(w2, e))
            total[t] += weights[t, slot] * y[0].float()
    got = moe.moe_experts(x, w13, w2, idx, weights)
    assert_bitwise_equal(got, total.bfloat16())


def test_permute_experts_unpermute_gradients():
    torch.manual_seed(8)
    f64 = dict(dtype=torch.float64, requires_grad=True)
    x, w13, w2 = torch.randn(4, 3, **f64), torch.randn(3, 4, 3, **f64), torch.randn(3, 3, 2, **f64)
    weights = torch.rand(4, 2, **f64)
    idx = torch.tensor([[0, 1], [1, -1], [2, 0], [1, 1]])
    assert torch.autograd.gradcheck(
        lambda x, w13, w2, weights: moe.moe_experts(x, w13, w2, idx, weights), (x, w13, w2, weights)
    )


def test_bias_update_moves_toward_balance():
    counts = torch.tensor([4, 2, 3, 3])
    bias = torch.zeros(4)
    assert moe.moe_bias_update(bias, counts, 0.001).tolist() == [
        pytest.approx(v) for v in (-0.001, 0.001, 0.0, 0.0)
    ]
    assert not bias.any(), "the old bias stays"
    huge = torch.full((3,), 2**40)
    huge[1] += 1  # a difference that fp32 cannot see
    assert torch.sign(moe.moe_bias_update(torch.zeros(3), huge, 1.0)).tolist() == [1, -1, 1]
    # A router that prefers expert 0 by its scores is balanced by the update alone.
    torch.manual_seed(9)
    x, weight, bias = torch.randn(512, 8), torch.randn(8, 8) * 0.1, torch.zeros(8)
    weight[0] += x.mean(0) + 0.3
    loads = []
    for _ in range(400):
        idx, _, _ = moe.moe_gate(x, weight, bias, topk=2)
        counts = torch.bincount(idx.flatten(), minlength=8)
        loads.append(counts.max() / counts.float().mean())
        bias = moe.moe_bias_update(bias, counts, 0.002)
    assert loads[0] > 1.5 and loads[-1] < 1.1


def losses_by_hand(scores, idx, devices, max_devices):
    """The papers' sums, element by element: (sequence, device, communication), alpha = 1."""
    (b, s, e), k = scores.shape, idx.shape[-1]
    size = e // devices
    totals = [0.0, 0.0, 0.0]
    for n in range(b):
        rows = [set(row) - {-1} for row in idx[n].tolist()]
        f = [e / (k * s) * sum(i in row for row in rows) for i in range(e)]
        p = [sum((scores[n, t, i] / scores[n, t].sum()).item() for t in range(s)) / s
             for i in range(e)]  # fmt: skip
        totals[0] += sum(f[i] * p[i] for i in range(e)) / b
        for d in range(devices):
            mine = range(d * size, (d + 1) * size)
            share = sum(p[i] for i in mine)
            totals[1] += sum(f[i] for i in mine) / size * share / b
            sent = sum(bool(row & set(mine)) for row in rows)
            totals[2] += devices / (max_devices * s) * sent * share / b
    return totals


def test_balance_losses_follow_the_papers():
    torch.manual_seed(10)
    scores = torch.rand(3, 10, 8, requires_grad=True)
    idx = scores.detach().topk(3).indices
    idx[1, 4, 2] = -1
    got = [
        moe.sequence_balance_loss(scores, idx, 0.5),
        moe.device_balance_loss(scores, idx, 4, 0.5),
        moe.communication_balance_loss(scores, idx, 4, 2, 0.5),
    ]
    for value, want in zip(got, losses_by_hand(scores, idx, 4, 2)):
        assert value.item() == pytest.approx(0.5 * want, rel=1e-5)
        assert torch.autograd.grad(value, scores)[0].isfinite().all()
    even = torch.arange(8).repeat(3).view(1, 8, 3)
    flat = torch.full((1, 8, 8), 0.3)
    assert moe.sequence_balance_loss(flat, even, 1e-4).item() == pytest.approx(1e-4)
    with pytest.raises(ValueError, match=r"scores, topk_idx: expected \[b, s, e\]"):
        moe.sequence_balance_loss(scores[0], idx, 1.0)
    with pytest.raises(ValueError, match="num_devices: expected a divisor of 8"):
        moe.device_balance_loss(scores, idx, 3, 1.0)
