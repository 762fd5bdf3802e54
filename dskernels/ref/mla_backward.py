"""Gradients of latent attention's prefill, as explicit formulas in fp32 (fp64 for fp64 tensors).

Letters as in `mla`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .mla import _softmax


def mla_prefill_backward(
    grad: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    causal: bool = True,
    softmax_scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """grad [t, h, dv], grad_lse [h, t] -> gradients of q, k [t, h, dqk] and v [t, h, dv].

    out and lse are the forward's. With P the probabilities and D = sum(grad out) over dv:
    dV = P^T grad, dS = P (grad V^T - D + grad_lse), dQ = scale dS K, dK = scale dS^T Q.
    Queries that attend nothing, and rows outside every request, get and give 0.
    """
    del out, lse  # recomputed in full precision; kernels use them to avoid the second softmax
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    dq, dk, dv = (torch.zeros(t.shape, dtype=wide, device=t.device) for t in (q, k, v))
    ends_q, ends_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for start_q, end_q, start_k, end_k in zip(ends_q, ends_q[1:], ends_k, ends_k[1:]):
        rows, keys = slice(start_q, end_q), slice(start_k, end_k)
        q_i, k_i, v_i = q[rows].to(wide), k[keys].to(wide), v[keys].to(wide)
        g = grad[rows].to(wide)
        probs = _probabilities(q_i, k_i, scale, causal)
        back = torch.einsum("qhd,khd->hqk", g, v_i)
        # D from the probabilities just computed, so that dS sums to grad_lse exactly as it should.
        mean = (probs * back).sum(dim=-1, keepdim=True)
        dscores = probs * (back - mean + grad_lse[:, rows, None].to(wide)) * scale
        dq[rows] = torch.einsum("hqk,khd->qhd", dscores, k_i)
        dk[keys] = torch.einsum("hqk,qhd->khd", dscores, q_i)
        dv[keys] = torch.einsum("hqk,qhd->khd", probs, g)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _probabilities(q: Tensor, k: Tensor, scale: float, causal: bool) -> Tensor:
    """Softmax of q [lq, h, d] against k [lk, h, d] -> [h, lq, lk]; 0 for queries that see none."""
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    if causal:
        len_q, len_k = q.shape[0], k.shape[0]
        hidden = torch.ones(len_q, len_k, dtype=torch.bool, device=q.device)
        scores = scores.masked_fill(hidden.triu(len_k - len_q + 1), -torch.inf)
    return _softmax(scores)[0]
