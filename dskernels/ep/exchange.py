"""Dispatch and combine over a Group. Semantics, orders and sums are those of `dskernels.ref.ep`.

Letters: t tokens of this rank, h hidden, k slots per token, r ranks, l local experts, n rows
received.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ..types import ScaledTensor
from .group import Group, view

Tokens = torch.Tensor | ScaledTensor
Hook = Callable[[], None]


class Received(NamedTuple):
    """What a rank receives, rows in order of (source rank, source token). x (with its scales) and
    source lie in the group's receive buffer: it is free for later calls once neither is alive."""

    x: Tokens  # [n, h]
    topk_idx: torch.Tensor  # int64 [n, k]: local expert numbers, -1 for other ranks' experts
    topk_weights: torch.Tensor | None  # fp32 [n, k], 0 where topk_idx is -1
    tokens_per_expert: list[int]  # [l], each rounded up to a multiple of expert_alignment
    source: torch.Tensor  # int64 [n, 2]: (source rank, source token)
    handle: Any
    sent_idx: torch.Tensor  # int64 [t, k]: what this rank sent, for backward passes


class LowLatencyReceived(NamedTuple):
    """What a rank receives per local expert, packed, in order of (source rank, source token). Rows
    at or behind count[i] of expert i are undefined, their source is -1."""

    x: Tokens  # [l, r * max_tokens, h]; scales [l, r * max_tokens, ceil(h / 128)], MN-major
    count: torch.Tensor  # int32 [l]
    source: torch.Tensor  # int64 [l, r * max_tokens]: source rank * max_tokens + source token
    layout_range: torch.Tensor  # int64 [l, r]: first row << 32 | rows, of each source rank
    handle: Any


def dispatch(
    group: Group,
    x: Tokens,
    topk_idx: torch.Tensor,
    topk_weights: torch.Tensor | None = None,
    *,
    expert_alignment: int = 1,
    timeout: float | None = None,
) -> Received:
    """Send x [t, h], plain or ScaledTensor in blocks (1, c), to the ranks of the experts that
    topk_idx int64 [t, k] names (-1: none), with topk_weights fp32 [t, k].

    One copy of a token per rank that hosts any of its experts. Raises PeerSilent if a rank does not
    answer within `timeout` (default: the group's) seconds, ValueError on bad arguments.
    Differentiable in a plain x and in topk_weights: the gradient of dispatch is a combine, and the
    other way round, so backward passes are collective, too, and come in the same order everywhere.
    """
    if torch.is_grad_enabled() and not isinstance(x, ScaledTensor):
        if x.requires_grad or (topk_weights is not None and topk_weights.requires_grad):
            return _differentiable_dispatch(
                group, x, topk_idx, topk_weights, expert_alignment, timeout
            )
    if expert_alignment < 1:
        raise ValueError(f"expert_alignment: expected a positive number, got {expert_alignment}")
    data, scale = _parts(x)
    handle, region, fields = group._exchange.dispatch(
        data, scale, _plain(topk_idx), _plain(topk_weights), group._seconds(timeout)
    )
    rows, slots = handle.rows, topk_idx.shape[1]
    data_at, records_at, record, scale_at, idx_at, weights_at, source_at = fields
    received: Tokens = view(region, data_at, (rows, data.shape[1]), data.dtype)
    records = view(region, records_at, (rows, record), torch.uint8)

    def field(offset: int, width: int, dtype: torch.dtype) -> torch.Tensor:
        return records[:, offset : offset + width * dtype.itemsize].view(dtype)

    if isinstance(x, ScaledTensor):
        scales = field(scale_at, x.scale.shape[1], torch.float32)
        received = ScaledTensor(received, scales, x.block, x.dtype)
    weights = None
    if topk_weights is not None:
        weights = field(weights_at, slots, torch.float32).contiguous()
    per_expert = [-(-n // expert_alignment) * expert_alignment for n in handle.mentions]
    return Received(
        received,
        field(idx_at, slots, torch.int64).contiguous(),
        weights,
        per_expert,
        field(source_at, 2, torch.int64),
        handle,
        topk_idx.detach(),
    )


def combine(
    group: Group,
    y: torch.Tensor,
    received: Received,
    *,
    topk_weights: torch.Tensor | None = None,
    bias: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None = None,
    out: torch.Tensor | None = None,
    timeout: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Bring the results y [n, h] for the rows `received` back to the tokens' ranks.

    A token's rows are summed in fp32, without weights, in order of the rank they come from (node by
    node in a group with ranks_per_node: see dskernels.ref.ep.combine); then bias [t, h], or a pair
    of them one after the other, is added, and the sum is rounded once to y's dtype. topk_weights
    fp32 [n, k], if given, are brought back and summed alike. Returns (x [t, h], weights [t, k] or
    None). A y from `Group.result_buffer` is read in place. Errors as in `dispatch`.
    """
    if torch.is_grad_enabled() and y.requires_grad:
        if topk_weights is not None or out is not None:
            raise ValueError(
                "topk_weights, out: expected None for a y that requires a gradient, got tensors"
            )
        if bias is not None:
            raise ValueError("bias: expected None for a y that requires a gradient, got a tensor")
        return _Combine.apply(y, group, received, timeout), None
    handle = received.handle
    biases = _biases(bias)
    y = y.detach()
    if out is None:
        out = y.new_empty(handle.tokens, y.shape[-1])
    weights = None
    if topk_weights is not None:
        weights = torch.empty(handle.tokens, topk_weights.shape[-1])
    group._exchange.combine(
        handle,
        y,
        _plain(topk_weights),
        *biases,
        out,
        weights,
        group.ranks_per_node,
        group._seconds(timeout),
    )
    return out, weights


def _biases(bias: Any) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    if not isinstance(bias, tuple):
        return _plain(bias), None
    if len(bias) != 2:
        raise ValueError(f"bias: expected a tensor or a pair of them, got {len(bias)}")
    return _plain(bias[0]), _plain(bias[1])


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, topk_weights, group, topk_idx, alignment, timeout, keep):
        received = dispatch(
            group, x, topk_idx, topk_weights, expert_alignment=alignment, timeout=timeout
        )
        keep.append(received)
        # Only what the way back needs: the receive buffer is free again after this call.
        ctx.group, ctx.timeout = group, timeout
        ctx.received = received._replace(x=None, source=None)
        ctx.weighted = topk_weights is not None
        weights = received.topk_weights if ctx.weighted else None
        return received.x.clone(), weights

    @staticmethod
    def backward(ctx, grad_x, grad_weights):
        if ctx.weighted and grad_weights is None:
            grad_weights = torch.zeros_like(ctx.received.topk_weights)
        back, weights = combine(
            ctx.group, grad_x, ctx.received, topk_weights=grad_weights, timeout=ctx.timeout
        )
        return back, weights, None, None, None, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, group, received, timeout):
        ctx.group, ctx.idx, ctx.timeout = group, received.sent_idx, timeout
        return combine(group, y, received, timeout=timeout)[0]

    @staticmethod
    def backward(ctx, grad):
        # The same tokens to the same ranks: the same rows in the same order.
        rows = dispatch(ctx.group, grad.contiguous(), ctx.idx, timeout=ctx.timeout)
        return rows.x.clone(), None, None, None


def _differentiable_dispatch(group, x, topk_idx, topk_weights, alignment, timeout) -> Received:
    keep: list[Received] = []
    rows, weights = _Dispatch.apply(x, topk_weights, group, topk_idx, alignment, timeout, keep)
    plain = keep[0]
    return plain._replace(
        x=rows, topk_weights=weights, source=plain.source.clone(), sent_idx=topk_idx.detach()
    )


def low_latency_dispatch(
    group: Group,
    x: torch.Tensor,
    topk_idx: torch.Tensor,
    *,
    use_fp8: bool = True,
    round_scale: bool = False,
    return_recv_hook: bool = False,
    timeout: float | None = None,
) -> LowLatencyReceived | tuple[LowLatencyReceived, Hook]:
    """Send each token of x [t, h], t <= group.max_tokens, to every expert in its row of topk_idx.

    use_fp8 quantises to e4m3 in blocks (1, 128), with power-of-two scales for round_scale. The
    experts of one token must differ. With return_recv_hook, returns at once, and the results are
    there after hook(); compute in between. Every call needs its `low_latency_combine`, in order.
    """
    from ..ops import quantize

    sent: Tokens = x
    if use_fp8:
        sent = quantize(x.detach(), scale_format="ue8m0" if round_scale else "fp32")
    data, scale = _parts(sent)
    handle = group._exchange.low_latency_send(
        data, scale, _plain(topk_idx), group._seconds(timeout)
    )
    local, slots = group.num_local_experts, group.num_ranks * group.max_tokens
    got = torch.empty(local, slots, data.shape[1], dtype=data.dtype)
    tokens: Tokens = got
    scales = None
    if isinstance(sent, ScaledTensor):
        width = sent.scale.shape[1]
        padded = -(-slots // 4) * 4
        scales = torch.empty_strided((local, slots, width), (width * padded, 1, padded))
        tokens = ScaledTensor(got, scales, sent.block, sent.dtype)
    received = LowLatencyReceived(
        tokens,
        torch.empty(local, dtype=torch.int32),
        torch.empty(local, slots, dtype=torch.int64),
        torch.empty(local, group.num_ranks, dtype=torch.int64),
        handle,
    )

    def hook() -> None:
        group._exchange.low_latency_receive(
            handle,
            got,
            scales,
            received.count,
            received.source,
            received.layout_range,
            group._seconds(timeout),
        )

    if return_recv_hook:
        return received, hook
    hook()
    return received


def low_latency_combine(
    group: Group,
    y: torch.Tensor,
    topk_weights: torch.Tensor,
    received: LowLatencyReceived,
    *,
    out: torch.Tensor | None = None,
    return_recv_hook: bool = False,
    timeout: float | None = None,
) -> torch.Tensor | tuple[torch.Tensor, Hook]:
    """Bring y [l, r * max_tokens, h] back and sum each token's results with topk_weights fp32
    [t, k].

    The sum is fp32, in order of the token's slots: each weight times row is rounded, then added;
    slots of -1, and slots of dead ranks, are skipped. The result [t, h] is rounded once to y's
    dtype. With return_recv_hook, returns once the results are sent; `out` is there after hook().
    """
    weights = _plain(topk_weights)
    y = y.detach()
    call = group._exchange.low_latency_return(received.handle, y, group._seconds(timeout))
    if out is None:
        out = y.new_empty(weights.shape[0], y.shape[-1])

    def hook() -> None:
        group._exchange.low_latency_reduce(
            received.handle, call, weights, out, group._seconds(timeout)
        )

    if return_recv_hook:
        return out, hook
    hook()
    return out


def _parts(x: Tokens) -> tuple[torch.Tensor, torch.Tensor | None]:
    if not isinstance(x, ScaledTensor):
        return x.detach(), None
    if x.block[0] != 1:
        raise ValueError(f"x: expected scales per token, blocks (1, c), got {x.block}")
    return x.data.detach(), x.scale.detach()


def _plain(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x.detach().contiguous()
