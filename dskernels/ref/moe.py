"""Mixture of experts: router, permutation, experts, balance losses and the bias update.

Letters: t tokens, b sequences of s tokens, d model width, e experts, k chosen experts per token,
m permuted rows, i expert width.
"""

from __future__ import annotations

import torch

from ..types import ScaledTensor
from .gemm import grouped_gemm
from .rowwise import quantize, swiglu

WEIGHT_SUM_FLOOR = 1e-20  # keeps the renormalisation finite when every chosen score is 0


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
    """Choose topk experts for each token of x [t, d] by weight [e, d] and bias [e].

    Returns topk_idx int64 [t, k] in descending order of the biased score, topk_weights fp32
    [t, k], and the unbiased scores fp32 [t, e]. All arithmetic is fp32.

        scores  = sigmoid(x weight^T)      ("softmax" for V2)
        biased  = scores + bias            decides who is chosen, and nothing else
        groups  of e / n_group consecutive experts are ranked by the sum of their two best biased
                scores ("top2", with sigmoid) or by their best ("max", with softmax); experts
                outside the topk_group best groups are out of the running whatever their sign
        weights = scores[chosen]; divided by (their sum + 1e-20) if renormalize (default: with
                sigmoid only); times scale

    Ties go to the lowest index, for groups and experts. A NaN score ranks behind every number but
    before the experts of unchosen groups; so the indices are always valid and the group limit
    always holds, and the NaN shows in scores and weights. Differentiable in x and weight through
    weights and scores; the choice itself and the bias get no gradient.

    With `sequences`, that many of equally many tokens, `gate_statistics` follows: five results.

    Source: V3 report eq. 12-16, V2 paper 2.2.2.
    """
    _check_gate(x, weight, bias, n_group, topk_group, topk, score, group_score)
    logits = x.float() @ weight.float().transpose(0, 1)
    scores = torch.sigmoid(logits) if score == "sigmoid" else torch.softmax(logits, dim=-1)
    topk_idx, weights = choose_experts(
        scores,
        bias,
        n_group=n_group,
        topk_group=topk_group,
        topk=topk,
        scale=scale,
        by_sum=(group_score or ("top2" if score == "sigmoid" else "max")) == "top2",
        renormalize=renormalize if renormalize is not None else score == "sigmoid",
    )
    if sequences is None:
        return topk_idx, weights, scores
    return topk_idx, weights, scores, *gate_statistics(topk_idx, scores, sequences)


def gate_statistics(
    topk_idx: torch.Tensor, scores: torch.Tensor, sequences: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """What balancing needs, of `sequences` runs of equally many tokens: (counts, affinity) [b, e].

    counts int64 are the choices of each expert; affinity fp32 is the mean over the sequence of
    scores / (their sum + 1e-20), within a few roundings of fp32 (NaN if any score is); it is
    differentiable in scores. topk_idx [t, k], scores [t, e]. Source: V3 report eq. 17-20.
    """
    tokens, experts = scores.shape
    if sequences < 1 or tokens % sequences or tokens == 0:
        raise ValueError(f"sequences: expected a divisor of t = {tokens} tokens, got {sequences}")
    length = tokens // sequences
    sequence = torch.arange(sequences, device=scores.device).repeat_interleave(length)
    place = (sequence[:, None] * experts + topk_idx).flatten()
    counts = torch.bincount(place, minlength=sequences * experts).view(sequences, experts)
    share = scores / (scores.sum(dim=-1, keepdim=True) + WEIGHT_SUM_FLOOR)
    return counts, share.view(sequences, length, experts).mean(dim=1)


def choose_experts(
    scores: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    n_group: int,
    topk_group: int,
    topk: int,
    scale: float,
    by_sum: bool,
    renormalize: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """moe_gate from its scores fp32 [t, e] on: (topk_idx, topk_weights) [t, k].

    Everything here is pinned to the bit, the order of the sum of chosen scores included: it is the
    order of the choices. (The logits' sums over d, and with them the scores, are not.)
    """
    tokens, experts = scores.shape
    lowest = torch.finfo(torch.float32).min
    biased = scores.detach() if bias is None else scores.detach() + bias.detach().float()
    key = biased.nan_to_num(nan=lowest, posinf=-lowest, neginf=lowest)
    if n_group > 1:
        groups = key.view(tokens, n_group, experts // n_group)
        best = groups.sort(dim=-1, descending=True).values[..., : 2 if by_sum else 1].sum(dim=-1)
        chosen = _top(best, topk_group)
        allowed = torch.zeros_like(best, dtype=torch.bool).scatter(1, chosen, True)
        key = groups.masked_fill(~allowed.unsqueeze(-1), -torch.inf).view(tokens, experts)
    topk_idx = _top(key, topk)
    weights = scores.gather(1, topk_idx)
    if renormalize:
        total = torch.zeros_like(weights[:, :1])
        for choice in range(topk):
            total = total + weights[:, choice, None]
        weights = weights / (total + WEIGHT_SUM_FLOOR)
    return topk_idx, weights * scale


def _top(values: torch.Tensor, count: int) -> torch.Tensor:
    """Indices of the largest values in descending order; equal values in order of index."""
    return values.sort(dim=-1, descending=True, stable=True).indices[..., :count]


GOLDEN_TURN = 2654435769  # the golden ratio's fraction in units of 2^-32


def choose_replicas(topk_idx: torch.Tensor, expert_map: torch.Tensor) -> torch.Tensor:
    """One of the replicas expert_map [l, r] of each chosen expert topk_idx [t, k] -> int64 [t, k].

    Entries of -1 in expert_map are no replicas; an expert with n > 0 others is served at token t by
    number floor(n * frac(t * 0.618...)) of them, in their order, the fraction being taken in units
    of 2^-32. So a choice depends on nothing but its own token, and consecutive tokens, or every
    second one, spread evenly. An expert without replicas, and -1, give -1.
    """
    token = torch.arange(topk_idx.shape[0], device=topk_idx.device)
    turn = (token * GOLDEN_TURN % 2**32)[:, None]
    replicas = expert_map.to(torch.int64)[topk_idx.clamp(min=0)]  # [t, k, r]
    there = replicas >= 0
    number = turn * there.sum(dim=-1) >> 32
    picked = there & (there.cumsum(dim=-1) - 1 == number.unsqueeze(-1))
    chosen = torch.where(picked, replicas, 0).sum(dim=-1)
    return torch.where(picked.any(dim=-1) & (topk_idx >= 0), chosen, -1)


def expert_slots(
    topk_idx: torch.Tensor,
    topk_weights: torch.Tensor,
    num_experts: int,
    expert_map: torch.Tensor | None,
    num_shared: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The slots of `moe_experts` and their weights, both [t, k + s]: choices of replicas, then for
    every token the last s = num_shared of num_experts experts with the weight 1."""
    if expert_map is not None:
        topk_idx = choose_replicas(topk_idx, expert_map)
    if num_shared == 0:
        return topk_idx, topk_weights
    tokens = topk_idx.shape[0]
    shared = torch.arange(num_experts - num_shared, num_experts, device=topk_idx.device)
    topk_idx = torch.cat([topk_idx.to(torch.int64), shared.expand(tokens, -1)], dim=1)
    ones = topk_weights.new_ones(tokens, num_shared)
    return topk_idx, torch.cat([topk_weights, ones], dim=1)


def moe_permute(
    x: torch.Tensor,
    topk_idx: torch.Tensor,
    num_experts: int,
    *,
    alignment: int = 1,
    expert_map: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sort the copies of the tokens x [t, d] by expert: a stable counting sort.

    topk_idx int64 [t, k], -1 for a slot without an expert. With expert_map [l, r] topk_idx names
    its rows, and `choose_replicas` the experts. Returns

        x_perm       [m, d]: expert after expert; within one, in order of (token, slot)
        group_sizes  int64 [e]: rows of each expert, each rounded up to a multiple of alignment
                     (padding rows are 0 and lie at the group's end); their sum is m
        row_map      int64 [t, k]: the row of x_perm of each copy, -1 where dropped

    A token may name an expert twice and then has two rows. Differentiable in x.
    """
    if alignment < 1:
        raise ValueError(f"alignment: expected at least 1, got {alignment}")
    if expert_map is not None:
        _check_topk_idx(x, topk_idx, expert_map.shape[0])
        topk_idx = choose_replicas(topk_idx, expert_map)
    _check_topk_idx(x, topk_idx, num_experts)
    flat = topk_idx.flatten()
    order = flat.sort(stable=True).indices[int((flat < 0).sum()) :]
    counts = torch.bincount(flat[order], minlength=num_experts)
    group_sizes = (counts + alignment - 1) // alignment * alignment
    shift = group_sizes.cumsum(0) - group_sizes - (counts.cumsum(0) - counts)
    rows = torch.arange(order.numel(), device=x.device) + shift[flat[order]]
    row_map = torch.full_like(flat, -1).scatter(0, order, rows).view_as(topk_idx)
    x_perm = x.new_zeros(int(group_sizes.sum()), x.shape[1])
    tokens = order // max(1, topk_idx.shape[1])
    return x_perm.index_copy(0, rows, x[tokens]), group_sizes, row_map


def moe_unpermute(
    y: torch.Tensor, row_map: torch.Tensor, topk_weights: torch.Tensor | None
) -> torch.Tensor:
    """Sum each token's rows of y [m, d] -> [t, d]; row_map int64 [t, k], -1 skipped.

    fp32 sums in order of k, of topk_weights [t, k] times the row (plain rows for None), rounded
    once to y's dtype. Rows that row_map does not name are never read; a token without rows gives
    0. Differentiable in y and topk_weights.
    """
    if row_map.numel() and not -1 <= row_map.min() <= row_map.max() < y.shape[0]:
        raise ValueError(
            f"row_map: expected values in [-1, {y.shape[0]}), got "
            f"{int(row_map.min())} .. {int(row_map.max())}"
        )
    wide = torch.float64 if y.dtype == torch.float64 else torch.float32
    total = torch.zeros(row_map.shape[0], y.shape[1], dtype=wide, device=y.device)
    for slot in range(row_map.shape[1]):
        tokens = (row_map[:, slot] >= 0).nonzero().flatten()
        term = y[row_map[tokens, slot]].to(wide)
        if topk_weights is not None:
            term = term * topk_weights[tokens, slot, None].to(wide)
        total = total.index_add(0, tokens, term)
    return total.to(y.dtype)


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
    """The routed experts of x [t, d]: sum over k of weight * w2 swiglu(w13 x) -> [t, d].

    w13 [e, 2i, d] = [gate; up] and w2 [e, d, i], plain or ScaledTensor in blocks (128, 128). Plain:
    each product and the SwiGLU are rounded to x's dtype; differentiable. Scaled (W8A8): x is
    quantised in blocks (1, 128), as is the SwiGLU's unrounded result, and the second product is
    rounded to x's dtype. The weighted sum is `moe_unpermute`'s. Slots of -1 add nothing.

    expert_map as in `moe_permute`. The last num_shared of the e experts are shared: every token
    goes to them too, with the weight 1, added after its choices; topk_idx does not name them.
    layout is how a backend lays out rows between the products and changes no result.
    """
    topk_idx, topk_weights = expert_slots(
        topk_idx, topk_weights, w13.shape[0], expert_map, num_shared
    )
    x_perm, group_sizes, row_map = moe_permute(x, topk_idx, w13.shape[0])
    if isinstance(w13, ScaledTensor):
        hidden = grouped_gemm(
            quantize(x_perm), w13, group_sizes=group_sizes, epilogue="swiglu_quant"
        )
    else:
        hidden = swiglu(grouped_gemm(x_perm, w13, group_sizes=group_sizes))
    y = grouped_gemm(hidden, w2, group_sizes=group_sizes, out_dtype=x.dtype)
    return moe_unpermute(y, row_map, topk_weights)


def moe_bias_update(bias: torch.Tensor, counts: torch.Tensor, gamma: float) -> torch.Tensor:
    """One step of the aux-loss-free balancing: bias [e] + gamma * sign(mean(counts) - counts).

    counts [e] are the tokens each expert got in the whole batch, as integers; the comparison with
    their mean is exact. Returns a new tensor. Source: V3 report 2.1.2.
    """
    counts = counts.to(torch.int64)
    direction = torch.sign(counts.sum() - counts.numel() * counts)
    return bias + gamma * direction.to(bias.dtype)


def sequence_balance_loss(
    scores: torch.Tensor, topk_idx: torch.Tensor, alpha: float
) -> torch.Tensor:
    """V3's complementary loss, alpha * sum_i f_i P_i, mean over sequences; a scalar.

    scores fp32 [b, s, e], unbiased, as `moe_gate` returns them; topk_idx [b, s, k].
    f_i = e / (k s) * (tokens of the sequence that chose i), P_i = mean over the sequence of the
    scores normalised to a sum of 1. f gets no gradient. 1 * alpha is perfect balance.
    Source: V3 report eq. 17-20; V2 paper eq. 23-25 (its expert-level loss) with softmax scores.
    """
    frequency, probability = _load_and_affinity(scores, topk_idx)
    return alpha * (frequency * probability).sum(dim=-1).mean()


def device_balance_loss(
    scores: torch.Tensor, topk_idx: torch.Tensor, num_devices: int, alpha: float
) -> torch.Tensor:
    """V2's device-level loss: alpha * sum over devices of f'_d P'_d, mean over sequences.

    Experts are split evenly over devices in order; f' is the mean of the device's f_i, P' the sum
    of its P_i. Shapes as in `sequence_balance_loss`. Source: V2 paper eq. 26-28.
    """
    frequency, probability = _load_and_affinity(scores, topk_idx)
    frequency = _by_device(frequency, num_devices).mean(dim=-1)
    probability = _by_device(probability, num_devices).sum(dim=-1)
    return alpha * (frequency * probability).sum(dim=-1).mean()


def communication_balance_loss(
    scores: torch.Tensor, topk_idx: torch.Tensor, num_devices: int, max_devices: int, alpha: float
) -> torch.Tensor:
    """V2's communication loss: alpha * sum over devices of f''_d P''_d, mean over sequences.

    f'' = num_devices / (max_devices * s) * (tokens sent to the device: a token counts once per
    device), P'' = P'. Source: V2 paper eq. 29-31.
    """
    _, probability = _load_and_affinity(scores, topk_idx)
    chosen = _by_device(_chosen(topk_idx, scores.shape[-1]), num_devices).amax(dim=-1)
    sent = chosen.sum(dim=1) * (num_devices / (max_devices * topk_idx.shape[1]))
    probability = _by_device(probability, num_devices).sum(dim=-1)
    return alpha * (sent * probability).sum(dim=-1).mean()


def _load_and_affinity(
    scores: torch.Tensor, topk_idx: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """f and P [b, e] of the balance losses."""
    if scores.dim() != 3 or topk_idx.dim() != 3 or scores.shape[:2] != topk_idx.shape[:2]:
        raise ValueError(
            "scores, topk_idx: expected [b, s, e] and [b, s, k], got "
            f"{tuple(scores.shape)} and {tuple(topk_idx.shape)}"
        )
    (_, tokens, experts), k = scores.shape, topk_idx.shape[-1]
    frequency = _chosen(topk_idx, experts).sum(dim=1) * (experts / (k * tokens))
    affinity = scores / (scores.sum(dim=-1, keepdim=True) + WEIGHT_SUM_FLOOR)
    return frequency, affinity.mean(dim=1)


def _chosen(topk_idx: torch.Tensor, experts: int) -> torch.Tensor:
    """fp32 [b, s, e]: 1 where the token chose the expert; -1 chooses none."""
    one_more = torch.zeros(*topk_idx.shape[:-1], experts + 1, device=topk_idx.device)
    target = torch.where(topk_idx < 0, experts, topk_idx)
    return one_more.scatter(-1, target, 1.0)[..., :experts]


def _by_device(x: torch.Tensor, num_devices: int) -> torch.Tensor:
    if num_devices < 1 or x.shape[-1] % num_devices:
        raise ValueError(
            f"num_devices: expected a divisor of {x.shape[-1]} experts, got {num_devices}"
        )
    return x.unflatten(-1, (num_devices, -1))


def _check_gate(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    n_group: int,
    topk_group: int,
    topk: int,
    score: str,
    group_score: str | None,
) -> None:
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"x, weight: expected [t, d] and [e, d], got {tuple(x.shape)}, {tuple(weight.shape)}"
        )
    experts = weight.shape[0]
    if bias is not None and tuple(bias.shape) != (experts,):
        raise ValueError(f"bias: expected [{experts}], got {tuple(bias.shape)}")
    if score not in ("sigmoid", "softmax"):
        raise ValueError(f"score: expected 'sigmoid' or 'softmax', got {score!r}")
    if group_score not in (None, "top2", "max"):
        raise ValueError(f"group_score: expected None, 'top2' or 'max', got {group_score!r}")
    if n_group < 1 or experts % n_group:
        raise ValueError(f"n_group: expected a divisor of {experts} experts, got {n_group}")
    if not 1 <= topk_group <= n_group:
        raise ValueError(f"topk_group: expected 1 .. {n_group}, got {topk_group}")
    reachable = experts // n_group * topk_group
    if not 1 <= topk <= reachable:
        raise ValueError(
            f"topk: expected 1 .. {reachable} ({topk_group} groups of {experts // n_group} "
            f"experts), got {topk}"
        )


def _check_topk_idx(x: torch.Tensor, topk_idx: torch.Tensor, num_experts: int) -> None:
    if topk_idx.dim() != 2 or topk_idx.shape[0] != x.shape[0]:
        raise ValueError(
            f"topk_idx: expected [{x.shape[0]}, k] for x {tuple(x.shape)}, "
            f"got {tuple(topk_idx.shape)}"
        )
    if topk_idx.numel() and not -1 <= topk_idx.min() <= topk_idx.max() < num_experts:
        raise ValueError(
            f"topk_idx: expected values in [-1, {num_experts}), got "
            f"{int(topk_idx.min())} .. {int(topk_idx.max())}"
        )
