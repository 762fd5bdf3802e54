"""Row-wise ops on the CPU kernels; names, arguments and meaning are those of `ref.rowwise`.

Dimension letters: m rows, k columns, d width, t tokens, h heads, r RoPE width, i expert width.
What no kernel covers (E5M6, fp64) runs the reference function.
"""

from __future__ import annotations

import math

import torch

from .. import _C
from ..ref import rowwise as ref
from ..types import ScaledTensor, scale_shape

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def quantize(
    x: torch.Tensor | ScaledTensor,
    block: tuple[int, int] = (1, 128),
    scale_format: str = "fp32",
    dtype: str = "e4m3",
    transpose: bool = False,
) -> ScaledTensor:
    """x [..., m, k] -> e4m3 data and one fp32 scale per block; bitwise `ref.rowwise.quantize`."""
    if transpose and dtype == "e4m3":
        wide = x.dequantize() if isinstance(x, ScaledTensor) else x.detach()
        if wide.dtype in _FLOATS and wide.dim() >= 2:
            return quantize(wide.transpose(-2, -1).contiguous(), block, scale_format)
    plain = isinstance(x, torch.Tensor) and x.dtype in _FLOATS and x.dim() >= 2
    stacked = plain and x.dim() > 2 and (block[0] != 1 and x.shape[-2] % block[0] != 0)
    if not plain or stacked or transpose or dtype != "e4m3" or len(block) != 2:
        return ref.quantize(x, block, scale_format, dtype, transpose)
    pow2 = _pow2(scale_format)
    data = torch.empty(x.shape, dtype=torch.float8_e4m3fn)
    scale = _empty_scale(x.shape, block)
    rows = x.detach().reshape(math.prod(x.shape[:-1]), x.shape[-1])
    if x.dim() == 2:
        _C.cpu.quantize(_rows(rows), data, scale, *block, pow2, _threads())
    elif rows.numel():
        # Blocks of a stack do not straddle its matrices, so it is one tall matrix.
        flat = torch.empty(scale_shape(rows.shape, block))
        _C.cpu.quantize(_rows(rows), data.view(rows.shape), flat, *block, pow2, _threads())
        scale.copy_(flat.view(scale.shape))
    return ScaledTensor(data, scale, tuple(block))


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float = 1e-6,
    residual: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """x [..., d] normalised to mean square 1, times weight [d]; see `ref.rowwise.rms_norm`."""
    if not _is_native(x, weight, residual):
        return ref.rms_norm(x, weight, eps, residual)
    y = torch.empty(x.shape, dtype=x.dtype)
    total = None if residual is None else torch.empty(x.shape, dtype=x.dtype)
    rows = [None if t is None else _matrix(t) for t in (x, residual, y, total)]
    _C.cpu.rms_norm(rows[0], weight.detach(), rows[1], eps, rows[2], rows[3], _threads())
    return y if residual is None else (y, total)


def rms_norm_quantize(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float = 1e-6,
    residual: torch.Tensor | None = None,
    *,
    block: tuple[int, int] = (1, 128),
    scale_format: str = "fp32",
) -> ScaledTensor | tuple[ScaledTensor, torch.Tensor]:
    """`rms_norm` then `quantize` without storing the normalised row in between."""
    if not _is_native(x, weight, residual) or x.dim() != 2 or tuple(block) != (1, 128):
        return ref.rms_norm_quantize(
            x, weight, eps, residual, block=block, scale_format=scale_format
        )
    data = torch.empty(x.shape, dtype=torch.float8_e4m3fn)
    scale = _empty_scale(x.shape, block)
    total = None if residual is None else torch.empty(x.shape, dtype=x.dtype)
    rest = None if residual is None else _matrix(residual)
    args = (_matrix(x), weight.detach(), rest, eps, data, scale, total)
    _C.cpu.rms_norm_quantize(*args, _pow2(scale_format), _threads())
    scaled = ScaledTensor(data, scale, tuple(block))
    return scaled if residual is None else (scaled, total)


def swiglu(x: torch.Tensor) -> torch.Tensor:
    """x [..., 2i] = [gate; up] -> silu(gate) * up [..., i], in fp32, in x's dtype."""
    if x.dtype not in _FLOATS or x.shape[-1] % 2:
        return ref.swiglu(x)
    y = torch.empty(*x.shape[:-1], x.shape[-1] // 2, dtype=x.dtype)
    _C.cpu.swiglu(_matrix(x), _matrix(y), _threads())
    return y


def swiglu_quantize(
    x: torch.Tensor, *, block: tuple[int, int] = (1, 128), scale_format: str = "fp32"
) -> ScaledTensor:
    """`swiglu` then `quantize` without storing the product in between."""
    if x.dtype not in _FLOATS or x.dim() != 2 or x.shape[1] % 2 or tuple(block) != (1, 128):
        return ref.swiglu_quantize(x, block=block, scale_format=scale_format)
    shape = (x.shape[0], x.shape[1] // 2)
    data, scale = torch.empty(shape, dtype=torch.float8_e4m3fn), _empty_scale(shape, block)
    _C.cpu.swiglu_quantize(_matrix(x), data, scale, _pow2(scale_format), _threads())
    return ScaledTensor(data, scale, tuple(block))


def rope(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    interleaved: bool = True,
    inverse: bool = False,
) -> torch.Tensor:
    """Rotate the pairs of x [..., t, h, r] by cos, sin [..., t, r/2]; see `ref.rowwise.rope`."""
    regular = x.dim() >= 3 and cos.shape == sin.shape and x.shape[-1] == 2 * cos.shape[-1]
    tokens = tuple(x.shape[:-2])
    if (
        not regular
        or x.dtype not in _FLOATS
        or {cos.dtype, sin.dtype} != {torch.float32}
        or x.numel() == 0
    ):
        return ref.rope(x, cos, sin, interleaved=interleaved, inverse=inverse)
    half = cos.shape[-1]
    angles = [a.detach().expand(*tokens, half).reshape(-1, half).contiguous() for a in (cos, sin)]
    flat = x.detach().reshape(-1, *x.shape[-2:])
    flat = flat if flat.stride(-1) == 1 else flat.contiguous()
    y = torch.empty(flat.shape, dtype=x.dtype)
    _C.cpu.rope(flat, *angles, interleaved, inverse, y, _threads())
    return y.view(x.shape)


def _threads() -> int:
    return torch.get_num_threads()


def _pow2(scale_format: str) -> int:
    if scale_format not in ref.SCALE_FORMATS:
        raise ValueError(f"scale_format: expected one of {ref.SCALE_FORMATS}, got {scale_format!r}")
    return int(scale_format != "fp32")


def _is_native(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None) -> bool:
    same = residual is None or (residual.dtype == x.dtype and residual.shape == x.shape)
    fits = weight.dim() == 1 and x.dim() >= 1 and weight.shape[0] == x.shape[-1]
    return same and fits and x.dtype in _FLOATS and weight.dtype in _FLOATS


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x if x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous()


def _matrix(x: torch.Tensor) -> torch.Tensor:
    """[rows, columns] with contiguous columns; a view wherever x allows it."""
    rows = math.prod(x.shape[:-1])
    return _rows(x.detach().reshape(rows, x.shape[-1]))


def _empty_scale(shape: torch.Size | tuple[int, ...], block: tuple[int, int]) -> torch.Tensor:
    """Scales that the kernel fills: MN-major with zero padding for block (1, c)."""
    wanted = scale_shape(shape, block)
    if block[0] != 1:
        return torch.empty(wanted)
    *lead, m, columns = wanted
    padded = -(-m // 4) * 4
    make = torch.empty if padded == m else torch.zeros
    return make(*lead, columns, padded).transpose(-2, -1)[..., :m, :]
