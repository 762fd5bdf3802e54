"""What the CPU kernels' tests share: the targets of this machine, error measures, fixtures."""

from __future__ import annotations

from contextlib import contextmanager

import torch

from dskernels import _C

TARGETS = _C.cpu.available_targets()


@contextmanager
def use_target(name: str):
    """Run on one target, then return to the default choice."""
    _C.cpu.select_target(name)
    try:
        assert _C.cpu.target() == name
        yield name
    finally:
        _C.cpu.select_target("")


def relative_error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    norm = exact.double().norm()
    return ((actual.double() - exact.double()).norm() / norm.clamp_min(1e-300)).item()


def guarded(shape: tuple[int, ...], dtype: torch.dtype, pad: int = 64):
    """A contiguous tensor inside a larger buffer of a fixed pattern, and a check of the rest."""
    count = torch.Size(shape).numel() * dtype.itemsize
    raw = torch.full((count + 2 * pad,), 0x5A, dtype=torch.uint8)
    view = raw[pad : pad + count].view(dtype).view(shape)

    def intact() -> bool:
        ends = torch.cat([raw[:pad], raw[pad + count :]])
        return bool((ends == 0x5A).all())

    return view, intact
