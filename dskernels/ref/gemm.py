"""Matrix products: dense, grouped by rows (experts), grouped along k (weight gradients).

Letters: m rows, n columns, k depth, g groups. Everything is "nt": a [m, k] times b [n, k] is
[m, n], both operands with contiguous k, which is the only layout Hopper's FP8 tensor cores take.

Scaled operands (e4m3): a has blocks (1, 128), b blocks (128, 128) ("1d2d") or (1, 128) ("1d1d",
weight gradients). The sum is pinned, so that every backend can be compared bit for bit:

    final = 0
    for each block of 128 along k, in order:
        acc   = sum of the block's 128 products
        final = fma(scale_a * scale_b, acc, final)      scale product rounded to fp32, exact FMA

`accumulate` says how the 128 products become acc:
    "fp32"                 exactly, rounded once to fp32: independent of the order of the products
    "hopper"               as Hopper's tensor core does (see tensorcore.py): 4 steps of 32
    "hopper_no_promotion"  the tensor core alone for as long as the scales last: with blocks
                           (1, k) and (128, k) that is all of k, the error the V3 report warns of
    "fp64"                 no pinned order: everything in fp64, the yardstick for errors

Plain operands: products and sums in fp32 (fp64 for fp64 operands), rounded once at the end;
"hopper" runs FP16 and BF16 through the tensor core's arithmetic over all of k.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..types import ScaledTensor
from . import tensorcore
from .rowwise import quantize, swiglu

Operand = torch.Tensor | ScaledTensor
ACCUMULATE = ("fp32", "fp64", "hopper", "hopper_no_promotion")
EPILOGUES = (None, "swiglu", "swiglu_quant")
PROMOTION_INTERVAL = 128


def gemm(
    a: Operand,
    b: Operand,
    *,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    c: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    epilogue: str | None = None,
    deterministic: bool = False,
    num_sms: int | None = None,
    accumulate: str = "fp32",
) -> torch.Tensor | ScaledTensor:
    """a [m, k] times b [n, k] transposed, plus c [m, n], plus bias [n] -> [m, n].

    c and bias are added in fp32, in that order, to the unrounded product. epilogue "swiglu"
    (b = [gate; up] along n) gives silu(gate) * up [m, n/2]; "swiglu_quant" quantises that, still
    unrounded, to a ScaledTensor in blocks (1, 128). The result is rounded once to out_dtype:
    by default a's dtype for plain operands, bf16 for 1d2d, fp32 for 1d1d. `out` takes the result
    and is returned. Plain operands are differentiable. An empty k gives zeros (plus c and bias).

    deterministic and num_sms change nothing here. Raises ValueError or TypeError naming the
    argument that does not fit. Source: V3 report 3.3; DeepGEMM's recipes.
    """
    del deterministic, num_sms
    _check_operands(a, b, b_dims=2)
    _check_modes(a, epilogue, accumulate)
    value = _epilogue(_product(a, b, accumulate), c, bias, epilogue)
    return _store(value, a, b, epilogue, out, out_dtype)


def grouped_gemm(
    a: Operand,
    b: Operand,
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
    accumulate: str = "fp32",
) -> torch.Tensor | ScaledTensor:
    """Every row of a times the matrix of its group in b [g, n, k]. Exactly one of three forms:

    group_sizes  [g]: a [m, k] holds the groups one after the other; sum(group_sizes) <= m
    m_indices    int32 [m]: the group of each row of a [m, k], -1 for a padding row; kernels may
                 ask for segments aligned to 128, the meaning needs no alignment
    masked_m     [g]: a [g, max_m, k], of which the first masked_m[i] rows of group i count

    Padding rows (-1, behind the last group, behind masked_m) are never read, and are 0 in the
    result whatever c and bias hold; behind masked_m other backends may leave them unwritten.
    expected_m is a hint for the launch. c has the result's shape before the epilogue, bias is
    [g, n]. Everything else as in `gemm`; plain operands are differentiable.
    """
    del expected_m, deterministic, num_sms
    _check_operands(a, b, b_dims=3)
    _check_modes(a, epilogue, accumulate)
    groups = _rows_of_groups(a, b.shape[0], group_sizes, m_indices, masked_m)
    lead, n = a.shape[:-1], b.shape[1]
    flat = _flatten_rows(a)
    flat_c = None if c is None else _checked_c(c, (*lead, n)).reshape(-1, n)
    if bias is not None and tuple(bias.shape) != (b.shape[0], n):
        raise ValueError(f"bias: expected shape {(b.shape[0], n)}, got {tuple(bias.shape)}")
    rows, pieces = [], []
    for index, group_rows in enumerate(groups):
        if not group_rows.numel():
            continue
        product = _product(_take_rows(flat, group_rows), _take_group(b, index), accumulate)
        group_c = None if flat_c is None else flat_c[group_rows]
        group_bias = None if bias is None else bias[index]
        rows.append(group_rows)
        pieces.append(_epilogue(product, group_c, group_bias, epilogue))
    width = n if epilogue is None else n // 2
    wide = pieces[0].dtype if pieces else torch.float32
    device = a.device
    value = torch.zeros(flat.shape[0], width, dtype=wide, device=device)
    if pieces:
        value = value.index_copy(0, torch.cat(rows), torch.cat(pieces))
    return _store(value.reshape(*lead, width), a, b, epilogue, out, out_dtype)


def grouped_gemm_k(
    a: Operand,
    b: Operand,
    group_sizes: torch.Tensor | Sequence[int],
    *,
    c: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
    deterministic: bool = False,
    num_sms: int | None = None,
    accumulate: str = "fp32",
) -> torch.Tensor:
    """The weight gradients of all experts: a [m, sum k], b [n, sum k] -> [g, m, n].

    group_sizes [g] cuts the shared depth into groups, one product each, plus c [g, m, n] in fp32;
    columns behind the last group are never read. An empty group gives 0 (or its c). Scaled
    operands: both in blocks (1, 128), group sizes multiples of 128. Differentiable for plain ones.
    """
    del deterministic, num_sms
    _check_operands(a, b, b_dims=2)
    _check_modes(a, None, accumulate)
    scaled = isinstance(a, ScaledTensor)
    if scaled and b.block[0] != 1:
        raise ValueError(f"b: expected block (1, {a.block[1]}) for grouped_gemm_k, got {b.block}")
    sizes = _sizes(group_sizes, None, a.shape[1], "columns of a")
    if scaled and any(size % a.block[1] for size in sizes):
        raise ValueError(f"group_sizes: expected multiples of {a.block[1]}, got {sizes}")
    m, n = a.shape[0], b.shape[0]
    if c is not None:
        _checked_c(c, (len(sizes), m, n))
    pieces, start = [], 0
    for index, size in enumerate(sizes):
        ks = slice(start, start + size)
        product = _product(_take_columns(a, ks), _take_columns(b, ks), accumulate)
        pieces.append(_epilogue(product, None if c is None else c[index], None, None))
        start += size
    empty = torch.zeros(0, m, n, device=a.device)
    return _store(torch.stack(pieces) if pieces else empty, a, b, None, out, out_dtype)


def _product(a: Operand, b: Operand, accumulate: str) -> torch.Tensor:
    """a [m, k] b [n, k]^T in fp32, or in fp64 where that is asked for."""
    if isinstance(a, ScaledTensor):
        return _scaled_product(a, b, accumulate)
    if accumulate.startswith("hopper"):
        zero = torch.zeros(a.shape[0], b.shape[0], device=a.device)
        return tensorcore.wgmma(a, b, zero)
    wide = torch.float64 if accumulate == "fp64" or a.dtype == torch.float64 else torch.float32
    return a.to(wide) @ b.to(wide).transpose(0, 1)


def _scaled_product(a: ScaledTensor, b: ScaledTensor, accumulate: str) -> torch.Tensor:
    if accumulate == "fp64":
        return a.dequantize(torch.float64) @ b.dequantize(torch.float64).transpose(0, 1)
    (m, k), n, depth = a.shape, b.shape[0], a.block[1]
    interval = depth if accumulate == "hopper_no_promotion" else PROMOTION_INTERVAL
    final = torch.zeros(m, n, device=a.device)
    for block in range(a.scale.shape[1]):
        scale_b = b.scale[:, block].repeat_interleave(b.block[0])[:n]
        scale = a.scale[:, block, None] * scale_b[None, :]
        end = min((block + 1) * depth, k)
        for start in range(block * depth, end, interval):
            ks = slice(start, min(start + interval, end))
            acc = _partial_sum(a.data[:, ks], b.data[:, ks], accumulate)
            final = tensorcore.fma(scale, acc, final)
    return final


def _partial_sum(a: torch.Tensor, b: torch.Tensor, accumulate: str) -> torch.Tensor:
    if accumulate == "fp32":
        # Exact: products of e4m3 are multiples of 2^-18 below 2^18, their sums fit fp64's 53 bits.
        return (a.double() @ b.double().transpose(0, 1)).float()
    return tensorcore.wgmma(a, b, torch.zeros(a.shape[0], b.shape[0], device=a.device))


def _epilogue(
    product: torch.Tensor,
    c: torch.Tensor | None,
    bias: torch.Tensor | None,
    epilogue: str | None,
) -> torch.Tensor:
    if c is not None:
        product = product + _checked_c(c, tuple(product.shape)).to(product.dtype)
    if bias is not None:
        if tuple(bias.shape) != (product.shape[1],):
            raise ValueError(f"bias: expected [n = {product.shape[1]}], got {tuple(bias.shape)}")
        product = product + bias.to(product.dtype)
    return product if epilogue is None else swiglu(product)


def _store(
    value: torch.Tensor,
    a: Operand,
    b: Operand,
    epilogue: str | None,
    out: torch.Tensor | None,
    out_dtype: torch.dtype | None,
) -> torch.Tensor | ScaledTensor:
    if epilogue == "swiglu_quant":
        if out is not None or out_dtype is not None:
            raise ValueError("out, out_dtype: expected None with epilogue 'swiglu_quant'")
        return quantize(value)
    if out is not None:
        if out_dtype not in (None, out.dtype):
            raise ValueError(f"out_dtype: expected out's {out.dtype}, got {out_dtype}")
        if out.shape != value.shape:
            raise ValueError(f"out: expected {tuple(value.shape)}, got {tuple(out.shape)}")
        return out.copy_(value)
    if out_dtype is None:
        scaled = isinstance(a, ScaledTensor)
        one_d = torch.float32 if scaled and b.block[0] == 1 else torch.bfloat16
        out_dtype = one_d if scaled else a.dtype
    return value.to(out_dtype)


def _rows_of_groups(
    a: Operand,
    num_groups: int,
    group_sizes: torch.Tensor | Sequence[int] | None,
    m_indices: torch.Tensor | None,
    masked_m: torch.Tensor | None,
) -> list[torch.Tensor]:
    """The rows of a, flattened to two dimensions, that belong to each group."""
    if sum(form is not None for form in (group_sizes, m_indices, masked_m)) != 1:
        raise ValueError("expected exactly one of group_sizes, m_indices and masked_m")
    dims = 3 if masked_m is not None else 2
    if len(a.shape) != dims or (dims == 3 and a.shape[0] != num_groups):
        wanted = "[m, k]" if dims == 2 else f"[g = {num_groups}, max_m, k]"
        raise ValueError(f"a: expected {wanted}, got {tuple(a.shape)}")
    device = a.device
    if m_indices is not None:
        if tuple(m_indices.shape) != (a.shape[0],):
            raise ValueError(f"m_indices: expected [{a.shape[0]}], got {tuple(m_indices.shape)}")
        if m_indices.numel() and not -1 <= m_indices.min() <= m_indices.max() < num_groups:
            raise ValueError(
                f"m_indices: expected values in [-1, {num_groups}), got "
                f"{int(m_indices.min())} .. {int(m_indices.max())}"
            )
        return [(m_indices == group).nonzero().flatten() for group in range(num_groups)]
    if masked_m is not None:
        max_m = a.shape[1]
        counts = torch.as_tensor(masked_m).tolist()
        if len(counts) != num_groups or not all(0 <= count <= max_m for count in counts):
            raise ValueError(
                f"masked_m: expected {num_groups} values in [0, {max_m}], got {counts}"
            )
        starts = [group * max_m for group in range(num_groups)]
    else:
        counts = _sizes(group_sizes, num_groups, a.shape[0], "rows of a")
        starts = [sum(counts[:group]) for group in range(num_groups)]
    return [
        torch.arange(start, start + count, device=device) for start, count in zip(starts, counts)
    ]


def _sizes(sizes: torch.Tensor | Sequence[int], num: int | None, limit: int, of: str) -> list[int]:
    values = torch.as_tensor(sizes).tolist()
    if num is not None and len(values) != num:
        raise ValueError(f"group_sizes: expected {num} values, got {len(values)}")
    if any(value < 0 for value in values) or sum(values) > limit:
        raise ValueError(
            f"group_sizes: expected non-negative sizes with a sum of at most {limit} ({of}), "
            f"got {values}"
        )
    return values


def _flatten_rows(a: Operand) -> Operand:
    if isinstance(a, torch.Tensor):
        return a.reshape(-1, a.shape[-1])
    data, scale = a.data.flatten(0, -2), a.scale.reshape(-1, a.scale.shape[-1])
    return ScaledTensor(data, scale, a.block, a.dtype)


def _take_rows(a: Operand, rows: torch.Tensor) -> Operand:
    if isinstance(a, torch.Tensor):
        return a[rows]
    # index_select has no FP8 kernel on every torch: move the bytes.
    data = a.data.view(torch.uint8)[rows].view(a.data.dtype)
    return ScaledTensor(data, a.scale[rows], a.block, a.dtype)


def _take_group(b: Operand, group: int) -> Operand:
    if isinstance(b, torch.Tensor):
        return b[group]
    return ScaledTensor(b.data[group], b.scale[group], b.block, b.dtype)


def _take_columns(a: Operand, ks: slice) -> Operand:
    if isinstance(a, torch.Tensor):
        return a[:, ks]
    blocks = slice(ks.start // a.block[1], -(-ks.stop // a.block[1]))
    return ScaledTensor(a.data[:, ks], a.scale[:, blocks], a.block, a.dtype)


def _checked_c(c: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    if tuple(c.shape) != shape:
        raise ValueError(f"c: expected shape {shape}, got {tuple(c.shape)}")
    return c


def _check_operands(a: Operand, b: Operand, b_dims: int) -> None:
    if isinstance(a, ScaledTensor) != isinstance(b, ScaledTensor):
        raise TypeError("a, b: expected two plain tensors or two ScaledTensors, got one of each")
    if len(b.shape) != b_dims or len(a.shape) not in (2, b_dims) or a.shape[-1] != b.shape[-1]:
        wanted = "[n, k]" if b_dims == 2 else "[g, n, k]"
        raise ValueError(
            f"a, b: expected a [..., k] and b {wanted} with the same k, "
            f"got {tuple(a.shape)} and {tuple(b.shape)}"
        )
    if a.dtype != b.dtype:
        raise TypeError(f"a, b: expected one dtype, got {a.dtype} and {b.dtype}")
    if isinstance(a, torch.Tensor):
        if not a.dtype.is_floating_point or a.dtype.itemsize < 2:
            raise TypeError(f"a, b: expected fp16, bf16, fp32 or fp64, got {a.dtype}")
        return
    if a.dtype != "e4m3":
        raise TypeError(f"a, b: expected e4m3 data (dequantize other formats), got {a.dtype}")
    if a.block[0] != 1 or a.block[1] != b.block[1]:
        raise ValueError(
            "a, b: expected blocks (1, c) and (r, c) with one c, such as (1, 128) and (128, 128), "
            f"got {a.block} and {b.block}"
        )


def _check_modes(a: Operand, epilogue: str | None, accumulate: str) -> None:
    if epilogue not in EPILOGUES:
        raise ValueError(f"epilogue: expected one of {EPILOGUES}, got {epilogue!r}")
    if accumulate not in ACCUMULATE:
        raise ValueError(f"accumulate: expected one of {ACCUMULATE}, got {accumulate!r}")
    if isinstance(a, torch.Tensor) and accumulate.startswith("hopper"):
        if not tensorcore.supported(a.dtype):
            raise TypeError(f"a: accumulate={accumulate!r} expects fp16 or bf16, got {a.dtype}")
