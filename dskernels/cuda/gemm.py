"""FP8 GEMM on the sm_90a kernels: dense, grouped contiguous, masked.

Dimension letters: m rows, n columns, k depth, g groups.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..types import ScaledTensor, Support, Unsupported
from . import launchers
from ._tensor import device_of, stream_of

# What the kernels store and add; results of other dtypes are rounded once more, from fp32.
KERNEL_DTYPES = (torch.bfloat16, torch.float32)
N_ALIGN, K_ALIGN = 8, 16  # TMA: rows of D (bf16) and of A and B (e4m3) start at 16-byte boundaries


def _check(a, b, epilogue) -> None:
    """Raise Unsupported, naming what is given, for a call the kernels do not cover."""
    for name, operand, block in (("a", a, (1, 128)), ("b", b, (128, 128))):
        if not isinstance(operand, ScaledTensor):
            raise Unsupported(f"{name}: expected a ScaledTensor, got {type(operand).__name__}")
        if tuple(operand.block) != block or operand.dtype != "e4m3":
            raise Unsupported(
                f"{name}: expected e4m3 in blocks of {block}, "
                f"got {operand.dtype} in {operand.block}"
            )
    if epilogue is not None:
        raise Unsupported(f"epilogue: expected None, got {epilogue!r}")
    n, k = b.shape[-2:]
    if n % N_ALIGN or k % K_ALIGN or k == 0:
        raise Unsupported(
            f"b: expected n a multiple of {N_ALIGN} and k a positive multiple of {K_ALIGN} "
            f"(TMA's 16-byte rows), got n = {n}, k = {k}"
        )


def _rows(x: torch.Tensor) -> torch.Tensor:
    """x with contiguous rows, 16-byte aligned as TMA asks."""
    fits = x.stride(-1) == 1 and x.stride(-2) % 16 == 0 and x.data_ptr() % 16 == 0
    if x.dim() == 3:  # planes must follow one another as rows do
        fits = fits and x.stride(0) == x.shape[1] * x.stride(1)
    return x if fits else x.contiguous()


def _mn_major(scale: torch.Tensor) -> torch.Tensor:
    """scale [..., m, c] with strides (1, align(m, 4)), planes c * align(m, 4) apart."""
    m, c = scale.shape[-2:]
    ld = -(-m // 4) * 4
    wanted = (1, ld) if scale.dim() == 2 else (c * ld, 1, ld)
    if scale.stride() == wanted and scale.data_ptr() % 16 == 0:
        return scale
    storage = scale.new_zeros(*scale.shape[:-2], c, ld)
    storage[..., :m] = scale.transpose(-2, -1)
    return storage.transpose(-2, -1)[..., :m, :]


def _addend(x: torch.Tensor | None) -> torch.Tensor | None:
    """c or bias as the kernels read it: contiguous, fp32 or bf16 (other dtypes round to fp32)."""
    if x is None or (x.dtype in KERNEL_DTYPES and x.is_contiguous() and x.data_ptr() % 16 == 0):
        return x
    return (x if x.dtype in KERNEL_DTYPES else x.float()).clone(
        memory_format=torch.contiguous_format
    )


def _argument(x: torch.Tensor | None) -> tuple[int, bool]:
    """A tensor as the launchers take it: its address, and whether it is fp32."""
    return (0, False) if x is None else (x.data_ptr(), x.dtype == torch.float32)


def _result(
    shape: tuple[int, ...], out: torch.Tensor | None, dtype: torch.dtype | None, device, zero: bool
) -> torch.Tensor:
    """Where the kernel writes: `out` itself where it can, else a tensor of a dtype it can store.

    zero  rows that no group owns must be 0, and the kernel does not write them
    """
    if out is not None and out.dtype in KERNEL_DTYPES and out.is_contiguous():
        if out.data_ptr() % 16 == 0 and not zero:
            return out
    dtype = dtype if dtype in KERNEL_DTYPES else torch.float32
    return (torch.zeros if zero else torch.empty)(shape, dtype=dtype, device=device)


def on(machine: str):
    """gemm(), grouped_gemm() and supports() for "cuda" or "emu"."""

    def launch(kind, a, b, d, *, c, bias, counts=None, expected_m=None, num_sms=None):
        data, weight = _rows(a.data), _rows(b.data)
        sfa, sfb = _mn_major(a.scale), b.scale.contiguous()
        c, bias = _addend(c), _addend(bias)
        m, k = a.shape[-2:]
        launchers().gemm_fp8(
            machine=machine,
            ordinal=device_of(d),
            stream=stream_of(d),
            kind=kind,
            a=data.data_ptr(),
            sfa=sfa.data_ptr(),
            b=weight.data_ptr(),
            sfb=sfb.data_ptr(),
            d=_argument(d),
            c=_argument(c),
            bias=_argument(bias),
            group_rows=0 if counts is None else counts.data_ptr(),
            m=m,
            n=b.shape[-2],
            k=k,
            expected_m=expected_m or 0,
            num_groups=1 if kind == "dense" else b.shape[0],
            lda=data.stride(-2),
            ldb=weight.stride(-2),
            ld_sfa=sfa.stride(-1),
            num_sms=num_sms or 0,
        )

    def finish(d, out, dtype):
        if out is None:
            return d.to(dtype)
        return out if d is out else out.copy_(d)

    def gemm(
        a: ScaledTensor,
        b: ScaledTensor,
        *,
        out: torch.Tensor | None = None,
        out_dtype: torch.dtype | None = None,
        c: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        epilogue: str | None = None,
        deterministic: bool = False,
        num_sms: int | None = None,
    ) -> torch.Tensor:
        """As dskernels.ref.gemm.gemm for e4m3 in blocks (1, 128) x (128, 128).

        Always deterministic: every output is one ordered sum, whatever the batch around it.
        """
        _check(a, b, epilogue)
        dtype = out.dtype if out is not None else out_dtype or torch.bfloat16
        d = _result((a.shape[0], b.shape[0]), out, dtype, a.device, zero=False)
        launch("dense", a, b, d, c=c, bias=bias, num_sms=num_sms)
        return finish(d, out, dtype)

    def grouped_gemm(
        a: ScaledTensor,
        b: ScaledTensor,
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
    ) -> torch.Tensor:
        """As dskernels.ref.gemm.grouped_gemm, by group_sizes (no padding needed) or masked_m."""
        _check(a, b, epilogue)
        if m_indices is not None:
            raise Unsupported("m_indices: expected group_sizes or masked_m, got m_indices")
        dtype = out.dtype if out is not None else out_dtype or torch.bfloat16
        masked = masked_m is not None
        counts = masked_m if masked else group_sizes
        counts = torch.as_tensor(counts, dtype=torch.int32, device=a.device).contiguous()
        d = _result((*a.shape[:-1], b.shape[1]), out, dtype, a.device, zero=True)
        launch(
            "masked" if masked else "contiguous",
            a,
            b,
            d,
            c=c,
            bias=bias,
            counts=counts,
            expected_m=expected_m,
            num_sms=num_sms,
        )
        return finish(d, out, dtype)

    def supports(op: str, **shapes) -> Support:
        n, k = shapes.get("n", N_ALIGN), shapes.get("k", K_ALIGN)
        if op == "grouped_gemm_k":
            return Support(False, f"the {machine} backend has no implementation of {op}")
        if n % N_ALIGN or k % K_ALIGN:
            return Support(
                False, f"expected n % {N_ALIGN} == 0 and k % {K_ALIGN} == 0, got n={n}, k={k}"
            )
        return Support(True, f"{machine}: gemm_fp8_1d2d (e4m3 operands)")

    return gemm, grouped_gemm, supports


gemm, grouped_gemm, supports = on("cuda")
