"""Inputs that several tests of the MoE stem share."""

import torch

from dskernels.ref import rowwise


def routing(kind, t, k, e):
    """int64 [t, k] with the given skew."""
    if kind == "one expert":
        return torch.full((t, k), e - 1)
    if kind == "nobody":
        return torch.full((t, k), -1)
    if t == 0:
        return torch.zeros(0, k).long()
    if kind == "zipf":
        odds = 1 / torch.arange(1, e + 1).float()
        return torch.multinomial(odds.expand(t, e), k, replacement=True)
    balanced = torch.stack([torch.randperm(e)[:k] for _ in range(t)])
    return torch.where(torch.rand(t, k) < 0.2, -1, balanced) if kind == "holes" else balanced


def scaled_experts(e, d, i):
    """w13 [e, 2i, d] and w2 [e, d, i], quantised in blocks of 128 x 128."""
    w13 = rowwise.quantize(torch.randn(e, 2 * i, d) / d**0.5, (128, 128))
    return w13, rowwise.quantize(torch.randn(e, d, i) / i**0.5, (128, 128))
