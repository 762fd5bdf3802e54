"""What kernels really reach: measured rates, and every assumption of the cost model with source.

Nothing here is fitted to a training time. Published measurements of single kernels on H800 are
used per shape; where only a range is known, the assumption says so, and `cost --sensitivity`
shows how much the answer moves if it is wrong.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace

from .hardware import Hardware

# (n, k) -> (FP8 TFLOP/s on H800, speed-up over DeepSeek's internal CUTLASS 3.6 kernels).
# DeepGEMM README at its first release (February 2025), m = 4096.
_DENSE = {
    (2112, 7168): (1058, 1.1),
    (24576, 1536): (990, 1.0),
    (32768, 512): (590, 1.0),
    (7168, 16384): (1358, 1.2),
    (4096, 7168): (1304, 1.1),
    (7168, 2048): (1025, 1.1),
}
# The same README, grouped contiguous, 4 groups of 8192 rows.
_GROUPED = {(4096, 7168): (1297, 1.2), (7168, 2048): (1099, 1.2)}
# Weight gradients: DeepGEMM pull request 95 (May 2025), dense over 4096 tokens and 4 groups of
# 8192; "about 20% faster than the internal CUTLASS implementation".
_WGRAD = {
    (2112, 7168): 920,
    (24576, 1536): 986,
    (32768, 512): 878,
    (7168, 16384): 994,
    (4096, 7168): 942,
    (7168, 2048): 920,
}
_WGRAD_GROUPED = {(4096, 7168): 1044, (7168, 2048): 1033}
_WGRAD_SPEEDUP = 1.2
# Small m (decode): m -> {(n, k): TFLOP/s}, same README.
_SMALL = {
    64: {
        (2112, 7168): 206,
        (24576, 1536): 289,
        (32768, 512): 219,
        (7168, 16384): 336,
        (4096, 7168): 287,
        (7168, 2048): 295,
    },
    128: {
        (2112, 7168): 352,
        (24576, 1536): 535,
        (32768, 512): 358,
        (7168, 16384): 645,
        (4096, 7168): 533,
        (7168, 2048): 510,
    },
}
# Grouped masked: rows per group -> {(n, k): TFLOP/s}
_MASKED = {
    256: {(4096, 7168): 932, (7168, 2048): 815},
    512: {(4096, 7168): 1040, (7168, 2048): 916},
    1024: {(4096, 7168): 1233, (7168, 2048): 925},
}
_H800_FP8 = 1979e12


@dataclass(frozen=True)
class Assumption:
    """A number, its unit, and why we believe it."""

    value: float
    unit: str
    source: str


def _says(value: float, unit: str, source: str):
    return field(default=Assumption(value, unit, source))


@dataclass(frozen=True)
class Rates:
    """Efficiencies and overheads. Replace one with `with_value(name, value)`."""

    gemm_speed: Assumption = _says(
        1.0,
        "x the FP8 GEMM rates measured per shape",
        "DeepGEMM README of February 2025 and pull request 95: TFLOP/s per V3 shape on H800",
    )
    gemm_predates_deepgemm: Assumption = _says(
        1.0,
        "1: divide those rates by DeepGEMM's reported speed-up, 0: take them as they are",
        "the run ended in 2024; the README's speed-ups are over DeepSeek's internal, optimised "
        "CUTLASS 3.6 kernels, the best public record of what came before",
    )
    gemm_generic: Assumption = _says(
        0.55, "of peak FP8, for shapes without a measurement", "mean of the measured shapes"
    )
    bf16_gemm: Assumption = _says(
        0.70,
        "of peak BF16 (output head, embedding gradient)",
        "about 700 of 989 TFLOP/s by cuBLAS on H100 SXM (SemiAnalysis, December 2024: 720)",
    )
    attention_forward: Assumption = _says(
        0.55,
        "of peak BF16",
        "FlashAttention-3 (arXiv 2407.08608, figure 5): about 550 TFLOP/s causal, head dim 128, "
        "4k tokens, read off the plot",
    )
    attention_backward: Assumption = _says(
        0.45,
        "of peak BF16",
        "FlashAttention-3, figure 6: about 500 TFLOP/s at 4k tokens without mask; causal masking "
        "costs about a tenth",
    )
    hbm: Assumption = _says(
        0.80,
        "of peak HBM bandwidth for memory-bound kernels",
        "DeepGEMM README: 2.4-2.7 of 3.35 TB/s in its memory-bound rows; FlashMLA: 3.0",
    )
    dispatch_bandwidth: Assumption = _says(
        51e9,
        "bytes/s of RDMA per GPU, dispatch over more than 4 nodes",
        "DeepEP V1 table, EP64 on H800: 51 GB/s (4096 tokens, FP8, top-4 groups)",
    )
    combine_bandwidth: Assumption = _says(
        50e9, "bytes/s of RDMA per GPU, combine", "DeepEP V1 table, EP64 on H800: 50 GB/s"
    )
    dispatch_bandwidth_ep32: Assumption = _says(
        58e9, "bytes/s, dispatch over 3 or 4 nodes", "DeepEP V1 table, EP32: 58 GB/s"
    )
    combine_bandwidth_ep32: Assumption = _says(
        57e9, "bytes/s, combine over 3 or 4 nodes", "DeepEP V1 table, EP32: 57 GB/s"
    )
    bandwidth_ep16: Assumption = _says(
        43e9, "bytes/s, dispatch and combine over 2 nodes", "DeepEP V1 table, EP16: 43 GB/s both"
    )
    low_latency_bandwidth: Assumption = _says(
        39e9,
        "bytes/s of RDMA per GPU, decode dispatch and combine",
        "DeepEP V1 low-latency table, EP128 and EP256: 39-40 GB/s",
    )
    comm_sms: Assumption = _says(
        20, "SMs held by all-to-all kernels", "DeepSeek-V3 report, 3.2.2: only 20 SMs"
    )
    imbalance: Assumption = _says(
        1.10,
        "x mean expert load on the busiest rank, experts and all-to-all",
        "auxiliary-loss-free balancing (arXiv 2408.15664) shows maximal violations of 0.1-0.2 per "
        "expert and batch; a rank averages several experts",
    )
    kernel_gap: Assumption = _says(
        2e-6, "s between dependent kernels", "launch and drain without CUDA graphs, 1-4 us"
    )
    p2p_bandwidth: Assumption = _says(
        0.9, "of the NIC's rate for pipeline and data-parallel traffic", "NCCL on 400 Gb/s links"
    )
    attention_decode: Assumption = _says(
        580e12, "FLOP/s of MLA decode kernels", "FlashMLA on H800, first release (February 2025)"
    )
    decode_hbm: Assumption = _says(
        3.0e12, "bytes/s of MLA decode kernels", "FlashMLA on H800: 3000 GB/s memory-bound"
    )

    def __getitem__(self, name: str) -> float:
        return getattr(self, name).value

    def with_value(self, name: str, value: float) -> Rates:
        old = getattr(self, name)
        return replace(self, **{name: replace(old, value=value)})

    def items(self) -> Iterator[tuple[str, Assumption]]:
        for f in fields(self):
            yield f.name, getattr(self, f.name)


@dataclass(frozen=True)
class Kernels:
    """Times of single kernels on one GPU, in seconds."""

    hw: Hardware
    rates: Rates

    def gemm(
        self, m: float, n: int, k: int, *, grouped: bool = False, transposed: bool = False
    ) -> float:
        """FP8 GEMM of m rows (all groups together). `transposed`: the input gradient of a layer
        (n, k), which runs the same FLOPs with the roles of n and k exchanged."""
        table = _GROUPED if grouped else _DENSE
        tflops, speedup = table.get((n, k), (None, 1.0))
        rate = self._rate(tflops, speedup)
        flops_time = 2.0 * m * n * k / rate
        out_width = k if transposed else n
        in_width = n if transposed else k
        moved = m * in_width + n * k + 2 * m * out_width
        return max(flops_time, moved / (self.hw.hbm * self.rates["hbm"]))

    def wgrad(self, m: float, n: int, k: int, *, groups: int = 0) -> float:
        """FP8 weight gradient over m tokens, accumulated onto FP32 in memory."""
        table = _WGRAD_GROUPED if groups else _WGRAD
        rate = self._rate(table.get((n, k)), _WGRAD_SPEEDUP)
        # Read and write of the FP32 accumulator is extra to the GEMM's own traffic.
        accumulate = 8.0 * max(groups, 1) * n * k / (self.hw.hbm * self.rates["hbm"])
        return 2.0 * m * n * k / rate + accumulate

    def _rate(self, tflops: float | None, speedup: float) -> float:
        if tflops is None:
            return self.hw.fp8 * self.rates["gemm_generic"] * self.rates["gemm_speed"]
        older = 1.0 + (speedup - 1.0) * self.rates["gemm_predates_deepgemm"]
        return tflops * 1e12 / older * self.hw.fp8 / _H800_FP8 * self.rates["gemm_speed"]

    def small_gemm(self, m: float, n: int, k: int) -> float:
        """FP8 GEMM of few rows: between the measured m = 64 and 128, else by memory."""
        flops = 2.0 * m * n * k
        scale = 1e12 * self.hw.hbm / 3.35e12
        measured = [(rows, table[n, k]) for rows, table in _SMALL.items() if (n, k) in table]
        if not measured:
            return max(n * k / (self.hw.hbm * 0.6), flops / (self.hw.fp8 * 0.5))
        times = [(rows, 2.0 * rows * n * k / (t * scale)) for rows, t in measured]
        (m0, t0), (m1, t1) = times
        if m <= m0:
            return t0  # reading the weights takes the time, however few rows there are
        return t0 + (t1 - t0) * (m - m0) / (m1 - m0)

    def masked_gemm(self, rows: float, groups: int, n: int, k: int) -> float:
        """FP8 grouped GEMM of `rows` per group (decode experts)."""
        measured = sorted((r, t[n, k]) for r, t in _MASKED.items() if (n, k) in t)
        weights = groups * n * k / (self.hw.hbm * self.rates["hbm"])
        if not measured:
            rate = self.hw.fp8 * self.rates["gemm_generic"]
        else:
            tflops = next((t for r, t in measured if rows <= r), measured[-1][1])
            rate = tflops * 1e12 * self.hw.fp8 / _H800_FP8
        return max(weights, 2.0 * groups * rows * n * k / rate)

    def moved(self, num_bytes: float) -> float:
        """A memory-bound pass over so many bytes."""
        return num_bytes / (self.hw.hbm * self.rates["hbm"])
