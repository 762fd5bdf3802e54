"""The feed-forward half of a block: a dense SwiGLU, or shared plus routed experts behind a gate.

Shape letters: t tokens, d hidden, i intermediate, e experts, k experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

import dskernels as dsk
from model.config import DeepseekConfig
from model.linear import Linear, Weight


@dataclass
class RouterStats:
    """What one gate decided for one batch, for balance losses and reports."""

    topk_idx: torch.Tensor  # [t, k] int64
    scores: torch.Tensor  # [t, e] fp32, without the balancing bias; differentiable
    counts: torch.Tensor  # [e] int64: tokens routed to each expert


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x)), gate and up in one matrix. x [t, d] -> [t, d]."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_up_proj = Linear(2 * intermediate_size, hidden_size, row_parts=2)
        self.down_proj = Linear(hidden_size, intermediate_size, pad_cols=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(dsk.swiglu(self.gate_up_proj(x)))


class Gate(nn.Module):
    """The router (V3 report section 2.1.2; V2: softmax, no bias).

    bias    [e] fp32, V3 only: added to the scores for the choice of experts, never to the weights
    counts  [e] int64: tokens per expert since the last `update_bias`, gathered in training mode
    """

    def __init__(self, config: DeepseekConfig) -> None:
        super().__init__()
        self.config = config
        experts = config.n_routed_experts
        self.weight = nn.Parameter(torch.empty(experts, config.hidden_size))
        has_bias = config.scoring_func == "sigmoid"
        self.register_buffer("bias", torch.zeros(experts) if has_bias else None)
        self.register_buffer("counts", torch.zeros(experts, dtype=torch.int64), persistent=False)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x [t, d] -> topk_idx [t, k] int64, topk_weights [t, k] fp32, scores [t, e] fp32."""
        cfg = self.config
        return dsk.moe_gate(
            x,
            self.weight,
            self.bias,
            n_group=cfg.n_group,
            topk_group=cfg.topk_group,
            topk=cfg.num_experts_per_tok,
            scale=cfg.routed_scaling_factor,
            score=cfg.scoring_func,
            renormalize=cfg.norm_topk_prob,
        )

    @torch.no_grad()
    def update_bias(self, gamma: float) -> None:
        """One balancing step: raise the bias of underloaded experts, lower the others', by gamma;
        then forget the counts. Nothing to do for V2, which balances by losses."""
        if self.bias is not None:
            self.bias.copy_(dsk.moe_bias_update(self.bias, self.counts, gamma))
        self.counts.zero_()

    def _apply(self, fn, recurse: bool = True) -> nn.Module:
        # The bias moves in steps of 0.001 and chooses experts: it stays fp32 in any model dtype.
        bias = self.bias
        super()._apply(fn, recurse)
        if bias is not None and self.bias.dtype != bias.dtype:
            self.bias = bias.to(self.bias.device)
        return self


class Experts(nn.Module):
    """The experts' weights, stacked: w13 [e, 2i, d] = [gate; up], w2 [e, d, i].

    V3's one shared expert is the last of the stack, so that it runs in the same launches as the
    routed ones. Several shared experts (V2) are one wide matrix in a checkpoint, whose FP8 blocks
    need not end where an expert does: those stay by themselves, outside.
    """

    def __init__(self, config: DeepseekConfig) -> None:
        super().__init__()
        self.num_shared = int(config.n_shared_experts == 1)
        experts, d = config.n_routed_experts + self.num_shared, config.hidden_size
        width = config.moe_intermediate_size
        self.w13 = Weight(experts, 2 * width, d, row_parts=2)
        self.w2 = Weight(experts, d, width, pad_cols=True)
        self.group: dsk.ep.Group | None = None  # experts spread over its ranks; None: all are here

    def forward(self, x, topk_idx, topk_weights) -> torch.Tensor:
        """x [t, d], topk_idx and topk_weights [t, k] -> [t, d]."""
        if self.group is None:
            return self._multiply(x, topk_idx, topk_weights, None, self.num_shared)
        # Tokens travel to their routed experts and results back; a rank keeps its own ones only.
        # The shared expert stays with the tokens.
        routed, shared = slice(self.group.num_local_experts), slice(-self.num_shared, None)
        got = dsk.ep.dispatch(self.group, x, topk_idx, topk_weights)
        y = self._multiply(got.x, got.topk_idx, got.topk_weights, routed, 0)
        out = dsk.ep.combine(self.group, y, got)[0]
        if self.num_shared:
            nobody = topk_idx[:, :0], topk_weights[:, :0]
            out = out + self._multiply(x, *nobody, shared, self.num_shared)
        return out

    def _multiply(self, x, topk_idx, topk_weights, part: slice | None, num_shared: int):
        weights = self.w13.value(part), self.w2.value(part)
        return dsk.moe_experts(x, *weights, topk_idx, topk_weights, num_shared=num_shared)

    def distribute(self, group: dsk.ep.Group) -> None:
        """Keep only this rank of `group`'s routed experts, and exchange tokens with the others.

        Every rank must hold the same weights before, and call the layer in step with the others
        afterwards, each with tokens of its own (as many as it likes, also none)."""
        first = sum(group.experts_of_rank[: group.rank])
        own = slice(first, first + group.num_local_experts)
        for weight in (self.w13, self.w2):
            shared = slice(weight.weight.shape[0] - self.num_shared, None)
            weight.keep_leading(own, shared)
        self.group = group


class MoE(nn.Module):
    """Shared experts for every token plus k routed ones. x [t, d] -> [t, d]."""

    def __init__(self, config: DeepseekConfig) -> None:
        super().__init__()
        self.gate = Gate(config)
        self.experts = Experts(config)
        apart = config.n_shared_experts - self.experts.num_shared
        width = config.moe_intermediate_size * apart
        self.shared_experts = MLP(config.hidden_size, width) if width else None

    def forward(self, x: torch.Tensor, router: list[RouterStats] | None = None) -> torch.Tensor:
        """Appends this layer's statistics to `router` when one is given."""
        topk_idx, topk_weights, scores = self.gate(x)
        if router is not None:
            counts = torch.bincount(topk_idx.flatten(), minlength=scores.shape[-1])
            router.append(RouterStats(topk_idx, scores, counts))
            if self.training:
                self.gate.counts += counts
        out = self.experts(x, topk_idx, topk_weights)
        return out if self.shared_experts is None else out + self.shared_experts(x)
