"""ScaledTensors at the border of torch.library, whose ops take and return plain tensors."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, float32
from torch.compiler import is_compiling

from ..types import FORMAT_STORAGE, ScaledTensor
from . import _check as check


def scaled(data: Tensor, scale: Tensor, block: Sequence[int], dtype: str) -> ScaledTensor:
    """The ScaledTensor of (data, scale) that are known to fit: its own validation costs 3 us."""
    if is_compiling():
        return ScaledTensor(data, scale, (block[0], block[1]), dtype)
    result = object.__new__(ScaledTensor)
    result.__dict__.update(data=data, scale=scale, block=(block[0], block[1]), dtype=dtype)
    return result


def check_parts(op: str, data: Tensor, scale: Tensor, block: Sequence[int], dtype: str) -> None:
    """Whether data, scale, block and format of an argument x make a ScaledTensor on one device."""
    check.rank(op, "x", data, "[..., m, k]", 2)
    check.one_of(op, "x.dtype", dtype, tuple(FORMAT_STORAGE))
    check.dtype(op, "x.data", data, (FORMAT_STORAGE[dtype],))
    check.block(op, "x.block", block)
    ScaledTensor(data, scale, tuple(block), dtype)  # says what else does not fit
    check.same_device(op, "x.scale", scale, "x.data", data)


def parts(q: ScaledTensor) -> tuple[Tensor, Tensor]:
    """(data, scale) of an implementation's result."""
    return q.data, q.scale


def empty_scaled(
    like: Tensor, shape: Sequence[int], block: Sequence[int], dtype: str
) -> tuple[Tensor, Tensor]:
    """Empty (data, scale) for data of `shape`, the scales in the layout `quantize` produces."""
    *lead, m, k = shape
    data = like.new_empty(shape, dtype=FORMAT_STORAGE[dtype])
    rows, columns = -(-m // block[0]), -(-k // block[1])
    if block[0] == 1:
        storage = like.new_empty((*lead, columns, -(-m // 4) * 4), dtype=float32)
        return data, storage.transpose(-2, -1)[..., :m, :]
    return data, like.new_empty((*lead, rows, columns), dtype=float32)
