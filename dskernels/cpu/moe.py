"""Mixture of experts on the CPU kernels; names, arguments and meaning are those of `ref.moe`.

Letters: t tokens, d model width, e experts, k experts of a token, i expert width.

Native in bf16, fp16 and fp32: the router, permutation and its way back with gradients, and FP8
experts. On the reference functions: fp64, plain experts, the router's gradient (two dense fp32
products, which are torch's own) and the balance losses.
"""

from __future__ import annotations

import torch

from .. import _C
from ..ref import moe as ref
from ..types import ScaledTensor, Unsupported
from . import gemm, packing, rowwise
from .packing import PackedWeight, packed

__all__ = [
    "moe_experts",
    "moe_gate",
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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
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
    return topk_idx, weights, scores


def moe_permute(
    x: torch.Tensor, topk_idx: torch.Tensor, num_experts: int, *, alignment: int = 1
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Copies of x [t, d] sorted by expert -> x_perm, group_sizes, row_map: `ref.moe_permute`'s."""
    x = _rows("x", x)
    ref._check_topk_idx(x, topk_idx, num_experts)
    topk_idx = topk_idx.to(torch.int64).contiguous()
    counts, group_sizes = torch.empty(2, num_experts, dtype=torch.int64)
    row_map = torch.empty_like(topk_idx)
    _C.cpu.moe_layout(topk_idx, alignment, counts, group_sizes, row_map)
    x_perm = torch.empty(int(group_sizes.sum()), x.shape[1], dtype=x.dtype)
    _C.cpu.moe_permute(x, row_map, counts, group_sizes, x_perm, torch.get_num_threads())
    return x_perm, group_sizes.clone(), row_map


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
    quantize_activations: bool = True,
) -> torch.Tensor:
    """The routed experts of x [t, d] in one call: see `ref.moe_experts` for the arithmetic.

    FP8 weights w13 [e, 2i, d], w2 [e, d, i], packed or not. quantize_activations=False multiplies
    activations of x's dtype with FP8 weights (W8A16); the hidden layer is then rounded to x's
    dtype, not quantised. Plain weights run the reference function.
    """
    scaled = [isinstance(w, ScaledTensor | PackedWeight) for w in (w13, w2)]
    if not all(scaled) or x.dtype not in _FLOATS:
        w13, w2 = (w.unpack() if isinstance(w, PackedWeight) else w for w in (w13, w2))
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
