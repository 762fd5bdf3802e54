"""Row-wise ops: block quantisation, RMSNorm, RoPE, SwiGLU, and their fusions.

Dimension letters: m rows, k columns, d model or head width, t tokens, h heads, r RoPE width,
i expert width; "..." any leading dimensions.
"""

from __future__ import annotations

import torch

from ..types import FORMAT_MAX, ScaledTensor, scale_shape
from . import fp8

AMAX_FLOOR = 1e-4  # keeps the scale of an all-zero block finite and invertible
SCALE_FORMATS = ("fp32", "ue8m0", "pow2")


def quantize(
    x: torch.Tensor | ScaledTensor,
    block: tuple[int, int] = (1, 128),
    scale_format: str = "fp32",
    dtype: str = "e4m3",
    transpose: bool = False,
) -> ScaledTensor:
    """Quantise x [..., m, k] with one scale per block of rows x columns.

    scale = max(amax, 1e-4) / 448 (65024 for "e5m6"), an IEEE fp32 division; "ue8m0" and "pow2"
    (the V3 report's name for the same thing) round it up to a power of two, so nothing saturates.
    data = cast(x / scale), fp32 division, round to nearest even, saturating.

    transpose  quantise x^T instead: data [..., k, m], scale [..., k, ceil(m / 128)]: the 1x128
               tiles of the forward become the 128x1 tiles the weight gradient needs. A
               ScaledTensor x is dequantised in fp32 first.

    The scale of block (1, c) is MN-major, strides (1, align(m, 4)). Ragged last blocks use the
    elements that exist. Empty dimensions give empty data and scales.

    A NaN element does not enter its block's amax and becomes a NaN element. A block that holds an
    infinity has scale +inf and dequantises to NaN throughout.

    Source: V3 report 3.3.2, 3.5.2; DeepSeek's demo quantiser (the 1e-4 floor).
    """
    if scale_format not in SCALE_FORMATS:
        raise ValueError(f"scale_format: expected one of {SCALE_FORMATS}, got {scale_format!r}")
    if dtype not in FORMAT_MAX:
        raise ValueError(f"dtype: expected one of {list(FORMAT_MAX)}, got {dtype!r}")
    values = x.dequantize() if isinstance(x, ScaledTensor) else x.detach().float()
    if transpose:
        values = values.transpose(-2, -1)
    tiles = _tiles(values, block)
    amax = tiles.abs().nan_to_num(nan=0.0, posinf=torch.inf).amax(dim=(-3, -1))
    scale = amax.clamp(min=AMAX_FLOOR) / FORMAT_MAX[dtype]
    if scale_format != "fp32":
        scale = fp8.ceil_pow2(scale)
    cast = {"e4m3": fp8.cast_e4m3, "e5m6": fp8.cast_e5m6}[dtype]
    quotient = tiles / scale[..., :, None, :, None]
    m, k = values.shape[-2:]
    data = cast(_untile(quotient)[..., :m, :k].contiguous())
    return ScaledTensor(data, mn_major(scale) if block[0] == 1 else scale, tuple(block), dtype)


def dequantize(x: ScaledTensor, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """data * scale [..., m, k], the product in fp32 (fp64 for dtype float64), rounded to dtype.

    Source: DeepSeek-V3's fp8_cast_bf16.
    """
    return x.dequantize(dtype)


def pack_e5m6(data: torch.Tensor) -> torch.Tensor:
    """E5M6 in float16 [..., k] -> uint8 [..., 3 * ceil(k / 2)]; see `fp8.pack_e5m6`."""
    return fp8.pack_e5m6(data)


def unpack_e5m6(packed: torch.Tensor, k: int) -> torch.Tensor:
    """uint8 [..., 3 * ceil(k / 2)] -> E5M6 in float16 [..., k]; see `fp8.unpack_e5m6`."""
    return fp8.unpack_e5m6(packed, k)


def _tiles(x: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """[..., m, k] -> [..., m / rows, rows, k / columns, columns], zeros after the ragged end."""
    rows, columns = block
    row_blocks, column_blocks = scale_shape(x.shape, block)[-2:]
    m, k = x.shape[-2:]
    padded = torch.nn.functional.pad(x, (0, column_blocks * columns - k, 0, row_blocks * rows - m))
    return padded.unflatten(-1, (column_blocks, columns)).unflatten(-3, (row_blocks, rows))


def _untile(tiles: torch.Tensor) -> torch.Tensor:
    return tiles.flatten(-2).flatten(-3, -2)


def mn_major(scale: torch.Tensor) -> torch.Tensor:
    """The same scales [..., m, c] with strides (1, align(m, 4)): what TMA reads. Padding is 0."""
    m, c = scale.shape[-2:]
    storage = scale.new_zeros(*scale.shape[:-2], c, -(-m // 4) * 4)
    storage[..., :m] = scale.transpose(-2, -1)
    return storage.transpose(-2, -1)[..., :m, :]


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float = 1e-6,
    residual: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """x [..., d] / sqrt(mean(x^2) + eps) * weight [d], in fp32, in x's dtype. Differentiable.

    With `residual` (x's shape and dtype) the sum x + residual, rounded to x's dtype, is what is
    normalised, and (y, x + residual) is returned: the sum is the next block's residual.
    """
    if residual is not None:
        x = x + residual
    wide = _wide(x)
    inverse = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    y = (wide * inverse * weight.to(wide.dtype)).to(x.dtype)
    return y if residual is None else (y, x)


def rope(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    interleaved: bool = True,
    inverse: bool = False,
) -> torch.Tensor:
    """Rotate the pairs of x [..., t, h, r] by the angles of its token. Differentiable.

    cos, sin  fp32 [..., t, r/2], indexed to the tokens already. (a, b) -> (a cos - b sin,
    b cos + a sin) in fp32, rounded once to x's dtype. Pair p is elements (2p, 2p+1), DeepSeek's
    order, or (p, p + r/2) with interleaved=False. inverse rotates by the negative angle.
    """
    if x.shape[-1] % 2 or cos.shape[-1] * 2 != x.shape[-1] or cos.shape != sin.shape:
        raise ValueError(
            "x, cos, sin: expected x [..., t, h, r] with even r and cos, sin [..., t, r/2], got "
            f"{tuple(x.shape)}, {tuple(cos.shape)}, {tuple(sin.shape)}"
        )
    wide = _wide(x)
    cos, sin = cos.to(wide.dtype).unsqueeze(-2), sin.to(wide.dtype).unsqueeze(-2)
    if inverse:
        sin = -sin
    a, b = (wide[..., 0::2], wide[..., 1::2]) if interleaved else wide.chunk(2, dim=-1)
    rotated = (a * cos - b * sin, b * cos + a * sin)
    y = torch.stack(rotated, dim=-1).flatten(-2) if interleaved else torch.cat(rotated, dim=-1)
    return y.to(x.dtype)


def swiglu(x: torch.Tensor) -> torch.Tensor:
    """x [..., 2i] = [gate; up] -> silu(gate) * up [..., i], in fp32, in x's dtype.

    Differentiable. Raises ValueError for an odd last dimension.
    """
    if x.shape[-1] % 2:
        raise ValueError(f"x: expected an even last dimension [gate; up], got {tuple(x.shape)}")
    gate, up = _wide(x).chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up).to(x.dtype)


def rms_norm_quantize(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float = 1e-6,
    residual: torch.Tensor | None = None,
    *,
    block: tuple[int, int] = (1, 128),
    scale_format: str = "fp32",
) -> ScaledTensor | tuple[ScaledTensor, torch.Tensor]:
    """`rms_norm` then `quantize`; the normalised value is quantised from fp32, unrounded."""
    if residual is not None:
        x = x + residual
    y = quantize(rms_norm(x.float(), weight, eps), block, scale_format)
    return y if residual is None else (y, x)


def swiglu_quantize(
    x: torch.Tensor, *, block: tuple[int, int] = (1, 128), scale_format: str = "fp32"
) -> ScaledTensor:
    """`swiglu` then `quantize`; the product is quantised from fp32, unrounded."""
    return quantize(swiglu(x.float()), block, scale_format)


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()
