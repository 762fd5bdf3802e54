"""FP8 GEMM in Triton: dense, grouped by rows (sizes, row indices or masks) and grouped along k.

Scales are 1x128 of A and 128x128 of B, or 1x128 of both (weight gradients, fp32 out). Dimension
letters: m rows, n columns, k depth, g groups. One program computes one tile; the partial sum of
every 128 along k is promoted to fp32 with its scales, as on every backend.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ..types import ScaledTensor, Support, Unsupported
from . import interpreting
from .cast import cast_to, decode_e4m3

BLOCK_N, BLOCK_K = 128, 128
DENSE, CONTIGUOUS, MASKED, ALONG_K = 0, 1, 2, 3
BY_BLOCK, BY_ROW = (128, 128), (1, 128)  # blocks of b


@triton.jit
def locate_tile(tile, m, group_rows_ptr, num_groups, KIND: tl.constexpr, BLOCK_M: tl.constexpr):
    """The m tile with this number -> (group, its first row of A, rows left in the group).

    Rows left is 0 for a tile beyond the last group: the grid is an upper bound, because the counts
    are known on the device only.
    """
    group = 0
    start = 0
    first_tile = 0
    rows = 0
    found_group = 0
    found_start = 0
    while group < num_groups:
        size = tl.load(group_rows_ptr + group)
        tiles = tl.cdiv(size, BLOCK_M)
        if (tile >= first_tile) & (tile < first_tile + tiles):
            within = (tile - first_tile) * BLOCK_M
            found_group = group
            found_start = start + within
            rows = size - within
        first_tile += tiles
        start += m if KIND == 2 else size
        group += 1
    return found_group, found_start, rows


@triton.jit
def locate_depth(group, sizes_ptr):
    """The k range of a group of columns -> (first, one past the last)."""
    begin = 0
    for before in range(0, group):
        begin += tl.load(sizes_ptr + before)
    return begin, begin + tl.load(sizes_ptr + group)


@triton.jit
def gemm_kernel(
    a_ptr, sfa_ptr, b_ptr, sfb_ptr, d_ptr, counts_ptr, rows_ptr, c_ptr, bias_ptr,
    m, n, k, num_groups, ld_a, ld_b, ld_sfa, ld_sfb, plane_sfa,
    KIND: tl.constexpr, BY_ROW: tl.constexpr, GATHER: tl.constexpr, NATIVE_FP8: tl.constexpr,
    HAS_C: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """D [rows, n] = A [rows, k] * B [g * n, k]^T; see the module for the layouts.

    sfa: [k blocks, rows], row stride ld_sfa (masked: one such plane per group, plane_sfa apart);
    sfb: [g, ceil(n / 128), ceil(k / 128)], or BY_ROW [k blocks, n], row stride ld_sfb.
    m: rows (masked: rows allotted to each group). counts: rows of each group, or its share of k
    (along k: the groups lie side by side in A [m, k] and B [n, k], and D is [g, m, n]).
    GATHER (contiguous): the groups' rows are those that rows_ptr names, of A and of D.
    C, like D, and bias [g, n] are added in fp32 where there are any.
    """
    tile = tl.program_id(0)
    group = 0
    start = tile * BLOCK_M
    rows_left = m - start
    first_k = 0
    end_k = k
    if KIND == 3:
        group = tl.program_id(2)
        first_k, end_k = locate_depth(group, counts_ptr)
    elif KIND != 0:
        group, start, rows_left = locate_tile(tile, m, counts_ptr, num_groups, KIND, BLOCK_M)
        if rows_left <= 0:  # no group's: the grid is an upper bound
            end_k = 0
    row = tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    depth = tl.arange(0, BLOCK_K)
    row_inside = row < rows_left
    a_row = (start + row).to(tl.int64)
    if GATHER:
        a_row = tl.load(rows_ptr + a_row, mask=row_inside, other=0).to(tl.int64)
    d_row = a_row
    b_row = column.to(tl.int64)
    if KIND == 3:
        d_row += tl.cast(group, tl.int64) * m
    else:
        b_row += tl.cast(group, tl.int64) * n
    scale_row = a_row
    if KIND == 2:
        scale_row = a_row - group * m + tl.cast(group, tl.int64) * plane_sfa
    k_blocks = tl.cdiv(k, BLOCK_K)
    sfb_row = (group * tl.cdiv(n, 128) + column // 128) * k_blocks

    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for block in range(first_k // BLOCK_K, tl.cdiv(end_k, BLOCK_K)):
        at = block * BLOCK_K + depth
        a = tl.load(
            a_ptr + a_row[:, None] * ld_a + at[None, :],
            mask=row_inside[:, None] & (at[None, :] < end_k), other=0,
        )  # fmt: skip
        b = tl.load(
            b_ptr + b_row[None, :] * ld_b + at[:, None],
            mask=(column[None, :] < n) & (at[:, None] < end_k), other=0,
        )  # fmt: skip
        if NATIVE_FP8:
            partial = tl.dot(
                a.to(tl.float8e4nv, bitcast=True), b.to(tl.float8e4nv, bitcast=True)
            )  # fmt: skip
        else:
            partial = tl.dot(decode_e4m3(a), decode_e4m3(b))
        sa = tl.load(sfa_ptr + block * ld_sfa + scale_row, mask=row_inside, other=0.0)
        sfb_at = sfb_row + block
        if BY_ROW:
            sfb_at = block * ld_sfb + column
        sb = tl.load(sfb_ptr + sfb_at, mask=column < n, other=0.0)
        total += partial * (sa[:, None] * sb[None, :])
    if KIND == 3:  # a group that shares a block of scales with its neighbour: a caller's error
        if (first_k % BLOCK_K != 0) | ((end_k - first_k) % BLOCK_K != 0):
            total += float("nan")

    out = d_row[:, None] * n + column[None, :]
    inside = row_inside[:, None] & (column[None, :] < n)
    if HAS_C:
        total += tl.load(c_ptr + out, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + group * n + column, mask=column < n, other=0.0)
        total += bias.to(tl.float32)[None, :]
    tl.store(d_ptr + out, cast_to(total, d_ptr.dtype.element_ty), mask=inside)


# ---- launchers ---------------------------------------------------------------------------------


def native_fp8(device: torch.device) -> bool:
    """Whether the target's tensor cores take e4m3 (sm_89 and later); else it is decoded to fp16."""
    if interpreting():
        return False
    return torch.cuda.get_device_capability(device) >= (8, 9)


def block_m(rows: int) -> int:
    """Rows of a tile: no more than the problem has, within what tl.dot takes."""
    return min(128, max(16, triton.next_power_of_2(rows)))


def _check(a, b, out_dtype, b_blocks: tuple, epilogue: str | None = None) -> torch.dtype:
    for name, operand, blocks in (("a", a, (BY_ROW,)), ("b", b, b_blocks)):
        if not isinstance(operand, ScaledTensor):
            raise Unsupported(f"{name}: expected a ScaledTensor, got {type(operand).__name__}")
        if tuple(operand.block) not in blocks or operand.dtype != "e4m3":
            raise Unsupported(
                f"{name}: expected e4m3 in blocks of {' or '.join(map(str, blocks))}, "
                f"got {operand.dtype} in {operand.block}"
            )
    if epilogue is not None:
        raise Unsupported(f"epilogue: expected None, got {epilogue!r}")
    if out_dtype not in (None, torch.bfloat16, torch.float16, torch.float32):
        raise Unsupported(f"out_dtype: expected bfloat16, float16 or float32, got {out_dtype}")
    return out_dtype or (torch.float32 if tuple(b.block) == BY_ROW else torch.bfloat16)


def _mn_major(scale: torch.Tensor) -> torch.Tensor:
    """Scales [..., m, k blocks] -> [..., k blocks, m padded to fours], the padding 0."""
    m = scale.shape[-2]
    rows = scale.new_zeros(*scale.shape[:-2], scale.shape[-1], -(-m // 4) * 4)
    rows[..., :m] = scale.transpose(-2, -1)
    return rows


def _launch(
    kind: int, a, b, d, counts: torch.Tensor | None, expected_m: int, c=None, bias=None, rows=None
) -> None:
    m, k = a.shape[-2:]
    n = b.shape[-2]
    if not d.numel():
        return
    data, weight = a.data.contiguous(), b.data.contiguous()
    by_row = tuple(b.block) == BY_ROW
    sfa, sfb = _mn_major(a.scale), _mn_major(b.scale) if by_row else b.scale.contiguous()
    groups = 1 if kind == DENSE else counts.shape[0]
    height = block_m(expected_m)
    tiles = triton.cdiv(m, height) * (groups if kind == MASKED else 1)
    tiles += groups if kind == CONTIGUOUS else 0  # each group may add one partly empty tile
    gemm_kernel[(tiles, triton.cdiv(n, BLOCK_N), groups if kind == ALONG_K else 1)](
        data.view(torch.uint8), sfa, weight.view(torch.uint8), sfb, d,
        d if counts is None else counts, d if rows is None else rows,
        d if c is None else c.contiguous(), d if bias is None else bias.contiguous(),
        m, n, k, groups, k, k, sfa.stride(-2), sfb.stride(-2),
        sfa.stride(0) if kind == MASKED else 0,
        KIND=kind, BY_ROW=by_row, GATHER=rows is not None, NATIVE_FP8=native_fp8(d.device),
        HAS_C=c is not None, HAS_BIAS=bias is not None,
        BLOCK_M=height, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K,
    )  # fmt: skip


def gemm(
    a: ScaledTensor,
    b: ScaledTensor,
    *,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    c: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    epilogue: str | None = None,
    deterministic: bool = False,
    num_sms: int | None = None,
) -> torch.Tensor:
    """As dskernels.ref.gemm.gemm for e4m3 in blocks (1, 128) x (128, 128) or (1, 128) x (1, 128),
    without epilogue.

    The tile height depends on m, the sums do not: one ordered sum an output, always deterministic.
    """
    dtype = _check(a, b, out_dtype if out is None else out.dtype, (BY_BLOCK, BY_ROW), epilogue)
    d = torch.empty(a.shape[0], b.shape[0], dtype=dtype, device=a.device)
    _launch(DENSE, a, b, d, None, a.shape[0], c, bias)
    return d if out is None else out.copy_(d)


def _rows_by_group(m_indices: torch.Tensor, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Row indices [m] -> (the rows in the order of their groups, padding last; rows of each group),
    found on the device."""
    key = torch.where(m_indices < 0, groups, m_indices)
    each = torch.arange(groups, device=key.device)
    counts = (key[:, None] == each).sum(0, dtype=torch.int32)
    return torch.argsort(key, stable=True).to(torch.int32), counts


def grouped_gemm(
    a: ScaledTensor,
    b: ScaledTensor,
    *,
    group_sizes: torch.Tensor | Sequence[int] | None = None,
    m_indices: torch.Tensor | None = None,
    masked_m: torch.Tensor | None = None,
    expected_m: int | None = None,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    c: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    epilogue: str | None = None,
    deterministic: bool = False,
    num_sms: int | None = None,
) -> torch.Tensor:
    """As dskernels.ref.gemm.grouped_gemm for e4m3 operands without epilogue, in any of the three
    forms. No order or alignment is asked of group_sizes or m_indices."""
    dtype = _check(a, b, out_dtype if out is None else out.dtype, (BY_BLOCK,), epilogue)
    kind, rows = CONTIGUOUS, None
    if m_indices is not None:
        rows, counts = _rows_by_group(m_indices, b.shape[0])
    else:
        kind = CONTIGUOUS if masked_m is None else MASKED
        counts = group_sizes if masked_m is None else masked_m
        counts = torch.as_tensor(counts, dtype=torch.int32, device=a.device).contiguous()
    d = torch.zeros(*a.shape[:-1], b.shape[1], dtype=dtype, device=a.device)
    expected = expected_m or (a.shape[-2] if kind == MASKED else -(-a.shape[0] // b.shape[0]))
    _launch(kind, a, b, d, counts, max(expected, 1), c, bias, rows)
    return d if out is None else out.copy_(d)


def grouped_gemm_k(
    a: ScaledTensor,
    b: ScaledTensor,
    group_sizes: torch.Tensor | Sequence[int],
    *,
    c: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
    deterministic: bool = False,
    num_sms: int | None = None,
) -> torch.Tensor:
    """As dskernels.ref.gemm.grouped_gemm_k for e4m3 operands, both in blocks (1, 128).

    An empty group loads nothing. Group sizes may lie on the device, where a size that is no
    multiple of 128 makes its group's result, and those behind it, NaN.
    """
    dtype = _check(a, b, out_dtype if out is None else out.dtype, (BY_ROW,))
    counts = torch.as_tensor(group_sizes, dtype=torch.int32, device=a.device).contiguous()
    d = torch.empty(counts.shape[0], a.shape[0], b.shape[0], dtype=dtype, device=a.device)
    _launch(ALONG_K, a, b, d, counts, a.shape[0], c)
    return d if out is None else out.copy_(d)


def supports(op: str, **shapes) -> Support:
    blocks = {"grouped_gemm": "128x128", "grouped_gemm_k": "1x128"}.get(op, "128x128 or 1x128")
    return Support(True, f"triton: e4m3 operands, b in blocks of {blocks}, no epilogue")
