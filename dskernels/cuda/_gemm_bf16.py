"""Plain bf16 operands on the sm_90a kernels: what gemm.py does with tensors that have no scales."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..types import Unsupported
from . import launchers
from ._operands import addend, address, argument, tma_rows
from ._tensor import device_of, stream_of

ALIGN = 8  # TMA: rows of A, B and D start at 16-byte boundaries
K_BLOCK = 64  # groups along k are whole blocks

_forced = ""


@contextmanager
def forced_kernel(name: str) -> Iterator[None]:
    """For tests and benchmarks: launches inside use this gemm_bf16 instance."""
    global _forced
    outer, _forced = _forced, name
    try:
        yield
    finally:
        _forced = outer


def check(a: torch.Tensor, b: torch.Tensor, epilogue: str | None) -> None:
    """Raise Unsupported, naming what is given, for a call the kernels do not cover."""
    for name, operand in (("a", a), ("b", b)):
        if not isinstance(operand, torch.Tensor) or operand.dtype != torch.bfloat16:
            given = getattr(operand, "dtype", type(operand).__name__)
            raise Unsupported(f"{name}: expected e4m3 with scales or plain bf16, got {given}")
    n, k = b.shape[-2:]
    if n % ALIGN or k % ALIGN or k == 0:
        raise Unsupported(
            f"b: expected n a multiple of {ALIGN} and k a positive multiple of {ALIGN} "
            f"(TMA's 16-byte rows), got n = {n}, k = {k}"
        )
    if epilogue is not None:
        raise Unsupported(f"epilogue: expected None for bf16 operands, got {epilogue!r}")


def check_k_groups(sizes: torch.Tensor) -> None:
    """Groups along k that the CPU can see; on a GPU a wrong size stops the kernel with a trap."""
    if sizes.is_cpu and bool((sizes % K_BLOCK != 0).any()):
        raise Unsupported(
            f"group_sizes: expected multiples of {K_BLOCK} for bf16, got {sizes.tolist()}"
        )


def launch(
    machine: str, kind: str, a, b, d, *, c, bias=None, counts=None, runs=None, expected_m=None,
    num_groups=1, num_sms=None,
) -> None:  # fmt: skip
    data, weight = tma_rows(a), tma_rows(b)
    c, bias = addend(c), addend(bias)
    m, k = a.shape[-2:]
    launchers().gemm_bf16(
        machine=machine,
        ordinal=device_of(data),
        stream=stream_of(data),
        kind=kind,
        a=data.data_ptr(),
        b=weight.data_ptr(),
        d=argument(d),
        c=argument(c),
        bias=argument(bias),
        group_rows=address(counts),
        runs=address(runs),
        m=m,
        n=b.shape[-2],
        k=k,
        expected_m=expected_m or 0,
        num_groups=num_groups,
        lda=data.stride(-2),
        ldb=weight.stride(-2),
        num_sms=num_sms or 0,
        kernel=_forced,
    )
