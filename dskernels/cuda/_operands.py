"""Operands and results as the GEMM launchers take them: strides, alignment, dtypes, addresses."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..types import FORMAT_MAX, ScaledTensor

AMAX_FLOOR = 1e-4  # as in quantize
# What the kernels store and add; results of other dtypes are rounded once more, from fp32.
KERNEL_DTYPES = (torch.bfloat16, torch.float32)
_TYPES = {torch.bfloat16: "bf16", torch.float32: "fp32"}


def tma_rows(x: torch.Tensor) -> torch.Tensor:
    """x with contiguous rows, 16-byte aligned as TMA asks."""
    fits = x.stride(-1) == 1 and x.stride(-2) % 16 == 0 and x.data_ptr() % 16 == 0
    fits = fits and x.stride(-2) >= x.shape[-1]
    if x.dim() == 3:  # planes must follow one another as rows do
        fits = fits and x.stride(0) == x.shape[1] * x.stride(1)
    return x if fits else x.clone(memory_format=torch.contiguous_format)


def mn_major(scale: torch.Tensor) -> torch.Tensor:
    """scale [..., m, c] with strides (1, align(m, 4)), planes c * align(m, 4) apart."""
    m, c = scale.shape[-2:]
    ld = -(-m // 4) * 4
    wanted = (1, ld) if scale.dim() == 2 else (c * ld, 1, ld)
    if scale.stride() == wanted and scale.data_ptr() % 16 == 0:
        return scale
    storage = scale.new_zeros(*scale.shape[:-2], c, ld)
    storage[..., :m] = scale.transpose(-2, -1)
    return storage.transpose(-2, -1)[..., :m, :]


def addend(x: torch.Tensor | None) -> torch.Tensor | None:
    """c or bias as the kernels read it: contiguous, fp32 or bf16 (other dtypes round to fp32)."""
    if x is None or (x.dtype in KERNEL_DTYPES and x.is_contiguous() and x.data_ptr() % 16 == 0):
        return x
    return (x if x.dtype in KERNEL_DTYPES else x.float()).clone(
        memory_format=torch.contiguous_format
    )


def argument(x: torch.Tensor | ScaledTensor | None) -> tuple[int, str, int, int]:
    """A tensor as the launchers take it: address, type, address of scales, their row stride."""
    if x is None:
        return 0, "bf16", 0, 0
    if isinstance(x, ScaledTensor):
        return x.data.data_ptr(), "e4m3", x.scale.data_ptr(), x.scale.stride(-1)
    return x.data_ptr(), _TYPES[x.dtype], 0, 0


def quantised_result(shape: tuple[int, ...], device: torch.device, zero: bool) -> ScaledTensor:
    """An e4m3 result [..., m, k] in blocks (1, 128), scales MN-major.

    zero  rows that no group owns must be what quantising zeros gives
    """
    *lead, m, k = shape
    empty = torch.zeros if zero else torch.empty
    data = empty(shape, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn)
    scale = torch.empty(*lead, -(-k // 128), -(-m // 4) * 4, dtype=torch.float32, device=device)
    if zero:
        scale.fill_(AMAX_FLOOR).div_(FORMAT_MAX["e4m3"])
    return ScaledTensor(data, scale.transpose(-2, -1)[..., :m, :], (1, 128), "e4m3")


def result_tensor(
    shape: tuple[int, ...],
    out: torch.Tensor | None,
    dtype: torch.dtype,
    device: torch.device,
    c: torch.Tensor | None = None,
    zero: bool = False,
) -> torch.Tensor:
    """Where the kernel writes: `out` itself where it can, else a tensor of a dtype it can store.

    zero  rows that no group owns must be 0, and the kernel does not write them
    """
    if out is not None and out.dtype in KERNEL_DTYPES and out.is_contiguous():
        is_c = c is not None and c.untyped_storage().data_ptr() == out.untyped_storage().data_ptr()
        if out.data_ptr() % 16 == 0 and not (zero and is_c):
            return out.zero_() if zero else out
    dtype = dtype if dtype in KERNEL_DTYPES else torch.float32
    return (torch.zeros if zero else torch.empty)(shape, dtype=dtype, device=device)


def finish(d: torch.Tensor, out: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    if out is None:
        return d.to(dtype)
    return out if d is out else out.copy_(d)


def int32_counts(sizes: torch.Tensor | Sequence[int], device) -> torch.Tensor:
    return torch.as_tensor(sizes, dtype=torch.int32, device=device).contiguous()


def address(x: torch.Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()
