"""The MoE reference against loops written from the papers' equations."""

import math

import pytest
import torch

from dskernels.ref import moe, rowwise


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
