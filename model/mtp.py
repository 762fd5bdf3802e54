"""Multi-token prediction (V3 report section 2.2): a further block that sees one token more.

Depth k combines the representation of position i from depth k-1 with the embedding of token i+k,
and predicts token i+k+1 through the shared embedding and head. Where the report's formula and the
shipped weights differ this follows the weights: the projection takes [embedding; hidden], in that
order, and the hidden state is taken after the final norm.
"""

from __future__ import annotations

import torch
from torch import nn

from model.block import Block
from model.cache import TokenBatch
from model.config import DeepseekConfig
from model.linear import Linear, RMSNorm
from model.moe import RouterStats


class MTPModule(nn.Module):
    """One depth. Names follow the checkpoint, where the block's own parts lie beside these."""

    def __init__(self, config: DeepseekConfig, layer_idx: int) -> None:
        super().__init__()
        d, eps = config.hidden_size, config.rms_norm_eps
        self.enorm = RMSNorm(d, eps)
        self.hnorm = RMSNorm(d, eps)
        self.eh_proj = Linear(d, 2 * d)
        self.block = Block(config, layer_idx)
        self.norm = RMSNorm(d, eps)

    def forward(
        self,
        hidden: torch.Tensor,
        embedding: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor],
        batch: TokenBatch,
        pool: torch.Tensor | None = None,
        router: list[RouterStats] | None = None,
    ) -> torch.Tensor:
        """hidden [t, d]: the depth before's output for each position (the main model's after its
        final norm); embedding [t, d]: of the token k later. Returns [t, d], normalised: ready for
        the head and for the next depth."""
        x = self.eh_proj(torch.cat([self.enorm(embedding), self.hnorm(hidden)], dim=-1))
        return self.norm(self.block(x, rotation, batch, pool, router))
