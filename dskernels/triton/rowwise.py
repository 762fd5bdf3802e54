"""Row-wise ops in Triton: quantisation, RMSNorm, RoPE, SwiGLU and their fusions.

Dimension letters: m rows, k columns, t tokens, h heads, r RoPE width. Each function has the names
and arguments of dskernels.ref.rowwise and raises Unsupported for what the kernel does not cover.
The kernels are in rowwise_kernels.py.
"""

from __future__ import annotations

import math

import torch
import triton

from ..types import FORMAT_STORAGE, ScaledTensor, Support, Unsupported, scale_shape
from .rowwise_kernels import (
    dequantize_kernel,
    pack_e5m6_kernel,
    quantize_block_kernel,
    quantize_kernel,
    quantize_transpose_kernel,
    rms_norm_kernel,
    rope_kernel,
    swiglu_backward_kernel,
    swiglu_kernel,
    unpack_e5m6_kernel,
)

GROUP = 128  # values that share a scale
ROWS = 4  # rows a quantising program takes
TRANSPOSE_COLUMNS = 32
RUN = 1024  # elements an element-wise program takes
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def _need_plain(name: str, x) -> None:
    if not isinstance(x, torch.Tensor) or x.dtype not in DTYPES:
        raise Unsupported(f"{name}: expected one of {DTYPES}, got {getattr(x, 'dtype', type(x))}")


def _need_groups(block: tuple[int, int]) -> None:
    if tuple(block) != (1, GROUP):
        raise Unsupported(f"block: expected (1, {GROUP}), got {tuple(block)}")


def _group_scales(shape: tuple[int, ...], device: torch.device) -> tuple[torch.Tensor, int]:
    """Zeroed MN-major scales of [..., m, k] in groups of 1 x 128, and floats between two groups."""
    *lead, m, k = shape
    ld = -(-m // 4) * 4
    storage = torch.zeros(*lead, -(-k // GROUP), ld, dtype=torch.float32, device=device)
    return storage.transpose(-2, -1)[..., :m, :], ld


def _bits(data: torch.Tensor) -> torch.Tensor:
    """Narrow data as the integers that kernels read and write."""
    return data.view(torch.uint8 if data.dtype.itemsize == 1 else torch.int16)


def _quantize(
    x: torch.Tensor, k: int, scale_format: str, swiglu: bool, dtype: str = "e4m3"
) -> ScaledTensor:
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1]).contiguous()
    shape = (*x.shape[:-1], k)
    data = torch.empty(shape, dtype=FORMAT_STORAGE[dtype], device=x.device)
    scale, ld_scale = _group_scales(shape, x.device)
    if data.numel():
        groups = -(-k // GROUP)
        quantize_kernel[(triton.cdiv(rows.shape[0], ROWS), groups)](
            rows, _bits(data), scale, rows.shape[0], k, rows.stride(0), ld_scale, shape[-2],
            groups * ld_scale, SWIGLU=swiglu, POWER_OF_TWO=scale_format != "fp32",
            E5M6=dtype == "e5m6", ROWS=ROWS, GROUP=GROUP,
        )  # fmt: skip
    return ScaledTensor(data, scale, (1, GROUP), dtype)


def _quantize_blocks(x: torch.Tensor, scale_format: str) -> ScaledTensor:
    x = x.contiguous()
    m, k = x.shape[-2:]
    data = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(
        scale_shape(x.shape, (GROUP, GROUP)), dtype=torch.float32, device=x.device
    )  # fmt: skip
    if data.numel():
        grid = (triton.cdiv(m, GROUP), triton.cdiv(k, GROUP), math.prod(x.shape[:-2]))
        quantize_block_kernel[grid](
            x, _bits(data), scale, m, k, POWER_OF_TWO=scale_format != "fp32", GROUP=GROUP
        )
    return ScaledTensor(data, scale, (GROUP, GROUP), "e4m3")


def _quantize_transposed(x: torch.Tensor | ScaledTensor, scale_format: str) -> ScaledTensor:
    scaled = isinstance(x, ScaledTensor)
    rows = (x.data if scaled else x).contiguous()
    m, k = rows.shape
    data = torch.empty(k, m, dtype=torch.float8_e4m3fn, device=rows.device)
    scale, ld_scale = _group_scales((k, m), rows.device)
    x_scale = x.scale if scaled else scale  # the second is not read
    if data.numel():
        grid = (triton.cdiv(m, GROUP), triton.cdiv(k, TRANSPOSE_COLUMNS))
        quantize_transpose_kernel[grid](
            _bits(rows) if scaled else rows, x_scale, _bits(data), scale, m, k, ld_scale,
            x.block[0] if scaled else 1, x.block[1] if scaled else 1, *x_scale.stride(),
            SCALED=scaled, POWER_OF_TWO=scale_format != "fp32", COLUMNS=TRANSPOSE_COLUMNS,
            GROUP=GROUP,
        )  # fmt: skip
    return ScaledTensor(data, scale, (1, GROUP), "e4m3")


def quantize(
    x: torch.Tensor | ScaledTensor,
    block: tuple[int, int] = (1, 128),
    scale_format: str = "fp32",
    dtype: str = "e4m3",
    transpose: bool = False,
) -> ScaledTensor:
    """x [..., m, k] to e4m3 or e5m6 per 1 x 128, to e4m3 per 128 x 128; x^T of [m, k] per 1 x 128,
    from e4m3 too."""
    if transpose:
        _need_groups(block)
        fits = x.dtype == "e4m3" if isinstance(x, ScaledTensor) else x.dtype in DTYPES
        if len(x.shape) != 2 or dtype != "e4m3" or not fits:
            raise Unsupported(
                f"x: expected [m, k] to e4m3 when transposed, got {x.dtype} {tuple(x.shape)} "
                f"to {dtype}"
            )
        return _quantize_transposed(x, scale_format)
    _need_plain("x", x)
    if tuple(block) == (GROUP, GROUP) and dtype == "e4m3":
        return _quantize_blocks(x, scale_format)
    _need_groups(block)
    return _quantize(x, x.shape[-1], scale_format, swiglu=False, dtype=dtype)


def swiglu_quantize(
    x: torch.Tensor, *, block: tuple[int, int] = (1, 128), scale_format: str = "fp32"
) -> ScaledTensor:
    """x [..., m, 2k] = [gate; up] -> silu(gate) * up [..., m, k] in e4m3, a scale per 1 x 128."""
    _need_plain("x", x)
    _need_groups(block)
    return _quantize(x, x.shape[-1] // 2, scale_format, swiglu=True)


def _norm(x, weight, eps, residual, quantized: bool, scale_format: str = "fp32"):
    _need_plain("x", x)
    rows = x.contiguous()
    total = torch.empty_like(rows) if residual is not None else None
    d = x.shape[-1]
    y = torch.empty_like(rows, dtype=torch.float8_e4m3fn if quantized else x.dtype)
    scale, ld_scale = _group_scales(x.shape, x.device) if quantized else (rows, 0)
    if rows.numel():
        plane_rows = x.shape[-2] if quantized else 1
        rms_norm_kernel[(rows.numel() // d,)](
            rows, rows if residual is None else residual.contiguous(), weight.contiguous(),
            _bits(y) if quantized else y, y if total is None else total, scale, d, eps, plane_rows,
            ld_scale, -(-d // GROUP) * ld_scale, HAS_RESIDUAL=residual is not None,
            QUANTIZE=quantized, POWER_OF_TWO=scale_format != "fp32",
            BLOCK=max(GROUP, triton.next_power_of_2(d)), GROUP=GROUP,
        )  # fmt: skip
    result = ScaledTensor(y, scale, (1, GROUP), "e4m3") if quantized else y
    return result if total is None else (result, total)


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float = 1e-6,
    residual: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """x [..., d] normalised to mean square 1, times weight [d]; (y, x + residual) with residual."""
    return _norm(x, weight, eps, residual, quantized=False)


def rms_norm_quantize(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float = 1e-6,
    residual: torch.Tensor | None = None,
    *,
    block: tuple[int, int] = (1, 128),
    scale_format: str = "fp32",
) -> ScaledTensor | tuple[ScaledTensor, torch.Tensor]:
    """rms_norm of x [..., m, d], quantised unrounded per 1 x 128."""
    _need_groups(block)
    return _norm(x, weight, eps, residual, quantized=True, scale_format=scale_format)


def swiglu(x: torch.Tensor) -> torch.Tensor:
    """x [..., 2k] = [gate; up] -> silu(gate) * up [..., k]."""
    _need_plain("x", x)
    rows = x.contiguous()
    k = x.shape[-1] // 2
    y = torch.empty(*x.shape[:-1], k, dtype=x.dtype, device=x.device)
    if y.numel():
        block = min(RUN, triton.next_power_of_2(k))
        swiglu_kernel[(y.numel() // k, triton.cdiv(k, block))](rows, y, k, BLOCK=block)
    return y


def swiglu_backward(grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """grad [..., k], x [..., 2k] = [gate; up] -> the gradient of x, in its dtype."""
    _need_plain("x", x)
    rows = x.contiguous()
    k = x.shape[-1] // 2
    dx = torch.empty_like(rows)
    if dx.numel():
        block = min(RUN, triton.next_power_of_2(k))
        grid = (dx.numel() // (2 * k), triton.cdiv(k, block))
        swiglu_backward_kernel[grid](grad.contiguous(), rows, dx, k, BLOCK=block)
    return dx


def rope(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    interleaved: bool = True,
    inverse: bool = False,
) -> torch.Tensor:
    """x [..., t, h, r] with the pairs of each head turned by its token's angles [..., t, r / 2]."""
    _need_plain("x", x)
    if cos.dtype != torch.float32 or sin.dtype != torch.float32:
        raise Unsupported(f"cos, sin: expected fp32, got {cos.dtype} and {sin.dtype}")
    rows = x.contiguous()
    y = torch.empty_like(rows)
    *tokens, heads, r = x.shape
    if rows.numel():
        angles = [a.expand(*tokens, r // 2).contiguous() for a in (cos, sin)]
        rope_kernel[(math.prod(tokens) * heads,)](
            rows, *angles, y, heads, r // 2,
            INTERLEAVED=interleaved, INVERSE=inverse, BLOCK=triton.next_power_of_2(r // 2),
        )  # fmt: skip
    return y


def dequantize(x: ScaledTensor, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """data * scale in fp32, rounded to dtype: any blocks, e4m3 or e5m6."""
    if dtype not in DTYPES:
        raise Unsupported(f"dtype: expected one of {DTYPES}, got {dtype}")
    data = x.data.contiguous()
    m, k = data.shape[-2:]
    y = torch.empty(data.shape, dtype=dtype, device=data.device)
    if y.numel():
        scale = x.scale.contiguous()
        block = min(RUN, triton.next_power_of_2(k))
        e4m3 = x.dtype == "e4m3"
        dequantize_kernel[(y.numel() // k, triton.cdiv(k, block))](
            _bits(data) if e4m3 else data, scale, y, m, k, *x.block, *scale.shape[-2:],
            E4M3=e4m3, BLOCK=block,
        )  # fmt: skip
    return y


def pack_e5m6(data: torch.Tensor) -> torch.Tensor:
    """E5M6 in float16 [..., k] -> uint8 [..., 3 * ceil(k / 2)]."""
    k, rows = data.shape[-1], math.prod(data.shape[:-1])
    words = -(-k // 2)
    packed = torch.empty(*data.shape[:-1], 3 * words, dtype=torch.uint8, device=data.device)
    if packed.numel():
        grid = (triton.cdiv(rows * words, RUN),)
        pack_e5m6_kernel[grid](_bits(data.contiguous()), packed, rows * words, k, words, BLOCK=RUN)
    return packed


def unpack_e5m6(packed: torch.Tensor, k: int) -> torch.Tensor:
    """uint8 [..., 3 * ceil(k / 2)] -> E5M6 in float16 [..., k]."""
    rows, words = math.prod(packed.shape[:-1]), -(-k // 2)
    data = torch.empty(*packed.shape[:-1], k, dtype=torch.float16, device=packed.device)
    if data.numel():
        grid = (triton.cdiv(rows * words, RUN),)
        unpack_e5m6_kernel[grid](
            packed.contiguous(), _bits(data), rows * words, k, words, BLOCK=RUN
        )
    return data


def supports(op: str, **shapes) -> Support:
    return Support(True, "triton: bf16, fp16 and fp32")
