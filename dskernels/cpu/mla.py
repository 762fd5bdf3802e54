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
from .prefill import mla_prefill, mla_prefill_backward

__all__ = [
    "mla_absorb_output",
    "mla_absorb_queries",
    "mla_cache_append",
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


def mla_cache_append(
    kv_cache: torch.Tensor, latent: torch.Tensor, k_rope: torch.Tensor, slots: torch.Tensor
) -> None:
    """latent [t, dl], k_rope [t, r] into the cache at slots [t]: see `ref.mla_cache_append`."""
    for name, x in (("latent", latent), ("k_rope", k_rope)):
        if x.dtype not in _FLOATS:
            raise Unsupported(f"{name}: expected one of {_FLOATS}, got {x.dtype}")
    if kv_cache.dtype not in (*_FLOATS, torch.uint8) or kv_cache.stride(-1) != 1:
        raise Unsupported(f"kv_cache: expected dense rows of a float type, got {kv_cache.dtype}")
    rows = (prefill._rows(x) for x in (latent, k_rope))
    where = slots.to(torch.int64).contiguous()
    _C.cpu.mla_cache_append(kv_cache.detach(), *rows, where, torch.get_num_threads())
