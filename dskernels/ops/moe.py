"""Mixture of experts: router, permutation, bias update; the experts are in experts.py.

Dimension letters: t tokens, d model width, e experts, k chosen experts per token, m permuted rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backend as _backend
from . import _check as check
from . import _values as values
from ._registry import define

SCORES = ("sigmoid", "softmax")
WEIGHT_SUM_FLOOR = 1e-20  # keeps divisions by a sum of scores finite
GROUP_SCORES = ("top2", "max")

_chosen = _backend.chosen
_run = _backend.run


# ---- moe_gate ----------------------------------------------------------------------------------


def moe_gate(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    n_group: int = 1,
    topk_group: int = 1,
    topk: int,
    scale: float = 1.0,
    score: str = "sigmoid",
    group_score: str | None = None,
    renormalize: bool | None = None,
    sequences: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, ...]:
    """Choose topk experts for each token of x [t, d] by weight [e, d] and bias [e] or None.

    n_group, topk_group  the experts come in n_group equal groups, of which the topk_group best are
                         in the running
    scale                factor of the weights (routed_scaling_factor)
    score                "sigmoid" (V3) or "softmax" (V2)
    group_score          a group is as good as its "top2" experts' sum or its "max"; default: top2
                         with sigmoid, max with softmax
    renormalize          divide the weights by their sum; default: with sigmoid only
    sequences            the tokens are so many sequences of equal length, one after the other:
                         statistics for balancing follow from the same pass

    Returns (topk_idx int64 [t, k] by descending biased score, topk_weights fp32 [t, k] from the
    UNBIASED scores, scores fp32 [t, e], unbiased). Ties go to the lowest index. Differentiable in
    x and weight through weights and scores; the choice and the bias get no gradient.

    With sequences = b also (counts int64 [b, e]: choices of each expert, whose sum over b is what
    `moe_bias_update` takes; affinity fp32 [b, e]: the mean over the sequence of the scores, each
    token's divided by their sum). V3's sequence-wise loss is then
    alpha * e / (k s) * (counts * affinity).sum(-1).mean(), with s tokens a sequence; affinity is
    differentiable. Source: V3 report eq. 12-20; V2 paper 2.2.2.
    """
    name = _chosen(backend)
    if group_score is None:
        group_score = "top2" if score == "sigmoid" else "max"
    if renormalize is None:
        renormalize = score == "sigmoid"
    choice = (n_group, topk_group, topk, scale, score, group_score, renormalize)
    if sequences is None:
        return _gate(x, weight, bias, *choice, name)
    return _gate_statistics(x, weight, bias, *choice, sequences, name)


def _check_gate(x, weight, bias, n_group, topk_group, topk, score, group_score):
    op = "moe_gate"
    check.rank(op, "x", x, "[t, d]", 2, 2)
    check.dtype(op, "x", x, check.FLOATS)
    check.rank(op, "weight", weight, "[e, d]", 2, 2)
    check.dtype(op, "weight", weight, check.FLOATS)
    experts = weight.shape[0]
    check.shape(op, "weight", weight, "[e, d]", (experts, x.shape[1]))
    check.same_device(op, "weight", weight, "x", x)
    if bias is not None:
        check.shape(op, "bias", bias, "[e]", (experts,))
        check.dtype(op, "bias", bias, check.FLOATS)
        check.same_device(op, "bias", bias, "x", x)
    check.one_of(op, "score", score, SCORES)
    check.one_of(op, "group_score", group_score, GROUP_SCORES)
    if n_group < 1 or experts % n_group:
        check.bad_value(op, "n_group", f"a divisor of e = {experts}", n_group)
    if not 1 <= topk_group <= n_group:
        check.bad_value(op, "topk_group", f"1 .. {n_group} (n_group)", topk_group)
    reachable = experts // n_group * topk_group
    if not 1 <= topk <= reachable:
        check.bad_value(op, "topk", f"1 .. {reachable} (experts in topk_group groups)", topk)


def _gate_kernel(
    x, weight, bias, n_group, topk_group, topk, scale, score, group_score, renormalize, backend
):
    topk_idx, weights, scores = _run(
        "moe_gate",
        backend,
        x.device.type,
        x,
        weight,
        bias,
        n_group=n_group,
        topk_group=topk_group,
        topk=topk,
        scale=scale,
        score=score,
        group_score=group_score,
        renormalize=renormalize,
    )
    return topk_idx.contiguous(), weights.contiguous(), scores.contiguous()


def _gate_fake(
    x, weight, bias, n_group, topk_group, topk, scale, score, group_score, renormalize, backend
):
    tokens = x.shape[0]
    return (
        x.new_empty((tokens, topk), dtype=torch.int64),
        x.new_empty((tokens, topk), dtype=torch.float32),
        x.new_empty((tokens, weight.shape[0]), dtype=torch.float32),
    )


def _gate_save(ctx, inputs, output):
    x, weight, _, _, _, _, ctx.scale, ctx.score, _, ctx.renormalize, ctx.backend = inputs
    topk_idx, _, scores = output
    # A bias that requires grad is legal and gets none: it is trained by moe_bias_update.
    ctx.mark_non_differentiable(topk_idx)
    ctx.save_for_backward(x, weight, topk_idx, scores)


def _gate_grad(ctx, _, grad_weights, grad_scores):
    saved = ctx.saved_tensors
    modes = (ctx.scale, ctx.score, ctx.renormalize, ctx.backend)
    return *_gate_backward(grad_weights, grad_scores, *saved, *modes), *(None,) * 9


_gate = define(
    "moe_gate(Tensor x, Tensor weight, Tensor? bias, int n_group, int topk_group, int topk,"
    " float scale, str score, str group_score, bool renormalize, str backend)"
    " -> (Tensor, Tensor, Tensor)",
    _check_gate,
    _gate_kernel,
    _gate_fake,
    _gate_grad,
    _gate_save,
)


def _check_gate_statistics(
    x, weight, bias, n_group, topk_group, topk, score, group_score, sequences
):
    _check_gate(x, weight, bias, n_group, topk_group, topk, score, group_score)
    tokens = x.shape[0]
    if sequences < 1 or tokens < 1 or tokens % sequences:
        check.bad_value("moe_gate", "sequences", f"a divisor of t = {tokens} tokens", sequences)


def _gate_statistics_kernel(
    x, weight, bias, n_group, topk_group, topk, scale, score, group_score, renormalize, sequences,
    backend,
):  # fmt: skip
    options = dict(n_group=n_group, topk_group=topk_group, topk=topk, scale=scale, score=score)
    options |= dict(group_score=group_score, renormalize=renormalize, sequences=sequences)
    results = _run("moe_gate", backend, x.device.type, x, weight, bias, **options)
    return tuple(result.contiguous() for result in results)


def _gate_statistics_fake(
    x, weight, bias, n_group, topk_group, topk, scale, score, group_score, renormalize, sequences,
    backend,
):  # fmt: skip
    shape = (sequences, weight.shape[0])
    choice = (n_group, topk_group, topk, scale, score, group_score, renormalize, backend)
    return (
        *_gate_fake(x, weight, bias, *choice),
        x.new_empty(shape, dtype=torch.int64),
        x.new_empty(shape, dtype=torch.float32),
    )


def _gate_statistics_save(ctx, inputs, output):
    _gate_save(ctx, (*inputs[:10], inputs[11]), output[:3])
    ctx.mark_non_differentiable(output[0], output[3])


def _gate_statistics_grad(ctx, _, grad_weights, grad_scores, __, grad_affinity):
    scores = ctx.saved_tensors[3]
    # affinity is the mean of share = scores / total: its gradient joins that of the scores.
    total = scores.sum(dim=-1, keepdim=True) + WEIGHT_SUM_FLOOR
    share, length = scores / total, scores.shape[0] // grad_affinity.shape[0]
    g = (grad_affinity / length).repeat_interleave(length, dim=0)
    more = (g - (g * share).sum(dim=-1, keepdim=True)) / total
    grads = _gate_grad(ctx, None, grad_weights, grad_scores + more)
    return *grads, None


_gate_statistics = define(
    "moe_gate_statistics(Tensor x, Tensor weight, Tensor? bias, int n_group, int topk_group,"
    " int topk, float scale, str score, str group_score, bool renormalize, int sequences,"
    " str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _check_gate_statistics,
    _gate_statistics_kernel,
    _gate_statistics_fake,
    _gate_statistics_grad,
    _gate_statistics_save,
)


def _check_gate_backward(grad_weights, grad_scores, topk_idx, scores):
    op = "moe_gate_backward"
    check.shape(op, "grad_weights", grad_weights, "[t, k]", topk_idx.shape)
    check.shape(op, "grad_scores", grad_scores, "[t, e]", scores.shape)


def _gate_backward_kernel(
    grad_weights, grad_scores, x, weight, topk_idx, scores, scale, score, renormalize, backend
):
    op = "moe_gate_backward"
    topk_idx = values.index(op, "topk_idx", topk_idx, 0, scores.shape[1])
    args = (grad_weights, grad_scores, x, weight, topk_idx, scores, scale, score, renormalize)
    dx, dweight = _run(op, backend, x.device.type, *args)
    return dx.contiguous(), dweight.contiguous()


def _gate_backward_fake(
    grad_weights, grad_scores, x, weight, topk_idx, scores, scale, score, renormalize, backend
):
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


_gate_backward = define(
    "moe_gate_backward(Tensor grad_weights, Tensor grad_scores, Tensor x, Tensor weight,"
    " Tensor topk_idx, Tensor scores, float scale, str score, bool renormalize, str backend)"
    " -> (Tensor, Tensor)",
    _check_gate_backward,
    _gate_backward_kernel,
    _gate_backward_fake,
)


# ---- moe_permute -------------------------------------------------------------------------------


def moe_permute(
    x: Tensor,
    topk_idx: Tensor,
    num_experts: int,
    *,
    alignment: int = 1,
    expert_map: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sort the copies of the tokens x [t, d] by expert: a stable counting sort.

    topk_idx    int64 (or int32) [t, k], -1 for a slot without an expert
    alignment   each expert's rows are rounded up to a multiple of it with rows of zeros
    expert_map  int64 (or int32) [l, r]: topk_idx names rows of it, the logical experts, and the
                num_experts sorted by are their replicas (`eplb`'s log2phy of a layer). -1 is no
                replica; of n others token t gets number floor(n * frac(t * 0.618...)), so that
                every choice depends on its own token only. An expert without any is dropped

    Returns (x_perm [m, d], group_sizes int64 [e] whose sum is m, row_map int64 [t, k]: the row of
    x_perm of each copy, -1 where dropped). m depends on topk_idx's values: under torch.compile it
    is a dynamic size. Differentiable in x.
    """
    return _permute(x, topk_idx, num_experts, alignment, expert_map, _chosen(backend))


def check_permute(x, topk_idx, num_experts, alignment, expert_map, op="moe_permute"):
    check.rank(op, "x", x, "[t, d]", 2, 2)
    check.dtype(op, "x", x, check.FLOATS)
    check.dtype(op, "topk_idx", topk_idx, check.INDEX)
    check.rank(op, "topk_idx", topk_idx, "[t, k]", 2, 2)
    if topk_idx.shape[0] != x.shape[0]:
        check.bad_value(op, "topk_idx", f"[t = {x.shape[0]}, k]", check.show(topk_idx.shape))
    check.same_device(op, "topk_idx", topk_idx, "x", x)
    if num_experts < 0:
        check.bad_value(op, "num_experts", "a size", num_experts)
    check.positive(op, "alignment", alignment)
    if expert_map is not None:
        check.dtype(op, "expert_map", expert_map, check.INDEX)
        check.rank(op, "expert_map", expert_map, "[l, r]", 2, 2)
        if expert_map.numel() == 0:
            check.bad_value(op, "expert_map", "[l, r], not empty", check.show(expert_map.shape))
        check.same_device(op, "expert_map", expert_map, "x", x)


def check_routing(op, topk_idx, num_experts, expert_map):
    """topk_idx and expert_map as int64, their values within what they name."""
    if expert_map is None:
        return values.index(op, "topk_idx", topk_idx, -1, num_experts), None
    expert_map = values.index(op, "expert_map", expert_map, -1, num_experts)
    return values.index(op, "topk_idx", topk_idx, -1, expert_map.shape[0]), expert_map


def _permute_kernel(x, topk_idx, num_experts, alignment, expert_map, backend):
    op, options = "moe_permute", {"alignment": alignment}
    topk_idx, expert_map = check_routing(op, topk_idx, num_experts, expert_map)
    if expert_map is not None:
        options["expert_map"] = expert_map
    results = _run(op, backend, x.device.type, x, topk_idx, num_experts, **options)
    return tuple(result.contiguous() for result in results)


def _permute_fake(x, topk_idx, num_experts, alignment, expert_map, backend):
    rows = torch.library.get_ctx().new_dynamic_size()
    return (
        x.new_empty((rows, x.shape[1])),
        x.new_empty((num_experts,), dtype=torch.int64),
        x.new_empty(topk_idx.shape, dtype=torch.int64),
    )


def _permute_save(ctx, inputs, output):
    ctx.backend = inputs[-1]
    ctx.mark_non_differentiable(output[1], output[2])
    ctx.save_for_backward(output[2])


def _permute_grad(ctx, grad, *_):
    (row_map,) = ctx.saved_tensors
    return _unpermute(grad, row_map, None, ctx.backend), *(None,) * 5


_permute = define(
    "moe_permute(Tensor x, Tensor topk_idx, SymInt num_experts, SymInt alignment,"
    " Tensor? expert_map, str backend) -> (Tensor, Tensor, Tensor)",
    check_permute,
    _permute_kernel,
    _permute_fake,
    _permute_grad,
    _permute_save,
)


# ---- moe_unpermute -----------------------------------------------------------------------------


def moe_unpermute(
    y: Tensor, row_map: Tensor, topk_weights: Tensor | None, *, backend: str | None = None
) -> Tensor:
    """Sum each token's rows of y [m, d] -> [t, d]; row_map int64 (or int32) [t, k], -1 skipped.

    fp32 sums in order of k, of topk_weights [t, k] times the row (plain rows for None), rounded
    once to y's dtype. A token without rows gives 0. Differentiable in y and topk_weights.
    """
    return _unpermute(y, row_map, topk_weights, _chosen(backend))


def _check_unpermute(y, row_map, topk_weights, op="moe_unpermute"):
    check.rank(op, "y", y, "[m, d]", 2, 2)
    check.dtype(op, "y", y, check.FLOATS)
    check.dtype(op, "row_map", row_map, check.INDEX)
    check.rank(op, "row_map", row_map, "[t, k]", 2, 2)
    check.same_device(op, "row_map", row_map, "y", y)
    if topk_weights is not None:
        check.shape(op, "topk_weights", topk_weights, "row_map's shape", row_map.shape)
        check.dtype(op, "topk_weights", topk_weights, check.FLOATS)
        check.same_device(op, "topk_weights", topk_weights, "y", y)


def _unpermute_kernel(y, row_map, topk_weights, backend):
    row_map = values.index("moe_unpermute", "row_map", row_map, -1, y.shape[0])
    return _run("moe_unpermute", backend, y.device.type, y, row_map, topk_weights).contiguous()


def _unpermute_fake(y, row_map, topk_weights, backend):
    return y.new_empty((row_map.shape[0], y.shape[1]))


def _unpermute_save(ctx, inputs, output):
    y, row_map, topk_weights, ctx.backend = inputs
    ctx.save_for_backward(y, row_map, topk_weights)


def _unpermute_grad(ctx, grad):
    y, row_map, topk_weights = ctx.saved_tensors
    dy, dweights = _unpermute_backward(grad, y, row_map, topk_weights, ctx.backend)
    return dy, None, None if topk_weights is None else dweights, None


_unpermute = define(
    "moe_unpermute(Tensor y, Tensor row_map, Tensor? topk_weights, str backend) -> Tensor",
    _check_unpermute,
    _unpermute_kernel,
    _unpermute_fake,
    _unpermute_grad,
    _unpermute_save,
)


def _check_unpermute_backward(grad, y, row_map, topk_weights):
    op = "moe_unpermute_backward"
    _check_unpermute(y, row_map, topk_weights, op)
    check.shape(op, "grad", grad, "[t, d]", (row_map.shape[0], y.shape[1]))


def _unpermute_backward_kernel(grad, y, row_map, topk_weights, backend):
    op = "moe_unpermute_backward"
    row_map = values.index(op, "row_map", row_map, -1, y.shape[0])
    dy, dweights = _run(op, backend, y.device.type, grad, y, row_map, topk_weights)
    return dy.contiguous(), dweights.contiguous()


def _unpermute_backward_fake(grad, y, row_map, topk_weights, backend):
    like = y if topk_weights is None else topk_weights
    return y.new_empty(y.shape), like.new_empty(row_map.shape)


_unpermute_backward = define(
    "moe_unpermute_backward(Tensor grad, Tensor y, Tensor row_map, Tensor? topk_weights,"
    " str backend) -> (Tensor, Tensor)",
    _check_unpermute_backward,
    _unpermute_backward_kernel,
    _unpermute_backward_fake,
)


# ---- moe_bias_update ---------------------------------------------------------------------------


def moe_bias_update(
    bias: Tensor, counts: Tensor, gamma: float, *, backend: str | None = None
) -> Tensor:
    """One step of the aux-loss-free balancing: bias [e] + gamma * sign(mean(counts) - counts).

    counts  integer [e]: the tokens each expert got in the whole batch; compared exactly

    Returns a new tensor in bias's dtype. Not differentiable. Source: V3 report 2.1.2.
    """
    return _bias_update(bias, counts, gamma, _chosen(backend))


def _check_bias_update(bias, counts):
    op = "moe_bias_update"
    check.rank(op, "bias", bias, "[e]", 1, 1)
    check.dtype(op, "bias", bias, check.FLOATS)
    check.shape(op, "counts", counts, "[e]", bias.shape)
    check.dtype(op, "counts", counts, check.INDEX)
    check.same_device(op, "counts", counts, "bias", bias)


def _bias_update_kernel(bias, counts, gamma, backend):
    return _run("moe_bias_update", backend, bias.device.type, bias, counts, gamma).contiguous()


def _bias_update_fake(bias, counts, gamma, backend):
    return bias.new_empty(bias.shape)


_bias_update = define(
    "moe_bias_update(Tensor bias, Tensor counts, float gamma, str backend) -> Tensor",
    _check_bias_update,
    _bias_update_kernel,
    _bias_update_fake,
)
