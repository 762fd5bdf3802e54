"""The value types of the public interface, `ScaledTensor` and `Support`, and `Unsupported`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

# The largest finite value of each quantised format: amax / FORMAT_MAX is a block's scale.
FORMAT_MAX = {"e4m3": 448.0, "e5m6": 65024.0}
# How the elements of each format are stored. E5M6 shares float16's sign, exponent and bias, so it
# is kept as float16 whose 4 lowest mantissa bits are zero; `ref.fp8.pack_e5m6` packs it to 12 bits.
FORMAT_STORAGE = {"e4m3": torch.float8_e4m3fn, "e5m6": torch.float16}


class Support(NamedTuple):
    """Whether a backend runs an op, and why (not). Usable as a truth value."""

    ok: bool
    reason: str

    def __bool__(self) -> bool:
        return self.ok


class Unsupported(Exception):
    """Raised by an implementation, before it changes anything, for a call it cannot run."""


@dataclass(frozen=True, eq=False)
class ScaledTensor:
    """A tensor in a narrow format with one scale per block: value = data * scale.

    data   [..., m, k], float8_e4m3fn ("e4m3") or float16 ("e5m6", see FORMAT_STORAGE)
    scale  fp32, [..., ceil(m / block[0]), ceil(k / block[1])]; any strides. What this package
           produces for block (1, 128) is MN-major: strides (1, align(m, 4)), so that a tile's
           column of scales is one contiguous, 16-byte aligned row for TMA.
    block  rows and columns that share a scale: (1, 128) for activations, (128, 128) for weights.
           The last block of a row or column may be ragged: 576 = 4.5 * 128.

    UE8M0 and power-of-two scales stay fp32 numbers. Raises TypeError or ValueError when data and
    scale do not fit each other.
    """

    data: torch.Tensor
    scale: torch.Tensor
    block: tuple[int, int]
    dtype: str = "e4m3"

    def __post_init__(self) -> None:
        if self.dtype not in FORMAT_STORAGE:
            raise ValueError(f"dtype: expected one of {list(FORMAT_STORAGE)}, got {self.dtype!r}")
        if self.data.dtype != FORMAT_STORAGE[self.dtype]:
            raise TypeError(
                f"data: expected {FORMAT_STORAGE[self.dtype]} for dtype {self.dtype!r}, "
                f"got {self.data.dtype}"
            )
        if self.scale.dtype != torch.float32:
            raise TypeError(f"scale: expected torch.float32, got {self.scale.dtype}")
        expected = scale_shape(self.data.shape, self.block)
        if tuple(self.scale.shape) != expected:
            raise ValueError(
                f"scale: expected shape {expected} for data {tuple(self.data.shape)} in blocks of "
                f"{self.block}, got {tuple(self.scale.shape)}"
            )

    @property
    def shape(self) -> torch.Size:
        return self.data.shape

    @property
    def device(self) -> torch.device:
        return self.data.device

    def to(self, device: torch.device | str) -> ScaledTensor:
        """The same tensor on another device; the scales keep their MN-major strides."""
        data, scale = self.data.to(device), self.scale.to(device)
        return ScaledTensor(data, scale, self.block, self.dtype)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """data * scale, the product taken in fp32 (fp64 for dtype float64), then cast to dtype."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        m, k = self.data.shape[-2:]
        scale = self.scale.to(wide)
        for dim, size, step in ((-2, m, self.block[0]), (-1, k, self.block[1])):
            scale = scale.repeat_interleave(step, dim=dim).narrow(dim, 0, size)
        return (self.data.to(wide) * scale).to(dtype)


def scale_shape(shape: torch.Size | tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    """The shape of the scales of data [..., m, k]: ragged last blocks count as whole ones."""
    if len(shape) < 2 or len(block) != 2 or min(block) < 1:
        raise ValueError(
            "data and block: expected data of at least 2 dimensions and a block of 2 positive "
            f"sizes, got shape {tuple(shape)} and block {block}"
        )
    return (*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1]))
