"""Hopper's tensor-core arithmetic, exactly, and the exact fp32 FMA of the promotion.

One wgmma step along k multiplies 16 (FP16, BF16) or 32 (FP8) pairs and adds the accumulator C in
one go: products are exact; every term is aligned to the largest exponent among them and truncated
below 25 (FP16, BF16) or 13 (FP8) fraction bits of it; the integer sum is exact; the result is
rounded toward zero, to fp32 or, for FP8, to 13 mantissa bits. So an FP8 accumulator has about 14
bits, and a term more than 2^-13 below the largest is lost whole: the reason why DeepSeek-V3
promotes partial sums to fp32 registers every 128 of k (report, 3.3.2 and figure 7b).

The model was measured on hardware by the authors of MMA-Sim (PyPI `mmasim`); the tests compare
with theirs bit for bit. Letters: m, n, k as in gemm.
"""

from __future__ import annotations

import torch

from .fp8 import pow2

# dtype: (products per step, fraction bits kept in alignment, mantissa bits of the result,
#         exponent of the format's subnormals)
_STEP = {
    torch.float8_e4m3fn: (32, 13, 13, -6),
    torch.float16: (16, 25, 23, -14),
    torch.bfloat16: (16, 25, 23, -126),
}
_ZERO_EXPONENT = -133  # what a zero term contributes to the search for the largest exponent
_FP32_SUBNORMAL_EXPONENT = -126
_MAX_TERMS = 1 << 21  # per chunk of rows: keeps a step's [rows, n, k] temporaries in cache


def supported(dtype: torch.dtype) -> bool:
    """Whether Hopper's exact arithmetic is modelled for operands of this dtype."""
    return dtype in _STEP


def wgmma(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """a [m, k], b [n, k] (e4m3, fp16 or bf16), c [m, n] fp32 -> c + a b^T as Hopper sums it, fp32.

    k runs in steps of 16 or 32 from the left, each step's result being the next one's C; a ragged
    last step is filled up with zeros. NaN results are the canonical 0x7FFFFFFF, zeros are +0.
    """
    step = _STEP[a.dtype][0]
    rows = max(1, _MAX_TERMS // max(1, b.shape[0] * step))
    chunks = [
        _accumulate(a_rows, b, c_rows) for a_rows, c_rows in zip(a.split(rows), c.split(rows))
    ]
    return torch.cat(chunks) if chunks else c.clone()


def _accumulate(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    step, fraction_bits, mantissa_bits, subnormal = _STEP[a.dtype]
    wide_a, wide_b = a.double(), b.double()
    exponent_a, exponent_b = _exponent(wide_a, subnormal), _exponent(wide_b, subnormal)
    for start in range(0, a.shape[1], step):
        ks = slice(start, start + step)
        products = wide_a[:, None, ks] * wide_b[None, :, ks]
        exponents = exponent_a[:, None, ks] + exponent_b[None, :, ks]
        # 1 <= |product| / 2^exponent < 4: the exponents are added, never normalised.
        exponents = torch.where(products == 0, _ZERO_EXPONENT, exponents)
        c_wide = c.double()
        c_exponent = _exponent(c_wide, _FP32_SUBNORMAL_EXPONENT)
        c_exponent = torch.where(c_wide == 0, _ZERO_EXPONENT, c_exponent)
        largest = torch.maximum(exponents.amax(dim=-1), c_exponent)
        to_integer = pow2(fraction_bits - largest)
        total = torch.trunc(products * to_integer[..., None]).sum(dim=-1)
        total = total + torch.trunc(c_wide * to_integer)
        c = _round_toward_zero(total * pow2(largest - fraction_bits), mantissa_bits)
    return c


def _exponent(x: torch.Tensor, subnormal: int) -> torch.Tensor:
    """e such that |x| = s * 2^e with 1 <= s < 2, or s < 1 where x is subnormal in its format."""
    return (torch.frexp(x).exponent - 1).clamp(min=subnormal)


def _round_toward_zero(x: torch.Tensor, mantissa_bits: int) -> torch.Tensor:
    """fp64 -> fp32 with that many explicit mantissa bits, truncating; +0 and canonical NaN."""
    unit = pow2(_exponent(x, _FP32_SUBNORMAL_EXPONENT) - mantissa_bits)
    rounded = (torch.trunc(x / unit) * unit).float() + 0.0
    canonical = torch.full_like(rounded, 0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    return torch.where(rounded.isnan(), canonical, rounded)


def fma(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """a * b + c for fp32 tensors, rounded once: `__fmaf_rn`. Broadcasts.

    The product is exact in fp64, the sum is not: it is rounded to odd (its last bit set when bits
    were lost), which makes the second rounding, to fp32, come out as if it were the only one.
    """
    product = a.double() * b.double()
    c = c.double()
    total = product + c
    # Knuth's two-sum: total + error == product + c exactly.
    c_part = total - product
    error = (product - (total - c_part)) + (c - c_part)
    bits = total.view(torch.int64)
    even = (bits & 1) == 0
    inexact = torch.isfinite(total) & (error != 0) & even
    # Toward the error: one step up in magnitude when it has total's sign, else one step down.
    step = torch.where((error > 0) == (total > 0), 1, -1)
    odd = torch.where(inexact, bits + step, bits).view(torch.float64)
    return odd.float()
