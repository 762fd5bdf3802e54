"""Gradients of the mixture-of-experts ops, as explicit formulas in fp32 (fp64 for fp64 tensors).

Letters as in `moe`. Each function takes the gradients of the outputs first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .moe import WEIGHT_SUM_FLOOR, moe_permute
from .rowwise import swiglu
from .rowwise_backward import swiglu_backward


def moe_gate_backward(
    grad_weights: Tensor,
    grad_scores: Tensor,
    x: Tensor,
    weight: Tensor,
    topk_idx: Tensor,
    scores: Tensor,
    scale: float,
    score: str,
    renormalize: bool,
) -> tuple[Tensor, Tensor]:
    """grad_weights [t, k], grad_scores [t, e] -> gradients of x [t, d] and weight [e, d].

    topk_idx and scores are what the forward returned. The choice is a constant: only the chosen
    scores' values and the scores themselves carry gradients.
    """
    g = grad_weights * scale
    if renormalize:
        chosen = scores.gather(1, topk_idx)
        total = chosen.sum(dim=-1, keepdim=True) + WEIGHT_SUM_FLOOR
        g = (g - (g * chosen).sum(dim=-1, keepdim=True) / total) / total
    ds = grad_scores.scatter_add(1, topk_idx, g)
    if score == "sigmoid":
        dlogits = ds * scores * (1 - scores)
    else:
        dlogits = scores * (ds - (ds * scores).sum(dim=-1, keepdim=True))
    dx = (dlogits @ weight.to(dlogits.dtype)).to(x.dtype)
    dweight = (dlogits.transpose(0, 1) @ x.to(dlogits.dtype)).to(weight.dtype)
    return dx, dweight


def moe_unpermute_backward(
    grad: Tensor, y: Tensor, row_map: Tensor, topk_weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    """grad [t, d] -> gradients of y [m, d] and of topk_weights [t, k] (of ones for None)."""
    wide = torch.float64 if y.dtype == torch.float64 else torch.float32
    tokens, slots = (row_map >= 0).nonzero(as_tuple=True)
    rows = row_map[tokens, slots]
    g = grad[tokens].to(wide)
    like = y if topk_weights is None else topk_weights
    dweights = torch.zeros(row_map.shape, dtype=like.dtype, device=y.device)
    dweights[tokens, slots] = (g * y[rows].to(wide)).sum(dim=-1).to(like.dtype)
    if topk_weights is not None:
        g = g * topk_weights[tokens, slots, None].to(wide)
    dy = torch.zeros(y.shape, dtype=wide, device=y.device).index_add(0, rows, g)
    return dy.to(y.dtype), dweights


def moe_experts_backward(
    grad: Tensor,
    x: Tensor,
    w13: Tensor,
    w2: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """grad [t, d] -> gradients of x [t, d], w13 [e, 2i, d], w2 [e, d, i], topk_weights [t, k].

    Nothing but the inputs is kept from the forward: the gate and up projections of each expert
    are computed again, as in the V3 report's recomputation of SwiGLU.
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    x_perm, group_sizes, row_map = moe_permute(x, topk_idx, w13.shape[0])
    tokens, slots = (row_map >= 0).nonzero(as_tuple=True)
    rows = row_map[tokens, slots]
    grad_perm = torch.zeros(x_perm.shape, dtype=wide, device=x.device)
    grad_perm[rows] = grad[tokens].to(wide)
    weights = torch.zeros(x_perm.shape[0], 1, dtype=wide, device=x.device)
    weights[rows, 0] = topk_weights[tokens, slots].to(wide)

    dx_perm = torch.empty_like(grad_perm)
    dot = torch.empty_like(weights)
    d13, d2 = torch.zeros_like(w13), torch.zeros_like(w2)
    start = 0
    for expert, size in enumerate(group_sizes.tolist()):
        if size == 0:
            continue
        part = slice(start, start + size)
        start += size
        first, second = w13[expert].to(wide), w2[expert].to(wide)
        x_e, g_e = x_perm[part].to(wide), grad_perm[part]
        h = (x_e @ first.t()).to(x.dtype)
        act = swiglu(h).to(wide)
        # <grad, y> = <grad w2, act>: the expert's output itself is not needed.
        back = g_e @ second
        dot[part] = (back * act).sum(dim=-1, keepdim=True)
        d2[expert] = ((g_e * weights[part]).t() @ act).to(w2.dtype)
        dh = swiglu_backward(back * weights[part], h.to(wide))
        d13[expert] = (dh.t() @ x_e).to(w13.dtype)
        dx_perm[part] = dh @ first
    dx = torch.zeros(x.shape, dtype=wide, device=x.device).index_add(0, tokens, dx_perm[rows])
    dweights = torch.zeros_like(topk_weights)
    dweights[tokens, slots] = dot[rows, 0].to(topk_weights.dtype)
    return dx.to(x.dtype), d13, d2, dweights
