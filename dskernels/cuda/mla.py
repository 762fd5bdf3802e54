"""Latent attention on the sm_90a kernels: decode over a paged cache, bf16 or FP8.

Dimension letters: b requests, s query tokens of a request, h heads.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch

from ..types import Support, Unsupported
from . import launchers
from . import mla_prefill as _prefill
from ._tensor import device_of, stream_of
from .mla_fused import OPS as FUSED_OPS
from .mla_fused import MlaFused

WIDTH, LATENT = 576, 512  # values of a cached token; of which these are also its value vector
BLOCK = 64  # tokens that the kernels take at a time
FIXED_SPLIT = 16  # blocks of a split in deterministic mode
PART_FIELDS = 8


class Schedule(NamedTuple):
    """Who works on what: made on the device from seq_lens, the same for all layers of a model."""

    parts: torch.Tensor  # int32 [num_parts, 8], see MlaPart in csrc/cuda/params/mla.hpp
    num_splits: torch.Tensor  # int32 [b + 1]: splits of the requests before i
    split_blocks: int  # 0, or blocks of a split in deterministic mode


def page_refusal(page: int) -> str:
    """Why the kernels cannot read pages of that many tokens; empty when they can."""
    if page in (16, 32) or (page > 0 and page % BLOCK == 0):
        return ""
    return f"kv_cache: expected pages of 16, 32, or a multiple of {BLOCK} tokens, got {page}"


def _check(q, kv_cache, head_dim_v, softmax_scale) -> None:
    """Raise Unsupported, naming what is given, for a call the kernels do not cover."""
    if q.dtype != torch.bfloat16 or kv_cache.dtype not in (torch.bfloat16, torch.uint8):
        raise Unsupported(
            "q, kv_cache: expected torch.bfloat16 and torch.bfloat16 or torch.uint8, "
            f"got {q.dtype} and {kv_cache.dtype}"
        )
    if q.shape[-1] != WIDTH or head_dim_v != LATENT:
        raise Unsupported(
            f"q, head_dim_v: expected widths {WIDTH} and {LATENT}, "
            f"got {q.shape[-1]} and {head_dim_v}"
        )
    refusal = page_refusal(kv_cache.shape[1])
    if refusal:
        raise Unsupported(refusal)
    strides = kv_cache.stride()
    unit = 16 // kv_cache.itemsize
    if strides[2] != 1 or strides[0] % unit or strides[1] % unit or kv_cache.data_ptr() % 16:
        raise Unsupported(
            "kv_cache: expected 16-byte aligned rows of contiguous values, "
            f"got strides {strides} at address {kv_cache.data_ptr():#x}"
        )
    if softmax_scale is not None and not 0 < softmax_scale < math.inf:
        raise Unsupported(f"softmax_scale: expected a positive number, got {softmax_scale}")


def _supports(machine: str, op: str, **shapes) -> Support:
    if op == "mla_prefill":
        return _prefill.supports(machine, **shapes)
    if op in FUSED_OPS:
        return MlaFused(machine).supports(op, **shapes)
    if op != "mla_decode":
        return Support(False, f"the {machine} backend has no implementation of {op}")
    for letter, expected in (("dl", LATENT), ("r", WIDTH - LATENT), ("v", LATENT)):
        if shapes.get(letter, expected) != expected:
            return Support(False, f"expected {letter} = {expected}, got {shapes[letter]}")
    refusal = page_refusal(shapes.get("page", BLOCK))
    if refusal:
        return Support(False, refusal)
    if shapes.get("dtype", torch.bfloat16) not in (torch.bfloat16, torch.uint8):
        return Support(
            False, f"dtype: expected torch.bfloat16 or torch.uint8, got {shapes['dtype']}"
        )
    return Support(True, f"{machine}: mla_decode (bf16 or FP8 cache)")


def on(machine: str):
    """mla_schedule(), mla_decode(), mla_prefill(), mla_prefill_backward() and supports() for "cuda"
    or "emu"."""

    def where(x: torch.Tensor) -> dict:
        return dict(machine=machine, ordinal=device_of(x), stream=stream_of(x))

    def mla_schedule(
        seq_lens: torch.Tensor, rows: int, *, deterministic: bool = False, num_sms: int = 0
    ) -> Schedule:
        """The schedule of decode for seq_lens int32 [b] and `rows` = s * h queries of a request.

        No host synchronisation: it may be captured in a CUDA graph. deterministic cuts every
        request at fixed places, so that its result does not depend on the batch around it.
        """
        seq_lens = seq_lens.contiguous()
        b = seq_lens.shape[0]
        num_parts = launchers().mla_num_parts(machine, device_of(seq_lens), rows, num_sms)
        parts = seq_lens.new_empty(num_parts, PART_FIELDS)
        num_splits = seq_lens.new_empty(b + 1)
        split_blocks = FIXED_SPLIT if deterministic else 0
        launchers().mla_schedule(
            **where(seq_lens),
            seq_lens=seq_lens.data_ptr(),
            parts=parts.data_ptr(),
            num_splits=num_splits.data_ptr(),
            b=b,
            num_parts=num_parts,
            split_blocks=split_blocks,
            rows=rows,
        )
        return Schedule(parts, num_splits, split_blocks)

    def mla_decode(
        q: torch.Tensor,
        kv_cache: torch.Tensor,
        block_table: torch.Tensor,
        seq_lens: torch.Tensor,
        *,
        head_dim_v: int = LATENT,
        softmax_scale: float | None = None,
        causal: bool = True,
        deterministic: bool = False,
        schedule: Schedule | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As dskernels.ref.mla.mla_decode for 512 + 64 wide bf16 queries, bf16 or FP8 caches.

        FP8 latents are rounded to bf16 when they are dequantised.

        schedule  of mla_schedule for the same seq_lens and rows; made here when None
        """
        _check(q, kv_cache, head_dim_v, softmax_scale)
        b, s, h, _ = q.shape
        out = q.new_empty(b, s, h, LATENT)
        lse = q.new_empty(b, h, s, dtype=torch.float32)
        if out.numel() == 0:
            return out, lse
        if kv_cache.shape[0] == 0:  # no page: every request is empty; TMA needs an address
            kv_cache = kv_cache.new_zeros(1, BLOCK, kv_cache.shape[2])
        q = q.contiguous()
        q = q.clone() if q.data_ptr() % 16 else q
        block_table, seq_lens = block_table.contiguous(), seq_lens.contiguous()
        pages, page, _ = kv_cache.shape
        if schedule is None:
            schedule = mla_schedule(seq_lens, s * h, deterministic=deterministic)
        num_parts = schedule.parts.shape[0]
        max_splits = num_parts + b
        if schedule.split_blocks:
            longest = -(-block_table.shape[1] * page // BLOCK)
            max_splits = b * max(1, -(-longest // schedule.split_blocks))
        out_partial = q.new_empty(max_splits, s * h, LATENT, dtype=torch.float32)
        lse_partial = q.new_empty(max_splits, s * h, dtype=torch.float32)
        launchers().mla_decode(
            **where(q),
            q=q.data_ptr(),
            kv=kv_cache.data_ptr(),
            block_table=block_table.data_ptr(),
            seq_lens=seq_lens.data_ptr(),
            parts=schedule.parts.data_ptr(),
            num_splits=schedule.num_splits.data_ptr(),
            out=out.data_ptr(),
            lse=lse.data_ptr(),
            out_partial=out_partial.data_ptr(),
            lse_partial=lse_partial.data_ptr(),
            b=b,
            s=s,
            h=h,
            pages=pages,
            page=page,
            max_pages=block_table.shape[1],
            ld_page=kv_cache.stride(0),
            ld_token=kv_cache.stride(1),
            num_parts=num_parts,
            max_splits=max_splits,
            split_blocks=schedule.split_blocks,
            fp8=kv_cache.dtype == torch.uint8,
            causal=causal,
            softmax_scale=WIDTH**-0.5 if softmax_scale is None else softmax_scale,
        )
        return out, lse

    supports = functools.partial(_supports, machine)
    mla_prefill = functools.partial(_prefill.prefill, machine)
    mla_prefill_backward = functools.partial(_prefill.prefill_backward, machine)
    return mla_schedule, mla_decode, mla_prefill, mla_prefill_backward, supports


mla_schedule, mla_decode, mla_prefill, mla_prefill_backward, supports = on("cuda")
_fused = MlaFused("cuda")
mla_latents, mla_cache_append = _fused.mla_latents, _fused.mla_cache_append
mla_absorb_queries, mla_absorb_output = _fused.mla_absorb_queries, _fused.mla_absorb_output
