"""Latent attention in Triton: decode over a paged cache, bf16 or FP8, split along the keys.

Letters: b requests, s query tokens, h heads, r rows of a request (s * h, token by token), dl latent
width, t cached tokens. One program attends BLOCK_R rows to one split of one request and writes a
normalised fp32 partial result with its log-sum-exp (base 2); a second kernel joins the splits.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from ..types import Support, Unsupported
from . import interpreting
from . import mla_prefill as _prefill
from .cast import cast_to, decode_e4m3
from .mla_blocks import product
from .mla_prefill import mla_prefill

__all__ = ["mla_decode", "mla_prefill", "supports"]

LATENT, ROPE = 512, 64
BLOCK_T = 32  # tokens a program takes at a time
FIXED_SPLIT = 32  # blocks of a split in deterministic mode
TARGET_PROGRAMS = 264  # two for each SM of an H100


@triton.jit
def load_block(
    kv_ptr, rope_ptr, scale_ptr, at, ld, inside,
    FP8: tl.constexpr, DL: tl.constexpr, DR: tl.constexpr,
):  # fmt: skip
    """Tokens whose rows start at `at` (in rows of `ld` elements of kv_ptr) -> latents, RoPE keys.

    FP8: the same bytes are seen as uint8, bf16 and fp32. Tokens outside are zero.
    """
    column = tl.arange(0, DL)
    rope_column = tl.arange(0, DR)
    mask = inside[:, None]
    latent = tl.load(kv_ptr + at[:, None] * ld + column[None, :], mask=mask, other=0)
    if FP8:
        scales = scale_ptr + at[:, None] * (ld // 4) + DL // 4 + column[None, :] // 128
        scale = tl.load(scales, mask=mask, other=0.0)
        latent = cast_to(decode_e4m3(latent).to(tl.float32) * scale, tl.bfloat16)
        rope_at = at[:, None] * (ld // 2) + (DL + DL // 32) // 2
    else:
        rope_at = at[:, None] * ld + DL
    rope = tl.load(rope_ptr + rope_at + rope_column[None, :], mask=mask, other=0.0)
    return latent, rope


@triton.jit
def decode_kernel(
    q_ptr, kv_ptr, rope_ptr, scale_ptr, table_ptr, lens_ptr, out_ptr, lse_ptr,
    s, h, page, ld_table, ld_page, ld_row, scale_log2,
    CAUSAL: tl.constexpr, FP8: tl.constexpr, FIXED: tl.constexpr, DL: tl.constexpr,
    DR: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """grid (row blocks, b, splits). q [b, r, DL + DR]; out [b, splits, r, DL], lse [b, splits, r].

    ld_page: rows of ld_row elements between pages. FIXED: blocks of a split, or 0 to divide each
    request evenly.
    """
    request = tl.program_id(1)
    split = tl.program_id(2)
    num_splits = tl.num_programs(2)
    rows = s * h
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    row_inside = row < rows
    length = tl.load(lens_ptr + request)
    blocks = tl.cdiv(length, BLOCK_T)
    share = FIXED if FIXED > 0 else tl.cdiv(blocks, num_splits)
    begin = split * share
    end = tl.minimum(begin + share, blocks)
    visible = tl.zeros((BLOCK_R,), tl.int32) + length
    if CAUSAL:
        visible = length - s + 1 + row // h

    column = tl.arange(0, DL)
    rope_column = tl.arange(0, DR)
    q_at = q_ptr + (tl.cast(request, tl.int64) * rows + row)[:, None] * (DL + DR)
    q = tl.load(q_at + column[None, :], mask=row_inside[:, None], other=0.0)
    q_rope = tl.load(q_at + DL + rope_column[None, :], mask=row_inside[:, None], other=0.0)

    peak = tl.full((BLOCK_R,), -1e30, tl.float32)
    total = tl.zeros((BLOCK_R,), tl.float32)
    out = tl.zeros((BLOCK_R, DL), tl.float32)
    for block in range(begin, end):
        token = block * BLOCK_T + tl.arange(0, BLOCK_T)
        inside = token < length
        entry = table_ptr + request * ld_table + token // page
        page_index = tl.load(entry, mask=inside, other=0).to(tl.int64)
        at = page_index * ld_page + token % page
        latent, rope = load_block(kv_ptr, rope_ptr, scale_ptr, at, ld_row, inside, FP8, DL, DR)
        scores = product(q, tl.trans(latent), WIDE)
        scores += product(q_rope, tl.trans(rope), WIDE)
        scores = tl.where(token[None, :] < visible[:, None], scores * scale_log2, float("-inf"))
        raised = tl.maximum(peak, tl.max(scores, 1))
        weights = tl.exp2(scores - raised[:, None])
        factor = tl.exp2(peak - raised)
        total = total * factor + tl.sum(weights, 1)
        out = out * factor[:, None]
        out += product(cast_to(weights, tl.bfloat16), latent, WIDE)
        peak = raised

    nothing = total == 0.0
    out = out / tl.where(nothing, 1.0, total)[:, None]
    lse = tl.where(nothing, float("-inf"), peak + tl.log2(tl.where(nothing, 1.0, total)))
    first = (tl.cast(request, tl.int64) * num_splits + split) * rows
    tl.store(out_ptr + (first + row)[:, None] * DL + column[None, :], out, mask=row_inside[:, None])
    tl.store(lse_ptr + first + row, lse, mask=row_inside)


@triton.jit
def combine_kernel(
    partial_ptr, partial_lse_ptr, out_ptr, lse_ptr, s, h, num_splits, DL: tl.constexpr
):  # fmt: skip
    """grid (r, b): the splits of one row -> out [b, r, DL] bf16, lse [b, h, s] natural."""
    row = tl.program_id(0)
    request = tl.program_id(1)
    rows = s * h
    column = tl.arange(0, DL)
    at = tl.cast(request, tl.int64) * num_splits * rows + row
    peak = tl.cast(-1e30, tl.float32)
    total = tl.cast(0.0, tl.float32)
    out = tl.zeros((DL,), tl.float32)
    for split in range(num_splits):
        lse = tl.load(partial_lse_ptr + at + split * rows)
        part = tl.load(partial_ptr + (at + split * rows) * DL + column)
        raised = tl.maximum(peak, lse)
        factor = tl.exp2(peak - raised)
        weight = tl.exp2(lse - raised)
        total = total * factor + weight
        out = out * factor + part * weight
        peak = raised
    nothing = total == 0.0
    safe = tl.where(nothing, 1.0, total)
    natural = tl.where(nothing, float("inf"), (peak + tl.log2(safe)) * 0.6931471805599453)
    tl.store(lse_ptr + (request * h + row % h) * s + row // h, natural)
    result = cast_to(out / safe, tl.bfloat16)
    tl.store(out_ptr + (tl.cast(request, tl.int64) * rows + row) * DL + column, result)


def _check(q, kv_cache, head_dim_v, softmax_scale) -> None:
    if q.dtype != torch.bfloat16 or kv_cache.dtype not in (torch.bfloat16, torch.uint8):
        raise Unsupported(
            "q, kv_cache: expected torch.bfloat16 and torch.bfloat16 or torch.uint8, "
            f"got {q.dtype} and {kv_cache.dtype}"
        )
    if (head_dim_v, q.shape[-1]) != (LATENT, LATENT + ROPE):
        raise Unsupported(
            f"q, head_dim_v: expected widths {LATENT + ROPE} and {LATENT}, "
            f"got {q.shape[-1]} and {head_dim_v}"
        )
    if softmax_scale is not None and not 0 < softmax_scale < math.inf:
        raise Unsupported(f"softmax_scale: expected a positive number, got {softmax_scale}")


def _rows_in_place(kv_cache: torch.Tensor) -> torch.Tensor:
    """The cache itself where its pages are whole numbers of rows apart, else a copy."""
    page_stride, row_stride, one = kv_cache.stride()
    aligned = kv_cache.data_ptr() % 16 == 0 and row_stride * kv_cache.itemsize % 16 == 0
    fits = one == 1 and aligned and row_stride > 0 and page_stride % row_stride == 0
    return kv_cache if fits else kv_cache.contiguous()


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
) -> tuple[torch.Tensor, torch.Tensor]:
    """As dskernels.ref.mla.mla_decode for 512 + 64 wide bf16 queries, bf16 or FP8 caches.

    FP8 latents are rounded to bf16 when they are dequantised.
    """
    _check(q, kv_cache, head_dim_v, softmax_scale)
    b, s, h, width = q.shape
    out = q.new_empty(b, s, h, LATENT)
    lse = q.new_empty(b, h, s, dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    rows = s * h
    q, block_table, seq_lens = q.contiguous(), block_table.contiguous(), seq_lens.contiguous()
    cache = _rows_in_place(kv_cache)
    fp8 = cache.dtype == torch.uint8
    block_r, programs = 16 if rows <= 16 else 32, TARGET_PROGRAMS
    if interpreting():  # where a program costs more than the rows it computes
        block_r, programs = 16 if rows <= 16 else 64, 24
    longest = -(-block_table.shape[1] * max(cache.shape[1], 1) // BLOCK_T)
    fixed = FIXED_SPLIT if deterministic else 0
    if deterministic:
        splits = max(1, -(-longest // FIXED_SPLIT))
    else:
        splits = max(1, min(longest, programs // (b * -(-rows // block_r))))
    partial = q.new_empty(b, splits, rows, LATENT, dtype=torch.float32)
    partial_lse = q.new_empty(b, splits, rows, dtype=torch.float32)
    decode_kernel[(-(-rows // block_r), b, splits)](
        q,
        cache,
        cache.view(torch.bfloat16) if fp8 else cache,
        cache.view(torch.float32) if fp8 else lse,
        block_table,
        seq_lens,
        partial,
        partial_lse,
        s,
        h,
        cache.shape[1],
        block_table.shape[1],
        cache.stride(0) // cache.stride(1),
        cache.stride(1),
        (width**-0.5 if softmax_scale is None else softmax_scale) * math.log2(math.e),
        CAUSAL=causal,
        FP8=fp8,
        FIXED=fixed,
        DL=LATENT,
        DR=ROPE,
        BLOCK_R=block_r,
        BLOCK_T=BLOCK_T,
        WIDE=interpreting(),
    )
    combine_kernel[(rows, b)](partial, partial_lse, out, lse, s, h, splits, DL=LATENT)
    return out, lse


def supports(op: str, **shapes) -> Support:
    """Whether the Triton kernels cover these sizes, and why not."""
    if op == "mla_prefill":
        return _prefill.supports(**shapes)
    if op != "mla_decode":
        return Support(False, f"the triton backend has no implementation of {op}")
    for letter, expected in (("dl", LATENT), ("r", ROPE), ("v", LATENT)):
        if shapes.get(letter, expected) != expected:
            return Support(False, f"expected {letter} = {expected}, got {shapes[letter]}")
    if shapes.get("dtype", torch.bfloat16) not in (torch.bfloat16, torch.uint8):
        return Support(
            False, f"dtype: expected torch.bfloat16 or torch.uint8, got {shapes['dtype']}"
        )
    return Support(True, "triton: mla_decode (bf16 or FP8 cache)")
