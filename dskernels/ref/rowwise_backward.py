"""Gradients of the row-wise ops, as explicit formulas in fp32 (fp64 for fp64 tensors).

Letters as in `rowwise`. Each function takes the gradient of the output first.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """grad [..., d], x [..., d], weight [d] -> gradients of x and weight, in their dtypes.

    With r = 1 / sqrt(mean(x^2) + eps) and n = x r: dweight = sum grad n, and
    dx = r (grad weight - n mean(grad weight n)).
    """
    wide, g = _wide(x), grad.to(_wide(x).dtype)
    inverse = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    normal = wide * inverse
    weighted = g * weight.to(wide.dtype)
    dx = inverse * (weighted - normal * (weighted * normal).mean(dim=-1, keepdim=True))
    dweight = (g * normal).flatten(0, -2).sum(dim=0) if x.dim() > 1 else g * normal
    return dx.to(x.dtype), dweight.to(weight.dtype)


def swiglu_backward(grad: Tensor, x: Tensor) -> Tensor:
    """grad [..., i], x [..., 2i] = [gate; up] -> gradient of x, in its dtype."""
    gate, up = _wide(x).chunk(2, dim=-1)
    g = grad.to(gate.dtype)
    sigmoid = torch.sigmoid(gate)
    dgate = g * up * sigmoid * (1 + gate * (1 - sigmoid))
    return torch.cat([dgate, g * gate * sigmoid], dim=-1).to(x.dtype)
