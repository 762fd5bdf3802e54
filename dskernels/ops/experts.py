"""The routed experts of a mixture, forward and backward.

Dimension letters: t tokens, d model width, e experts, k chosen experts per token, i expert width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backend as _backend
from ..types import ScaledTensor
from . import _check as check
from . import _values as values
from ._registry import constant, define
from ._scaled import scaled
from .gemm import Operand, _split, check_scaled
from .moe import check_permute

_chosen = _backend.chosen
_run = _backend.run


def moe_experts(
    x: Tensor,
    w13: Operand,
    w2: Operand,
    topk_idx: Tensor,
    topk_weights: Tensor,
    *,
    backend: str | None = None,
) -> Tensor:
    """The routed experts of x [t, d]: sum over k of weight * w2 swiglu(w13 x) -> [t, d].

    w13           [e, 2i, d] = [gate; up]; plain (x's dtype) or ScaledTensor in blocks (128, 128)
    w2            [e, d, i], of w13's kind
    topk_idx      int64 (or int32) [t, k], -1 for a slot without an expert
    topk_weights  fp32 [t, k]

    Plain weights: each product and the SwiGLU are rounded to x's dtype; differentiable in x, w13,
    w2 and topk_weights. Scaled weights (W8A8): x and the unrounded SwiGLU are quantised in blocks
    (1, 128); differentiable in x and topk_weights, by FP8 products (`nn.fp8_experts` trains the
    weights too). The weighted sum is `moe_unpermute`'s.
    """
    name = _chosen(backend)
    w13, w2, s13, s2, blocks = _split_weights(w13, w2)
    return _experts(x, w13, w2, s13, s2, blocks, topk_idx, topk_weights, name)


def _split_weights(w13: Operand, w2: Operand) -> tuple:
    if isinstance(w13, ScaledTensor) != isinstance(w2, ScaledTensor):
        expected = "two plain tensors or two ScaledTensors"
        actual = f"{type(w13).__name__} and {type(w2).__name__}"
        check.bad_type("moe_experts", "w13, w2", expected, actual)
    return _split("moe_experts", w13, w2)


def _check_experts(
    x, w13, w2, w13_scale, w2_scale, blocks, topk_idx, topk_weights, op="moe_experts"
):
    check.rank(op, "w13", w13, "[e, 2i, d]", 3, 3)
    experts, double, width = w13.shape
    check_permute(x, topk_idx, experts, 1, op)
    if width != x.shape[1] or double % 2:
        expected = f"[e, 2i, d = {x.shape[1]}]"
        check.bad_value(op, "w13", expected, check.show(w13.shape))
    check.rank(op, "w2", w2, "[e, d, i]", 3, 3)
    check.shape(op, "w2", w2, "[e, d, i]", (experts, width, double // 2))
    if w13_scale is None and w2_scale is None:
        check.same_dtype(op, "w13", w13, "x", x)
        check.same_dtype(op, "w2", w2, "x", x)
    else:
        _check_expert_scales(op, w13, w2, w13_scale, w2_scale, blocks)
    check.same_device(op, "w13", w13, "x", x)
    check.same_device(op, "w2", w2, "x", x)
    check.shape(op, "topk_weights", topk_weights, "[t, k]", topk_idx.shape)
    check.dtype(op, "topk_weights", topk_weights, check.FLOATS)
    check.same_device(op, "topk_weights", topk_weights, "x", x)


def _check_expert_scales(op, w13, w2, s13, s2, blocks):
    if s13 is None or s2 is None or len(blocks) != 4:
        check.bad_value(op, "blocks", "two scales and 4 block sizes", list(blocks))
    # Activations are quantised in blocks (1, 128), so the weights' blocks must be 128 deep.
    for name, data, scale, block in (("w13", w13, s13, blocks[:2]), ("w2", w2, s2, blocks[2:])):
        if block[1] != 128:
            check.bad_value(op, f"{name}.block", "(rows, 128)", tuple(block))
        check_scaled(op, name, data, scale, block)


def _weights(w13, w2, s13, s2, blocks):
    if s13 is None:
        return w13, w2
    return scaled(w13, s13, blocks[:2], "e4m3"), scaled(w2, s2, blocks[2:], "e4m3")


def _experts_kernel(x, w13, w2, s13, s2, blocks, topk_idx, topk_weights, backend):
    topk_idx = values.index("moe_experts", "topk_idx", topk_idx, -1, w13.shape[0])
    first, second = _weights(w13, w2, s13, s2, blocks)
    device = x.device.type
    return _run(
        "moe_experts", backend, device, x, first, second, topk_idx, topk_weights
    ).contiguous()


def _experts_fake(x, w13, w2, s13, s2, blocks, topk_idx, topk_weights, backend):
    return x.new_empty(x.shape)


def _experts_save(ctx, inputs, output):
    x, w13, w2, s13, s2, blocks, topk_idx, topk_weights, ctx.backend = inputs
    if s13 is not None:  # FP8 numbers have no FP8 gradient; nn.fp8_experts trains a master copy
        constant(ctx, "moe_experts", inputs, w13=1, w2=2, w13_scale=3, w2_scale=4)
    ctx.blocks = list(blocks)
    ctx.save_for_backward(x, w13, w2, s13, s2, topk_idx, topk_weights)


def _experts_grad(ctx, grad):
    x, w13, w2, s13, s2, topk_idx, topk_weights = ctx.saved_tensors
    of_weights = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
    dx, d13, d2, dweights = _experts_backward(
        grad, x, w13, w2, s13, s2, ctx.blocks, topk_idx, topk_weights, of_weights, ctx.backend
    )
    if not of_weights:
        d13 = d2 = None
    return dx, d13, d2, None, None, None, None, dweights, None


_experts = define(
    "moe_experts(Tensor x, Tensor w13, Tensor w2, Tensor? w13_scale, Tensor? w2_scale,"
    " SymInt[] blocks, Tensor topk_idx, Tensor topk_weights, str backend) -> Tensor",
    _check_experts,
    _experts_kernel,
    _experts_fake,
    _experts_grad,
    _experts_save,
)


def moe_experts_backward(
    grad: Tensor,
    x: Tensor,
    w13: Operand,
    w2: Operand,
    topk_idx: Tensor,
    topk_weights: Tensor,
    *,
    weight_grads: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `moe_experts` from that of its result, grad [t, d]; arguments as there.

    Returns (dx [t, d], dw13 [e, 2i, d], dw2 [e, d, i], dweights [t, k]), the middle two empty
    without weight_grads. Plain weights: in the inputs' dtypes. Scaled weights: every product in
    FP8, as the V3 report trains (3.3); dw13 and dw2 are fp32, for a master copy of the weights.
    The forward is computed again up to SwiGLU: nothing but its inputs is needed.
    """
    name = _chosen(backend)
    w13, w2, s13, s2, blocks = _split_weights(w13, w2)
    return _experts_backward(
        grad, x, w13, w2, s13, s2, blocks, topk_idx, topk_weights, weight_grads, name
    )


def _check_experts_backward(
    grad, x, w13, w2, w13_scale, w2_scale, blocks, topk_idx, topk_weights
):  # fmt: skip
    op = "moe_experts_backward"
    _check_experts(x, w13, w2, w13_scale, w2_scale, blocks, topk_idx, topk_weights, op)
    check.shape(op, "grad", grad, "x's shape", x.shape)
    check.dtype(op, "grad", grad, check.FLOATS)
    check.same_device(op, "grad", grad, "x", x)


def _experts_backward_kernel(
    grad, x, w13, w2, s13, s2, blocks, topk_idx, topk_weights, weight_grads, backend
):
    op = "moe_experts_backward"
    topk_idx = values.index(op, "topk_idx", topk_idx, -1, w13.shape[0])
    first, second = _weights(w13, w2, s13, s2, blocks)
    inputs = grad, x, first, second, topk_idx, topk_weights
    dx, d13, d2, dweights = _run(op, backend, x.device.type, *inputs, weight_grads=weight_grads)
    if not weight_grads:
        d13, d2 = x.new_empty(0), x.new_empty(0)
    return dx.contiguous(), d13.contiguous(), d2.contiguous(), dweights.contiguous()


def _experts_backward_fake(
    grad, x, w13, w2, s13, s2, blocks, topk_idx, topk_weights, weight_grads, backend
):
    like = [
        w.new_empty(w.shape, dtype=w.dtype if s13 is None else torch.float32) for w in (w13, w2)
    ]
    if not weight_grads:
        like = [x.new_empty(0), x.new_empty(0)]
    return x.new_empty(x.shape), *like, topk_weights.new_empty(topk_weights.shape)


_experts_backward = define(
    "moe_experts_backward(Tensor grad, Tensor x, Tensor w13, Tensor w2, Tensor? w13_scale,"
    " Tensor? w2_scale, SymInt[] blocks, Tensor topk_idx, Tensor topk_weights,"
    " bool weight_grads, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _check_experts_backward,
    _experts_backward_kernel,
    _experts_backward_fake,
)
