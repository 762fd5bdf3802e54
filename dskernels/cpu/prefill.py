"""Prefill attention and its gradients on the CPU kernels; the scores never reach memory.

bf16, fp16 and fp32, any batch; fp64 and mixed types are the reference's. Letters as in `ref.mla`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _C
from ..types import Unsupported

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_MOST_WIDTH = 1024  # of a row that the kernels take


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
    """q, k [t, h, dqk], v [t, h, dv] -> out [t, h, dv], lse fp32 [h, t]; see `ref.mla_prefill`."""
    scale = _scale(q, k, v, softmax_scale)
    out = torch.zeros(*q.shape[:2], v.shape[-1], dtype=q.dtype)
    lse = torch.full((q.shape[1], q.shape[0]), torch.inf)
    ends = _ends(cu_seqlens_q, cu_seqlens_k)
    rows = (_rows(x) for x in (q, k, v))
    _C.cpu.mla_prefill(*rows, *ends, scale, causal, out, lse, torch.get_num_threads())
    return out, lse


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
    """Gradients of q, k and v; see `ref.mla_backward.mla_prefill_backward`.

    On a bf16 unit bf16 tensors' probabilities and scores' gradients are rounded to bf16; sums are
    fp32. The same bits for any number of threads.
    """
    scale = _scale(q, k, v, softmax_scale)
    grads = tuple(torch.zeros(x.shape, dtype=x.dtype) for x in (q, k, v))
    _C.cpu.mla_prefill_backward(
        *(_rows(grad.to(q.dtype)), _rows(grad_lse.float())),
        *(_rows(x) for x in (q, k, v)),
        *(out.detach().contiguous(), _rows(lse)),
        *_ends(cu_seqlens_q, cu_seqlens_k),
        *(scale, causal, *grads, torch.get_num_threads()),
    )
    return grads


def _scale(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None) -> float:
    """The scores' factor; Unsupported for tensors that the kernels do not take."""
    if not q.dtype == k.dtype == v.dtype or q.dtype not in _FLOATS or q.dim() != 3:
        raise Unsupported(f"q, k, v: expected [t, h, d] of one float type, got {q.dtype}")
    if not all(0 < x.shape[-1] <= _MOST_WIDTH for x in (q, v)):
        raise Unsupported(f"q, v: expected 1 to {_MOST_WIDTH} values, got {q.shape}, {v.shape}")
    return q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale


def _rows(x: Tensor) -> Tensor:
    """x with a last dimension without gaps."""
    x = x.detach()
    return x if x.stride(-1) == 1 else x.contiguous()


def _ends(*cu_seqlens: Tensor) -> list[Tensor]:
    return [ends.to(torch.int32).contiguous() for ends in cu_seqlens]
