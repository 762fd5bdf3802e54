"""FP8 matrix products on the CPU kernels; names, arguments and meaning are those of `ref.gemm`.

Letters: m rows, n columns, k depth, g groups. Native:

    b e4m3 in blocks (128, 128), packed or not, with a either e4m3 in blocks (1, 128) (W8A8, the
    GPU's numbers) or a plain bf16, fp16 or fp32 tensor (W8A16: no activation is quantised)
    both e4m3 in blocks (1, 128): weight gradients

Two plain tensors are PyTorch's own product, without widening them whole. Everything else runs the
reference function.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .. import _C
from ..ref import gemm as ref
from ..types import ScaledTensor
from . import packing, rowwise
from .packing import PackedWeight, packed

_PLAIN = (torch.bfloat16, torch.float16, torch.float32)
# From this many rows on every target uses one unit whatever their number (csrc/cpu: kMaxHalfRows).
_SAME_UNIT_ROWS = 16
Operand = torch.Tensor | ScaledTensor
Weight = torch.Tensor | ScaledTensor | PackedWeight


def gemm(
    a: Operand,
    b: Weight,
    *,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    c: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    epilogue: str | None = None,
    deterministic: bool = False,
    num_sms: int | None = None,
) -> torch.Tensor | ScaledTensor:
    """a [m, k] times b [n, k] transposed, plus c, plus bias -> [m, n]; see `ref.gemm`.

    The result does not depend on the number of threads. NaN and infinities propagate; no finite
    input overflows inside. out_dtype defaults to bf16 (W8A8) or a's dtype (W8A16).

    Few rows run on another unit than many, so a row's last bits depend on how many there are.
    deterministic=True pads few rows with zeros: the same row then gives the same bits in any batch.
    """
    if not _is_native(a, b, (c, bias), out_dtype, out):
        b = b.unpack() if isinstance(b, PackedWeight) else b
        if _is_large_plain(a, b, (c, bias, out), out_dtype, epilogue):
            return _plain(a, b, deterministic)
        return ref.gemm(a, b, out=out, out_dtype=out_dtype, c=c, bias=bias, epilogue=epilogue)
    if len(b.shape) != 2 or len(a.shape) != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(
            f"a, b: expected [m, k] and [n, k] with the same k, got {tuple(a.shape)} and "
            f"{tuple(b.shape)}"
        )
    if epilogue not in ref.EPILOGUES:
        raise ValueError(f"epilogue: expected one of {ref.EPILOGUES}, got {epilogue!r}")
    if deterministic and 0 < a.shape[0] < _SAME_UNIT_ROWS:
        return _gemm_padded(a, b, out, out_dtype, c, bias, epilogue)
    shape = (a.shape[0], b.shape[0])
    scaled = isinstance(a, ScaledTensor)
    one_d = scaled and b.block[0] == 1
    default = torch.float32 if one_d else torch.bfloat16 if scaled else a.dtype
    if epilogue is not None:
        wide = torch.empty(shape, dtype=torch.float32)
        _launch(a, b, c, bias, wide)
        return _finish(wide, epilogue, out, out_dtype or default)
    result = out if out is not None else torch.empty(shape, dtype=out_dtype or default)
    if tuple(result.shape) != shape:
        raise ValueError(f"out: expected {shape}, got {tuple(result.shape)}")
    if result.stride(-1) != 1 and result.shape[-1] > 1:
        return result.copy_(gemm(a, b, out_dtype=result.dtype, c=c, bias=bias))
    _launch(a, b, c, bias, result)
    return result


def grouped_gemm(
    a: Operand,
    b: Weight,
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
) -> torch.Tensor | ScaledTensor:
    """Every row of a times the matrix of its group in b [g, n, k]; see `ref.grouped_gemm`."""
    native = _is_native(a, b, (c, bias), out_dtype, out) and b.block[0] == 128
    if native and group_sizes is None:
        forms = dict(m_indices=m_indices, masked_m=masked_m, out=out, out_dtype=out_dtype)
        return _grouped_by_rows(a, b, c, bias, epilogue, **forms)
    if not native or m_indices is not None or masked_m is not None:
        b = b.unpack() if isinstance(b, PackedWeight) else b
        forms = dict(group_sizes=group_sizes, m_indices=m_indices, masked_m=masked_m)
        rest = dict(out=out, out_dtype=out_dtype, c=c, bias=bias, epilogue=epilogue)
        return ref.grouped_gemm(a, b, **forms, **rest)
    if len(b.shape) != 3 or len(a.shape) != 2 or a.shape[1] != b.shape[2]:
        raise ValueError(
            f"a, b: expected [m, k] and [g, n, k] with the same k, got {tuple(a.shape)} and "
            f"{tuple(b.shape)}"
        )
    sizes = ref._sizes(group_sizes, b.shape[0], a.shape[0], "rows of a")
    matrix = packing.groups(b)
    default = torch.bfloat16 if isinstance(a, ScaledTensor) else a.dtype
    wide = torch.float32 if epilogue is not None else None
    if out is not None and tuple(out.shape) != (a.shape[0], b.shape[1]) and epilogue is None:
        raise ValueError(f"out: expected {(a.shape[0], b.shape[1])}, got {tuple(out.shape)}")
    kind = wide or (out.dtype if out is not None else out_dtype or default)
    result = torch.zeros(a.shape[0], b.shape[1], dtype=kind)
    start = 0
    for group, size in enumerate(sizes):
        if size:
            rows = slice(start, start + size)
            part_c = None if c is None else c[rows]
            part_bias = None if bias is None else bias[group]
            _launch(_rows(a, rows), matrix(group), part_c, part_bias, result[rows])
        start += size
    if epilogue is not None:
        return _finish(result, epilogue, out, out_dtype or default)
    return result if out is None else out.copy_(result)


def _grouped_by_rows(
    a, b, c, bias, epilogue, *, m_indices, masked_m, out, out_dtype
) -> torch.Tensor | ScaledTensor:
    """grouped_gemm whose groups are scattered rows, or rows with gaps between groups: gathered into
    one matrix, multiplied, scattered. Padding rows are not read, and 0 in the result."""
    if len(b.shape) != 3 or a.shape[-1] != b.shape[2]:
        raise ValueError(
            f"a, b: expected a [..., k] and b [g, n, k] with the same k, got {tuple(a.shape)} and "
            f"{tuple(b.shape)}"
        )
    groups = ref._rows_of_groups(a, b.shape[0], None, m_indices, masked_m)
    rows, sizes = torch.cat(groups), [group.numel() for group in groups]
    part = ref._take_rows(ref._flatten_rows(a), rows)
    lead, n = a.shape[:-1], b.shape[1]
    part_c = None if c is None else ref._checked_c(c, (*lead, n)).reshape(-1, n)[rows]
    kind = out.dtype if out is not None else out_dtype
    wide = kind if epilogue is None else torch.float32
    y = grouped_gemm(part, b, group_sizes=sizes, c=part_c, bias=bias, out_dtype=wide)
    if epilogue is not None:
        y = rowwise.swiglu(y)
    full = torch.zeros(lead.numel(), y.shape[1], dtype=y.dtype).index_copy_(0, rows, y)
    full = full.view(*lead, y.shape[1])
    if epilogue == "swiglu_quant":
        return ref._store(full, a, b, epilogue, out, out_dtype)
    default = torch.bfloat16 if isinstance(a, ScaledTensor) else a.dtype
    return full.to(kind or default) if out is None else out.copy_(full)


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
) -> torch.Tensor:
    """The weight gradients of all experts: a [m, sum k], b [n, sum k] -> [g, m, n]; see
    `ref.grouped_gemm_k`."""
    fits = isinstance(a, ScaledTensor) and isinstance(b, ScaledTensor) and b.block[0] == 1
    if not fits or not _is_native(a, b, (c,), out_dtype, out):
        return ref.grouped_gemm_k(a, b, group_sizes, c=c, out=out, out_dtype=out_dtype)
    ref._check_operands(a, b, b_dims=2)
    sizes = ref._sizes(group_sizes, None, a.shape[1], "columns of a")
    if any(size % 128 for size in sizes):
        raise ValueError(f"group_sizes: expected multiples of 128, got {sizes}")
    shape = (len(sizes), a.shape[0], b.shape[0])
    if c is not None:
        ref._checked_c(c, shape)
    if out is not None and tuple(out.shape) != shape:
        raise ValueError(f"out: expected {shape}, got {tuple(out.shape)}")
    direct = out is not None and (out.stride(-1) == 1 or shape[-1] <= 1)
    result = (
        out if direct else torch.empty(shape, dtype=out.dtype if out is not None else out_dtype)
    )
    start = 0
    for index, size in enumerate(sizes):
        ks = slice(start, start + size)
        parts = ref._take_columns(a, ks), ref._take_columns(b, ks)
        _launch(*parts, None if c is None else c[index], None, result[index])
        start += size
    return result if direct or out is None else out.copy_(result)


# A product of two plain tensors widens its second operand in slices of this many bytes.
_SLICE_BYTES = 8 << 20


def _is_large_plain(a, b, others, out_dtype, epilogue) -> bool:
    """Whether `_plain` takes this call: no extras, and an operand worth not widening whole."""
    if not (isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)):
        return False
    plain = a.dtype == b.dtype and a.dtype in (torch.bfloat16, torch.float16)
    fits = plain and a.dim() == b.dim() == 2 and a.shape[1] == b.shape[1]
    bare = all(t is None for t in others) and out_dtype in (None, a.dtype) and epilogue is None
    graph = torch.is_grad_enabled() and (a.requires_grad or b.requires_grad)
    return fits and bare and not graph and b.numel() * 4 > _SLICE_BYTES


def _plain(a: torch.Tensor, b: torch.Tensor, deterministic: bool) -> torch.Tensor:
    """a [m, k] times b [n, k] transposed, fp32 sums, rounded once.

    bf16 where oneDNN has a unit for it: it neither widens b nor rounds sums. Else slice by slice:
    a language model's head as fp32 would be 4 GiB.
    """
    if a.dtype == torch.bfloat16 and not deterministic and _onednn_has_bf16():
        return torch.mm(a, b.t())
    wide, y = a.float(), torch.empty(a.shape[0], b.shape[0], dtype=a.dtype)
    step = max(1, _SLICE_BYTES // (4 * b.shape[1]))
    for n in range(0, b.shape[0], step):
        y[:, n : n + step] = wide @ b[n : n + step].float().t()
    return y


def plain_product(
    a: torch.Tensor, b: torch.Tensor, out: torch.Tensor | None = None
) -> torch.Tensor:
    """a [m, k] times b [k, n] in one float type: fp32 sums, rounded once; into `out` [m, n] of that
    type where one is given."""
    if a.dtype == torch.float32 or (a.dtype == torch.bfloat16 and _onednn_has_bf16()):
        return torch.mm(a, b, out=out)
    wide = a.float() @ b.float()
    return wide.to(a.dtype) if out is None else out.copy_(wide)


def _onednn_has_bf16() -> bool:
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _gemm_padded(a, b, out, out_dtype, c, bias, epilogue) -> torch.Tensor | ScaledTensor:
    """gemm of few rows among zero rows, so that they meet the unit that many rows meet."""
    m = a.shape[0]
    missing = _SAME_UNIT_ROWS - m
    wide_c = None if c is None else _pad_rows(c, missing)
    if isinstance(a, ScaledTensor):
        data = _pad_rows(a.data.view(torch.uint8), missing).view(a.data.dtype)
        wide_a = ScaledTensor(data, _pad_rows(a.scale, missing), a.block, a.dtype)
    else:
        wide_a = _pad_rows(a, missing)
    options = dict(out_dtype=out.dtype if out is not None else out_dtype, bias=bias)
    y = gemm(wide_a, b, c=wide_c, epilogue=epilogue, **options)
    if isinstance(y, ScaledTensor):
        return _rows(y, slice(0, m))
    return y[:m].clone() if out is None else out.copy_(y[:m])


def _pad_rows(x: torch.Tensor, missing: int) -> torch.Tensor:
    return torch.nn.functional.pad(x, (0, 0, 0, missing))


def _rows(a: Operand, rows: slice) -> Operand:
    if isinstance(a, ScaledTensor):
        return ScaledTensor(a.data[rows], a.scale[rows], a.block)
    return a[rows]


def _is_native(a, b, addends, out_dtype, out) -> bool:
    one_d = isinstance(b, ScaledTensor) and tuple(b.block) == (1, 128)
    if isinstance(b, torch.Tensor) or (tuple(b.block) != (128, 128) and not one_d):
        return False
    if one_d and not isinstance(a, ScaledTensor):
        return False
    if isinstance(b, ScaledTensor) and b.dtype != "e4m3":
        return False
    if isinstance(a, ScaledTensor):
        fits = tuple(a.block) == (1, 128) and a.dtype == "e4m3"
    else:
        fits = a.dtype in _PLAIN
    kinds = [t.dtype for t in (*addends, out) if t is not None]
    kinds += [out_dtype] if out_dtype is not None else []
    return fits and all(kind in _PLAIN for kind in kinds)


def _launch(a: Operand, b: Weight, c, bias, out: torch.Tensor) -> None:
    weight = packing.pack_columns(b) if b.block[0] == 1 else packed(b)
    x, scale = (a.data, a.scale) if isinstance(a, ScaledTensor) else (a.detach(), None)
    c, bias = (None if t is None else t.detach() for t in (c, bias))
    x, c = (
        t if t is None or t.shape[-1] <= 1 or t.stride(-1) == 1 else t.contiguous() for t in (x, c)
    )
    threads = torch.get_num_threads()
    _C.cpu.gemm(x, scale, weight.data, weight.marks, weight.scale, c, bias, out, threads)


def _finish(wide: torch.Tensor, epilogue: str, out, out_dtype) -> torch.Tensor | ScaledTensor:
    if epilogue == "swiglu_quant":
        if out is not None:
            raise ValueError("out: expected None with epilogue 'swiglu_quant'")
        return rowwise.swiglu_quantize(wide)
    value = rowwise.swiglu(wide)
    return value.to(out_dtype) if out is None else out.copy_(value)
