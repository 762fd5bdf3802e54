"""Weights and the layers that multiply by them, in floating point or in block-scaled FP8.

An FP8 weight stays E4M3 in memory with one fp32 scale per 128x128 block, and is multiplied as the
GPU does it (W8A8): the activations are quantised 1x128 on the way in. Everything goes through
`dskernels`, so a faster backend speeds up the model without a change here.

Shape letters: t tokens, n outputs, k inputs, e experts, i intermediate width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

import dskernels as dsk
from model.config import FP8_BLOCK


def round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


class Weight(nn.Module):
    """A weight [.., n, k], or several of them stacked along the rows (`row_parts`: gate and up).

    In FP8 every part starts at a multiple of 128 rows, padded with zeros, so that each keeps the
    scale blocks it has in a checkpoint; likewise `pad_cols` widens k for the zero activations that
    padded rows of the layer before produce. Padding is invisible: it adds exact zeros.
    """

    def __init__(self, *shape: int, row_parts: int = 1, pad_cols: bool = False) -> None:
        super().__init__()
        *self.lead, rows, self.k = shape
        self.row_parts, self.pad_cols = row_parts, pad_cols
        self.part_rows = rows // row_parts
        self.weight = nn.Parameter(torch.empty(shape))
        self.weight_scale_inv: torch.Tensor | None = None

    @property
    def is_fp8(self) -> bool:
        return self.weight_scale_inv is not None

    def use_fp8(self) -> None:
        """Replace the storage by an unfilled FP8 one of the same logical shape."""
        part = round_up(self.part_rows, FP8_BLOCK) if self.row_parts > 1 else self.part_rows
        rows = part * self.row_parts
        cols = round_up(self.k, FP8_BLOCK) if self.pad_cols else self.k
        scales = (*self.lead, -(-rows // FP8_BLOCK), -(-cols // FP8_BLOCK))
        device = self.weight.device
        del self.weight
        data = torch.empty((*self.lead, rows, cols), dtype=torch.float8_e4m3fn, device=device)
        self.register_buffer("weight", data)
        del self.weight_scale_inv
        self.register_buffer("weight_scale_inv", torch.empty(scales, device=device))

    def part(
        self, lead: tuple[int, ...], row_part: int
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Views of one checkpoint tensor in the storage: data [n, k] and, in FP8, its scales."""
        stride = self.weight.shape[-2] // self.row_parts
        first = row_part * stride
        data = self.weight[lead][first : first + self.part_rows, : self.k]
        if not self.is_fp8:
            return data, None
        row = first // FP8_BLOCK
        rows, cols = -(-self.part_rows // FP8_BLOCK), -(-self.k // FP8_BLOCK)
        return data, self.weight_scale_inv[lead][row : row + rows, :cols]

    def keep_leading(self, *parts: slice) -> None:
        """Drop all but `parts` of the first dimension of a stack of weights."""

        def kept(stack: torch.Tensor) -> torch.Tensor:
            return torch.cat([stack[part] for part in parts])

        if self.is_fp8:
            dtype = self.weight.dtype
            self.weight = kept(self.weight.view(torch.uint8)).view(dtype)
            self.weight_scale_inv = kept(self.weight_scale_inv)
        else:
            self.weight = nn.Parameter(kept(self.weight.detach()), self.weight.requires_grad)
        self.lead = [self.weight.shape[0], *self.lead[1:]]

    def zero_padding(self) -> None:
        """Clear what no checkpoint tensor covers (called once, before a load fills the rest)."""
        if not self.is_fp8:
            return
        stride = self.weight.shape[-2] // self.row_parts
        raw = self.weight.view(torch.uint8)  # fill_ knows no float8 on every backend
        for first in range(0, self.weight.shape[-2], stride):
            raw[..., first + self.part_rows : first + stride, :].zero_()
        raw[..., self.k :].zero_()
        self.weight_scale_inv.fill_(1.0)

    def value(self, part: slice | None = None) -> torch.Tensor | dsk.ScaledTensor:
        """What `dskernels` takes as the b operand; of a stack, only `part` of it."""
        data, scale = self.weight, self.weight_scale_inv
        if part is not None:
            data, scale = data[part], scale[part] if self.is_fp8 else None
        if self.is_fp8:
            return dsk.ScaledTensor(data, scale, (FP8_BLOCK, FP8_BLOCK))
        return data

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight in floating point [.., n, k] (unpadded weights only)."""
        if self.is_fp8:
            return self.value().dequantize(dtype)
        return self.weight.to(dtype)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        # `.to(bfloat16)`, `.half()` and friends move an FP8 weight but never change its format.
        if not self.is_fp8:
            return super()._apply(fn, recurse)
        for name in ("weight", "weight_scale_inv"):
            old = self._buffers[name]
            new = fn(old)
            self._buffers[name] = new if new.dtype == old.dtype else old.to(new.device)
        return self


class Linear(Weight):
    """y[t, n] = x[t, k] W^T, W [n, k], no bias."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.is_fp8:
            return dsk.nn.fp8_linear(x, self.value())
        return dsk.gemm(x, self.weight)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, computed in fp32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """norm(x); with `residual` the pair (norm(x + residual), x + residual)."""
        return dsk.rms_norm(x, self.weight, eps=self.eps, residual=residual)
