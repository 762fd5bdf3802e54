"""Mixture of experts on the CPU kernels; names, arguments and meaning are those of `ref.moe`.

Letters: t tokens, d model width, e experts, k experts of a token, i expert width.

Only the experts are native. The router is one small fp32 product and a sort, permutation a gather:
torch's kernels vectorise and thread them, and the reference functions are what runs.
"""

from __future__ import annotations

import torch

from .. import _C
from ..ref import moe as ref
from ..types import ScaledTensor
from . import gemm, packing, rowwise
from .packing import PackedWeight, packed

__all__ = ["moe_experts"]

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
Weight = torch.Tensor | ScaledTensor | PackedWeight


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
