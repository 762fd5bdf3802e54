"""Mixture of experts in Triton: gate, permute, unpermute, and the FP8 experts' forward.

Letters: t tokens, d model width, e experts, k chosen experts per token, m permuted rows, i expert
width. Each function has the names and arguments of dskernels.ref.moe and raises Unsupported for
what the kernels do not cover. The kernels are in moe_kernels.py.
"""

from __future__ import annotations

import torch
import triton

from ..types import ScaledTensor, Support, Unsupported
from . import gemm, rowwise
from .moe_kernels import (
    copy_rows_kernel,
    count_kernel,
    gate_kernel,
    place_kernel,
    unpermute_backward_kernel,
    unpermute_kernel,
)

GATE_TOKENS = 16  # of a program: the least that tl.dot takes
GATE_SLAB = 32  # of the depth
GATE_OPTIONS = {"num_warps": 4, "num_stages": 2}
EXACT = {"enable_fp_fusion": False}  # products and sums round apart, as in the reference
MAX_EXPERTS = 512  # of the gate: scores of a program's tokens stay in registers
CHUNK = 128  # slots that one program sorts
EXPERTS_BLOCK = 64
RUN = 1024  # columns a program copies or sums
GROUP = 128
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def _need_plain(name: str, x) -> None:
    if not isinstance(x, torch.Tensor) or x.dtype not in DTYPES:
        raise Unsupported(f"{name}: expected one of {DTYPES}, got {getattr(x, 'dtype', type(x))}")


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
    """As dskernels.ref.moe.moe_gate, at most 512 experts; the statistics are torch's."""
    _need_plain("x", x)
    _need_plain("weight", weight)
    (tokens, depth), experts = x.shape, weight.shape[0]
    if experts > MAX_EXPERTS:
        raise Unsupported(f"experts: expected at most {MAX_EXPERTS}, got {experts}")
    x, weight = x.contiguous(), weight.contiguous()
    topk_idx = torch.empty(tokens, topk, dtype=torch.int64, device=x.device)
    weights = torch.empty(tokens, topk, dtype=torch.float32, device=x.device)
    scores = torch.empty(tokens, experts, dtype=torch.float32, device=x.device)
    sigmoid = score == "sigmoid"
    if tokens:
        gate_kernel[(triton.cdiv(tokens, GATE_TOKENS),)](
            x, weight, weight if bias is None else bias.float().contiguous(), topk_idx, weights,
            scores, tokens, depth, experts, depth, n_group, topk_group, topk, scale,
            SOFTMAX=not sigmoid, HAS_BIAS=bias is not None,
            TOP2=(group_score or ("top2" if sigmoid else "max")) == "top2",
            RENORMALIZE=sigmoid if renormalize is None else renormalize,
            TOKENS=GATE_TOKENS, EXPERTS=max(16, triton.next_power_of_2(experts)),
            GROUPS=triton.next_power_of_2(n_group), TOPK=triton.next_power_of_2(topk),
            SLAB=GATE_SLAB, **GATE_OPTIONS,
        )  # fmt: skip
    if sequences is None:
        return topk_idx, weights, scores
    return topk_idx, weights, scores, *_gate_statistics(topk_idx, scores, sequences)


def _gate_statistics(topk_idx, scores, sequences: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Choices of each expert and mean shares of the scores, [b, e]; no kernel of its own."""
    chosen = topk_idx.view(sequences, -1)
    counts = torch.zeros(sequences, scores.shape[1], dtype=torch.int64, device=scores.device)
    counts.scatter_add_(1, chosen, torch.ones_like(chosen))
    share = scores / (scores.sum(dim=-1, keepdim=True) + 1e-20)
    return counts, share.view(sequences, -1, scores.shape[1]).mean(dim=1)


def _layout(
    topk_idx: torch.Tensor,
    experts: int,
    alignment: int,
    expert_map: torch.Tensor | None = None,
    shared: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """group_sizes int64 [e] and row_map int64 [t, k + s] of a stable sort by expert, on the
    device."""
    topk_idx = topk_idx.to(torch.int64).contiguous()
    (tokens, topk), device = topk_idx.shape, topk_idx.device
    chosen = topk_idx.new_empty(tokens, topk + shared)
    row_map, slots = torch.empty_like(chosen), chosen.numel()
    if slots == 0 or experts == 0:
        return torch.zeros(experts, dtype=torch.int64, device=device), row_map.fill_(-1)
    chunks = triton.cdiv(slots, CHUNK)
    counts = torch.empty(chunks, experts, dtype=torch.int32, device=device)
    mapped = expert_map is not None
    table = expert_map.to(torch.int64).contiguous() if mapped else topk_idx
    count_kernel[(chunks, triton.cdiv(experts, EXPERTS_BLOCK))](
        topk_idx, table, chosen, counts, slots, topk, shared, table.shape[1], experts,
        MAPPED=mapped, CHUNK=CHUNK, BLOCK=EXPERTS_BLOCK,
    )  # fmt: skip
    before = counts.cumsum(0)  # of the expert, up to and with the chunk
    group_sizes = (before[-1] + alignment - 1) // alignment * alignment
    first_row = before - counts + (group_sizes.cumsum(0) - group_sizes)
    place_kernel[(chunks,)](chosen, first_row, row_map, slots, experts, CHUNK=CHUNK)
    return group_sizes, row_map


def _copy_rows(x: torch.Tensor, row_map: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Each copy's row of x [t, c] to its row of out [m, c]."""
    columns = x.shape[1]
    if row_map.numel() and columns:
        block = min(RUN, triton.next_power_of_2(columns))
        copy_rows_kernel[(row_map.numel(), triton.cdiv(columns, block))](
            x, row_map, out, row_map.shape[1], columns, *x.stride(), *out.stride(), BLOCK=block
        )
    return out


def moe_permute(
    x: torch.Tensor,
    topk_idx: torch.Tensor,
    num_experts: int,
    *,
    alignment: int = 1,
    expert_map: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As dskernels.ref.moe.moe_permute; the number of rows is a result, so the call waits for the
    device."""
    _need_plain("x", x)
    group_sizes, row_map = _layout(topk_idx, num_experts, alignment, expert_map)
    x_perm = x.new_zeros(int(group_sizes.sum()), x.shape[1])
    return _copy_rows(x, row_map, x_perm), group_sizes, row_map


def moe_unpermute(
    y: torch.Tensor, row_map: torch.Tensor, topk_weights: torch.Tensor | None
) -> torch.Tensor:
    """As dskernels.ref.moe.moe_unpermute, the same bits. The columns of row_map [t, k + s] behind
    those of topk_weights [t, k] are shared experts' with weight 1."""
    _need_plain("y", y)
    y, row_map = y.contiguous(), row_map.to(torch.int64).contiguous()
    (tokens, topk), depth = row_map.shape, y.shape[1]
    out = torch.empty(tokens, depth, dtype=y.dtype, device=y.device)
    if out.numel():
        weights = y if topk_weights is None else topk_weights.float().contiguous()
        block = min(RUN, triton.next_power_of_2(depth))
        unpermute_kernel[(tokens, triton.cdiv(depth, block))](
            y, row_map, weights, out, topk,
            0 if topk_weights is None else topk - topk_weights.shape[1], depth,
            WEIGHTED=topk_weights is not None, BLOCK=block, **EXACT,
        )  # fmt: skip
    return out


def moe_unpermute_backward(
    grad: torch.Tensor,
    y: torch.Tensor,
    row_map: torch.Tensor,
    topk_weights: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As dskernels.ref.moe_backward.moe_unpermute_backward, for a row_map that names no row
    twice, as moe_permute's."""
    _need_plain("y", y)
    y, grad = y.contiguous(), grad.to(y.dtype).contiguous()
    row_map = row_map.to(torch.int64).contiguous()
    depth = y.shape[1]
    dy = torch.zeros_like(y)
    dweights = torch.zeros(row_map.shape, dtype=torch.float32, device=y.device)
    if row_map.numel() and depth:
        weights = y if topk_weights is None else topk_weights.float().contiguous()
        unpermute_backward_kernel[(row_map.numel(),)](
            grad, y, row_map, weights, dy, dweights, row_map.shape[1], depth,
            WEIGHTED=topk_weights is not None, BLOCK=min(RUN, triton.next_power_of_2(depth)),
        )  # fmt: skip
    return dy, dweights.to(y.dtype if topk_weights is None else topk_weights.dtype)


def moe_experts(
    x: torch.Tensor,
    w13: torch.Tensor | ScaledTensor,
    w2: torch.Tensor | ScaledTensor,
    topk_idx: torch.Tensor,
    topk_weights: torch.Tensor,
    *,
    expert_map: torch.Tensor | None = None,
    num_shared: int = 0,
    layout: str | None = None,
) -> torch.Tensor:
    """As dskernels.ref.moe.moe_experts with e4m3 weights in blocks of 128 x 128; one layout.

    Nothing waits for the device: there is room for every slot, and the products read the groups'
    sizes themselves. A token is quantised once, however many experts it goes to.
    """
    _need_plain("x", x)
    for name, weight in (("w13", w13), ("w2", w2)):
        if not isinstance(weight, ScaledTensor):
            raise Unsupported(f"{name}: expected a ScaledTensor, got a plain tensor")
    if x.shape[0] * (topk_idx.shape[1] + num_shared) == 0:
        return torch.zeros_like(x)
    group_sizes, row_map = _layout(topk_idx, w13.shape[0], 1, expert_map, num_shared)
    tokens, rows = rowwise.quantize(x), row_map.numel()
    data = torch.zeros(rows, x.shape[1], dtype=torch.uint8, device=x.device)
    _copy_rows(tokens.data.view(torch.uint8), row_map, data)
    scale = x.new_zeros(tokens.scale.shape[1], -(-rows // 4) * 4, dtype=torch.float32).t()[:rows]
    _copy_rows(tokens.scale, row_map, scale)
    tokens = ScaledTensor(data.view(torch.float8_e4m3fn), scale, (1, GROUP), "e4m3")
    h = gemm.grouped_gemm(tokens, w13, group_sizes=group_sizes, out_dtype=torch.float32)
    hidden = rowwise.swiglu_quantize(h)
    y = gemm.grouped_gemm(hidden, w2, group_sizes=group_sizes, out_dtype=x.dtype)
    return moe_unpermute(y, row_map, topk_weights)


def supports(op: str, **shapes) -> Support:
    if op == "moe_bias_update":
        return Support(False, "the triton backend has no implementation of moe_bias_update")
    if op == "moe_gate" and shapes.get("e", 1) > MAX_EXPERTS:
        return Support(False, f"expected at most {MAX_EXPERTS} experts, got e={shapes['e']}")
    if shapes.get("dtype", torch.bfloat16) not in DTYPES:
        return Support(False, f"expected bf16, fp16 or fp32, got dtype={shapes['dtype']}")
    return Support(True, "triton: bf16, fp16 and fp32; experts with e4m3 weights")
