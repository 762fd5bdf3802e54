"""Lending host arrays to kernels: what memory an argument covers."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Lent:
    """Memory of one array. address: of its first element; base, bytes: the range it spans."""

    owner: Any
    address: int
    base: int
    bytes: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # bytes
    itemsize: int
    dtype: str
    read_only: bool


def is_array(value: Any) -> bool:
    """Whether `value` is a NumPy array or a torch tensor (not a NumPy scalar)."""
    return hasattr(value, "shape") and (
        hasattr(value, "__array_interface__") and hasattr(value, "ctypes")
        if not hasattr(value, "data_ptr")
        else True
    )


def _span(address: int, shape: tuple, strides: tuple, itemsize: int) -> tuple[int, int]:
    if 0 in shape:
        return address, 0
    low = sum((n - 1) * s for n, s in zip(shape, strides, strict=True) if s < 0)
    high = sum((n - 1) * s for n, s in zip(shape, strides, strict=True) if s > 0)
    return address + low, high - low + itemsize


def describe(array: Any) -> Lent:
    """The memory behind a NumPy array or a torch CPU tensor."""
    if hasattr(array, "data_ptr"):
        if array.device.type != "cpu":
            raise ValueError(f"expected a CPU tensor, got one on {array.device}")
        itemsize = array.element_size()
        shape = tuple(int(n) for n in array.shape)
        strides = tuple(int(s) * itemsize for s in array.stride())
        address, dtype, read_only = array.data_ptr(), str(array.dtype).split(".")[-1], False
    else:
        itemsize = array.itemsize
        shape, strides = tuple(array.shape), tuple(array.strides)
        address, dtype = array.__array_interface__["data"][0], array.dtype.name
        read_only = not array.flags.writeable
    base, size = _span(address, shape, strides, itemsize)
    return Lent(array, address, base, size, shape, strides, itemsize, dtype, read_only)
