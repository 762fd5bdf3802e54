"""Mixture of experts on the CPU kernels; names, arguments and meaning are those of `ref.moe`.

Letters: t tokens, d model width, e experts, k experts of a token, i expert width.

Native in bf16, fp16 and fp32: the router, permutation and its way back, all with gradients, and
FP8 experts. Plain experts and their gradients are PyTorch's products of the weights as they are,
with native steps between them. On the reference functions: fp64 and the balance losses.
"""

from __future__ import annotations

import torch

from .. import _C
from ..ref import moe as ref
from ..ref.moe_backward import GROUP, transposed_blocks
from ..ref.rowwise_backward import swiglu_backward
from ..types import ScaledTensor, Unsupported
from . import gemm, packing, rowwise
from .packing import PackedWeight, packed

__all__ = [
    "moe_experts",
    "moe_experts_backward",
    "moe_gate",
    "moe_gate_backward",
    "moe_permute",
    "moe_unpermute",
    "moe_unpermute_backward",
]

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
Weight = torch.Tensor | ScaledTensor | PackedWeight


def _rows(name: str, x: torch.Tensor) -> torch.Tensor:
    """x as the kernels read it: a float type of theirs, rows without gaps."""
    if x.dtype not in _FLOATS:
        raise Unsupported(f"{name}: expected float32, bfloat16 or float16, got {x.dtype}")
    x = x.detach()
    return x if x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous()


def moe_gate(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    n_group: int = 1,
    topk_group: int = 1,
    topk: int,
    scale: float = 1.0,
    score: str = "sigmoid",
    group_score: str | None = None,
    renormalize: bool | None = None,
    sequences: int | None = None,
) -> tuple[torch.Tensor, ...]:
    """x [t, d], weight [e, d], bias [e] -> topk_idx, topk_weights [t, k], scores [t, e]; see
    `ref.moe_gate`. From the scores on, the same bits; a token's do not depend on its batch."""
    ref._check_gate(x, weight, bias, n_group, topk_group, topk, score, group_score)
    x, weight = _rows("x", x), _rows("weight", weight)
    tokens, sigmoid = x.shape[0], score == "sigmoid"
    topk_idx = torch.empty(tokens, topk, dtype=torch.int64)
    weights, scores = torch.empty(tokens, topk), torch.empty(tokens, weight.shape[0])
    _C.cpu.moe_gate(
        *(x, weight, None if bias is None else bias.detach().float().contiguous()),
        *(n_group, topk_group, scale, not sigmoid),
        (group_score or ("top2" if sigmoid else "max")) == "top2",
        sigmoid if renormalize is None else renormalize,
        *(topk_idx, weights, scores, torch.get_num_threads()),
    )
    if sequences is None:
        return topk_idx, weights, scores
    return topk_idx, weights, scores, *ref.gate_statistics(topk_idx, scores, sequences)


def moe_gate_backward(
    grad_weights: torch.Tensor,
    grad_scores: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    topk_idx: torch.Tensor,
    scores: torch.Tensor,
    scale: float,
    score: str,
    renormalize: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """grad_weights [t, k], grad_scores [t, e] -> gradients of x [t, d] and weight [e, d]; see
    `ref.moe_backward.moe_gate_backward`. Products in fp32 whatever the types of x and weight."""
    dx, dweight = torch.empty(x.shape, dtype=x.dtype), torch.empty(weight.shape, dtype=weight.dtype)
    _C.cpu.moe_gate_backward(
        *(t.detach().float().contiguous() for t in (grad_weights, grad_scores)),
        *(_rows("x", x), _rows("weight", weight), topk_idx.to(torch.int64).contiguous()),
        *(scores.detach().float().contiguous(), scale, score != "sigmoid", renormalize),
        *(dx, dweight, torch.get_num_threads()),
    )
    return dx, dweight


def moe_permute(
    x: torch.Tensor,
    topk_idx: torch.Tensor,
    num_experts: int,
    *,
    alignment: int = 1,
    expert_map: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Copies of x [t, d] sorted by expert -> x_perm, group_sizes, row_map: `ref.moe_permute`'s."""
    x = _rows("x", x)
    if expert_map is not None:
        ref._check_topk_idx(x, topk_idx, expert_map.shape[0])
        topk_idx = ref.choose_replicas(topk_idx, expert_map)
    ref._check_topk_idx(x, topk_idx, num_experts)
    layout = _layout(topk_idx, num_experts, alignment)
    _, group_sizes, row_map = layout
    return _gather(x, layout), group_sizes.clone(), row_map


def _layout(topk_idx, num_experts: int, alignment: int = 1) -> tuple[torch.Tensor, ...]:
    """counts [e], group_sizes [e], row_map [t, k] of a stable counting sort."""
    topk_idx = topk_idx.to(torch.int64).contiguous()
    counts, group_sizes = torch.empty(2, num_experts, dtype=torch.int64)
    row_map = torch.empty_like(topk_idx)
    _C.cpu.moe_layout(topk_idx, alignment, counts, group_sizes, row_map)
    return counts, group_sizes, row_map


def _gather(x: torch.Tensor, layout: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """The rows of x [t, d] sorted by expert."""
    counts, group_sizes, row_map = layout
    x_perm = torch.empty(int(group_sizes.sum()), x.shape[1], dtype=x.dtype)
    _C.cpu.moe_permute(x, row_map, counts, group_sizes, x_perm, torch.get_num_threads())
    return x_perm


def moe_unpermute(
    y: torch.Tensor, row_map: torch.Tensor, topk_weights: torch.Tensor | None
) -> torch.Tensor:
    """Weighted sum of each token's rows of y [m, d] -> [t, d]; the bits of `ref.moe_unpermute`."""
    y, row_map, weights = _rows("y", y), *_slots(row_map, topk_weights)
    out = torch.empty(row_map.shape[0], y.shape[1], dtype=y.dtype)
    _C.cpu.moe_unpermute(y, row_map, weights, out, torch.get_num_threads())
    return out


def moe_unpermute_backward(
    grad: torch.Tensor,
    y: torch.Tensor,
    row_map: torch.Tensor,
    topk_weights: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """grad [t, d] -> gradients of y [m, d] and of topk_weights [t, k] (of ones for None)."""
    like = y if topk_weights is None else topk_weights
    grad, y = _rows("grad", grad).to(y.dtype), _rows("y", y)
    row_map, weights = _slots(row_map, topk_weights)
    named = torch.bincount(row_map[row_map >= 0], minlength=y.shape[0])
    if named.numel() and named.max() > 1:
        raise Unsupported("row_map: expected each row of y at most once")
    dy = torch.empty(y.shape, dtype=y.dtype)
    dy[named == 0] = 0
    dweights = torch.empty(row_map.shape)
    _C.cpu.moe_unpermute_backward(grad, y, row_map, weights, dy, dweights, torch.get_num_threads())
    return dy, dweights.to(like.dtype)


def _slots(row_map, topk_weights) -> tuple[torch.Tensor, torch.Tensor | None]:
    if topk_weights is not None:
        topk_weights = topk_weights.detach().float().contiguous()
    return row_map.to(torch.int64).contiguous(), topk_weights


def moe_experts(
    x: torch.Tensor,
    w13: Weight,
    w2: Weight,
    topk_idx: torch.Tensor,
    topk_weights: torch.Tensor,
    *,
    expert_map: torch.Tensor | None = None,
    num_shared: int = 0,
    layout: str | None = None,
    quantize_activations: bool = True,
) -> torch.Tensor:
    """The routed experts of x [t, d] in one call: see `ref.moe_experts` for the arithmetic.

    FP8 weights w13 [e, 2i, d], w2 [e, d, i], packed or not. quantize_activations=False multiplies
    activations of x's dtype with FP8 weights (W8A16); the hidden layer is then rounded to x's
    dtype, not quantised. Plain weights run the reference function. There is one layout of rows.
    """
    slots = ref.expert_slots(topk_idx, topk_weights, w13.shape[0], expert_map, num_shared)
    return _experts(x, w13, w2, *slots, quantize_activations)


def _experts(x, w13: Weight, w2: Weight, topk_idx, topk_weights, quantize_activations: bool):
    scaled = [isinstance(w, ScaledTensor | PackedWeight) for w in (w13, w2)]
    if not all(scaled) or x.dtype not in _FLOATS:
        w13, w2 = (w.unpack() if isinstance(w, PackedWeight) else w for w in (w13, w2))
        if _suits_plain(x, w13, w2) and not (torch.is_grad_enabled() and _needs_grad(x, w13, w2)):
            return _plain_experts(x, w13, w2, topk_idx, topk_weights)
        return ref.moe_experts(x, w13, w2, topk_idx, topk_weights)
    width = w13.shape[-2] // 2
    if w13.shape[-2] % 2 or len(w13.shape) != 3 or width % 64:
        if not quantize_activations:
            raise ValueError(
                "w13: expected [e, 2 i, d] with i a multiple of 64 for W8A16, got "
                f"{tuple(w13.shape)}"
            )
        w13, w2 = (w.unpack() if isinstance(w, PackedWeight) else w for w in (w13, w2))
        return ref.moe_experts(x, w13, w2, topk_idx, topk_weights)
    if not packing.fits_cache(w13, w2):
        return _by_expert(x, w13, w2, topk_idx, topk_weights, quantize_activations)
    first, second = packed(w13), packed(w2)
    rows = x.detach()
    rows = rows if rows.shape[-1] <= 1 or rows.stride(-1) == 1 else rows.contiguous()
    out = torch.empty(rows.shape, dtype=x.dtype)
    _C.cpu.moe_experts(
        rows,
        *(first.data, first.marks, first.scale),
        *(second.data, second.marks, second.scale),
        topk_idx.to(torch.int64).contiguous(),
        topk_weights.detach().float().contiguous(),
        width,
        quantize_activations,
        out,
        torch.get_num_threads(),
    )
    return out


def _needs_grad(*tensors: torch.Tensor) -> bool:
    return any(t.requires_grad for t in tensors)


def _suits_plain(x, w13, w2) -> bool:
    plain = all(isinstance(w, torch.Tensor) and w.dtype == x.dtype for w in (w13, w2))
    return plain and x.dtype in _FLOATS and w13.dim() == w2.dim() == 3


def _parts(group_sizes: torch.Tensor):
    """(expert, its rows) of each expert that has any."""
    start = 0
    for expert, size in enumerate(group_sizes.tolist()):
        if size:
            yield expert, slice(start, start + size)
        start += size


def _plain_experts(x, w13, w2, topk_idx, topk_weights) -> torch.Tensor:
    rows, group_sizes, row_map = moe_permute(x, topk_idx, w13.shape[0])
    y = torch.empty_like(rows)
    for expert, part in _parts(group_sizes):
        hidden = rowwise.swiglu(gemm.plain_product(rows[part], w13[expert].t()))
        gemm.plain_product(hidden, w2[expert].t(), out=y[part])
    return moe_unpermute(y, row_map, topk_weights)


def moe_experts_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    w13: Weight,
    w2: Weight,
    topk_idx: torch.Tensor,
    topk_weights: torch.Tensor,
    *,
    expert_map: torch.Tensor | None = None,
    num_shared: int = 0,
    weight_grads: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """grad [t, d] -> gradients of x, w13, w2 and topk_weights; see `ref.moe_experts_backward`.

    Scaled weights: the reference's steps on native kernels. Plain ones: fp32 operands are
    multiplied in fp32; bf16 operands as they are, every product rounded to bf16, gradients inside
    an expert included, as autograd would. Without weight_grads those two are empty.
    """
    if x.dtype not in _FLOATS:
        raise Unsupported(f"x: expected float32, bfloat16 or float16, got {x.dtype}")
    if isinstance(w13, ScaledTensor) and isinstance(w2, ScaledTensor):
        run = _scaled_experts_backward
    elif _suits_plain(x, w13, w2) and grad.dtype == x.dtype != torch.float16:
        run = _plain_experts_backward
    else:
        raise Unsupported(f"expected bfloat16, float32 or scaled weights, got {w13.dtype}")
    topk = topk_weights.shape[1]
    slots = ref.expert_slots(topk_idx, topk_weights.detach(), w13.shape[0], expert_map, num_shared)
    *grads, dweights = run(grad.detach(), x.detach(), w13, w2, *slots, weight_grads)
    return *grads, dweights[:, :topk]


def _row_weights(rows: int, layout, topk_weights: torch.Tensor) -> torch.Tensor:
    """topk_weights [t, k] of each sorted row -> fp32 [m, 1], 0 for padding."""
    row_map = layout[2]
    here, weights = row_map >= 0, torch.zeros(rows, 1)
    weights[row_map[here], 0] = topk_weights[here].float()
    return weights


def _slot_values(dot: torch.Tensor, layout, topk_weights: torch.Tensor) -> torch.Tensor:
    """A number of each sorted row [m] back at its slot [t, k], 0 where there is no expert."""
    row_map, values = layout[2], torch.zeros_like(topk_weights)
    here = row_map >= 0
    values[here] = dot[row_map[here]].to(topk_weights.dtype)
    return values


def _plain_experts_backward(grad, x, w13, w2, topk_idx, topk_weights, weight_grads):
    layout = _layout(topk_idx, w13.shape[0])
    x_perm, g_perm = (_gather(_rows(n, t), layout) for n, t in (("x", x), ("grad", grad)))
    weights = _row_weights(x_perm.shape[0], layout, topk_weights)
    dot, dx_perm = torch.empty(x_perm.shape[0]), torch.empty_like(x_perm)
    d13, d2 = (torch.empty_like(w) if weight_grads else w.new_empty(0) for w in (w13, w2))
    if weight_grads:  # only the experts that no product fills: these are the largest tensors here
        for expert in (layout[1] == 0).nonzero().flatten().tolist():
            d13[expert] = d2[expert] = 0
    product = gemm.plain_product
    for expert, part in _parts(layout[1]):
        x_e, g_e, factor = x_perm[part], g_perm[part], weights[part]
        h = product(x_e, w13[expert].t())
        act = rowwise.swiglu(h)
        back = product(g_e, w2[expert]).float()
        # <grad, y> = <grad w2, act>: the expert's output itself is not needed.
        dot[part] = (back * act).sum(dim=-1)
        dh = swiglu_backward(back * factor, h.float()).to(x.dtype)
        product(dh, w13[expert], out=dx_perm[part])
        if weight_grads:
            product((g_e * factor).to(x.dtype).t(), act, out=d2[expert])
            product(dh.t(), x_e, out=d13[expert])
    dx = moe_unpermute(dx_perm, layout[2], None)
    return dx, d13, d2, _slot_values(dot, layout, topk_weights)


def _scaled_experts_backward(grad, x, w13, w2, topk_idx, topk_weights, weight_grads):
    """The steps of `ref.moe_backward._scaled_experts_backward`, which states what each one is."""
    layout = _layout(topk_idx, w13.shape[0], GROUP)
    _, sizes, row_map = layout
    x8 = rowwise.quantize(_gather(_rows("x", x), layout))
    g8 = rowwise.quantize(_gather(_rows("grad", grad.to(x.dtype)), layout), scale_format="pow2")
    h = gemm.grouped_gemm(x8, w13, group_sizes=sizes).float()
    back = gemm.grouped_gemm(g8, transposed_blocks(w2), group_sizes=sizes).float()
    weights = _row_weights(h.shape[0], layout, topk_weights)
    act = rowwise.swiglu(h)
    dweights = _slot_values((back * act).sum(dim=-1), layout, topk_weights)
    dh, act = swiglu_backward(back * weights, h), act * weights
    dx_perm = gemm.grouped_gemm(
        rowwise.quantize(dh), transposed_blocks(w13), group_sizes=sizes, out_dtype=x.dtype
    )
    dx = moe_unpermute(dx_perm, row_map, None)
    if not weight_grads:
        return dx, h.new_empty(0), h.new_empty(0), dweights

    def along_rows(t, scale_format="fp32"):
        return rowwise.quantize(t, scale_format=scale_format, transpose=True)

    d13 = gemm.grouped_gemm_k(along_rows(dh), along_rows(x8), sizes)
    d2 = gemm.grouped_gemm_k(along_rows(g8, "pow2"), along_rows(act), sizes)
    return dx, d13, d2, dweights


def _by_expert(x, w13, w2, topk_idx, topk_weights, quantize_activations) -> torch.Tensor:
    """The same for weights too large to keep packed: native products of one expert after the other,
    of which only the chosen ones are read."""
    rows, group_sizes, row_map = ref.moe_permute(x.detach(), topk_idx, w13.shape[0])
    epilogue = "swiglu_quant" if quantize_activations else "swiglu"
    if quantize_activations:
        rows = rowwise.quantize(rows)
    hidden = gemm.grouped_gemm(rows, w13, group_sizes=group_sizes, epilogue=epilogue)
    y = gemm.grouped_gemm(hidden, w2, group_sizes=group_sizes, out_dtype=x.dtype)
    return ref.moe_unpermute(y, row_map, topk_weights.detach())
