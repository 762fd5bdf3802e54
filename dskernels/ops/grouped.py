"""Grouped matrix products: by rows (experts) and along k (weight gradients).

Dimension letters and operands as in `gemm`; g groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.compiler import is_compiling

from .. import backend as _backend
from ..types import ScaledTensor
from . import _check as check
from . import _values as values
from ._registry import define
from ._scaled import empty_scaled, parts, scaled
from .gemm import (
    _QUANT_BLOCK,
    Operand,
    _check_addend,
    _check_modes,
    _check_operands,
    _check_out,
    _check_result,
    _join,
    _refuse_out_with_quant,
    _result_dtype,
    _split,
    _wide,
)
from .rowwise import _swiglu_backward

FORMS = ("group_sizes", "m_indices", "masked_m")

_chosen = _backend.chosen
_run = _backend.run


# ---- grouped_gemm ------------------------------------------------------------------------------


def grouped_gemm(
    a: Operand,
    b: Operand,
    *,
    group_sizes: Tensor | Sequence[int] | None = None,
    m_indices: Tensor | None = None,
    masked_m: Tensor | None = None,
    expected_m: int | None = None,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    c: Tensor | None = None,
    bias: Tensor | None = None,
    epilogue: str | None = None,
    deterministic: bool = False,
    num_sms: int | None = None,
    backend: str | None = None,
) -> Tensor | ScaledTensor:
    """Every row of a times the matrix of its group in b [g, n, k]. Exactly one of three forms:

    group_sizes  int64 or int32 [g], or a list: a [m, k] holds the groups one after the other;
                 sum(group_sizes) <= m
    m_indices    int32 or int64 [m]: the group of each row of a [m, k], -1 for a padding row;
                 kernels may ask for segments aligned to 128, the meaning needs no alignment
    masked_m     int32 or int64 [g]: a [g, max_m, k], the first masked_m[i] rows of group i count

    Returns [m, n] or [g, max_m, n]. Padding rows are never read and are 0 in the result; behind
    masked_m backends other than the reference may leave them unwritten. expected_m is a hint for
    the launch: the mean of masked_m. c has the result's shape before the epilogue, bias is [g, n].
    Everything else as in `gemm`. Plain operands with group_sizes are differentiable in a, b and
    c; the other forms are not.
    """
    name = _chosen(backend)
    a, b, sa, sb, blocks = _split("grouped_gemm", a, b)
    groups, form = _one_form(group_sizes, m_indices, masked_m)
    lead = (a, b, sa, sb, blocks, groups, form, expected_m, c, bias)
    if epilogue == "swiglu_quant":
        _refuse_out_with_quant("grouped_gemm", out, out_dtype)
        data, scale = _grouped_quant(*lead, deterministic, num_sms, name)
        return scaled(data, scale, _QUANT_BLOCK, "e4m3")
    if out is None:
        return _grouped(*lead, out_dtype, epilogue, deterministic, num_sms, name)
    _check_out("grouped_gemm", out, out_dtype, (a, b, c, bias))
    _grouped_out(out, *lead, epilogue, deterministic, num_sms, name)
    return out


def _one_form(
    group_sizes: Tensor | Sequence[int] | None, m_indices: Tensor | None, masked_m: Tensor | None
) -> tuple[Tensor, str]:
    """The one grouping tensor that was given, and which it is."""
    if group_sizes is not None and m_indices is None and masked_m is None:
        return _sizes_tensor("grouped_gemm", group_sizes), "group_sizes"
    if m_indices is not None and group_sizes is None and masked_m is None:
        return m_indices, "m_indices"
    if masked_m is not None and group_sizes is None and m_indices is None:
        return masked_m, "masked_m"
    forms = zip(FORMS, (group_sizes, m_indices, masked_m))
    given = [name for name, form in forms if form is not None]
    check.bad_value("grouped_gemm", "grouping", f"exactly one of {list(FORMS)}", given)


def _sizes_tensor(op: str, sizes: Tensor | Sequence[int]) -> Tensor:
    if isinstance(sizes, Tensor):
        return sizes
    try:
        if is_compiling():  # the compiler traces torch, not NumPy
            return torch.tensor(sizes, dtype=torch.int64)
        array = np.array(sizes) if len(sizes) else np.empty(0, np.int64)
    except (TypeError, ValueError, RuntimeError):
        array = None
    if array is None or array.dtype.kind != "i":
        check.bad_type(op, "group_sizes", "integers", repr(sizes))
    return torch.from_numpy(array)  # a third of torch.tensor's time


def _check_grouped(
    a, b, a_scale, b_scale, blocks, groups, form, expected_m, c, bias, num_sms, out_dtype=None,
    epilogue=None
):  # fmt: skip
    op = "grouped_gemm"
    check.rank(op, "b", b, "[g, n, k]", 3, 3)
    check.one_of(op, "form", form, FORMS)
    g, n, _ = b.shape
    if form == "masked_m":
        check.rank(op, "a", a, "[g, max_m, k]", 3, 3)
        if a.shape[0] != g:
            check.bad_value(op, "a", f"[g = {g}, max_m, k]", check.show(a.shape))
    else:
        check.rank(op, "a", a, "[m, k]", 2, 2)
    _check_operands(op, a, b, a_scale, b_scale, blocks)
    check.dtype(op, form, groups, check.INDEX)
    check.readable(op, form, groups, "a", a)
    if form == "m_indices":
        check.shape(op, form, groups, "[m]", (a.shape[0],))
    else:
        check.shape(op, form, groups, "[g]", (g,))
    if expected_m is not None and expected_m < 0:
        check.bad_value(op, "expected_m", "a size", expected_m)
    if c is not None:
        _check_addend(op, "c", c, "[..., n]", (*a.shape[:-1], n), a)
    if bias is not None:
        _check_addend(op, "bias", bias, "[g, n]", (g, n), a)
    if out_dtype is not None or epilogue is not None or num_sms is not None:
        _check_modes(op, n, out_dtype, epilogue, num_sms)


def _checked_groups(form: str, groups: Tensor, num_groups: int, rows: int) -> Tensor:
    """The grouping tensor in the dtype implementations take, its values checked. rows: of a, which
    the groups share (group_sizes), or that each may have (masked_m)."""
    if form == "group_sizes":
        return values.sizes_of_parts("grouped_gemm", groups, rows)
    if form == "masked_m":
        return values.sizes_within("grouped_gemm", groups, rows)
    return values.row_groups("grouped_gemm", groups, num_groups)


def _grouped_shape(a: Tensor, b: Tensor, epilogue: str | None) -> tuple:
    return *a.shape[:-1], b.shape[1] // 2 if epilogue else b.shape[1]


def _run_grouped(
    a, b, sa, sb, blocks, groups, form, expected_m, c, bias, epilogue, deterministic, num_sms,
    backend, **result
):  # fmt: skip
    groups = _checked_groups(form, groups, b.shape[0], a.shape[-2])
    left, right = _join(a, b, sa, sb, blocks)
    return _run(
        "grouped_gemm",
        backend,
        a.device.type,
        left,
        right,
        expected_m=expected_m,
        c=c,
        bias=bias,
        epilogue=epilogue,
        deterministic=deterministic,
        num_sms=num_sms,
        **{form: groups},
        **result,
    )


def _grouped_kernel(
    a, b, sa, sb, blocks, groups, form, expected_m, c, bias, out_dtype, epilogue, deterministic,
    num_sms, backend
):  # fmt: skip
    lead = (a, b, sa, sb, blocks, groups, form, expected_m, c, bias)
    y = _run_grouped(*lead, epilogue, deterministic, num_sms, backend, out_dtype=out_dtype)
    return y.contiguous()


def _grouped_fake(
    a, b, sa, sb, blocks, groups, form, expected_m, c, bias, out_dtype, epilogue, deterministic,
    num_sms, backend
):  # fmt: skip
    dtype = _result_dtype(a, sa, blocks, out_dtype)
    return a.new_empty(_grouped_shape(a, b, epilogue), dtype=dtype)


def _grouped_save(ctx, inputs, output):
    a, b, sa, _, _, groups, form, _, c, bias, _, ctx.epilogue, *modes = inputs
    if sa is not None or form != "group_sizes":
        raise NotImplementedError(
            "grouped_gemm is differentiable for plain operands with group_sizes only: detach"
        )
    if bias is not None and bias.requires_grad:
        raise NotImplementedError("grouped_gemm is not differentiable in bias: detach it")
    ctx.modes = modes
    ctx.c_dtype = None if c is None else c.dtype
    ctx.save_for_backward(a, b, groups, *((c, bias) if ctx.epilogue else (None, None)))


def _grouped_grad(ctx, grad):
    a, b, groups, c, bias = ctx.saved_tensors
    wide = _wide(a)
    if ctx.epilogue:
        value = _grouped(*_plain(a, b, groups, c, bias), wide, None, *ctx.modes)
        grad = _swiglu_backward(grad.to(wide), value, ctx.modes[-1])
    g = grad.to(a.dtype)
    da = db = dc = None
    if ctx.needs_input_grad[0]:
        da = _grouped(*_plain(g, b.transpose(1, 2), groups), a.dtype, None, *ctx.modes)
    if ctx.needs_input_grad[1]:
        db = _grouped_k(g.t(), a.t(), None, None, (), groups, None, b.dtype, *ctx.modes)
    if ctx.needs_input_grad[8]:
        dc = _zero_behind(grad, groups).to(ctx.c_dtype)
    return da, db, *(None,) * 6, dc, *(None,) * 6


def _plain(a, b, groups, c=None, bias=None):
    return a, b, None, None, (), groups, "group_sizes", None, c, bias


def _zero_behind(grad: Tensor, groups: Tensor) -> Tensor:
    """Rows behind the last group are 0 whatever c holds there, so c gets no gradient there."""
    rows = torch.arange(grad.shape[0], device=grad.device)
    return torch.where((rows < groups.sum())[:, None], grad, 0)


_grouped = define(
    "grouped_gemm(Tensor a, Tensor b, Tensor? a_scale, Tensor? b_scale, SymInt[] blocks,"
    " Tensor groups, str form, int? expected_m, Tensor? c, Tensor? bias, ScalarType? out_dtype,"
    " str? epilogue, bool deterministic, int? num_sms, str backend) -> Tensor",
    _check_grouped,
    _grouped_kernel,
    _grouped_fake,
    _grouped_grad,
    _grouped_save,
)


def _check_grouped_out(
    out, a, b, a_scale, b_scale, blocks, groups, form, expected_m, c, bias, epilogue, num_sms
):
    lead = (a, b, a_scale, b_scale, blocks, groups, form, expected_m, c, bias)
    _check_grouped(*lead, num_sms, None, epilogue)
    _check_result("grouped_gemm", out, _grouped_shape(a, b, epilogue), a)


def _grouped_out_kernel(
    out, a, b, sa, sb, blocks, groups, form, expected_m, c, bias, epilogue, deterministic, num_sms,
    backend
):  # fmt: skip
    lead = (a, b, sa, sb, blocks, groups, form, expected_m, c, bias)
    _run_grouped(*lead, epilogue, deterministic, num_sms, backend, out=out)


def _grouped_out_fake(*args):
    return None


_grouped_out = define(
    "grouped_gemm_out(Tensor(a!) out, Tensor a, Tensor b, Tensor? a_scale, Tensor? b_scale,"
    " SymInt[] blocks, Tensor groups, str form, int? expected_m, Tensor? c, Tensor? bias,"
    " str? epilogue, bool deterministic, int? num_sms, str backend) -> ()",
    _check_grouped_out,
    _grouped_out_kernel,
    _grouped_out_fake,
)


def _grouped_quant_kernel(
    a, b, sa, sb, blocks, groups, form, expected_m, c, bias, deterministic, num_sms, backend
):
    lead = (a, b, sa, sb, blocks, groups, form, expected_m, c, bias)
    return parts(_run_grouped(*lead, "swiglu_quant", deterministic, num_sms, backend))


def _grouped_quant_fake(
    a, b, sa, sb, blocks, groups, form, expected_m, c, bias, deterministic, num_sms, backend
):
    return empty_scaled(a, _grouped_shape(a, b, "swiglu_quant"), _QUANT_BLOCK, "e4m3")


_grouped_quant = define(
    "grouped_gemm_swiglu_quant(Tensor a, Tensor b, Tensor? a_scale, Tensor? b_scale,"
    " SymInt[] blocks, Tensor groups, str form, int? expected_m, Tensor? c, Tensor? bias,"
    " bool deterministic, int? num_sms, str backend) -> (Tensor, Tensor)",
    partial(_check_grouped, epilogue="swiglu_quant"),
    _grouped_quant_kernel,
    _grouped_quant_fake,
)


# ---- grouped_gemm_k ----------------------------------------------------------------------------


def grouped_gemm_k(
    a: Operand,
    b: Operand,
    group_sizes: Tensor | Sequence[int],
    *,
    c: Tensor | None = None,
    out: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
    deterministic: bool = False,
    num_sms: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """The weight gradients of all experts: a [m, sum k], b [n, sum k] -> [g, m, n].

    group_sizes  int64 or int32 [g], or a list: cuts the shared depth into groups, one product
                 each; columns behind the last group are never read. An empty group gives 0.
    c            [g, m, n], added in fp32
    out          takes the result and is returned; not while an argument requires grad
    out_dtype    fp32 by default

    Scaled operands: both in blocks (1, 128), group sizes multiples of 128. Plain ones are
    differentiable in a and b.
    """
    name = _chosen(backend)
    a, b, sa, sb, blocks = _split("grouped_gemm_k", a, b)
    groups = _sizes_tensor("grouped_gemm_k", group_sizes)
    lead = (a, b, sa, sb, blocks, groups, c)
    if out is None:
        return _grouped_k(*lead, out_dtype, deterministic, num_sms, name)
    _check_out("grouped_gemm_k", out, None, (a, b, c))
    _grouped_k_out(out, *lead, deterministic, num_sms, name)
    return out


def _check_grouped_k(
    a, b, a_scale, b_scale, blocks, group_sizes, c, num_sms, out_dtype=torch.float32
):
    op = "grouped_gemm_k"
    check.rank(op, "a", a, "[m, sum k]", 2, 2)
    check.rank(op, "b", b, "[n, sum k]", 2, 2)
    _check_operands(op, a, b, a_scale, b_scale, blocks)
    if a_scale is not None and blocks[2] != 1:
        check.bad_value(op, "b.block", f"(1, {blocks[1]})", tuple(blocks[2:]))
    check.dtype(op, "group_sizes", group_sizes, check.INDEX)
    check.readable(op, "group_sizes", group_sizes, "a", a)
    check.rank(op, "group_sizes", group_sizes, "[g]", 1, 1)
    if c is not None:
        _check_addend(op, "c", c, "[g, m, n]", _grouped_k_shape(a, b, group_sizes), a)
    if out_dtype is not torch.float32 or num_sms is not None:
        _check_modes(op, 0, out_dtype, None, num_sms)


def _grouped_k_shape(a: Tensor, b: Tensor, groups: Tensor) -> tuple:
    return groups.shape[0], a.shape[0], b.shape[0]


def _run_grouped_k(a, b, sa, sb, blocks, groups, c, deterministic, num_sms, backend, **result):
    op = "grouped_gemm_k"
    multiple = 1 if sa is None else blocks[1]
    groups = values.sizes_of_parts(op, groups, a.shape[1], multiple)
    left, right = _join(a, b, sa, sb, blocks)
    return _run(
        op,
        backend,
        a.device.type,
        left,
        right,
        groups,
        c=c,
        deterministic=deterministic,
        num_sms=num_sms,
        **result,
    )


def _grouped_k_kernel(a, b, sa, sb, blocks, groups, c, out_dtype, deterministic, num_sms, backend):
    lead = (a, b, sa, sb, blocks, groups, c)
    return _run_grouped_k(*lead, deterministic, num_sms, backend, out_dtype=out_dtype).contiguous()


def _grouped_k_fake(a, b, sa, sb, blocks, groups, c, out_dtype, deterministic, num_sms, backend):
    return a.new_empty(_grouped_k_shape(a, b, groups), dtype=out_dtype)


def _grouped_k_save(ctx, inputs, output):
    a, b, sa, _, _, groups, c, _, *ctx.modes = inputs
    if sa is not None:
        raise NotImplementedError("grouped_gemm_k of ScaledTensors is not differentiable")
    ctx.c_dtype = None if c is None else c.dtype
    ctx.save_for_backward(a, b, groups)


def _grouped_k_grad(ctx, grad):
    # Group i of the product is a_i b_i^T, so da_i = grad_i b_i: rows of b^T times grad_i.
    a, b, groups = ctx.saved_tensors
    g = grad.to(a.dtype)
    da = db = dc = None
    if ctx.needs_input_grad[0]:
        da = _grouped(*_plain(b.t(), g, groups), a.dtype, None, *ctx.modes).t()
    if ctx.needs_input_grad[1]:
        rows = _plain(a.t(), g.transpose(1, 2), groups)
        db = _grouped(*rows, b.dtype, None, *ctx.modes).t()
    if ctx.needs_input_grad[6]:
        dc = grad.to(ctx.c_dtype)
    return da, db, *(None,) * 4, dc, *(None,) * 4


_grouped_k = define(
    "grouped_gemm_k(Tensor a, Tensor b, Tensor? a_scale, Tensor? b_scale, SymInt[] blocks,"
    " Tensor group_sizes, Tensor? c, ScalarType out_dtype, bool deterministic, int? num_sms,"
    " str backend) -> Tensor",
    _check_grouped_k,
    _grouped_k_kernel,
    _grouped_k_fake,
    _grouped_k_grad,
    _grouped_k_save,
)


def _check_grouped_k_out(out, a, b, a_scale, b_scale, blocks, group_sizes, c, num_sms):
    _check_grouped_k(a, b, a_scale, b_scale, blocks, group_sizes, c, num_sms)
    _check_result("grouped_gemm_k", out, _grouped_k_shape(a, b, group_sizes), a)


def _grouped_k_out_kernel(out, a, b, sa, sb, blocks, groups, c, deterministic, num_sms, backend):
    lead = (a, b, sa, sb, blocks, groups, c)
    _run_grouped_k(*lead, deterministic, num_sms, backend, out=out, out_dtype=out.dtype)


def _grouped_k_out_fake(*args):
    return None


_grouped_k_out = define(
    "grouped_gemm_k_out(Tensor(a!) out, Tensor a, Tensor b, Tensor? a_scale, Tensor? b_scale,"
    " SymInt[] blocks, Tensor group_sizes, Tensor? c, bool deterministic, int? num_sms,"
    " str backend) -> ()",
    _check_grouped_k_out,
    _grouped_k_out_kernel,
    _grouped_k_out_fake,
)
