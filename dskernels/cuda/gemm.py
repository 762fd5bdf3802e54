"""FP8 GEMM on the sm_90a kernels: dense, grouped contiguous, masked, grouped along k.

Dimension letters: m rows, n columns, k depth, g groups.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from ..types import ScaledTensor, Support, Unsupported
from . import launchers
from ._tensor import device_of, stream_of

# What the kernels store and add; results of other dtypes are rounded once more, from fp32.
KERNEL_DTYPES = (torch.bfloat16, torch.float32)
N_ALIGN, K_ALIGN = 8, 16  # TMA: rows of D (bf16) and of A and B (e4m3) start at 16-byte boundaries
BY_BLOCK, BY_ROW = (128, 128), (1, 128)  # blocks of b: "1d2d" and "1d1d"


# What forced_kernel() set: the instance that every launch uses, and how many ways it splits k.
_forced: tuple[str, int] = ("", 1)


@contextmanager
def forced_kernel(name: str, split: int = 1) -> Iterator[None]:
    """For tests and benchmarks: launches inside use this instance of csrc/cuda/instances/gemm.def,
    with k split over `split` SMs. One that does not fit the call raises ValueError."""
    global _forced
    outer, _forced = _forced, (name, split)
    try:
        yield
    finally:
        _forced = outer


def _check(a: ScaledTensor, b: ScaledTensor, b_blocks: tuple, epilogue: str | None) -> None:
    """Raise Unsupported, naming what is given, for a call the kernels do not cover."""
    for name, operand, blocks in (("a", a, (BY_ROW,)), ("b", b, b_blocks)):
        if not isinstance(operand, ScaledTensor):
            raise Unsupported(f"{name}: expected a ScaledTensor, got {type(operand).__name__}")
        if tuple(operand.block) not in blocks or operand.dtype != "e4m3":
            raise Unsupported(
                f"{name}: expected e4m3 in blocks of {' or '.join(map(str, blocks))}, "
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
    fits = fits and x.stride(-2) >= x.shape[-1]
    if x.dim() == 3:  # planes must follow one another as rows do
        fits = fits and x.stride(0) == x.shape[1] * x.stride(1)
    return x if fits else x.clone(memory_format=torch.contiguous_format)


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


def _finish(d: torch.Tensor, out: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    if out is None:
        return d.to(dtype)
    return out if d is out else out.copy_(d)


def _counts(sizes: torch.Tensor | Sequence[int], device) -> torch.Tensor:
    return torch.as_tensor(sizes, dtype=torch.int32, device=device).contiguous()


def _address(x: torch.Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def on(machine: str):
    """gemm(), grouped_gemm(), grouped_gemm_k() and supports() for "cuda" or "emu"."""

    def launch(
        kind, a, b, d, *, c, bias=None, counts=None, runs=None, expected_m=None, num_groups=1,
        deterministic=False, num_sms=None,
    ):  # fmt: skip
        data, weight = _rows(a.data), _rows(b.data)
        sfa = _mn_major(a.scale)
        sfb = _mn_major(b.scale) if kind == "along_k" else b.scale.contiguous()
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
            group_rows=_address(counts),
            runs=_address(runs),
            m=m,
            n=b.shape[-2],
            k=k,
            expected_m=expected_m or 0,
            num_groups=num_groups,
            lda=data.stride(-2),
            ldb=weight.stride(-2),
            ld_sfa=sfa.stride(-1),
            ld_sfb=sfb.stride(-1),
            num_sms=num_sms or 0,
            deterministic=deterministic,
            forced_kernel=_forced[0],
            forced_split=_forced[1],
        )

    def find_runs(m_indices: torch.Tensor) -> torch.Tensor:
        """The runs of equal entries in m_indices [m], found on the device."""
        indices = m_indices.to(torch.int32).contiguous()
        runs = torch.empty(1 + 3 * indices.shape[0], dtype=torch.int32, device=indices.device)
        launchers().gemm_runs(
            machine=machine,
            ordinal=device_of(runs),
            stream=stream_of(runs),
            m_indices=indices.data_ptr(),
            runs=runs.data_ptr(),
            rows=indices.shape[0],
        )
        return runs

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
        """As dskernels.ref.gemm.gemm for e4m3 operands.

        Every run gives the same bits. With few tiles and b in blocks (128, 128), k is split over
        several SMs whose sums are added in order, which the reference's order does not have and
        which depends on m; deterministic=True never splits.
        """
        _check(a, b, (BY_BLOCK, BY_ROW), epilogue)
        by_row = tuple(b.block) == BY_ROW
        default = torch.float32 if by_row else torch.bfloat16
        dtype = out.dtype if out is not None else out_dtype or default
        d = _result((a.shape[0], b.shape[0]), out, dtype, a.device)
        launch(
            "along_k" if by_row else "dense",
            a,
            b,
            d,
            c=c,
            bias=bias,
            deterministic=deterministic,
            num_sms=num_sms,
        )
        return _finish(d, out, dtype)

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
        """As dskernels.ref.gemm.grouped_gemm for e4m3 operands, in any of the three forms.

        Group sizes may lie on the device and are never waited for; no alignment is asked of them
        or of m_indices. Every output is one ordered sum, whatever the batch around it.
        """
        _check(a, b, (BY_BLOCK,), epilogue)
        dtype = out.dtype if out is not None else out_dtype or torch.bfloat16
        # Rows behind masked_m may stay unwritten, other rows of no group may not.
        d = _result((*a.shape[:-1], b.shape[1]), out, dtype, a.device, c, zero=masked_m is None)
        if d.numel() == 0:
            return _finish(d, out, dtype)
        runs = counts = None
        if m_indices is not None:
            runs = find_runs(m_indices)
        else:
            counts = _counts(group_sizes if masked_m is None else masked_m, a.device)
        launch(
            "contiguous" if masked_m is None else "masked",
            a,
            b,
            d,
            c=c,
            bias=bias,
            counts=counts,
            runs=runs,
            expected_m=expected_m,
            num_groups=b.shape[0],
            num_sms=num_sms,
        )
        return _finish(d, out, dtype)

    def grouped_gemm_k(
        a: ScaledTensor,
        b: ScaledTensor,
        group_sizes: torch.Tensor | Sequence[int],
        *,
        c: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
        out_dtype: torch.dtype = torch.float32,
        deterministic: bool = False,
        num_sms: int | None = None,
    ) -> torch.Tensor:
        """As dskernels.ref.gemm.grouped_gemm_k for e4m3 operands in blocks (1, 128).

        Group sizes may lie on the device, where a size that is no multiple of 128 stops the kernel
        with a trap. An empty group loads nothing, and with c = out it is not even visited.
        """
        _check(a, b, (BY_ROW,), None)
        counts = _counts(group_sizes, a.device)
        dtype = out.dtype if out is not None else out_dtype
        d = _result((counts.shape[0], a.shape[0], b.shape[0]), out, dtype, a.device)
        launch("along_k", a, b, d, c=c, counts=counts, num_groups=counts.shape[0], num_sms=num_sms)
        return _finish(d, out, dtype)

    def supports(op: str, **shapes) -> Support:
        n, k = shapes.get("n", N_ALIGN), shapes.get("k", K_ALIGN)
        if n % N_ALIGN or k % K_ALIGN:
            return Support(
                False, f"expected n % {N_ALIGN} == 0 and k % {K_ALIGN} == 0, got n={n}, k={k}"
            )
        blocks = "a (1, 128), b (128, 128)" + (" or (1, 128)" if op == "gemm" else "")
        if op == "grouped_gemm_k":
            blocks = "both (1, 128)"
        return Support(True, f"{machine}: e4m3 operands in blocks {blocks}; no epilogue")

    return gemm, grouped_gemm, grouped_gemm_k, supports


gemm, grouped_gemm, grouped_gemm_k, supports = on("cuda")
