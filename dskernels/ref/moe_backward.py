"""Gradients of the mixture-of-experts ops, as explicit formulas in fp32 (fp64 for fp64 tensors).

Letters as in `moe`. Each function takes the gradients of the outputs first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..types import ScaledTensor
from .gemm import grouped_gemm, grouped_gemm_k
from .moe import WEIGHT_SUM_FLOOR, expert_slots, moe_permute, moe_unpermute
from .rowwise import quantize, swiglu
from .rowwise_backward import swiglu_backward

GROUP = 128  # of the scales; so the experts' rows, which the weights' gradients contract over


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
    w13: Tensor | ScaledTensor,
    w2: Tensor | ScaledTensor,
    topk_idx: Tensor,
    topk_weights: Tensor,
    *,
    expert_map: Tensor | None = None,
    num_shared: int = 0,
    weight_grads: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """grad [t, d] -> gradients of x [t, d], w13 [e, 2i, d], w2 [e, d, i], topk_weights [t, k].

    Nothing but the inputs is kept from the forward: the gate and up projections of each expert
    are computed again, as in the V3 report's recomputation of SwiGLU. For scaled weights see
    `_scaled_experts_backward`: the gradients of the weights are then fp32. weight_grads=False says
    that nobody looks at them; other backends then leave them out. expert_map and num_shared as in
    `moe_experts`.
    """
    del weight_grads
    topk = topk_weights.shape[1]
    slots = expert_slots(topk_idx, topk_weights, w13.shape[0], expert_map, num_shared)
    run = _scaled_experts_backward if isinstance(w13, ScaledTensor) else _plain_experts_backward
    *grads, dweights = run(grad, x, w13, w2, *slots)
    return *grads, dweights[:, :topk]


def _plain_experts_backward(
    grad: Tensor, x: Tensor, w13: Tensor, w2: Tensor, topk_idx: Tensor, topk_weights: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
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


def _scaled_experts_backward(
    grad: Tensor,
    x: Tensor,
    w13: ScaledTensor,
    w2: ScaledTensor,
    topk_idx: Tensor,
    topk_weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All six products in FP8 (V3 report, 3.3.2 and 3.5.2); rows are sorted copies of tokens.

        x8    = x in 1x128                          the forward's; 128x1 is requantised from it
        g8    = grad in 1x128, scales powers of two, so that its 128x1 loses next to nothing
        h     = x8 w13^T, back = g8 w2              bf16
        dh    = SwiGLU's gradient at h of weight * back, act = weight * SwiGLU(h)    unrounded
        dx    = (dh in 1x128) w13                   x's dtype, summed over a token's copies in fp32
        dw13  = dh^T x8, dw2 = g8^T act             all in 128x1, along the rows; fp32
        d topk_weights = <back, SwiGLU(h)> = <grad, the expert's output>             fp32

    w13 and w2 are taken in their 128x128 blocks, whose transposes are such blocks again. An
    expert's rows are padded with zeros to a multiple of 128, so no scale spans two experts.
    """
    experts = w13.shape[0]
    x_perm, sizes, row_map = moe_permute(x.detach(), topk_idx, experts, alignment=GROUP)
    grad_perm, _, _ = moe_permute(grad.to(x.dtype), topk_idx, experts, alignment=GROUP)
    x8, g8 = quantize(x_perm), quantize(grad_perm, scale_format="pow2")
    h = grouped_gemm(x8, w13, group_sizes=sizes).float()
    back = grouped_gemm(g8, transposed_blocks(w2), group_sizes=sizes).float()

    tokens, slots = (row_map >= 0).nonzero(as_tuple=True)
    rows = row_map[tokens, slots]
    weights = torch.zeros(x_perm.shape[0], 1, device=x.device)
    weights[rows, 0] = topk_weights[tokens, slots].float()
    act = swiglu(h)
    dweights = torch.zeros_like(topk_weights)
    dweights[tokens, slots] = (back * act).sum(dim=-1)[rows].to(topk_weights.dtype)
    dh, act = swiglu_backward(back * weights, h), act * weights

    dx_perm = grouped_gemm(
        quantize(dh), transposed_blocks(w13), group_sizes=sizes, out_dtype=x.dtype
    )
    d13 = grouped_gemm_k(quantize(dh, transpose=True), quantize(x8, transpose=True), sizes)
    left = quantize(g8, scale_format="pow2", transpose=True)
    d2 = grouped_gemm_k(left, quantize(act, transpose=True), sizes)
    return moe_unpermute(dx_perm, row_map, None), d13, d2, dweights


def transposed_blocks(w: ScaledTensor) -> ScaledTensor:
    """w [e, n, k] in blocks (128, 128) -> [e, k, n] in such blocks: the same numbers."""
    data = w.data.view(torch.uint8).transpose(-2, -1).contiguous().view(w.data.dtype)
    return ScaledTensor(data, w.scale.transpose(-2, -1).contiguous(), w.block[::-1], w.dtype)
