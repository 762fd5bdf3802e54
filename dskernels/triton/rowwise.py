"""Row-wise ops in Triton: quantisation, RMSNorm, RoPE, SwiGLU and their fusions.

Dimension letters: m rows, k columns, t tokens, h heads, r RoPE width. Each function has the names
and arguments of dskernels.ref.rowwise and raises Unsupported for what the kernel does not cover.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..types import ScaledTensor, Unsupported
from .cast import cast_to, encode_e4m3, scale_of

GROUP = 128  # values that share a scale
ROWS = 4  # rows a quantising program takes
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@triton.jit
def quantize_kernel(
    x_ptr, data_ptr, scale_ptr, m, k, ld_x, ld_scale,
    SWIGLU: tl.constexpr, POWER_OF_TWO: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """x [m, k] (SWIGLU: [m, 2k] = [gate; up]) -> e4m3 data [m, k], scale [ceil(k / 128), m]."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * GROUP + tl.arange(0, GROUP)
    inside = (rows[:, None] < m) & (columns[None, :] < k)
    at = rows[:, None].to(tl.int64) * ld_x + columns[None, :]
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if SWIGLU:
        up = tl.load(x_ptr + at + k, mask=inside, other=0.0).to(tl.float32)
        x = x / (1.0 + tl.exp(-x)) * up
    # NaN stays out of the block's amax (it becomes a NaN element); maximum drops it here.
    magnitude = tl.where(x != x, 0.0, tl.abs(x))
    scale = scale_of(tl.max(magnitude, axis=1), POWER_OF_TWO)
    code = encode_e4m3(tl.math.div_rn(x, tl.broadcast_to(scale[:, None], x.shape)))
    out = rows[:, None].to(tl.int64) * k + columns[None, :]
    tl.store(data_ptr + out, code, mask=inside)
    tl.store(scale_ptr + tl.program_id(1).to(tl.int64) * ld_scale + rows, scale, mask=rows < m)


@triton.jit
def rms_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, y_ptr, sum_ptr, d, eps,
    HAS_RESIDUAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y = x / rms(x) * weight, one program a row; with a residual, x + residual takes x's place."""
    row = tl.program_id(0).to(tl.int64) * d
    columns = tl.arange(0, BLOCK)
    inside = columns < d
    x = tl.load(x_ptr + row + columns, mask=inside, other=0.0)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + row + columns, mask=inside, other=0.0)
        x = cast_to(x.to(tl.float32) + residual.to(tl.float32), x.dtype)
        tl.store(sum_ptr + row + columns, x, mask=inside)
    wide = x.to(tl.float32)
    inverse = 1.0 / tl.sqrt(tl.sum(wide * wide, axis=0) / d + eps)
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + row + columns, cast_to(wide * inverse * weight, x.dtype), mask=inside)


@triton.jit
def swiglu_kernel(x_ptr, y_ptr, k, BLOCK: tl.constexpr):
    """x [m, 2k] = [gate; up] -> silu(gate) * up, a program takes BLOCK columns of a row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < k
    gate = tl.load(x_ptr + row * 2 * k + columns, mask=inside, other=0.0)
    up = tl.load(x_ptr + row * 2 * k + k + columns, mask=inside, other=0.0).to(tl.float32)
    wide = gate.to(tl.float32)
    y = wide / (1.0 + tl.exp(-wide)) * up
    tl.store(y_ptr + row * k + columns, cast_to(y, gate.dtype), mask=inside)


@triton.jit
def rope_kernel(
    x_ptr, cos_ptr, sin_ptr, y_ptr, heads, half,
    INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rotate the pairs of one head of one token by the token's angles."""
    row = tl.program_id(0).to(tl.int64)  # token * heads + head
    pair = tl.arange(0, BLOCK)
    inside = pair < half
    first = pair * 2 if INTERLEAVED else pair
    second = first + (1 if INTERLEAVED else half)
    token = row // heads
    cos = tl.load(cos_ptr + token * half + pair, mask=inside, other=0.0)
    sin = tl.load(sin_ptr + token * half + pair, mask=inside, other=0.0)
    if INVERSE:
        sin = -sin
    x = x_ptr + row * 2 * half
    y = y_ptr + row * 2 * half
    a = tl.load(x + first, mask=inside, other=0.0)
    b = tl.load(x + second, mask=inside, other=0.0).to(tl.float32)
    wide = a.to(tl.float32)
    tl.store(y + first, cast_to(wide * cos - b * sin, a.dtype), mask=inside)
    tl.store(y + second, cast_to(wide * sin + b * cos, a.dtype), mask=inside)


# ---- launchers ---------------------------------------------------------------------------------


def _need_plain(name: str, x) -> None:
    if not isinstance(x, torch.Tensor) or x.dtype not in DTYPES:
        raise Unsupported(f"{name}: expected one of {DTYPES}, got {getattr(x, 'dtype', type(x))}")


def _quantize(x: torch.Tensor, k: int, scale_format: str, swiglu: bool) -> ScaledTensor:
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    m = rows.shape[0]
    groups = -(-k // GROUP)
    data = torch.empty(m, k, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.zeros(groups, -(-m // 4) * 4, dtype=torch.float32, device=x.device)
    if data.numel():
        quantize_kernel[(triton.cdiv(m, ROWS), groups)](
            rows, data.view(torch.uint8), scale, m, k, rows.stride(0), scale.stride(0),
            SWIGLU=swiglu, POWER_OF_TWO=scale_format != "fp32", ROWS=ROWS, GROUP=GROUP,
        )  # fmt: skip
    return ScaledTensor(data, scale.t()[:m], (1, GROUP), "e4m3")


def quantize(
    x: torch.Tensor,
    block: tuple[int, int] = (1, 128),
    scale_format: str = "fp32",
    dtype: str = "e4m3",
    transpose: bool = False,
) -> ScaledTensor:
    """x [m, k] -> e4m3 with one scale per 1 x 128."""
    _need_plain("x", x)
    if x.dim() != 2 or tuple(block) != (1, GROUP) or dtype != "e4m3" or transpose:
        raise Unsupported(
            f"expected [m, k] to e4m3 in blocks of (1, {GROUP}), not transposed; got "
            f"{tuple(x.shape)} to {dtype} in {tuple(block)}, transpose={transpose}"
        )
    return _quantize(x, x.shape[1], scale_format, swiglu=False)


def swiglu_quantize(
    x: torch.Tensor, *, block: tuple[int, int] = (1, 128), scale_format: str = "fp32"
) -> ScaledTensor:
    """x [m, 2k] = [gate; up] -> silu(gate) * up [m, k] in e4m3, one scale per 1 x 128."""
    _need_plain("x", x)
    if x.dim() != 2 or tuple(block) != (1, GROUP):
        raise Unsupported(
            f"expected [m, 2k] in blocks of (1, {GROUP}), got {tuple(x.shape)} in {tuple(block)}"
        )
    return _quantize(x, x.shape[1] // 2, scale_format, swiglu=True)


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float = 1e-6,
    residual: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """x [..., d] normalised to mean square 1, times weight [d]; (y, x + residual) with residual."""
    _need_plain("x", x)
    rows = x.contiguous()
    y = torch.empty_like(rows)
    total = torch.empty_like(rows) if residual is not None else None
    d = x.shape[-1]
    if rows.numel():
        rms_norm_kernel[(rows.numel() // d,)](
            rows, rows if residual is None else residual.contiguous(), weight.contiguous(), y,
            y if total is None else total, d, eps,
            HAS_RESIDUAL=residual is not None, BLOCK=triton.next_power_of_2(d),
        )  # fmt: skip
    return y if total is None else (y, total)


def swiglu(x: torch.Tensor) -> torch.Tensor:
    """x [..., 2k] = [gate; up] -> silu(gate) * up [..., k]."""
    _need_plain("x", x)
    rows = x.contiguous()
    k = x.shape[-1] // 2
    y = torch.empty(*x.shape[:-1], k, dtype=x.dtype, device=x.device)
    if y.numel():
        block = min(1024, triton.next_power_of_2(k))
        swiglu_kernel[(y.numel() // k, triton.cdiv(k, block))](rows, y, k, BLOCK=block)
    return y


def rope(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    interleaved: bool = True,
    inverse: bool = False,
) -> torch.Tensor:
    """x [t, h, r] with the pairs of each head turned by its token's angles cos, sin [t, r / 2]."""
    _need_plain("x", x)
    if x.dim() != 3 or cos.dim() != 2:
        raise Unsupported(f"x: expected [t, h, r], got {tuple(x.shape)}")
    rows = x.contiguous()
    y = torch.empty_like(rows)
    t, heads, r = x.shape
    if rows.numel():
        rope_kernel[(t * heads,)](
            rows, cos.contiguous(), sin.contiguous(), y, heads, r // 2,
            INTERLEAVED=interleaved, INVERSE=inverse, BLOCK=triton.next_power_of_2(r // 2),
        )  # fmt: skip
    return y
