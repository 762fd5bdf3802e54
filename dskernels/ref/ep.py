"""Expert-parallel exchange: every rank's tokens to the ranks of their experts, and back.

The specification runs all ranks in one process: arguments and results are lists with one entry a
rank. Letters: r ranks, t tokens of a rank (ranks may differ), h hidden width, k slots per token,
e experts in all, l = e / r experts of a rank, n rows a rank receives.

Expert i lives on rank i // l, where it is number i % l. A slot of -1 names no expert. `alive`
(one bool a rank) takes dead ranks out: they send nothing and get nothing, and slots that name
their experts count as -1; weights are not renormalised.

Two forms. `dispatch`/`combine` (training, prefill): one copy of a token per rank that hosts any of
its experts, results summed without weights. `low_latency_dispatch`/`low_latency_combine` (decode):
one copy per expert, in fixed slots of max_tokens per source rank, results summed with weights.
Orders of rows and of sums are pinned, so results can be compared bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..types import ScaledTensor
from .rowwise import quantize

Tokens = torch.Tensor | ScaledTensor


class Layout(NamedTuple):
    """Where one rank's tokens go. A token counts once per rank and per node, however many of its
    experts live there, and once per slot for its experts."""

    tokens_per_rank: torch.Tensor  # int32 [r]
    tokens_per_node: torch.Tensor  # int32 [r / ranks_per_node]
    tokens_per_expert: torch.Tensor  # int32 [e]
    is_token_in_rank: torch.Tensor  # bool [t, r]


class Received(NamedTuple):
    """What one rank receives, rows in order of (source rank, source token)."""

    x: Tokens  # [n, h]
    topk_idx: torch.Tensor  # int64 [n, k]: local expert numbers, -1 for other ranks' experts
    topk_weights: torch.Tensor | None  # fp32 [n, k], 0 where topk_idx is -1
    tokens_per_expert: list[int]  # [l], each rounded up to a multiple of expert_alignment
    source: torch.Tensor  # int64 [n, 2]: (source rank, source token)


class LowLatencyReceived(NamedTuple):
    """What one rank receives per local expert, packed, in order of (source rank, source token).

    Rows at or behind count[i] of expert i hold 0 and source -1 here; nobody may read them.
    """

    x: Tokens  # [l, r * max_tokens, h]; scales [l, r * max_tokens, ceil(h / 128)], MN-major
    count: torch.Tensor  # int32 [l]
    source: torch.Tensor  # int64 [l, r * max_tokens]: source rank * max_tokens + source token
    layout_range: torch.Tensor  # int64 [l, r]: first row << 32 | rows, of each source rank


def dispatch_layout(
    topk_idx: torch.Tensor, num_experts: int, num_ranks: int, ranks_per_node: int = 8
) -> Layout:
    """Count where the tokens with topk_idx [t, k] go. A node holds ranks_per_node ranks in a row,
    the last one perhaps fewer."""
    local = _local_experts(num_experts, num_ranks)
    _check_idx("topk_idx", topk_idx, num_experts)
    ranks = torch.arange(num_ranks, device=topk_idx.device)
    # [t, k, r]; -1 // local is -1, which is no rank.
    goes = (topk_idx // local)[..., None] == ranks
    in_rank = goes.any(dim=1)
    nodes = -(-num_ranks // ranks_per_node)
    padded = torch.nn.functional.pad(in_rank, (0, nodes * ranks_per_node - num_ranks))
    in_node = padded.unflatten(1, (nodes, ranks_per_node)).any(dim=2)
    per_expert = torch.bincount(topk_idx[topk_idx >= 0], minlength=num_experts)
    return Layout(in_rank.sum(0).int(), in_node.sum(0).int(), per_expert.to(torch.int32), in_rank)


def dispatch(
    xs: Sequence[Tokens],
    topk_idxs: Sequence[torch.Tensor],
    topk_weights: Sequence[torch.Tensor] | None = None,
    *,
    num_experts: int,
    expert_alignment: int = 1,
    alive: Sequence[bool] | None = None,
) -> list[Received]:
    """Send each rank's xs [t, h], plain or ScaledTensor in blocks (1, c), with topk_idxs int64
    [t, k] and topk_weights fp32 [t, k], to the ranks of the experts they name.

    `moe_permute(x, topk_idx, l, alignment=expert_alignment)` turns what a rank receives into the
    rows of a grouped GEMM. Source: DeepSeek-V3 report 3.2.2; the interface of DeepEP.
    """
    num_ranks = len(xs)
    local = _local_experts(num_experts, num_ranks)
    idxs = _alive_idxs(xs, topk_idxs, num_experts, local, alive)
    received = []
    for rank in range(num_ranks):
        tokens = [(idx // local == rank).any(dim=1).nonzero().flatten() for idx in idxs]
        idx = torch.cat([idxs[src][rows] for src, rows in enumerate(tokens)])
        mine = idx // local == rank
        weights = None
        if topk_weights is not None:
            weights = torch.cat([topk_weights[src][rows] for src, rows in enumerate(tokens)])
            weights = torch.where(mine, weights, 0.0)
        idx = torch.where(mine, idx - rank * local, -1)
        counts = torch.bincount(idx[mine], minlength=local)
        aligned = (counts + expert_alignment - 1) // expert_alignment * expert_alignment
        source = [
            torch.stack([torch.full_like(rows, src), rows], 1) for src, rows in enumerate(tokens)
        ]
        x = _cat([_rows(xs[src], rows) for src, rows in enumerate(tokens)])
        received.append(Received(x, idx, weights, aligned.tolist(), torch.cat(source)))
    return received


def combine(
    ys: Sequence[torch.Tensor],
    received: Sequence[Received],
    num_tokens: Sequence[int],
    *,
    topk_weights: Sequence[torch.Tensor] | None = None,
    bias: Sequence[torch.Tensor | tuple[torch.Tensor, torch.Tensor]] | None = None,
    ranks_per_node: int = 0,
    alive: Sequence[bool] | None = None,
) -> tuple[list[torch.Tensor], list[torch.Tensor] | None]:
    """Bring each rank's results ys [n, h] for the rows it received back to the tokens' ranks.

    A token's rows are summed in fp32, without weights, in order of the rank they come from; then
    bias [t, h] (or a pair of them, one after the other) is added, and the sum is rounded once to
    ys' dtype. Tokens that went nowhere give 0 (plus bias). num_tokens is t of every rank.
    topk_weights [n, k], if given, are brought back and summed alike. Returns (xs, weights), weights
    None if not asked for.

    With ranks_per_node (0: all ranks are one node) the rows of each node of that many ranks in a
    row are summed first, in order of rank; a sum that comes from another node than the token's is
    rounded to ys' dtype (weights are not); sums are then added in order of node. `alive` leaves
    out the rows of ranks that died after the dispatch.
    """
    width = [y.shape[0] for y in ys]
    if width != [len(r.source) for r in received]:
        raise ValueError(
            f"ys: expected {[len(r.source) for r in received]} rows, as received, got {width}"
        )
    _check_nodes(ranks_per_node, len(ys))
    if alive is not None and len(alive) != len(ys):
        raise ValueError(f"alive: expected {len(ys)} entries, got {len(alive)}")
    up = [True] * len(ys) if alive is None else alive
    rows = [y.float() for y in ys]
    xs = _sum_back(rows, received, num_tokens, ranks_per_node, up, ys[0].dtype)
    if bias is not None:
        pairs = [b if isinstance(b, tuple) else (b,) for b in bias]
        xs = [sum((b.float() for b in pair), start=x) for x, pair in zip(xs, pairs)]
    xs = [x.to(ys[0].dtype) for x in xs]
    if topk_weights is None:
        return xs, None
    return xs, _sum_back(
        list(topk_weights), received, num_tokens, ranks_per_node, up, torch.float32
    )


def low_latency_dispatch(
    xs: Sequence[torch.Tensor],
    topk_idxs: Sequence[torch.Tensor],
    *,
    max_tokens: int,
    num_experts: int,
    use_fp8: bool = True,
    round_scale: bool = False,
    alive: Sequence[bool] | None = None,
) -> list[LowLatencyReceived]:
    """Send each token of xs [t, h], t <= max_tokens, to every expert in its row of topk_idxs.

    use_fp8 quantises to e4m3 in blocks (1, 128), with power-of-two scales for round_scale. The
    experts of one token must differ. Source: DeepSeek-V3 report 3.4.2; the interface of DeepEP.
    """
    num_ranks = len(xs)
    local = _local_experts(num_experts, num_ranks)
    idxs = _alive_idxs(xs, topk_idxs, num_experts, local, alive)
    for rank, (x, idx) in enumerate(zip(xs, topk_idxs)):
        if x.shape[0] > max_tokens:
            raise ValueError(f"xs[{rank}]: expected at most {max_tokens} tokens, got {x.shape[0]}")
        _check_distinct(rank, idx)
    return [
        _low_latency_receive(xs, idxs, rank, local, max_tokens, use_fp8, round_scale)
        for rank in range(num_ranks)
    ]


def _low_latency_receive(
    xs: Sequence[torch.Tensor],
    idxs: Sequence[torch.Tensor],
    rank: int,
    local: int,
    max_tokens: int,
    use_fp8: bool,
    round_scale: bool,
) -> LowLatencyReceived:
    num_ranks, device = len(xs), xs[0].device
    slots = num_ranks * max_tokens
    x = torch.zeros(local, slots, xs[0].shape[1], dtype=xs[0].dtype, device=device)
    count = torch.zeros(local, dtype=torch.int32, device=device)
    source = torch.full((local, slots), -1, dtype=torch.int64, device=device)
    layout_range = torch.zeros(local, num_ranks, dtype=torch.int64, device=device)
    for expert in range(local):
        begin = 0
        for src, idx in enumerate(idxs):
            tokens = (idx == rank * local + expert).any(dim=1).nonzero().flatten()
            end = begin + len(tokens)
            x[expert, begin:end] = xs[src][tokens]
            source[expert, begin:end] = src * max_tokens + tokens
            layout_range[expert, src] = begin << 32 | len(tokens)
            begin = end
        count[expert] = begin
    sent: Tokens = x
    if use_fp8:
        sent = quantize(x, scale_format="ue8m0" if round_scale else "fp32")
    return LowLatencyReceived(sent, count, source, layout_range)


def low_latency_combine(
    ys: Sequence[torch.Tensor],
    topk_idxs: Sequence[torch.Tensor],
    topk_weights: Sequence[torch.Tensor],
    received: Sequence[LowLatencyReceived],
    *,
    max_tokens: int,
) -> list[torch.Tensor]:
    """Bring ys [l, r * max_tokens, h] back and sum each token's results with its weights.

    The sum is fp32, in order of the token's slots: each weight times row is rounded, then added;
    slots of -1, and slots whose expert got no row (a dead rank), are skipped. The result [t, h]
    is rounded once to ys' dtype.
    """
    local = ys[0].shape[0]
    results = []
    for rank, (idx, weights) in enumerate(zip(topk_idxs, topk_weights)):
        total = torch.zeros(idx.shape[0], ys[0].shape[2], device=ys[0].device)
        for token, row in enumerate(idx.tolist()):
            for slot, expert in enumerate(row):
                if expert < 0:
                    continue
                host, number = divmod(expert, local)
                named = received[host].source[number] == rank * max_tokens + token
                for y in ys[host][number][named]:
                    total[token] += weights[token, slot] * y.float()
        results.append(total.to(ys[0].dtype))
    return results


def _sum_back(
    ys: Sequence[torch.Tensor],
    received: Sequence[Received],
    num_tokens: Sequence[int],
    ranks_per_node: int,
    alive: Sequence[bool],
    between_nodes: torch.dtype,
) -> list[torch.Tensor]:
    """fp32 sums of the rows of each token, in order of the rank that holds them, node by node; a
    sum of another node is rounded to `between_nodes`."""
    per_node = ranks_per_node or len(ys)
    sums = []
    for rank, tokens in enumerate(num_tokens):
        total = torch.zeros(tokens, ys[0].shape[1], device=ys[0].device)
        for first in range(0, len(ys), per_node):
            part = torch.zeros_like(total)
            for host in range(first, first + per_node):
                source = received[host].source
                mine = source[:, 0] == rank
                if alive[host]:
                    part.index_add_(0, source[mine, 1], ys[host][mine])
            own = first == rank // per_node * per_node
            total += part if own else part.to(between_nodes).float()
        sums.append(total)
    return sums


def _check_nodes(ranks_per_node: int, num_ranks: int) -> None:
    if ranks_per_node < 0 or (ranks_per_node and num_ranks % ranks_per_node):
        raise ValueError(
            f"ranks_per_node: expected 0 or a divisor of {num_ranks} ranks, got {ranks_per_node}"
        )


def _local_experts(num_experts: int, num_ranks: int) -> int:
    if num_ranks < 1 or num_experts < 1 or num_experts % num_ranks:
        raise ValueError(
            f"num_experts: expected a positive multiple of {num_ranks} ranks, got {num_experts}"
        )
    return num_experts // num_ranks


def _alive_idxs(
    xs: Sequence[Tokens],
    topk_idxs: Sequence[torch.Tensor],
    num_experts: int,
    local: int,
    alive: Sequence[bool] | None,
) -> list[torch.Tensor]:
    """The checked topk_idxs, with -1 for the experts of dead ranks and the tokens of dead ranks."""
    if len(topk_idxs) != len(xs):
        raise ValueError(f"topk_idxs: expected {len(xs)} entries, got {len(topk_idxs)}")
    if alive is not None and len(alive) != len(xs):
        raise ValueError(f"alive: expected {len(xs)} entries, got {len(alive)}")
    idxs = []
    for rank, (x, idx) in enumerate(zip(xs, topk_idxs)):
        _check_idx(f"topk_idxs[{rank}]", idx, num_experts)
        if idx.shape[0] != x.shape[0]:
            raise ValueError(
                f"topk_idxs[{rank}]: expected {x.shape[0]} rows, as xs, got {idx.shape[0]}"
            )
        if alive is not None:
            up = torch.tensor([*alive, False], device=idx.device)  # -1 // local indexes the last
            idx = torch.where(up[idx // local] & bool(alive[rank]), idx, -1)
        idxs.append(idx)
    return idxs


def _check_idx(name: str, idx: torch.Tensor, num_experts: int) -> None:
    if idx.dim() != 2 or idx.dtype != torch.int64:
        raise ValueError(f"{name}: expected int64 [t, k], got {idx.dtype} {tuple(idx.shape)}")
    if idx.numel() and not -1 <= idx.min() <= idx.max() < num_experts:
        raise ValueError(
            f"{name}: expected values in [-1, {num_experts}), got "
            f"{int(idx.min())} .. {int(idx.max())}"
        )


def _check_distinct(rank: int, idx: torch.Tensor) -> None:
    for token, row in enumerate(idx.tolist()):
        named = [expert for expert in row if expert >= 0]
        if len(set(named)) != len(named):
            raise ValueError(f"topk_idxs[{rank}][{token}]: expected distinct experts, got {row}")


def _rows(x: Tokens, rows: torch.Tensor) -> Tokens:
    if isinstance(x, torch.Tensor):
        return x[rows]
    data = x.data.view(torch.uint8)[rows].view(x.data.dtype)
    return ScaledTensor(data, x.scale[rows], x.block, x.dtype)


def _cat(parts: Sequence[Tokens]) -> Tokens:
    if isinstance(parts[0], torch.Tensor):
        return torch.cat(list(parts))
    data = torch.cat([part.data.view(torch.uint8) for part in parts]).view(parts[0].data.dtype)
    scale = torch.cat([part.scale for part in parts])
    return ScaledTensor(data, scale, parts[0].block, parts[0].dtype)
