"""Prefill attention and its gradients on the sm_90a kernels: a ragged batch, heads 192 wide,
values 128.

Dimension letters: t rows of a ragged batch, b requests, h heads, dqk and dv head widths.
"""

from __future__ import annotations

import math

import torch

from ..types import Support, Unsupported
from . import launchers
from ._tensor import device_of, stream_of

WIDTH, VALUES = 192, 128


def _check(q, k, v, softmax_scale) -> None:
    """Raise Unsupported, naming what is given, for a call the kernel does not cover."""
    for name, x, width in (("q", q, WIDTH), ("k", k, WIDTH), ("v", v, VALUES)):
        if x.dtype != torch.bfloat16:
            raise Unsupported(f"{name}: expected torch.bfloat16, got {x.dtype}")
        if x.shape[-1] != width:
            raise Unsupported(f"{name}: expected heads of width {width}, got {x.shape[-1]}")
    if softmax_scale is not None and not 0 < softmax_scale < math.inf:
        raise Unsupported(f"softmax_scale: expected a positive number, got {softmax_scale}")


def _packed(x: torch.Tensor) -> torch.Tensor:
    """x contiguous at an address that TMA takes, with at least one row."""
    if x.shape[0] == 0:
        return x.new_zeros(1, *x.shape[1:])
    x = x.contiguous()
    return x.clone() if x.data_ptr() % 16 else x


def prefill(
    machine: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    *,
    causal: bool = True,
    softmax_scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As dskernels.ref.mla.mla_prefill for bf16 q, k [t, h, 192] and v [t, h, 128].

    Lengths are read on the device: no host synchronisation. Every row is one ordered sum over its
    keys in blocks of 128, whatever the batch around it.
    """
    _check(q, k, v, softmax_scale)
    t, h, _ = q.shape
    out = q.new_empty(t, h, VALUES)
    lse = q.new_empty(h, t, dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    q, k, v = _packed(q), _packed(k), _packed(v)
    ends_q, ends_k = (
        ends.to(device=q.device, dtype=torch.int32).contiguous()
        for ends in (cu_seqlens_q, cu_seqlens_k)
    )
    launchers().mla_prefill(
        machine=machine, ordinal=device_of(q), stream=stream_of(q), q=q.data_ptr(),
        k=k.data_ptr(), v=v.data_ptr(), cu_seqlens_q=ends_q.data_ptr(),
        cu_seqlens_k=ends_k.data_ptr(), out=out.data_ptr(), lse=lse.data_ptr(), t=t,
        keys=k.shape[0], h=h, b=ends_q.numel() - 1, causal=causal,
        softmax_scale=WIDTH**-0.5 if softmax_scale is None else softmax_scale,
    )  # fmt: skip
    return out, lse


def prefill_backward(
    machine: str,
    grad: torch.Tensor,
    grad_lse: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    *,
    causal: bool = True,
    softmax_scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As dskernels.ref.mla_backward.mla_prefill_backward for bf16 q, k [t, h, 192], v [t, h, 128].

    out and lse are the forward's, whose weights are computed again from lse. No atomics: every
    gradient is one ordered sum over blocks of 64 rows, the same bits whatever the batch around it.
    """
    _check(q, k, v, softmax_scale)
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    t, h, _ = q.shape
    if h == 0 or t == 0 or k.shape[0] == 0:  # nobody attends anything
        return dq.zero_(), dk.zero_(), dv.zero_()
    grad, q, k, v, out = (_packed(x) for x in (grad, q, k, v, out))
    lse, grad_lse = lse.contiguous(), grad_lse.contiguous()
    ends_q, ends_k = (
        ends.to(device=q.device, dtype=torch.int32).contiguous()
        for ends in (cu_seqlens_q, cu_seqlens_k)
    )
    b = ends_q.numel() - 1
    workspace = launchers().mla_prefill_backward_workspace(t=t, b=b, h=h)
    statistics = q.new_empty(workspace, dtype=torch.uint8)
    launchers().mla_prefill_backward(
        machine=machine, ordinal=device_of(q), stream=stream_of(q), grad=grad.data_ptr(),
        grad_lse=grad_lse.data_ptr(), q=q.data_ptr(), k=k.data_ptr(), v=v.data_ptr(),
        out=out.data_ptr(), lse=lse.data_ptr(), cu_seqlens_q=ends_q.data_ptr(),
        cu_seqlens_k=ends_k.data_ptr(), statistics=statistics.data_ptr(), dq=dq.data_ptr(),
        dk=dk.data_ptr(), dv=dv.data_ptr(), t=t, keys=k.shape[0], h=h, b=b, causal=causal,
        softmax_scale=WIDTH**-0.5 if softmax_scale is None else softmax_scale,
    )  # fmt: skip
    return dq, dk, dv


def supports(machine: str, **shapes) -> Support:
    for letter, expected in (("d", WIDTH), ("v", VALUES)):
        if shapes.get(letter, expected) != expected:
            return Support(False, f"expected {letter} = {expected}, got {shapes[letter]}")
    if shapes.get("dtype", torch.bfloat16) != torch.bfloat16:
        return Support(False, f"dtype: expected torch.bfloat16, got {shapes['dtype']}")
    return Support(True, f"{machine}: mla_prefill (forward and backward)")
