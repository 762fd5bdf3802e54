"""FP8 matrix products on the CPU kernels; names, arguments and meaning are those of `ref.gemm`.

Letters: m rows, n columns, k depth, g groups. Native: b e4m3 in blocks (128, 128), packed or not,
with a either e4m3 in blocks (1, 128) (W8A8, the GPU's numbers) or a plain bf16, fp16 or fp32 tensor
(W8A16: no activation is quantised). Everything else runs the reference function.
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
    default = torch.bfloat16 if scaled else a.dtype
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
    native = _is_native(a, b, (c, bias), out_dtype, out)
    if not native or group_sizes is None or m_indices is not None or masked_m is not None:
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
    if isinstance(b, torch.Tensor) or tuple(b.block) != (128, 128):
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
    weight = packed(b)
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
