"""Latent attention on the CPU kernels; names, arguments and meaning are those of `ref.mla`.

Letters: b requests, s query tokens, h heads, t tokens, dl latent width, r RoPE width.
Native: bf16, fp16 and fp32 queries over plain caches of these types and FP8 caches of any page
size. On AMX bf16 queries run on tiles: scores are exact products summed in fp32, softmax weights
and dequantised FP8 latents are rounded to bf16. fp64 runs the reference function.
"""

from __future__ import annotations

import torch

from .. import _C
from ..ref import mla as ref
from ..types import Unsupported
from . import prefill
from .mla_fused import mla_absorb_output, mla_absorb_queries, mla_latents
from .prefill import mla_prefill_backward

__all__ = [
    "mla_absorb_output",
    "mla_absorb_queries",
    "mla_decode",
    "mla_latents",
    "mla_prefill",
    "mla_prefill_backward",
]

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def mla_decode(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    head_dim_v: int = 512,
    softmax_scale: float | None = None,
    causal: bool = True,
    deterministic: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [b, s, h, dl + r] over a paged cache -> out [b, s, h, head_dim_v], lse fp32 [b, h, s]."""
    native = q.dtype in _FLOATS and kv_cache.dtype in (*_FLOATS, torch.uint8)
    if not native or q.dim() != 4 or not 0 < head_dim_v <= q.shape[-1] <= 1024:
        return ref.mla_decode(
            q,
            kv_cache,
            block_table,
            seq_lens,
            head_dim_v=head_dim_v,
            softmax_scale=softmax_scale,
            causal=causal,
        )
    b, s, h, width = q.shape
    scale = width**-0.5 if softmax_scale is None else softmax_scale
    out = torch.empty(b, s, h, head_dim_v, dtype=q.dtype)
    lse = torch.empty(b, h, s)
    tables = [t.to(torch.int32).contiguous() for t in (block_table, seq_lens)]
    # How several threads cut a request depends on how many requests there are.
    threads = 1 if deterministic else torch.get_num_threads()
    query = q.detach().contiguous()
    _C.cpu.mla_decode(query, kv_cache.detach(), *tables, scale, causal, out, lse, threads)
    return out, lse


def mla_prefill(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    *,
    causal: bool = True,
    softmax_scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q, k [t, h, dqk], v [t, h, dv] -> out [t, h, dv], lse fp32 [h, t]; see `ref.mla_prefill`.

    Requests of one length that attend themselves (training) run on PyTorch's fused kernel, every
    other batch on ours.
    """
    fixed = dict(causal=causal, softmax_scale=softmax_scale)
    try:
        return prefill.mla_prefill(q, k, v, cu_seqlens_q, cu_seqlens_k, **fixed)
    except Unsupported:
        return _ragged_prefill(q, k, v, cu_seqlens_q, cu_seqlens_k, **fixed)


def _ragged_prefill(
    q, k, v, cu_seqlens_q, cu_seqlens_k, *, causal, softmax_scale
) -> tuple[torch.Tensor, torch.Tensor]:
    if not (q.dtype == k.dtype == v.dtype and q.dtype in _FLOATS and q.dim() == 3):
        return ref.mla_prefill(
            q, k, v, cu_seqlens_q, cu_seqlens_k, causal=causal, softmax_scale=softmax_scale
        )
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    out = torch.zeros(*q.shape[:2], v.shape[-1], dtype=q.dtype)
    lse = torch.full((q.shape[1], q.shape[0]), torch.inf)
    rows = [x.detach() if x.stride(-1) == 1 else x.detach().contiguous() for x in (q, k, v)]
    ends = [x.to(torch.int32).contiguous() for x in (cu_seqlens_q, cu_seqlens_k)]
    _C.cpu.mla_prefill(*rows, *ends, scale, causal, out, lse, torch.get_num_threads())
    return out, lse
