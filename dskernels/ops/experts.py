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
from .moe import check_permute, check_routing

_chosen = _backend.chosen
_run = _backend.run

LAYOUTS = (None, "contiguous", "masked")


def moe_experts(
    x: Tensor,
    w13: Operand,
    w2: Operand,
    topk_idx: Tensor,
    topk_weights: Tensor,
    *,
    expert_map: Tensor | None = None,
    num_shared: int = 0,
    layout: str | None = None,
    backend: str | None = None,
) -> Tensor:
    """The routed experts of x [t, d]: sum over k of weight * w2 swiglu(w13 x) -> [t, d].

    w13           [e, 2i, d] = [gate; up]; plain (x's dtype) or ScaledTensor in blocks (128, 128)
    w2            [e, d, i], of w13's kind
    topk_idx      int64 (or int32) [t, k], -1 for a slot without an expert
    topk_weights  fp32 [t, k]
    expert_map    int64 (or int32) [l, r]: topk_idx names logical experts, rows of it, and w13 and
                  w2 hold their replicas; see `moe_permute`
    num_shared    the last so many of the e experts are shared: every token goes to them as well,
                  with the weight 1, and topk_idx does not name them. A shared expert that is n
                  times as wide is n such experts: its weights cut along i
    layout        how rows lie between the products, the results being the same to the bit:
                  "contiguous", expert after expert; or "masked", room for t rows of each, of which
                  the counts on the device say how many there are, for decode: less is launched and
                  the products fit few rows better, for e times the memory. A token must not name
                  an expert twice then (on a GPU, where values are not read, the kernel traps).
                  Backends without a masked layout take it for a hint. None: "contiguous"

    Plain weights: each product and the SwiGLU are rounded to x's dtype; differentiable in x, w13,
    w2 and topk_weights. Scaled weights (W8A8): x and the unrounded SwiGLU are quantised in blocks
    (1, 128); differentiable in x and topk_weights, by FP8 products (`nn.fp8_experts` trains the
    weights too). The weighted sum is `moe_unpermute`'s.
    """
    name = _chosen(backend)
    w13, w2, s13, s2, blocks = _split_weights(w13, w2)
    return _experts(
        x, w13, w2, s13, s2, blocks, topk_idx, topk_weights, expert_map, num_shared, layout, name
    )


def _split_weights(w13: Operand, w2: Operand) -> tuple:
    if isinstance(w13, ScaledTensor) != isinstance(w2, ScaledTensor):
        expected = "two plain tensors or two ScaledTensors"
        actual = f"{type(w13).__name__} and {type(w2).__name__}"
        check.bad_type("moe_experts", "w13, w2", expected, actual)
    return _split("moe_experts", w13, w2)


def _check_experts(
    x, w13, w2, w13_scale, w2_scale, blocks, topk_idx, topk_weights, expert_map, num_shared,
    layout=None, op="moe_experts",
):  # fmt: skip
    check.rank(op, "w13", w13, "[e, 2i, d]", 3, 3)
    experts, double, width = w13.shape
    check_permute(x, topk_idx, experts, 1, expert_map, op)
    if not 0 <= num_shared <= experts:
        check.bad_value(op, "num_shared", f"0 .. {experts} (e)", num_shared)
    check.one_of(op, "layout", layout, LAYOUTS)
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


def _routing(op, topk_idx, experts, expert_map, num_shared) -> tuple[Tensor, dict]:
    """topk_idx, its values checked, and what there is of the other two."""
    topk_idx, expert_map = check_routing(op, topk_idx, experts - num_shared, expert_map)
    given = {"expert_map": expert_map, "num_shared": num_shared or None}
    return topk_idx, {name: value for name, value in given.items() if value is not None}


def _experts_kernel(
    x, w13, w2, s13, s2, blocks, topk_idx, topk_weights, expert_map, num_shared, layout, backend
):
    op = "moe_experts"
    topk_idx, options = _routing(op, topk_idx, w13.shape[0], expert_map, num_shared)
    if layout == "masked":
        values.distinct(op, "topk_idx", topk_idx)
        options["layout"] = layout
    weights = _weights(w13, w2, s13, s2, blocks)
    inputs = x, *weights, topk_idx, topk_weights
    return _run(op, backend, x.device.type, *inputs, **options).contiguous()


def _experts_fake(
    x, w13, w2, s13, s2, blocks, topk_idx, topk_weights, expert_map, num_shared, layout, backend
):
    return x.new_empty(x.shape)


def _experts_save(ctx, inputs, output):
    x, w13, w2, s13, s2, blocks, topk_idx, topk_weights, expert_map, *rest = inputs
    ctx.num_shared, _, ctx.backend = rest
    if s13 is not None:  # FP8 numbers have no FP8 gradient; nn.fp8_experts trains a master copy
        constant(ctx, "moe_experts", inputs, w13=1, w2=2, w13_scale=3, w2_scale=4)
    ctx.blocks = list(blocks)
    ctx.save_for_backward(x, w13, w2, s13, s2, topk_idx, topk_weights, expert_map)


def _experts_grad(ctx, grad):
    x, w13, w2, s13, s2, *routing = ctx.saved_tensors
    of_weights = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
    dx, d13, d2, dweights = _experts_backward(
        grad, x, w13, w2, s13, s2, ctx.blocks, *routing, ctx.num_shared, of_weights, ctx.backend
    )
    if not of_weights:
        d13 = d2 = None
    return dx, d13, d2, *(None,) * 4, dweights, *(None,) * 4


_experts = define(
    "moe_experts(Tensor x, Tensor w13, Tensor w2, Tensor? w13_scale, Tensor? w2_scale,"
    " SymInt[] blocks, Tensor topk_idx, Tensor topk_weights, Tensor? expert_map,"
    " SymInt num_shared, str? layout, str backend) -> Tensor",
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
    expert_map: Tensor | None = None,
    num_shared: int = 0,
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
        grad, x, w13, w2, s13, s2, blocks, topk_idx, topk_weights, expert_map, num_shared,
        weight_grads, name,
    )  # fmt: skip


def _check_experts_backward(
    grad, x, w13, w2, w13_scale, w2_scale, blocks, topk_idx, topk_weights, expert_map, num_shared
):
    op = "moe_experts_backward"
    scales = w13_scale, w2_scale, blocks
    _check_experts(x, w13, w2, *scales, topk_idx, topk_weights, expert_map, num_shared, op=op)
    check.shape(op, "grad", grad, "x's shape", x.shape)
    check.dtype(op, "grad", grad, check.FLOATS)
    check.same_device(op, "grad", grad, "x", x)


def _experts_backward_kernel(
    grad, x, w13, w2, s13, s2, blocks, topk_idx, topk_weights, expert_map, num_shared,
    weight_grads, backend,
):  # fmt: skip
    op = "moe_experts_backward"
    topk_idx, options = _routing(op, topk_idx, w13.shape[0], expert_map, num_shared)
    options["weight_grads"] = weight_grads
    weights = _weights(w13, w2, s13, s2, blocks)
    inputs = grad, x, *weights, topk_idx, topk_weights
    dx, d13, d2, dweights = _run(op, backend, x.device.type, *inputs, **options)
    if not weight_grads:
        d13, d2 = x.new_empty(0), x.new_empty(0)
    return dx.contiguous(), d13.contiguous(), d2.contiguous(), dweights.contiguous()


def _experts_backward_fake(
    grad, x, w13, w2, s13, s2, blocks, topk_idx, topk_weights, expert_map, num_shared,
    weight_grads, backend,
):  # fmt: skip
    like = [
        w.new_empty(w.shape, dtype=w.dtype if s13 is None else torch.float32) for w in (w13, w2)
    ]
    if not weight_grads:
        like = [x.new_empty(0), x.new_empty(0)]
    return x.new_empty(x.shape), *like, topk_weights.new_empty(topk_weights.shape)


_experts_backward = define(
    "moe_experts_backward(Tensor grad, Tensor x, Tensor w13, Tensor w2, Tensor? w13_scale,"
    " Tensor? w2_scale, SymInt[] blocks, Tensor topk_idx, Tensor topk_weights,"
    " Tensor? expert_map, SymInt num_shared, bool weight_grads, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _check_experts_backward,
    _experts_backward_kernel,
    _experts_backward_fake,
)
