"""What surrounds latent attention, on the CPU: our row-wise kernels and PyTorch's batched product.

Letters: t tokens, h heads, dq, dl latent widths, r RoPE width, n, v head widths.
"""

from __future__ import annotations

from typing import Any

import torch

from .. import backend


def _cpu(op: str, *args: Any, **how: Any) -> Any:
    return backend.run(op, "cpu", "cpu", *args, **how)


def mla_latents(
    q_a: torch.Tensor | None,
    kv_a: torch.Tensor,
    q_weight: torch.Tensor | None,
    kv_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    kv_cache: torch.Tensor,
    slots: torch.Tensor,
    *,
    eps: float = 1e-6,
    interleaved: bool = True,
) -> torch.Tensor | None:
    """As dskernels.ref.mla.mla_latents, its four steps one after the other."""
    latent, k_rope = kv_a.split([kv_weight.shape[0], kv_a.shape[1] - kv_weight.shape[0]], dim=1)
    k_rope = _cpu("rope", k_rope[:, None], cos, sin, interleaved=interleaved)[:, 0]
    latent = _cpu("rms_norm", latent, kv_weight, eps)
    _cpu("mla_cache_append", kv_cache, latent, k_rope, slots)
    return None if q_a is None else _cpu("rms_norm", q_a, q_weight, eps)


def mla_absorb_queries(
    q: torch.Tensor,
    w_uk: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    interleaved: bool = True,
) -> torch.Tensor:
    """As dskernels.ref.mla.mla_absorb_queries; the product is PyTorch's in q's dtype."""
    nope, turning = q.split([w_uk.shape[1], q.shape[2] - w_uk.shape[1]], dim=-1)
    turned = _cpu("rope", turning, cos, sin, interleaved=interleaved)
    return torch.cat([torch.einsum("thn,hnc->thc", nope, w_uk), turned], dim=-1)


def mla_absorb_output(o: torch.Tensor, w_uv: torch.Tensor) -> torch.Tensor:
    """As dskernels.ref.mla.mla_absorb_output; the product is PyTorch's in o's dtype."""
    return torch.einsum("thc,hvc->thv", o, w_uv)
