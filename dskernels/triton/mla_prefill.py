"""Prefill attention in Triton: a ragged batch, heads 192 wide (128 + 64), values 128.

Letters: t rows of a ragged batch, b requests, h heads. One program attends BLOCK_Q rows of one
request and one head to its keys, BLOCK_K at a time; rows behind the last request are one more
request, without keys.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from ..types import Support, Unsupported
from . import interpreting
from .cast import cast_to
from .mla_blocks import product

NOPE, ROPE, VALUES = 128, 64, 128
WIDTH = NOPE + ROPE
# As many rows as there are values: Triton then gives every warp rows of its own.
BLOCK_Q, BLOCK_K = 128, 64
OPTIONS = {"num_warps": 8}


@triton.jit
def prefill_kernel(
    q_ptr, k_ptr, v_ptr, ends_q_ptr, ends_k_ptr, out_ptr, lse_ptr, t, h, b, scale_log2,
    CAUSAL: tl.constexpr, DN: tl.constexpr, DR: tl.constexpr, DV: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """grid (t // BLOCK_Q + b + 1, h). q, k [., h, DN + DR], v [., h, DV], ends [b + 1];
    out [t, h, DV] bf16, lse [h, t]."""
    block = tl.program_id(0)
    head = tl.program_id(1)
    seen = 0
    first, start, end, key_start, key_end = 0, 0, 0, 0, 0
    for request in range(b + 1):
        begins = tl.load(ends_q_ptr + request)
        stops = tl.load(ends_q_ptr + request + 1, mask=request < b, other=t)
        key_begins = tl.load(ends_k_ptr + request)
        key_stops = tl.load(ends_k_ptr + request + 1, mask=request < b, other=0)
        blocks = tl.cdiv(stops - begins, BLOCK_Q)
        mine = (block >= seen) & (block < seen + blocks)
        first = tl.where(mine, begins + (block - seen) * BLOCK_Q, first)
        start = tl.where(mine, begins, start)
        end = tl.where(mine, stops, end)
        key_start = tl.where(mine, key_begins, key_start)
        key_end = tl.where(mine, tl.maximum(key_stops, key_begins), key_end)
        seen += blocks

    row = first + tl.arange(0, BLOCK_Q)
    row_inside = row < end
    keys = key_end - key_start
    visible = tl.zeros((BLOCK_Q,), tl.int32) + keys
    last = keys  # behind the keys that any row attends
    if CAUSAL:
        shift = keys - (end - start) + 1 - start
        visible = tl.minimum(visible, row + shift)
        last = tl.minimum(last, tl.minimum(first + BLOCK_Q, end) - 1 + shift)

    nope = tl.arange(0, DN)
    rope = DN + tl.arange(0, DR)
    value = tl.arange(0, DV)
    q_at = q_ptr + ((row.to(tl.int64) * h + head) * (DN + DR))[:, None]
    q = tl.load(q_at + nope[None, :], mask=row_inside[:, None], other=0.0)
    q_rope = tl.load(q_at + rope[None, :], mask=row_inside[:, None], other=0.0)
    peak = tl.full((BLOCK_Q,), -1e30, tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    out = tl.zeros((BLOCK_Q, DV), tl.float32)
    for from_key in range(0, last, BLOCK_K):
        key = from_key + tl.arange(0, BLOCK_K)
        inside = (key < keys)[:, None]
        at = (key_start + key).to(tl.int64) * h + head
        k_at = k_ptr + (at * (DN + DR))[:, None]
        scores = product(q, tl.trans(tl.load(k_at + nope[None, :], mask=inside, other=0.0)), WIDE)
        k_rope = tl.load(k_at + rope[None, :], mask=inside, other=0.0)
        scores += product(q_rope, tl.trans(k_rope), WIDE)
        scores = tl.where(key[None, :] < visible[:, None], scores * scale_log2, float("-inf"))
        raised = tl.maximum(peak, tl.max(scores, 1))
        weights = tl.exp2(scores - raised[:, None])
        factor = tl.exp2(peak - raised)
        total = total * factor + tl.sum(weights, 1)
        v = tl.load(v_ptr + (at * DV)[:, None] + value[None, :], mask=inside, other=0.0)
        out = out * factor[:, None] + product(cast_to(weights, tl.bfloat16), v, WIDE)
        peak = raised

    nothing = total == 0.0
    safe = tl.where(nothing, 1.0, total)
    lse = tl.where(nothing, float("inf"), (peak + tl.log2(safe)) * 0.6931471805599453)
    tl.store(lse_ptr + tl.cast(head, tl.int64) * t + row, lse, mask=row_inside)
    out_at = out_ptr + ((row.to(tl.int64) * h + head) * DV)[:, None] + value[None, :]
    tl.store(out_at, cast_to(out / safe[:, None], tl.bfloat16), mask=row_inside[:, None])


def _check(q, k, v, softmax_scale) -> None:
    for name, x, width in (("q", q, WIDTH), ("k", k, WIDTH), ("v", v, VALUES)):
        if x.dtype != torch.bfloat16:
            raise Unsupported(f"{name}: expected torch.bfloat16, got {x.dtype}")
        if x.shape[-1] != width:
            raise Unsupported(f"{name}: expected heads of width {width}, got {x.shape[-1]}")
    if softmax_scale is not None and not 0 < softmax_scale < math.inf:
        raise Unsupported(f"softmax_scale: expected a positive number, got {softmax_scale}")


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
    """As dskernels.ref.mla.mla_prefill for bf16 q, k [t, h, 192] and v [t, h, 128]; lengths are
    read on the device."""
    _check(q, k, v, softmax_scale)
    t, h, _ = q.shape
    out = q.new_empty(t, h, VALUES)
    lse = q.new_empty(h, t, dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    ends_q, ends_k = (
        ends.to(device=q.device, dtype=torch.int32).contiguous()
        for ends in (cu_seqlens_q, cu_seqlens_k)
    )
    b = ends_q.numel() - 1
    # Where a program costs more than the rows it computes, it takes more of them.
    block_q, block_k = (256, 256) if interpreting() else (BLOCK_Q, BLOCK_K)
    prefill_kernel[(t // block_q + b + 1, h)](
        q.contiguous(), k.contiguous(), v.contiguous(), ends_q, ends_k, out, lse, t, h, b,
        (WIDTH**-0.5 if softmax_scale is None else softmax_scale) * math.log2(math.e),
        CAUSAL=causal, DN=NOPE, DR=ROPE, DV=VALUES, BLOCK_Q=block_q, BLOCK_K=block_k,
        WIDE=interpreting(), **OPTIONS,
    )  # fmt: skip
    return out, lse


def supports(**shapes) -> Support:
    for letter, expected in (("d", WIDTH), ("v", VALUES)):
        if shapes.get(letter, expected) != expected:
            return Support(False, f"expected {letter} = {expected}, got {shapes[letter]}")
    if shapes.get("dtype", torch.bfloat16) != torch.bfloat16:
        return Support(False, f"dtype: expected torch.bfloat16, got {shapes['dtype']}")
    return Support(True, "triton: mla_prefill (forward)")
