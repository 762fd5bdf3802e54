"""FP8 GEMM in Triton: dense, grouped contiguous and masked, scales 1x128 of A and 128x128 of B.

Dimension letters: m rows, n columns, k depth, g groups. One program computes one tile; the partial
sum of every 128 along k is promoted to fp32 with its scales, as on every backend.
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
DENSE, CONTIGUOUS, MASKED = 0, 1, 2


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
def gemm_kernel(
    a_ptr, sfa_ptr, b_ptr, sfb_ptr, d_ptr, group_rows_ptr, c_ptr, bias_ptr,
    m, n, k, num_groups, ld_a, ld_b, ld_sfa, plane_sfa,
    KIND: tl.constexpr, NATIVE_FP8: tl.constexpr, HAS_C: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """D [rows, n] = A [rows, k] * B [g * n, k]^T; see the module for the layouts.

    sfa: [k blocks, rows], row stride ld_sfa (masked: one such plane per group, plane_sfa apart);
    sfb: [g, ceil(n / 128), ceil(k / 128)]. m: rows (masked: rows allotted to each group).
    C, like D, and bias [g, n] are added in fp32 where there are any.
    """
    tile = tl.program_id(0)
    group = 0
    start = tile * BLOCK_M
    rows_left = m - start
    if KIND != 0:
        group, start, rows_left = locate_tile(tile, m, group_rows_ptr, num_groups, KIND, BLOCK_M)
    row = tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    depth = tl.arange(0, BLOCK_K)
    row_inside = row < rows_left
    a_row = (start + row).to(tl.int64)
    b_row = (group * n + column).to(tl.int64)
    scale_row = a_row
    if KIND == 2:
        scale_row = a_row - group * m + tl.cast(group, tl.int64) * plane_sfa
    k_blocks = tl.cdiv(k, BLOCK_K)
    sfb_row = (group * tl.cdiv(n, 128) + column // 128) * k_blocks

    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for block in range(0, k_blocks):
        at = block * BLOCK_K + depth
        a = tl.load(
            a_ptr + a_row[:, None] * ld_a + at[None, :],
            mask=row_inside[:, None] & (at[None, :] < k), other=0,
        )  # fmt: skip
        b = tl.load(
            b_ptr + b_row[None, :] * ld_b + at[:, None],
            mask=(column[None, :] < n) & (at[:, None] < k), other=0,
        )  # fmt: skip
        if NATIVE_FP8:
            partial = tl.dot(
                a.to(tl.float8e4nv, bitcast=True), b.to(tl.float8e4nv, bitcast=True)
            )  # fmt: skip
        else:
            partial = tl.dot(decode_e4m3(a), decode_e4m3(b))
        sa = tl.load(sfa_ptr + block * ld_sfa + scale_row, mask=row_inside, other=0.0)
        sb = tl.load(sfb_ptr + sfb_row + block, mask=column < n, other=0.0)
        total += partial * (sa[:, None] * sb[None, :])

    out = a_row[:, None] * n + column[None, :]
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


def _check(a, b, out_dtype, epilogue) -> torch.dtype:
    for name, operand, block in (("a", a, (1, 128)), ("b", b, (128, 128))):
        if not isinstance(operand, ScaledTensor):
            raise Unsupported(f"{name}: expected a ScaledTensor, got {type(operand).__name__}")
        if tuple(operand.block) != block or operand.dtype != "e4m3":
            raise Unsupported(
                f"{name}: expected e4m3 in blocks of {block}, "
                f"got {operand.dtype} in {operand.block}"
            )
    if epilogue is not None:
        raise Unsupported(f"epilogue: expected None, got {epilogue!r}")
    if out_dtype not in (None, torch.bfloat16, torch.float16, torch.float32):
        raise Unsupported(f"out_dtype: expected bfloat16, float16 or float32, got {out_dtype}")
    return out_dtype or torch.bfloat16


def _launch(
    kind: int, a, b, d, counts: torch.Tensor | None, expected_m: int, c=None, bias=None
) -> None:
    m, k = a.shape[-2:]
    n = b.shape[-2]
    if not d.numel():
        return
    data, weight = a.data.contiguous(), b.data.contiguous()
    ld_sfa = -(-m // 4) * 4
    groups = 1 if kind == DENSE else b.shape[0]
    sfa = a.scale.new_zeros(*a.scale.shape[:-2], a.scale.shape[-1], ld_sfa)
    sfa[..., :m] = a.scale.transpose(-2, -1)
    rows = block_m(expected_m)
    tiles = triton.cdiv(m, rows) * (groups if kind == MASKED else 1)
    tiles += groups if kind == CONTIGUOUS else 0  # each group may add one partly empty tile
    gemm_kernel[(tiles, triton.cdiv(n, BLOCK_N))](
        data.view(torch.uint8), sfa, weight.view(torch.uint8), b.scale.contiguous(), d,
        d if counts is None else counts, d if c is None else c.contiguous(),
        d if bias is None else bias.contiguous(), m, n, k, groups, k, k, ld_sfa,
        sfa.stride(0) if kind == MASKED else 0,
        KIND=kind, NATIVE_FP8=native_fp8(d.device), HAS_C=c is not None, HAS_BIAS=bias is not None,
        BLOCK_M=rows, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K,
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
    """As dskernels.ref.gemm.gemm for e4m3 in blocks (1, 128) x (128, 128), without epilogue.

    The tile height depends on m, the sums do not: one ordered sum an output, always deterministic.
    """
    dtype = _check(a, b, out_dtype if out is None else out.dtype, epilogue)
    d = torch.empty(a.shape[0], b.shape[0], dtype=dtype, device=a.device)
    _launch(DENSE, a, b, d, None, a.shape[0], c, bias)
    return d if out is None else out.copy_(d)


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
    """As dskernels.ref.gemm.grouped_gemm, by group_sizes (no padding needed) or masked_m."""
    dtype = _check(a, b, out_dtype if out is None else out.dtype, epilogue)
    if m_indices is not None:
        raise Unsupported("m_indices: expected group_sizes or masked_m, got m_indices")
    masked = masked_m is not None
    counts = masked_m if masked else group_sizes
    counts = torch.as_tensor(counts, dtype=torch.int32, device=a.device).contiguous()
    d = torch.zeros(*a.shape[:-1], b.shape[1], dtype=dtype, device=a.device)
    expected = expected_m or (a.shape[-2] if masked else -(-a.shape[0] // b.shape[0]))
    _launch(MASKED if masked else CONTIGUOUS, a, b, d, counts, max(expected, 1), c, bias)
    return d if out is None else out.copy_(d)


def supports(op: str, **shapes) -> Support:
    if op == "grouped_gemm_k":
        return Support(False, "the triton backend has no implementation of grouped_gemm_k")
    return Support(True, "triton: e4m3 operands, no epilogue")
