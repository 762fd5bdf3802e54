"""Tensor maps for TMA, as kernel arguments."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dskernels._C import emu as _emu
from dskernels.emu.arrays import Lent, describe

_TYPES = {
    "uint8": 0,
    "int8": 0,
    "float8_e4m3fn": 0,
    "float8_e5m2": 0,
    "uint16": 1,
    "int16": 1,
    "uint32": 2,
    "int32": 3,
    "uint64": 4,
    "int64": 5,
    "float16": 6,
    "float32": 7,
    "float64": 8,
    "bfloat16": 9,
}
_SWIZZLES = {0: 0, 32: 1, 64: 2, 128: 3}


@dataclass(frozen=True)
class TensorMap:
    """An encoded map (128 bytes) and the array it describes, which the launch must keep lent."""

    data: bytes
    array: Lent


def tensor_map(
    array: Any,
    box: Sequence[int],
    *,
    swizzle: int = 0,
    fill: str = "zero",
    element_strides: Sequence[int] | None = None,
    dtype: str | None = None,
) -> TensorMap:
    """Describes `array` (NumPy or torch CPU, up to 5 dimensions, innermost contiguous) for TMA.

    box: elements per dimension in the array's own order (outermost first, as array.shape).
    swizzle: 0, 32, 64 or 128 bytes. fill: "zero" or "nan" outside the array.
    element_strides: per dimension, default 1. dtype: overrides the array's (e.g. "bfloat16" for
    bits held in uint16). Raises ValueError naming the rule that the driver would refuse by.
    """
    lent = describe(array)
    name = dtype or lent.dtype
    if name not in _TYPES:
        raise ValueError(f"tensor_map: dtype {name} has no tensor-map type ({sorted(_TYPES)})")
    if swizzle not in _SWIZZLES:
        raise ValueError(f"tensor_map: swizzle must be 0, 32, 64 or 128, got {swizzle}")
    if fill not in ("zero", "nan"):
        raise ValueError(f"tensor_map: fill must be 'zero' or 'nan', got {fill!r}")
    rank = len(lent.shape)
    steps = list(element_strides) if element_strides is not None else [1] * rank
    if len(box) != rank or len(steps) != rank:
        raise ValueError(f"tensor_map: array has {rank} dimensions, box has {len(box)}")
    if rank and lent.strides[-1] != lent.itemsize and lent.shape[-1] > 1:
        raise ValueError("tensor_map: the innermost dimension must be contiguous")
    data = _emu.tensor_map(
        lent.address,
        _TYPES[name],
        list(reversed(lent.shape)),
        list(reversed(lent.strides))[1:],
        list(reversed([int(b) for b in box])),
        list(reversed([int(s) for s in steps])),
        0,
        _SWIZZLES[swizzle],
        0 if fill == "zero" else 1,
    )
    return TensorMap(data, lent)
