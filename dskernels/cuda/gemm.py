"""FP8 and BF16 GEMM on the sm_90a kernels: dense, grouped contiguous, masked, grouped along k,
and SwiGLU with quantisation in the epilogue.

Dimension letters: m rows, n columns, k depth, g groups.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from ..types import ScaledTensor, Support, Unsupported
from . import _gemm_bf16, launchers
from ._operands import (
    addend,
    address,
    argument,
    finish,
    int32_counts,
    mn_major,
    quantised_result,
    result_tensor,
    tma_rows,
)
from ._tensor import device_of, stream_of

Operand = torch.Tensor | ScaledTensor
N_ALIGN, K_ALIGN = 8, 16  # TMA: rows of D (bf16) and of A and B (e4m3) start at 16-byte boundaries
BY_BLOCK, BY_ROW = (128, 128), (1, 128)  # blocks of b: "1d2d" and "1d1d"


# What forced_kernel() set: (kernel, pair_m, pair_n, split), or no kernel: the launcher's choice.
_NOTHING_FORCED = ("", 1, 1, 1)
_forced = _NOTHING_FORCED


@contextmanager
def forced_kernel(name: str, *, pair_m: int = 1, pair_n: int = 1, split: int = 1) -> Iterator[None]:
    """For tests and benchmarks: launches inside use this instance of csrc/cuda/instances/gemm.def,
    in pairs of CTAs that share B (pair_m=2) or A (pair_n=2), or with k split over `split` CTAs.
    A call that it does not fit raises ValueError."""
    global _forced
    outer, _forced = _forced, (name, pair_m, pair_n, split)
    try:
        yield
    finally:
        _forced = outer


def _check(a: Operand, b: Operand, b_blocks: tuple, epilogue: str | None = None) -> None:
    """Raise Unsupported, naming what is given, for a call the kernels do not cover."""
    if isinstance(a, torch.Tensor):
        _gemm_bf16.check(a, b, epilogue)
        return
    for name, operand, blocks in (("a", a, (BY_ROW,)), ("b", b, b_blocks)):
        if not isinstance(operand, ScaledTensor):
            raise Unsupported(f"{name}: expected a ScaledTensor, got {type(operand).__name__}")
        if tuple(operand.block) not in blocks or operand.dtype != "e4m3":
            raise Unsupported(
                f"{name}: expected e4m3 in blocks of {' or '.join(map(str, blocks))}, "
                f"got {operand.dtype} in {operand.block}"
            )
    n, k = b.shape[-2:]
    if n % N_ALIGN or k % K_ALIGN or k == 0:
        raise Unsupported(
            f"b: expected n a multiple of {N_ALIGN} and k a positive multiple of {K_ALIGN} "
            f"(TMA's 16-byte rows), got n = {n}, k = {k}"
        )


def _check_swiglu(b: ScaledTensor, epilogue: str, c, bias) -> None:
    """Raise Unsupported for a call that the SwiGLU epilogue does not cover."""
    align = 2 * (16 if epilogue == "swiglu_quant" else N_ALIGN)
    if tuple(b.block) != BY_BLOCK or b.shape[-2] % align:
        raise Unsupported(
            f"b: expected blocks of {BY_BLOCK} and n a multiple of {align} with epilogue "
            f"{epilogue!r}, got {b.block} and n = {b.shape[-2]}"
        )
    for name, value in (("c", c), ("bias", bias)):
        if value is not None:
            raise Unsupported(f"{name}: expected None with epilogue {epilogue!r}, got a tensor")


class GemmKernels:
    """The functions of this stem on one machine: "cuda", or "emu", the emulator."""

    def __init__(self, machine: str) -> None:
        self.machine = machine

    def _launch(
        self, kind, a, b, d, *, c, bias=None, counts=None, runs=None, expected_m=None, num_groups=1,
        swiglu=False, deterministic=False, num_sms=None, arrived=None, on=None,
    ):  # fmt: skip
        if isinstance(a, torch.Tensor):  # every bf16 sum is in one order: deterministic already
            _gemm_bf16.launch(
                self.machine, kind, a, b, d, c=c, bias=bias, counts=counts, runs=runs,
                expected_m=expected_m, num_groups=num_groups, num_sms=num_sms,
            )  # fmt: skip
            return
        data, weight = tma_rows(a.data), tma_rows(b.data)
        sfa = mn_major(a.scale)
        sfb = mn_major(b.scale) if kind == "along_k" else b.scale.contiguous()
        c, bias = addend(c), addend(bias)
        m, k = a.shape[-2:]
        launchers().gemm_fp8(
            machine=self.machine,
            ordinal=device_of(data) if on is None else on[0],
            stream=stream_of(data) if on is None else on[1],
            kind=kind,
            a=data.data_ptr(),
            sfa=sfa.data_ptr(),
            b=weight.data_ptr(),
            sfb=sfb.data_ptr(),
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
            ld_sfa=sfa.stride(-1),
            ld_sfb=sfb.stride(-1),
            num_sms=num_sms or 0,
            swiglu=swiglu,
            deterministic=deterministic,
            force=_forced,
            arrived=address(arrived),
        )

    def _find_runs(self, m_indices: torch.Tensor) -> torch.Tensor:
        """The runs of equal entries in m_indices [m], found on the device."""
        indices = m_indices.to(torch.int32).contiguous()
        runs = torch.zeros(1 + 3 * indices.shape[0], dtype=torch.int32, device=indices.device)
        if indices.shape[0] == 0:
            return runs
        launchers().gemm_runs(
            machine=self.machine,
            ordinal=device_of(runs),
            stream=stream_of(runs),
            m_indices=indices.data_ptr(),
            runs=runs.data_ptr(),
            rows=indices.shape[0],
        )
        return runs

    def _launch_swiglu(self, kind, a, b, epilogue, out, out_dtype, c, bias, **options):
        """silu(gate) * up with b = [gate; up] along n, rounded or quantised."""
        _check_swiglu(b, epilogue, c, bias)
        shape = (*a.shape[:-1], b.shape[-2] // 2)
        zero = kind == "contiguous" and options.get("num_groups") is not None
        if epilogue == "swiglu_quant":
            d = quantised_result(shape, a.device, zero)
        else:
            dtype = out.dtype if out is not None else out_dtype or torch.bfloat16
            d = result_tensor(shape, out, dtype, a.device, zero=zero)
        if d.data.numel() != 0:
            self._launch(kind, a, b, d, c=None, swiglu=True, **options)
        return d if epilogue == "swiglu_quant" else finish(d, out, dtype)

    def gemm(
        self,
        a: Operand,
        b: Operand,
        *,
        out: torch.Tensor | None = None,
        out_dtype: torch.dtype | None = None,
        c: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        epilogue: str | None = None,
        deterministic: bool = False,
        num_sms: int | None = None,
    ) -> torch.Tensor:
        """As dskernels.ref.gemm.gemm for e4m3 operands, or plain bf16.

        Every run gives the same bits. With few tiles and b in blocks (128, 128), k is split over
        several SMs whose sums are added in order, which the reference's order does not have and
        which depends on m; deterministic=True never splits.
        """
        _check(a, b, (BY_BLOCK, BY_ROW), epilogue)
        if epilogue is not None:  # one group of all rows
            return self._launch_swiglu(
                "contiguous", a, b, epilogue, out, out_dtype, c, bias, num_sms=num_sms
            )
        by_row = isinstance(b, ScaledTensor) and tuple(b.block) == BY_ROW
        default = torch.float32 if by_row else torch.bfloat16
        dtype = out.dtype if out is not None else out_dtype or default
        d = result_tensor((a.shape[0], b.shape[0]), out, dtype, a.device)
        self._launch(
            "along_k" if by_row else "dense",
            a,
            b,
            d,
            c=c,
            bias=bias,
            deterministic=deterministic,
            num_sms=num_sms,
        )
        return finish(d, out, dtype)

    def grouped_gemm(
        self,
        a: Operand,
        b: Operand,
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
        """As dskernels.ref.gemm.grouped_gemm for e4m3 operands or plain bf16, in any of
        the three forms.

        Group sizes may lie on the device and are never waited for; no alignment is asked of them
        or of m_indices. Every output is one ordered sum, whatever the batch around it.
        """
        _check(a, b, (BY_BLOCK,), epilogue)
        kind = "contiguous" if masked_m is None else "masked"
        groups = {"expected_m": expected_m, "num_groups": b.shape[0], "num_sms": num_sms}
        if m_indices is not None:
            groups["runs"] = self._find_runs(m_indices)
        else:
            sizes = group_sizes if masked_m is None else masked_m
            groups["counts"] = int32_counts(sizes, a.device)
        if epilogue is not None:
            return self._launch_swiglu(kind, a, b, epilogue, out, out_dtype, c, bias, **groups)
        dtype = out.dtype if out is not None else out_dtype or torch.bfloat16
        # Rows behind masked_m may stay unwritten, other rows of no group may not.
        d = result_tensor(
            (*a.shape[:-1], b.shape[1]), out, dtype, a.device, c, zero=masked_m is None
        )
        if d.numel() != 0:
            self._launch(kind, a, b, d, c=c, bias=bias, **groups)
        return finish(d, out, dtype)

    def grouped_gemm_on_arrival(
        self,
        a: ScaledTensor,
        b: ScaledTensor,
        arrived: torch.Tensor,
        out: torch.Tensor,
        *,
        on: tuple[int, int],
        expected_m: int | None = None,
        num_sms: int | None = None,
    ) -> list[torch.Tensor]:
        """Queue out [g, m, n] = a [g, m, k] b [g, n, k]^T while another kernel brings a's rows.

        arrived int32 [g] is 0 until a group's rows are there, then 1 + their number (see
        csrc/cuda/tile/arrival.cuh): groups are multiplied in their order, each as soon as it has
        arrived; rows behind it stay unwritten. `on` is (GPU, stream), another stream than the
        other kernel's; num_sms must leave that kernel room, or both wait for ever. a is taken as
        it lies: m a multiple of the kernel's tile, rows of 16-byte multiples, scales MN-major.
        Returns the tensors that must live (on the emulator: be lent) until the kernel has run.
        """
        for name, x in (("a", a), ("b", b)):
            if not isinstance(x, ScaledTensor):
                raise Unsupported(f"{name}: expected a ScaledTensor, got {type(x).__name__}")
        _check(a, b, (BY_BLOCK,))
        if tma_rows(a.data) is not a.data or mn_major(a.scale) is not a.scale:
            raise ValueError(
                "a: expected 16-byte aligned rows and MN-major scales, which are not there to be "
                f"copied yet, got strides {a.data.stride()} and {a.scale.stride()}"
            )
        want = {"arrived": ((b.shape[0],), torch.int32),
                "out": ((*a.shape[:-1], b.shape[1]), torch.bfloat16)}  # fmt: skip
        for name, x in (("arrived", arrived), ("out", out)):
            shape, dtype = want[name]
            if tuple(x.shape) != shape or x.dtype != dtype or not x.is_contiguous():
                raise ValueError(
                    f"{name}: expected contiguous {dtype} {shape}, got {x.dtype} {tuple(x.shape)} "
                    f"with strides {x.stride()}"
                )
        weight = ScaledTensor(tma_rows(b.data), b.scale.contiguous(), b.block)
        self._launch("masked", a, weight, out, c=None, arrived=arrived, num_groups=b.shape[0],
                     expected_m=expected_m, num_sms=num_sms, on=on)  # fmt: skip
        return [a.data, a.scale, weight.data, weight.scale, arrived, out]

    def grouped_gemm_k(
        self,
        a: Operand,
        b: Operand,
        group_sizes: torch.Tensor | Sequence[int],
        *,
        c: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
        out_dtype: torch.dtype = torch.float32,
        deterministic: bool = False,
        num_sms: int | None = None,
    ) -> torch.Tensor:
        """As dskernels.ref.gemm.grouped_gemm_k for e4m3 operands in blocks (1, 128), or bf16.

        Group sizes may lie on the device, where a size that is no multiple of 128 (bf16: 64) stops
        the kernel with a trap. An empty group loads nothing, and with c = out it is not even
        visited.
        """
        _check(a, b, (BY_ROW,))
        counts = int32_counts(group_sizes, a.device)
        if isinstance(a, torch.Tensor):
            _gemm_bf16.check_k_groups(counts)
        dtype = out.dtype if out is not None else out_dtype
        d = result_tensor((counts.shape[0], a.shape[0], b.shape[0]), out, dtype, a.device)
        self._launch(
            "along_k", a, b, d, c=c, counts=counts, num_groups=counts.shape[0], num_sms=num_sms
        )
        return finish(d, out, dtype)

    def supports(self, op: str, **shapes) -> Support:
        n, k = shapes.get("n", N_ALIGN), shapes.get("k", K_ALIGN)
        if n % N_ALIGN or k % K_ALIGN:
            return Support(
                False, f"expected n % {N_ALIGN} == 0 and k % {K_ALIGN} == 0, got n={n}, k={k}"
            )
        blocks = "a (1, 128), b (128, 128)" + (" or (1, 128)" if op == "gemm" else "")
        if op == "grouped_gemm_k":
            blocks = "both (1, 128)"
        return Support(True, f"{self.machine}: e4m3 operands in blocks {blocks}, or bf16")


_kernels = GemmKernels("cuda")
gemm, grouped_gemm = _kernels.gemm, _kernels.grouped_gemm
grouped_gemm_k, supports = _kernels.grouped_gemm_k, _kernels.supports
