"""Number formats: the saturating E4M3 and E5M6 casts, and power-of-two scales.

E4M3 (float8_e4m3fn): 1 sign, 4 exponent (bias 7), 3 mantissa bits; no infinities, NaN is
S.1111.111; largest 448, smallest normal 2^-6, smallest subnormal 2^-9.
E5M6 (DeepSeek-V3 report, section 3.2.3): 1 sign, 5 exponent (bias 15), 6 mantissa bits: float16
with its 4 lowest mantissa bits zero. Exponent 31 is reserved for NaN as in float16, so the largest
value is 65024 and the smallest subnormal 2^-20. The report names the format, not its bias or its
NaN; taking float16's lets hardware that has no such format convert it for free.
"""

from __future__ import annotations

import torch

from ..types import FORMAT_MAX


def cast_e4m3(x: torch.Tensor) -> torch.Tensor:
    """fp32 -> float8_e4m3fn, round to nearest even, saturating: |x| > 448 and inf give +-448.

    NaN stays NaN. This is PTX's `cvt.rn.satfinite.e4m3x2.f32`. Raises TypeError unless x is fp32:
    fp64 would round twice.
    """
    if x.dtype != torch.float32:
        raise TypeError(f"x: expected torch.float32, got {x.dtype}")
    return x.clamp(-FORMAT_MAX["e4m3"], FORMAT_MAX["e4m3"]).to(torch.float8_e4m3fn)


def cast_e5m6(x: torch.Tensor) -> torch.Tensor:
    """fp32 -> E5M6 held in float16, round to nearest even, saturating at +-65024; NaN stays NaN.

    Rounding goes through the integer grid of the value's own binade, never through float16: two
    roundings in a row are not one. Raises TypeError unless x is fp32.
    """
    if x.dtype != torch.float32:
        raise TypeError(f"x: expected torch.float32, got {x.dtype}")
    clamped = x.clamp(-FORMAT_MAX["e5m6"], FORMAT_MAX["e5m6"])
    # frexp's exponent is one above the value's; the last of 6 mantissa bits is 7 below it.
    grid = pow2(torch.frexp(clamped).exponent.clamp(min=-13) - 7).float()
    return (torch.round(clamped / grid) * grid).to(torch.float16)


def pack_e5m6(data: torch.Tensor) -> torch.Tensor:
    """E5M6 in float16 [..., k] -> uint8 [..., 3 * ceil(k / 2)], 12 bits an element.

    Elements 2i and 2i+1 are bits 0-11 and 12-23 of a little-endian 3-byte word; an odd k is padded
    with a zero. Raises TypeError unless data is float16.
    """
    if data.dtype != torch.float16:
        raise TypeError(f"data: expected torch.float16 holding E5M6, got {data.dtype}")
    bits = (data.contiguous().view(torch.int16).to(torch.int32) >> 4) & 0xFFF
    if bits.shape[-1] % 2:
        bits = torch.nn.functional.pad(bits, (0, 1))
    low, high = bits[..., 0::2], bits[..., 1::2]
    word = low | (high << 12)
    parts = torch.stack([word & 0xFF, (word >> 8) & 0xFF, word >> 16], dim=-1)
    return parts.to(torch.uint8).flatten(-2)


def unpack_e5m6(packed: torch.Tensor, k: int) -> torch.Tensor:
    """The inverse of `pack_e5m6`: uint8 [..., 3 * ceil(k / 2)] -> float16 [..., k]."""
    if packed.dtype != torch.uint8 or packed.shape[-1] != 3 * -(-k // 2):
        raise ValueError(
            f"packed: expected uint8 [..., {3 * -(-k // 2)}] for k = {k}, "
            f"got {packed.dtype} {tuple(packed.shape)}"
        )
    parts = packed.unflatten(-1, (-1, 3)).to(torch.int32)
    word = parts[..., 0] | (parts[..., 1] << 8) | (parts[..., 2] << 16)
    bits = torch.stack([word & 0xFFF, word >> 12], dim=-1).flatten(-2)[..., :k] << 4
    signed = torch.where(bits >= 0x8000, bits - 0x10000, bits)
    return signed.to(torch.int16).view(torch.float16)


def ceil_pow2(x: torch.Tensor) -> torch.Tensor:
    """The smallest power of two >= x, for positive fp32 x: 2^ceil(log2 x) without a logarithm.

    frexp is exact where log2 is not: 2^n itself must not become 2^(n+1). The result is limited to
    what E8M0 can hold, 2^-127 .. 2^127; inf and NaN pass through.
    """
    mantissa, exponent = torch.frexp(x)
    exponent = torch.where(mantissa == 0.5, exponent - 1, exponent).clamp(-127, 127)
    return torch.where(torch.isfinite(x), pow2(exponent).float(), x)


def pow2(exponent: torch.Tensor) -> torch.Tensor:
    """Integer exponents in -1022 .. 1023 -> 2^exponent in fp64, exact: the bits are written."""
    return ((exponent.to(torch.int64) + 1023) << 52).view(torch.float64)
