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
    """What a rank receives, rows in order of (source rank, source token). The tensors lie in the
    group's receive buffer: it is free for later calls once none of them is alive."""

    x: Tokens  # [n, h]
    topk_idx: torch.Tensor  # int64 [n, k]: local expert numbers, -1 for other ranks' experts
    topk_weights: torch.Tensor | None  # fp32 [n, k], 0 where topk_idx is -1
    tokens_per_expert: list[int]  # [l], each rounded up to a multiple of expert_alignment
    source: torch.Tensor  # int64 [n, 2]: (source rank, source token)
    handle: Any


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
    """
    if expert_alignment < 1:
        raise ValueError(f"expert_alignment: expected a positive number, got {expert_alignment}")
    data, scale = _parts(x)
    handle, region, fields = group._exchange.dispatch(
        data, scale, _plain(topk_idx), _plain(topk_weights), group._seconds(timeout)
    )
    rows, slots = handle.rows, topk_idx.shape[1]
    received: Tokens = view(region, fields[0], (rows, data.shape[1]), data.dtype)
    if isinstance(x, ScaledTensor):
        width = x.scale.shape[1]
        scales = view(region, fields[1], (rows, width), torch.float32)
        received = ScaledTensor(received, scales, x.block, x.dtype)
    weights = None
    if topk_weights is not None:
        weights = view(region, fields[3], (rows, slots), torch.float32)
    per_expert = [-(-n // expert_alignment) * expert_alignment for n in handle.mentions]
    return Received(
        received,
        view(region, fields[2], (rows, slots), torch.int64),
        weights,
        per_expert,
        view(region, fields[4], (rows, 2), torch.int64),
        handle,
    )


def combine(
    group: Group,
    y: torch.Tensor,
    received: Received,
    *,
    topk_weights: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    timeout: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Bring the results y [n, h] for the rows `received` back to the tokens' ranks.

    A token's rows are summed in fp32, without weights, in order of the rank they come from; then
    bias [t, h] is added, and the sum is rounded once to y's dtype. topk_weights fp32 [n, k], if
    given, are brought back and summed alike. Returns (x [t, h], weights [t, k] or None). A y from
    `Group.result_buffer` is read in place. Errors as in `dispatch`.
    """
    handle = received.handle
    y = y.detach()
    if out is None:
        out = y.new_empty(handle.tokens, y.shape[-1])
    weights = None
    if topk_weights is not None:
        weights = torch.empty(handle.tokens, topk_weights.shape[-1])
    group._exchange.combine(
        handle, y, _plain(topk_weights), _plain(bias), out, weights, group._seconds(timeout)
    )
    return out, weights


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
