"""One transformer block: attention, then a dense or mixture-of-experts feed-forward."""

from __future__ import annotations

import torch
from torch import nn

from model.cache import TokenBatch
from model.config import DeepseekConfig
from model.linear import RMSNorm
from model.mla import MultiHeadLatentAttention
from model.moe import MLP, MoE, RouterStats


class Block(nn.Module):
    """x [t, d] -> [t, d]."""

    def __init__(self, config: DeepseekConfig, layer_idx: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = MultiHeadLatentAttention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if config.is_moe_layer(layer_idx):
            self.mlp: MoE | MLP = MoE(config)
        else:
            self.mlp = MLP(config.hidden_size, config.intermediate_size)

    def forward(
        self,
        x: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor],
        batch: TokenBatch,
        pool: torch.Tensor | None = None,
        router: list[RouterStats] | None = None,
    ) -> torch.Tensor:
        """rotation: cos, sin [t, r/2]; pool: this layer's pages; router: collects statistics."""
        attended = self.self_attn(self.input_layernorm(x), rotation, batch, pool)
        y, x = self.post_attention_layernorm(attended, residual=x)
        return x + (self.mlp(y, router) if isinstance(self.mlp, MoE) else self.mlp(y))
