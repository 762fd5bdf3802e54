"""Prefill attention on PyTorch's fused CPU kernel: the scores never reach memory.

Covers the common batch, requests of one length that attend themselves (training, whole prompts of
one size); everything else raises Unsupported and runs on the reference.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..types import Unsupported

_DTYPES = (torch.float32, torch.bfloat16)
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def mla_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    causal: bool = True,
    softmax_scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """q, k [t, h, dqk], v [t, h, dv] -> out [t, h, dv], lse [h, t]; see `ref.mla.mla_prefill`."""
    requests = _equal_requests(q, k, v, cu_seqlens_q, cu_seqlens_k)
    tokens, heads, width = q.shape
    scale = width**-0.5 if softmax_scale is None else softmax_scale
    parts = (_split(x, requests, width) for x in (q, k, v))
    out, lse = _flash(*parts, 0.0, causal, scale=scale)
    out = _join(out, tokens)[..., : v.shape[2]]
    return out.contiguous(), lse.transpose(0, 1).reshape(heads, tokens)


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
    """Gradients of q, k and v; see `ref.mla_backward.mla_prefill_backward`."""
    requests = _equal_requests(q, k, v, cu_seqlens_q, cu_seqlens_k)
    if grad_lse.any():
        raise Unsupported("the fused kernel takes no gradient of lse")
    tokens, heads, width = q.shape
    scale = width**-0.5 if softmax_scale is None else softmax_scale
    parts = [_split(x, requests, width) for x in (grad, q, k, v, out)]
    lse = lse.reshape(heads, requests, -1).transpose(0, 1)
    dq, dk, dv = _flash_backward(*parts, lse, 0.0, causal, scale=scale)
    return _join(dq, tokens), _join(dk, tokens), _join(dv, tokens)[..., : v.shape[2]]


def _equal_requests(q: Tensor, k: Tensor, v: Tensor, ends_q: Tensor, ends_k: Tensor) -> int:
    """How many requests of one length fill q, k and v; Unsupported for any other batch."""
    if q.dtype not in _DTYPES:
        raise Unsupported(f"dtype: expected float32 or bfloat16, got {q.dtype}")
    if v.shape[2] > q.shape[2]:
        raise Unsupported(f"dv: expected at most dqk {q.shape[2]}, got {v.shape[2]}")
    requests = ends_q.numel() - 1
    length = q.shape[0] // requests if requests > 0 else 0
    expected = list(range(0, requests * length + 1, length)) if length else []
    same = q.shape[0] == k.shape[0] and ends_q.tolist() == ends_k.tolist() == expected
    if not same or q.shape[0] != requests * length:
        raise Unsupported("requests: expected one length, and as many keys as queries")
    return requests


def _split(x: Tensor, requests: int, width: int) -> Tensor:
    """[t, h, d] -> [b, h, s, width]: the kernel wants values as wide as keys, zeros do no harm."""
    x = x.unflatten(0, (requests, -1)).transpose(1, 2)
    return x if x.shape[3] == width else pad(x, (0, width - x.shape[3]))


def _join(x: Tensor, tokens: int) -> Tensor:
    """[b, h, s, d] -> [t, h, d]."""
    return x.transpose(1, 2).reshape(tokens, x.shape[1], x.shape[3])
