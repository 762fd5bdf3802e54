"""Back from narrow formats: dequantisation, and E5M6's storage of 12 bits an element.

Dimension letters: m rows, k columns; "..." any leading dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backend as _backend
from ..types import ScaledTensor
from . import _check as check
from ._registry import define
from ._scaled import check_parts, scaled

_chosen = _backend.chosen
_run = _backend.run


def dequantize(
    x: ScaledTensor, dtype: torch.dtype = torch.bfloat16, *, backend: str | None = None
) -> Tensor:
    """x [..., m, k] -> data * scale in `dtype`: the product in fp32 (fp64), rounded once.

    Any block sizes, e4m3 or e5m6. Not differentiable. Source: DeepSeek-V3's fp8_cast_bf16.
    """
    if not isinstance(x, ScaledTensor):
        check.bad_type("dequantize", "x", "ScaledTensor", type(x).__name__)
    return _dequantize(x.data, x.scale, x.block, x.dtype, dtype, _chosen(backend))


def _check_dequantize(data, scale, block, data_dtype, dtype):
    check_parts("dequantize", data, scale, block, data_dtype)
    if dtype not in check.FLOATS:
        check.bad_value("dequantize", "dtype", "fp32, bf16, fp16 or fp64", dtype)


def _dequantize_kernel(data, scale, block, data_dtype, dtype, backend):
    x = scaled(data, scale, block, data_dtype)
    return _run("dequantize", backend, data.device.type, x, dtype).contiguous()


def _dequantize_fake(data, scale, block, data_dtype, dtype, backend):
    return data.new_empty(data.shape, dtype=dtype)


_dequantize = define(
    "dequantize(Tensor data, Tensor scale, SymInt[] block, str data_dtype, ScalarType dtype,"
    " str backend) -> Tensor",
    _check_dequantize,
    _dequantize_kernel,
    _dequantize_fake,
)


def pack_e5m6(data: Tensor, *, backend: str | None = None) -> Tensor:
    """E5M6 held in float16 [..., k] -> uint8 [..., 3 * ceil(k / 2)], 12 bits an element.

    Elements 2i and 2i+1 are bits 0-11 and 12-23 of a little-endian word of 3 bytes; an odd k is
    filled up with a zero. The 4 lowest mantissa bits, zero in E5M6, are dropped.
    """
    return _pack_e5m6(data, _chosen(backend))


def _check_pack(data: Tensor) -> None:
    check.rank("pack_e5m6", "data", data, "[..., k]", 1)
    check.dtype("pack_e5m6", "data", data, (torch.float16,))


def _pack_kernel(data, backend):
    return _run("pack_e5m6", backend, data.device.type, data).contiguous()


def _pack_fake(data, backend):
    return data.new_empty((*data.shape[:-1], 3 * -(-data.shape[-1] // 2)), dtype=torch.uint8)


_pack_e5m6 = define(
    "pack_e5m6(Tensor data, str backend) -> Tensor", _check_pack, _pack_kernel, _pack_fake
)


def unpack_e5m6(packed: Tensor, k: int, *, backend: str | None = None) -> Tensor:
    """The inverse of `pack_e5m6`: uint8 [..., 3 * ceil(k / 2)] -> float16 [..., k]."""
    return _unpack_e5m6(packed, k, _chosen(backend))


def _check_unpack(packed: Tensor, k: int) -> None:
    check.rank("unpack_e5m6", "packed", packed, "[..., 3 * ceil(k / 2)]", 1)
    check.dtype("unpack_e5m6", "packed", packed, (torch.uint8,))
    expected = (*packed.shape[:-1], 3 * -(-k // 2))
    check.shape("unpack_e5m6", "packed", packed, "[..., 3 * ceil(k / 2)]", expected)


def _unpack_kernel(packed, k, backend):
    return _run("unpack_e5m6", backend, packed.device.type, packed, k).contiguous()


def _unpack_fake(packed, k, backend):
    return packed.new_empty((*packed.shape[:-1], k), dtype=torch.float16)


_unpack_e5m6 = define(
    "unpack_e5m6(Tensor packed, SymInt k, str backend) -> Tensor",
    _check_unpack,
    _unpack_kernel,
    _unpack_fake,
)
