"""Row-wise ops: block quantisation, RMSNorm, RoPE, SwiGLU, and their fusions.

Dimension letters: m rows, k columns, d model or head width, t tokens, h heads, r RoPE width,
i expert width; "..." any leading dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backend as _backend
from ..types import FORMAT_MAX, ScaledTensor
from . import _check as check
from ._registry import constant, define
from ._scaled import check_parts, empty_scaled, parts, scaled

SCALE_FORMATS = ("fp32", "ue8m0", "pow2")

_chosen = _backend.chosen
_run = _backend.run


# ---- quantize ----------------------------------------------------------------------------------


def quantize(
    x: Tensor | ScaledTensor,
    block: tuple[int, int] = (1, 128),
    scale_format: str = "fp32",
    dtype: str = "e4m3",
    transpose: bool = False,
    *,
    backend: str | None = None,
) -> ScaledTensor:
    """Quantise x [..., m, k] with one scale per block of rows x columns.

    x             float, or a ScaledTensor to be quantised anew (dequantised in fp32)
    block         (1, 128) for activations, (128, 128) for weights; any positive sizes. Ragged last
                  blocks use the elements that exist.
    scale_format  "fp32": max(amax, 1e-4) / 448 (65024 for "e5m6"); "ue8m0" and "pow2" round it up
                  to a power of two. Scales are fp32 numbers in either case.
    dtype         "e4m3" (float8_e4m3fn, saturating, round to nearest even) or "e5m6" (in float16)
    transpose     quantise x^T: data [..., k, m], scale [..., k, ceil(m / 128)]

    Returns a ScaledTensor: data [..., m, k], scale fp32 [..., ceil(m / rows), ceil(k / columns)],
    MN-major (strides (1, align(m, 4))) when rows is 1. Not differentiable.

    Source: V3 report 3.3.2 and 3.5.2; DeepSeek's demo quantiser for the floor of amax.
    """
    b = _chosen(backend)
    if isinstance(x, ScaledTensor):
        data, scale = _requantize(
            x.data, x.scale, x.block, x.dtype, block, scale_format, dtype, transpose, b
        )
    else:
        data, scale = _quantize(x, block, scale_format, dtype, transpose, b)
    return scaled(data, scale, block, dtype)


def _check_quantize(
    x: Tensor, block: list[int], scale_format: str, dtype: str, name: str = "quantize"
) -> None:
    check.rank(name, "x", x, "[..., m, k]", 2)
    check.dtype(name, "x", x, check.FLOATS)
    check.block(name, "block", block)
    check.one_of(name, "scale_format", scale_format, SCALE_FORMATS)
    check.one_of(name, "dtype", dtype, tuple(FORMAT_MAX))


def _quantize_kernel(x, block, scale_format, dtype, transpose, backend):
    q = _run("quantize", backend, x.device.type, x, tuple(block), scale_format, dtype, transpose)
    return parts(q)


def _quantize_fake(x, block, scale_format, dtype, transpose, backend):
    return empty_scaled(x, _transposed(x.shape, transpose), block, dtype)


def _transposed(shape: tuple, transpose: bool) -> tuple:
    return (*shape[:-2], shape[-1], shape[-2]) if transpose else tuple(shape)


_quantize = define(
    "quantize(Tensor x, SymInt[] block, str scale_format, str dtype, bool transpose, str backend)"
    " -> (Tensor, Tensor)",
    _check_quantize,
    _quantize_kernel,
    _quantize_fake,
)


def _check_requantize(data, scale, data_block, data_dtype, block, scale_format, dtype):
    check_parts("quantize", data, scale, data_block, data_dtype)
    check.block("quantize", "block", block)
    check.one_of("quantize", "scale_format", scale_format, SCALE_FORMATS)
    check.one_of("quantize", "dtype", dtype, tuple(FORMAT_MAX))


def _requantize_kernel(
    data, scale, data_block, data_dtype, block, scale_format, dtype, transpose, backend
):
    x = scaled(data, scale, data_block, data_dtype)
    device = data.device.type
    return parts(_run("quantize", backend, device, x, tuple(block), scale_format, dtype, transpose))


def _requantize_fake(
    data, scale, data_block, data_dtype, block, scale_format, dtype, transpose, backend
):
    return empty_scaled(data, _transposed(data.shape, transpose), block, dtype)


_requantize = define(
    "requantize(Tensor data, Tensor scale, SymInt[] data_block, str data_dtype, SymInt[] block,"
    " str scale_format, str dtype, bool transpose, str backend) -> (Tensor, Tensor)",
    _check_requantize,
    _requantize_kernel,
    _requantize_fake,
)


# ---- rms_norm ----------------------------------------------------------------------------------


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    residual: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """x [..., d] / sqrt(mean(x^2) + eps) * weight [d], in fp32 (fp64 for fp64 x), in x's dtype.

    residual  x's shape and dtype: the sum x + residual, rounded to x's dtype, is normalised, and
              (y, x + residual) is returned

    Differentiable in x, weight and residual. Source: Zhang and Sennrich, arXiv 1910.07467.
    """
    b = _chosen(backend)
    if residual is None:
        return _rms_norm(x, weight, eps, b)
    return _add_rms_norm(x, residual, weight, eps, b)


def _check_rms_norm(x: Tensor, weight: Tensor, name: str = "rms_norm") -> None:
    check.rank(name, "x", x, "[..., d]", 1)
    check.dtype(name, "x", x, check.FLOATS)
    check.shape(name, "weight", weight, "[d]", x.shape[-1:])
    check.dtype(name, "weight", weight, check.FLOATS)
    check.same_device(name, "weight", weight, "x", x)


def _check_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> None:
    _check_rms_norm(x, weight)
    _check_residual(x, residual, "rms_norm")


def _check_residual(x: Tensor, residual: Tensor, name: str) -> None:
    check.shape(name, "residual", residual, "x's shape", x.shape)
    check.same_dtype(name, "residual", residual, "x", x)
    check.same_device(name, "residual", residual, "x", x)


def _rms_norm_kernel(x, weight, eps, backend):
    return _run("rms_norm", backend, x.device.type, x, weight, eps).contiguous()


def _rms_norm_fake(x, weight, eps, backend):
    return x.new_empty(x.shape)


def _rms_norm_save(ctx, inputs, output):
    x, weight, ctx.eps, ctx.backend = inputs
    ctx.save_for_backward(x, weight)


def _rms_norm_grad(ctx, grad):
    x, weight = ctx.saved_tensors
    return *_rms_norm_backward(grad, x, weight, ctx.eps, ctx.backend), None, None


_rms_norm = define(
    "rms_norm(Tensor x, Tensor weight, float eps, str backend) -> Tensor",
    _check_rms_norm,
    _rms_norm_kernel,
    _rms_norm_fake,
    _rms_norm_grad,
    _rms_norm_save,
)


def _add_rms_norm_kernel(x, residual, weight, eps, backend):
    y, total = _run("rms_norm", backend, x.device.type, x, weight, eps, residual)
    return y.contiguous(), total.contiguous()


def _add_rms_norm_fake(x, residual, weight, eps, backend):
    return x.new_empty(x.shape), x.new_empty(x.shape)


def _add_rms_norm_save(ctx, inputs, output):
    _, _, weight, ctx.eps, ctx.backend = inputs
    ctx.save_for_backward(output[1], weight)


def _add_rms_norm_grad(ctx, grad, grad_total):
    total, weight = ctx.saved_tensors
    dx, dweight = _rms_norm_backward(grad, total, weight, ctx.eps, ctx.backend)
    dx = dx + grad_total
    return dx, dx, dweight, None, None


_add_rms_norm = define(
    "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps, str backend)"
    " -> (Tensor, Tensor)",
    _check_add_rms_norm,
    _add_rms_norm_kernel,
    _add_rms_norm_fake,
    _add_rms_norm_grad,
    _add_rms_norm_save,
)


def _check_rms_norm_backward(grad, x, weight):
    _check_rms_norm(x, weight, "rms_norm_backward")
    check.shape("rms_norm_backward", "grad", grad, "x's shape", x.shape)


def _rms_norm_backward_kernel(grad, x, weight, eps, backend):
    dx, dweight = _run("rms_norm_backward", backend, x.device.type, grad, x, weight, eps)
    return dx.contiguous(), dweight.contiguous()


def _rms_norm_backward_fake(grad, x, weight, eps, backend):
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


_rms_norm_backward = define(
    "rms_norm_backward(Tensor grad, Tensor x, Tensor weight, float eps, str backend)"
    " -> (Tensor, Tensor)",
    _check_rms_norm_backward,
    _rms_norm_backward_kernel,
    _rms_norm_backward_fake,
)


# ---- rope --------------------------------------------------------------------------------------


def rope(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = True,
    inverse: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Rotate the pairs of x [..., t, h, r] by the angles of its token.

    cos, sin     fp32 (fp64 with fp64 x) [..., t, r/2], indexed to the tokens already; their
                 leading dimensions broadcast against x's
    interleaved  pair p is elements (2p, 2p+1), DeepSeek's order; False: (p, p + r/2)
    inverse      rotate by the negative angle

    (a, b) -> (a cos - b sin, b cos + a sin) in fp32, rounded once to x's dtype. Returns x's shape
    and dtype. Differentiable in x. Source: Su et al., arXiv 2104.09864.
    """
    return _rope(x, cos, sin, interleaved, inverse, _chosen(backend))


def _check_rope(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    check.rank("rope", "x", x, "[..., t, h, r]", 3)
    check.dtype("rope", "x", x, check.FLOATS)
    r = x.shape[-1]
    if r % 2:
        check.bad_value("rope", "x", "an even last dimension r", check.show(x.shape))
    for name, angle in (("cos", cos), ("sin", sin)):
        check.dtype("rope", name, angle, (torch.float32, torch.float64))
        check.same_device("rope", name, angle, "x", x)
    lead = tuple(x.shape[:-2])
    given = tuple(cos.shape)
    if given != (*lead, r // 2) and not _broadcasts(given, lead, r // 2):
        expected = f"[..., t, r/2] that broadcasts to {check.show((*lead, r // 2))}"
        check.bad_value("rope", "cos", expected, check.show(cos.shape))
    check.shape("rope", "sin", sin, "cos's shape", cos.shape)


def _broadcasts(given: tuple, lead: tuple, half: int) -> bool:
    """Whether angles of shape `given` serve x of leading dimensions `lead` without widening it."""
    if not given or given[-1] != half or len(given) > len(lead) + 1:
        return False
    sizes = given[:-1]
    return all(s in (1, n) for s, n in zip(reversed(sizes), reversed(lead)))


def _rope_kernel(x, cos, sin, interleaved, inverse, backend):
    device = x.device.type
    y = _run("rope", backend, device, x, cos, sin, interleaved=interleaved, inverse=inverse)
    return y.contiguous()


def _rope_fake(x, cos, sin, interleaved, inverse, backend):
    return x.new_empty(x.shape)


def _rope_save(ctx, inputs, output):
    _, cos, sin, ctx.interleaved, ctx.inverse, ctx.backend = inputs
    constant(ctx, "rope", inputs, cos=1, sin=2)
    ctx.save_for_backward(cos, sin)


def _rope_grad(ctx, grad):
    # The transpose of a rotation is the rotation by the negative angle.
    cos, sin = ctx.saved_tensors
    dx = _rope(grad, cos, sin, ctx.interleaved, not ctx.inverse, ctx.backend)
    return dx, None, None, None, None, None


_rope = define(
    "rope(Tensor x, Tensor cos, Tensor sin, bool interleaved, bool inverse, str backend) -> Tensor",
    _check_rope,
    _rope_kernel,
    _rope_fake,
    _rope_grad,
    _rope_save,
)


# ---- swiglu ------------------------------------------------------------------------------------


def swiglu(x: Tensor, *, backend: str | None = None) -> Tensor:
    """x [..., 2i] = [gate; up] -> silu(gate) * up [..., i], in fp32 (fp64), in x's dtype.

    Differentiable. Source: Shazeer, arXiv 2002.05202.
    """
    return _swiglu(x, _chosen(backend))


def _check_swiglu(x: Tensor, name: str = "swiglu") -> None:
    check.rank(name, "x", x, "[..., 2i]", 1)
    check.dtype(name, "x", x, check.FLOATS)
    if x.shape[-1] % 2:
        check.bad_value(name, "x", "an even last dimension [gate; up]", check.show(x.shape))


def _swiglu_kernel(x, backend):
    return _run("swiglu", backend, x.device.type, x).contiguous()


def _swiglu_fake(x, backend):
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


def _swiglu_save(ctx, inputs, output):
    x, ctx.backend = inputs
    ctx.save_for_backward(x)


def _swiglu_grad(ctx, grad):
    (x,) = ctx.saved_tensors
    return _swiglu_backward(grad, x, ctx.backend), None


_swiglu = define(
    "swiglu(Tensor x, str backend) -> Tensor",
    _check_swiglu,
    _swiglu_kernel,
    _swiglu_fake,
    _swiglu_grad,
    _swiglu_save,
)


def _check_swiglu_backward(grad, x):
    _check_swiglu(x, "swiglu_backward")
    expected = (*x.shape[:-1], x.shape[-1] // 2)
    check.shape("swiglu_backward", "grad", grad, "[..., i]", expected)


def _swiglu_backward_kernel(grad, x, backend):
    return _run("swiglu_backward", backend, x.device.type, grad, x).contiguous()


def _swiglu_backward_fake(grad, x, backend):
    return x.new_empty(x.shape)


_swiglu_backward = define(
    "swiglu_backward(Tensor grad, Tensor x, str backend) -> Tensor",
    _check_swiglu_backward,
    _swiglu_backward_kernel,
    _swiglu_backward_fake,
)


# ---- fusions -----------------------------------------------------------------------------------


def rms_norm_quantize(
    x: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    residual: Tensor | None = None,
    *,
    block: tuple[int, int] = (1, 128),
    scale_format: str = "fp32",
    backend: str | None = None,
) -> ScaledTensor | tuple[ScaledTensor, Tensor]:
    """`rms_norm` of x [..., m, d] then `quantize`; the norm is quantised from fp32, unrounded.

    Returns a ScaledTensor of data [..., m, d], with `residual` (ScaledTensor, x + residual).
    Arguments as in `rms_norm` and `quantize`. Not differentiable.
    """
    b = _chosen(backend)
    if residual is None:
        data, scale = _rms_norm_quantize(x, weight, eps, block, scale_format, b)
        return scaled(data, scale, block, "e4m3")
    data, scale, total = _add_rms_norm_quantize(x, residual, weight, eps, block, scale_format, b)
    return scaled(data, scale, block, "e4m3"), total


def _check_rms_norm_quantize(x, weight, block, scale_format):
    name = "rms_norm_quantize"
    _check_quantize(x, block, scale_format, "e4m3", name)
    _check_rms_norm(x, weight, name)


def _rms_norm_quantize_kernel(x, weight, eps, block, scale_format, backend):
    q = _run(
        "rms_norm_quantize",
        backend,
        x.device.type,
        x,
        weight,
        eps,
        block=tuple(block),
        scale_format=scale_format,
    )
    return parts(q)


def _rms_norm_quantize_fake(x, weight, eps, block, scale_format, backend):
    return empty_scaled(x, x.shape, block, "e4m3")


_rms_norm_quantize = define(
    "rms_norm_quantize(Tensor x, Tensor weight, float eps, SymInt[] block, str scale_format,"
    " str backend) -> (Tensor, Tensor)",
    _check_rms_norm_quantize,
    _rms_norm_quantize_kernel,
    _rms_norm_quantize_fake,
)


def _check_add_rms_norm_quantize(x, residual, weight, block, scale_format):
    _check_rms_norm_quantize(x, weight, block, scale_format)
    _check_residual(x, residual, "rms_norm_quantize")


def _add_rms_norm_quantize_kernel(x, residual, weight, eps, block, scale_format, backend):
    q, total = _run(
        "rms_norm_quantize",
        backend,
        x.device.type,
        x,
        weight,
        eps,
        residual,
        block=tuple(block),
        scale_format=scale_format,
    )
    return *parts(q), total.contiguous()


def _add_rms_norm_quantize_fake(x, residual, weight, eps, block, scale_format, backend):
    return *empty_scaled(x, x.shape, block, "e4m3"), x.new_empty(x.shape)


_add_rms_norm_quantize = define(
    "add_rms_norm_quantize(Tensor x, Tensor residual, Tensor weight, float eps, SymInt[] block,"
    " str scale_format, str backend) -> (Tensor, Tensor, Tensor)",
    _check_add_rms_norm_quantize,
    _add_rms_norm_quantize_kernel,
    _add_rms_norm_quantize_fake,
)


def swiglu_quantize(
    x: Tensor,
    *,
    block: tuple[int, int] = (1, 128),
    scale_format: str = "fp32",
    backend: str | None = None,
) -> ScaledTensor:
    """`swiglu` of x [..., m, 2i] then `quantize`; the product is quantised from fp32, unrounded.

    Returns a ScaledTensor of data [..., m, i]. Not differentiable.
    """
    data, scale = _swiglu_quantize(x, block, scale_format, _chosen(backend))
    return scaled(data, scale, block, "e4m3")


def _check_swiglu_quantize(x, block, scale_format):
    _check_quantize(x, block, scale_format, "e4m3", "swiglu_quantize")
    _check_swiglu(x, "swiglu_quantize")


def _swiglu_quantize_kernel(x, block, scale_format, backend):
    device = x.device.type
    return parts(
        _run("swiglu_quantize", backend, device, x, block=tuple(block), scale_format=scale_format)
    )


def _swiglu_quantize_fake(x, block, scale_format, backend):
    return empty_scaled(x, (*x.shape[:-1], x.shape[-1] // 2), block, "e4m3")


_swiglu_quantize = define(
    "swiglu_quantize(Tensor x, SymInt[] block, str scale_format, str backend) -> (Tensor, Tensor)",
    _check_swiglu_quantize,
    _swiglu_quantize_kernel,
    _swiglu_quantize_fake,
)
