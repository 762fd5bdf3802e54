"""Matrix products: dense, grouped by rows (experts), grouped along k (weight gradients).

Dimension letters: m rows, n columns, k depth, g groups. Everything is "nt": a [m, k] times b
[n, k] is [m, n].

Operands are two plain tensors of one dtype (fp32, bf16, fp16, fp64) or two ScaledTensors in e4m3:
a in blocks (1, 128), b in (128, 128) ("1d2d") or (1, 128) ("1d1d", weight gradients).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import backend as _backend
from ..types import ScaledTensor
from . import _check as check
from ._registry import define
from ._scaled import empty_scaled, parts, scaled
from .rowwise import _swiglu_backward

Operand = Tensor | ScaledTensor
EPILOGUES = (None, "swiglu", "swiglu_quant")
_QUANT_BLOCK = (1, 128)

_chosen = _backend.chosen
_run = _backend.run


# ---- operands ----------------------------------------------------------------------------------


def _split(op: str, a: Operand, b: Operand) -> tuple:
    """(a, b, scale of a, scale of b, blocks): what an op's schema takes for two operands."""
    a_scaled, b_scaled = isinstance(a, ScaledTensor), isinstance(b, ScaledTensor)
    if not a_scaled and not b_scaled:
        return a, b, None, None, ()
    if a_scaled != b_scaled:
        name, other = ("b", b) if a_scaled else ("a", a)
        check.bad_type(op, name, "a ScaledTensor like the other operand", type(other).__name__)
    return a.data, b.data, a.scale, b.scale, (*a.block, *b.block)


def _join(a: Tensor, b: Tensor, sa: Tensor | None, sb: Tensor | None, blocks: Sequence[int]):
    """The operands as implementations take them."""
    if sa is None:
        return a, b
    return scaled(a, sa, blocks[:2], "e4m3"), scaled(b, sb, blocks[2:], "e4m3")


def _check_operands(
    op: str, a: Tensor, b: Tensor, sa: Tensor | None, sb: Tensor | None, blocks: Sequence[int]
) -> None:
    """dtypes, devices and scales; the caller has checked the number of dimensions."""
    if sa is None and sb is None:
        check.dtype(op, "a", a, check.FLOATS)
    else:
        _check_scales(op, a, b, sa, sb, blocks)
    check.same_dtype(op, "b", b, "a", a)
    check.same_device(op, "b", b, "a", a)
    if a.shape[-1] != b.shape[-1]:
        check.bad_value(op, "b", f"last dimension k = {a.shape[-1]} as in a", check.show(b.shape))


def _check_scales(op, a, b, sa, sb, blocks):
    if sa is None or sb is None or len(blocks) != 4:
        check.bad_value(op, "blocks", "two scales and 4 block sizes", list(blocks))
    check_scaled(op, "a", a, sa, blocks[:2])
    check_scaled(op, "b", b, sb, blocks[2:])
    if blocks[0] != 1 or blocks[1] != blocks[3]:
        expected = "(1, c) for a and (r, c) for b, such as (1, 128) and (128, 128)"
        check.bad_value(op, "block", expected, f"{tuple(blocks[:2])} and {tuple(blocks[2:])}")


def check_scaled(op: str, name: str, data: Tensor, scale: Tensor, block: Sequence[int]) -> None:
    """One scaled operand: e4m3 data, and fp32 scales for each of its blocks."""
    check.block(op, f"{name}.block", block)
    check.dtype(op, f"{name}.data", data, (torch.float8_e4m3fn,))
    check.dtype(op, f"{name}.scale", scale, (torch.float32,))
    *lead, rows, columns = data.shape
    expected = (*lead, -(-rows // block[0]), -(-columns // block[1]))
    check.shape(op, f"{name}.scale", scale, "ceil(shape / block)", expected)
    check.same_device(op, f"{name}.scale", scale, f"{name}.data", data)


def _check_modes(
    op: str, n: int, out_dtype: torch.dtype | None, epilogue: str | None, num_sms: int | None
) -> None:
    if out_dtype is not None and out_dtype not in check.FLOATS:
        check.bad_value(op, "out_dtype", "fp32, bf16, fp16, fp64 or None", out_dtype)
    if epilogue is not None:
        check.one_of(op, "epilogue", epilogue, EPILOGUES)
        if n % 2:
            check.bad_value(op, "b", f"an even n for epilogue {epilogue!r}", f"n = {n}")
    if num_sms is not None:
        check.positive(op, "num_sms", num_sms)


def _check_addend(op: str, name: str, c: Tensor, letters: str, sizes: tuple, a: Tensor) -> None:
    check.shape(op, name, c, letters, sizes)
    check.dtype(op, name, c, check.FLOATS)
    check.same_device(op, name, c, "a", a)


def _result_dtype(
    a: Tensor, sa: Tensor | None, blocks: Sequence[int], out_dtype: torch.dtype | None
) -> torch.dtype:
    if out_dtype is not None:
        return out_dtype
    if sa is None:
        return a.dtype
    return torch.float32 if blocks[2] == 1 else torch.bfloat16


def _check_out(op: str, out: Any, out_dtype: torch.dtype | None, inputs: tuple) -> None:
    """What only the Python function can see of `out`; its shape is the kernel's to check."""
    if not isinstance(out, Tensor):
        check.bad_type(op, "out", "Tensor", type(out).__name__)
    if out_dtype is not None and out_dtype != out.dtype:
        check.bad_value(op, "out_dtype", f"None or out's {out.dtype}", out_dtype)
    if torch.is_grad_enabled():
        for tensor in (out, *inputs):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                check.bad_value(op, "out", "None while an argument requires grad", "a tensor")


def _check_result(op: str, out: Tensor, shape: tuple, a: Tensor) -> None:
    check.shape(op, "out", out, "the result's shape", shape)
    check.dtype(op, "out", out, check.FLOATS)
    check.same_device(op, "out", out, "a", a)


def _refuse_out_with_quant(op: str, out: Tensor | None, out_dtype: torch.dtype | None) -> None:
    if out is not None or out_dtype is not None:
        name, value = ("out", "a tensor") if out is not None else ("out_dtype", out_dtype)
        check.bad_value(op, name, "None with epilogue 'swiglu_quant'", value)


# ---- gemm --------------------------------------------------------------------------------------


def gemm(
    a: Operand,
    b: Operand,
    *,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    c: Tensor | None = None,
    bias: Tensor | None = None,
    epilogue: str | None = None,
    deterministic: bool = False,
    num_sms: int | None = None,
    backend: str | None = None,
) -> Tensor | ScaledTensor:
    """a [m, k] times b [n, k] transposed, plus c [m, n], plus bias [n] -> [m, n].

    out            takes the result and is returned; not while an argument requires grad
    out_dtype      default: a's dtype for plain operands, bf16 for 1d2d, fp32 for 1d1d
    c, bias        added in fp32, in that order, before the one rounding to out_dtype
    epilogue       "swiglu" (b = [gate; up] along n) -> [m, n/2]; "swiglu_quant" -> that as a
                   ScaledTensor in blocks (1, 128), quantised unrounded
    deterministic  the same bits whatever the batch around a row
    num_sms        SMs the launch may occupy (GPU backends); default: all

    Plain operands are differentiable in a, b, c and bias. Source: V3 report 3.3; DeepGEMM.
    """
    name = _chosen(backend)
    a, b, sa, sb, blocks = _split("gemm", a, b)
    if epilogue == "swiglu_quant":
        _refuse_out_with_quant("gemm", out, out_dtype)
        data, scale = _gemm_quant(a, b, sa, sb, blocks, c, bias, deterministic, num_sms, name)
        return scaled(data, scale, _QUANT_BLOCK, "e4m3")
    if out is None:
        return _gemm(
            a, b, sa, sb, blocks, c, bias, out_dtype, epilogue, deterministic, num_sms, name
        )
    _check_out("gemm", out, out_dtype, (a, b, c, bias))
    _gemm_out(out, a, b, sa, sb, blocks, c, bias, epilogue, deterministic, num_sms, name)
    return out


def _check_gemm(a, b, a_scale, b_scale, blocks, c, bias, num_sms, out_dtype=None, epilogue=None):
    check.rank("gemm", "a", a, "[m, k]", 2, 2)
    check.rank("gemm", "b", b, "[n, k]", 2, 2)
    _check_operands("gemm", a, b, a_scale, b_scale, blocks)
    m, n = a.shape[0], b.shape[0]
    if c is not None:
        _check_addend("gemm", "c", c, "[m, n]", (m, n), a)
    if bias is not None:
        _check_addend("gemm", "bias", bias, "[n]", (n,), a)
    if out_dtype is not None or epilogue is not None or num_sms is not None:
        _check_modes("gemm", n, out_dtype, epilogue, num_sms)


def _gemm_shape(a: Tensor, b: Tensor, epilogue: str | None) -> tuple:
    return a.shape[0], b.shape[0] // 2 if epilogue else b.shape[0]


def _gemm_kernel(
    a, b, sa, sb, blocks, c, bias, out_dtype, epilogue, deterministic, num_sms, backend
):
    left, right = _join(a, b, sa, sb, blocks)
    y = _run(
        "gemm",
        backend,
        a.device.type,
        left,
        right,
        out_dtype=out_dtype,
        c=c,
        bias=bias,
        epilogue=epilogue,
        deterministic=deterministic,
        num_sms=num_sms,
    )
    return y.contiguous()


def _gemm_fake(a, b, sa, sb, blocks, c, bias, out_dtype, epilogue, deterministic, num_sms, backend):
    return a.new_empty(_gemm_shape(a, b, epilogue), dtype=_result_dtype(a, sa, blocks, out_dtype))


def _gemm_save(ctx, inputs, output):
    a, b, sa, _, _, c, bias, _, ctx.epilogue, ctx.deterministic, ctx.num_sms, ctx.backend = inputs
    if sa is not None:
        raise NotImplementedError("gemm of ScaledTensors is not differentiable: detach them")
    ctx.dtypes = tuple(None if t is None else t.dtype for t in (c, bias))
    # Only the SwiGLU epilogue needs c and bias again: it is recomputed.
    ctx.save_for_backward(a, b, *((c, bias) if ctx.epilogue else (None, None)))


def _gemm_grad(ctx, grad):
    a, b, c, bias = ctx.saved_tensors
    modes = (ctx.deterministic, ctx.num_sms, ctx.backend)
    if ctx.epilogue:
        wide = _wide(a)
        value = _gemm(a, b, None, None, (), c, bias, wide, None, *modes)
        grad = _swiglu_backward(grad.to(wide), value, ctx.backend)
    need_a, need_b, need_c, need_bias = (ctx.needs_input_grad[i] for i in (0, 1, 5, 6))
    g = grad.to(a.dtype)
    da = _gemm(g, b.t(), *_PLAIN, a.dtype, None, *modes) if need_a else None
    db = _gemm(g.t(), a.t(), *_PLAIN, b.dtype, None, *modes) if need_b else None
    dc = grad.to(ctx.dtypes[0]) if need_c else None
    dbias = grad.to(_wide(a)).sum(0).to(ctx.dtypes[1]) if need_bias else None
    return da, db, None, None, None, dc, dbias, *(None,) * 5


_PLAIN = (None, None, (), None, None)  # scales, blocks, c, bias of a plain product


def _wide(a: Tensor) -> torch.dtype:
    return torch.float64 if a.dtype == torch.float64 else torch.float32


_gemm = define(
    "gemm(Tensor a, Tensor b, Tensor? a_scale, Tensor? b_scale, SymInt[] blocks, Tensor? c,"
    " Tensor? bias, ScalarType? out_dtype, str? epilogue, bool deterministic, int? num_sms,"
    " str backend) -> Tensor",
    _check_gemm,
    _gemm_kernel,
    _gemm_fake,
    _gemm_grad,
    _gemm_save,
)


def _check_gemm_out(out, a, b, a_scale, b_scale, blocks, c, bias, epilogue, num_sms):
    _check_gemm(a, b, a_scale, b_scale, blocks, c, bias, num_sms, None, epilogue)
    _check_result("gemm", out, _gemm_shape(a, b, epilogue), a)


def _gemm_out_kernel(out, a, b, sa, sb, blocks, c, bias, epilogue, deterministic, num_sms, backend):
    left, right = _join(a, b, sa, sb, blocks)
    _run(
        "gemm",
        backend,
        a.device.type,
        left,
        right,
        out=out,
        c=c,
        bias=bias,
        epilogue=epilogue,
        deterministic=deterministic,
        num_sms=num_sms,
    )


def _gemm_out_fake(*args):
    return None


_gemm_out = define(
    "gemm_out(Tensor(a!) out, Tensor a, Tensor b, Tensor? a_scale, Tensor? b_scale,"
    " SymInt[] blocks, Tensor? c, Tensor? bias, str? epilogue, bool deterministic, int? num_sms,"
    " str backend) -> ()",
    _check_gemm_out,
    _gemm_out_kernel,
    _gemm_out_fake,
)


def _gemm_quant_kernel(a, b, sa, sb, blocks, c, bias, deterministic, num_sms, backend):
    left, right = _join(a, b, sa, sb, blocks)
    q = _run(
        "gemm",
        backend,
        a.device.type,
        left,
        right,
        c=c,
        bias=bias,
        epilogue="swiglu_quant",
        deterministic=deterministic,
        num_sms=num_sms,
    )
    return parts(q)


def _gemm_quant_fake(a, b, sa, sb, blocks, c, bias, deterministic, num_sms, backend):
    return empty_scaled(a, _gemm_shape(a, b, "swiglu_quant"), _QUANT_BLOCK, "e4m3")


_gemm_quant = define(
    "gemm_swiglu_quant(Tensor a, Tensor b, Tensor? a_scale, Tensor? b_scale, SymInt[] blocks,"
    " Tensor? c, Tensor? bias, bool deterministic, int? num_sms, str backend)"
    " -> (Tensor, Tensor)",
    partial(_check_gemm, epilogue="swiglu_quant"),
    _gemm_quant_kernel,
    _gemm_quant_fake,
)
