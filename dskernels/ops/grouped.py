"""Grouped matrix products: by rows (experts) and along k (weight gradients).

Dimension letters and operands as in `gemm`; g groups.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import backend as _backend
from ..types import ScaledTensor
from . import _check as check
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
    given = [form is not None for form in (group_sizes, m_indices, masked_m)]
    if sum(given) != 1:
        names = [name for name, here in zip(FORMS, given) if here]
        check.bad_value("grouped_gemm", "grouping", f"exactly one of {list(FORMS)}", names)
    if m_indices is not None:
        return m_indices, "m_indices"
    if masked_m is not None:
        return masked_m, "masked_m"
    return _sizes_tensor("grouped_gemm", group_sizes), "group_sizes"


def _sizes_tensor(op: str, sizes: Tensor | Sequence[int]) -> Tensor:
    if isinstance(sizes, Tensor):
        return sizes
    try:
        return torch.tensor(sizes, dtype=torch.int64)
    except (TypeError, ValueError, RuntimeError):
        check.bad_type(op, "group_sizes", "integers", repr(sizes))


def _check_grouped(
    a, b, sa, sb, blocks, groups, form, expected_m, c, bias, out_dtype, epilogue, num_sms
):
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
    _check_operands(op, a, b, sa, sb, blocks)
    check.dtype(op, form, groups, check.INDEX)
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


def _checked_groups(op: str, form: str, groups: Tensor, num_groups: int, limit: int) -> Tensor:
    """The grouping tensor in the dtype implementations take: group_sizes int64, the others int32.

    Its values are checked where they can be read without waiting for a device. limit: rows of a
    that the groups share (group_sizes), or that each may have (masked_m).
    """
    if form == "m_indices":
        return check.index(op, form, groups, -1, num_groups).int()
    if groups.is_cpu:
        sizes = groups.tolist()
        total = sum(sizes) if form == "group_sizes" else max(sizes, default=0)
        if total > limit or min(sizes, default=0) < 0:
            what = "a sum" if form == "group_sizes" else "each"
            check.bad_value(op, form, f"sizes >= 0 with {what} of at most {limit}", sizes)
    wanted = torch.int64 if form == "group_sizes" else torch.int32
    return groups if groups.dtype is wanted else groups.to(wanted)


def _run_grouped(
    a, b, sa, sb, blocks, groups, form, expected_m, c, bias, epilogue, deterministic, num_sms,
    backend, **result
):  # fmt: skip
    groups = _checked_groups("grouped_gemm", form, groups, b.shape[0], a.shape[-2])
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
    _check_grouped(*lead, out_dtype, epilogue, num_sms)
    y = _run_grouped(*lead, epilogue, deterministic, num_sms, backend, out_dtype=out_dtype)
    return y.contiguous()


def _grouped_fake(
    a, b, sa, sb, blocks, groups, form, expected_m, c, bias, out_dtype, epilogue, deterministic,
    num_sms, backend
):  # fmt: skip
    lead = (a, b, sa, sb, blocks, groups, form, expected_m, c, bias)
    _check_grouped(*lead, out_dtype, epilogue, num_sms)
    width = b.shape[1] // 2 if epilogue else b.shape[1]
    return a.new_empty((*a.shape[:-1], width), dtype=_result_dtype(a, sa, blocks, out_dtype))


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
    _grouped_kernel,
    _grouped_fake,
    _grouped_grad,
    _grouped_save,
)


def _grouped_out_kernel(
    out, a, b, sa, sb, blocks, groups, form, expected_m, c, bias, epilogue, deterministic, num_sms,
    backend
):  # fmt: skip
    lead = (a, b, sa, sb, blocks, groups, form, expected_m, c, bias)
    _check_grouped(*lead, None, epilogue, num_sms)
    width = b.shape[1] // 2 if epilogue else b.shape[1]
    _check_result("grouped_gemm", out, (*a.shape[:-1], width), a)
    _run_grouped(*lead, epilogue, deterministic, num_sms, backend, out=out)


def _grouped_out_fake(
    out, a, b, sa, sb, blocks, groups, form, expected_m, c, bias, epilogue, deterministic, num_sms,
    backend
):  # fmt: skip
    lead = (a, b, sa, sb, blocks, groups, form, expected_m, c, bias)
    _check_grouped(*lead, None, epilogue, num_sms)


_grouped_out = define(
    "grouped_gemm_out(Tensor(a!) out, Tensor a, Tensor b, Tensor? a_scale, Tensor? b_scale,"
    " SymInt[] blocks, Tensor groups, str form, int? expected_m, Tensor? c, Tensor? bias,"
    " str? epilogue, bool deterministic, int? num_sms, str backend) -> ()",
    _grouped_out_kernel,
    _grouped_out_fake,
)


def _grouped_quant_kernel(
    a, b, sa, sb, blocks, groups, form, expected_m, c, bias, deterministic, num_sms, backend
):
    lead = (a, b, sa, sb, blocks, groups, form, expected_m, c, bias)
    _check_grouped(*lead, None, "swiglu_quant", num_sms)
    return parts(_run_grouped(*lead, "swiglu_quant", deterministic, num_sms, backend))


def _grouped_quant_fake(
    a, b, sa, sb, blocks, groups, form, expected_m, c, bias, deterministic, num_sms, backend
):
    lead = (a, b, sa, sb, blocks, groups, form, expected_m, c, bias)
    _check_grouped(*lead, None, "swiglu_quant", num_sms)
    return empty_scaled(a, (*a.shape[:-1], b.shape[1] // 2), _QUANT_BLOCK, "e4m3")


_grouped_quant = define(
    "grouped_gemm_swiglu_quant(Tensor a, Tensor b, Tensor? a_scale, Tensor? b_scale,"
    " SymInt[] blocks, Tensor groups, str form, int? expected_m, Tensor? c, Tensor? bias,"
    " bool deterministic, int? num_sms, str backend) -> (Tensor, Tensor)",
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


def _check_grouped_k(a, b, sa, sb, blocks, groups, c, out_dtype, num_sms):
    op = "grouped_gemm_k"
    check.rank(op, "a", a, "[m, sum k]", 2, 2)
    check.rank(op, "b", b, "[n, sum k]", 2, 2)
    _check_operands(op, a, b, sa, sb, blocks)
    if sa is not None and blocks[2] != 1:
        check.bad_value(op, "b.block", f"(1, {blocks[1]})", tuple(blocks[2:]))
    check.dtype(op, "group_sizes", groups, check.INDEX)
    check.rank(op, "group_sizes", groups, "[g]", 1, 1)
    if c is not None:
        _check_addend(op, "c", c, "[g, m, n]", (groups.shape[0], a.shape[0], b.shape[0]), a)
    if out_dtype is not torch.float32 or num_sms is not None:
        _check_modes(op, 0, out_dtype, None, num_sms)


def _run_grouped_k(a, b, sa, sb, blocks, groups, c, deterministic, num_sms, backend, **result):
    op = "grouped_gemm_k"
    groups = _checked_groups(op, "group_sizes", groups, groups.shape[0], a.shape[1])
    if sa is not None and groups.is_cpu and any(size % blocks[1] for size in groups.tolist()):
        check.bad_value(op, "group_sizes", f"multiples of {blocks[1]}", groups.tolist())
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
    _check_grouped_k(*lead, out_dtype, num_sms)
    return _run_grouped_k(*lead, deterministic, num_sms, backend, out_dtype=out_dtype).contiguous()


def _grouped_k_fake(a, b, sa, sb, blocks, groups, c, out_dtype, deterministic, num_sms, backend):
    _check_grouped_k(a, b, sa, sb, blocks, groups, c, out_dtype, num_sms)
    return a.new_empty((groups.shape[0], a.shape[0], b.shape[0]), dtype=out_dtype)


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
    _grouped_k_kernel,
    _grouped_k_fake,
    _grouped_k_grad,
    _grouped_k_save,
)


def _grouped_k_out_kernel(out, a, b, sa, sb, blocks, groups, c, deterministic, num_sms, backend):
    lead = (a, b, sa, sb, blocks, groups, c)
    _check_grouped_k(*lead, torch.float32, num_sms)
    _check_result("grouped_gemm_k", out, (groups.shape[0], a.shape[0], b.shape[0]), a)
    _run_grouped_k(*lead, deterministic, num_sms, backend, out=out, out_dtype=out.dtype)


def _grouped_k_out_fake(out, a, b, sa, sb, blocks, groups, c, deterministic, num_sms, backend):
    _check_grouped_k(a, b, sa, sb, blocks, groups, c, torch.float32, num_sms)


_grouped_k_out = define(
    "grouped_gemm_k_out(Tensor(a!) out, Tensor a, Tensor b, Tensor? a_scale, Tensor? b_scale,"
    " SymInt[] blocks, Tensor group_sizes, Tensor? c, bool deterministic, int? num_sms,"
    " str backend) -> ()",
    _grouped_k_out_kernel,
    _grouped_k_out_fake,
)
