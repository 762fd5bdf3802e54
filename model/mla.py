"""Multi-head latent attention (V2 paper section 2.1, V3 report section 2.1.1), twice.

Expanded: up-project every latent to keys and values per head, then attend. Cheapest for many new
tokens at once: training, prefill. Absorbed: fold the key up-projection into the query and the value
up-projection into the output, and attend over the cached latents themselves, one shared key of 576
values for all heads. Cheapest for few new tokens over a long cache: decode.

Shape letters: t new tokens, u keys, h heads, n non-rotary, r rotary, v value, c latent dimensions.
"""

from __future__ import annotations

import torch
from torch import nn

import dskernels as dsk
from model.cache import TokenBatch, append
from model.config import DeepseekConfig
from model.linear import Linear, RMSNorm

# The latent norms take no eps from the config: the shipped models use this value.
LATENT_NORM_EPS = 1e-6
# Up to this many new tokens per sequence the absorbed form is used: decoding, and its verification
# of a few drafted tokens.
MAX_ABSORBED_TOKENS = 8


class MultiHeadLatentAttention(nn.Module):
    """x [t, d] -> [t, d]. Module names are those of the checkpoint."""

    def __init__(self, config: DeepseekConfig) -> None:
        super().__init__()
        self.config = config
        d, h, c = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
        if config.q_lora_rank is None:
            self.q_proj = Linear(h * config.qk_head_dim, d)
        else:
            self.q_a_proj = Linear(config.q_lora_rank, d)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, LATENT_NORM_EPS)
            self.q_b_proj = Linear(h * config.qk_head_dim, config.q_lora_rank)
        self.kv_a_proj_with_mqa = Linear(config.latent_dim, d)
        self.kv_a_layernorm = RMSNorm(c, LATENT_NORM_EPS)
        self.kv_b_proj = Linear(h * (config.qk_nope_head_dim + config.v_head_dim), c)
        self.o_proj = Linear(d, h * config.v_head_dim)
        self._dense_kv_b: torch.Tensor | None = None

    def forward(
        self,
        x: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor],
        batch: TokenBatch,
        pool: torch.Tensor | None,
    ) -> torch.Tensor:
        """rotation: cos, sin [t, r/2]. pool: this layer's pages, or None for no cache."""
        if pool is not None and self._absorbs(batch, pool):
            return self.o_proj(self._attend_absorbed(x, rotation, batch, pool).flatten(1))
        q_nope, q_rope = self._queries(x, rotation)
        latent, k_rope = self._latents(x, rotation)
        if pool is not None:
            append(pool, latent, k_rope, batch)
            if any(batch.starts):  # else a whole prompt: its keys are all at hand
                rows = pool.flatten(0, 1)[batch.key_slots]
                latent, k_rope = rows.split([latent.shape[1], k_rope.shape[1]], -1)
        out = self._attend_expanded(q_nope, q_rope, latent, k_rope, batch)
        return self.o_proj(out.flatten(1))

    @staticmethod
    def _absorbs(batch: TokenBatch, pool: torch.Tensor) -> bool:
        if max(batch.counts) <= MAX_ABSORBED_TOKENS:
            return True
        # Quantised rows of earlier tokens are read by the decode kernel only.
        return any(batch.starts) and pool.dtype == torch.uint8

    def _queries(self, x, rotation) -> tuple[torch.Tensor, torch.Tensor]:
        """q_nope [t, h, n] and rotated q_rope [t, h, r]."""
        cfg = self.config
        if cfg.q_lora_rank is None:
            q = self.q_proj(x)
        else:
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        q = q.view(-1, cfg.num_attention_heads, cfg.qk_head_dim)
        q_nope, q_rope = q.split([cfg.qk_nope_head_dim, cfg.qk_rope_head_dim], dim=-1)
        return q_nope, dsk.rope(q_rope, *rotation, interleaved=cfg.rope_interleave)

    def _latents(self, x, rotation) -> tuple[torch.Tensor, torch.Tensor]:
        """What the cache holds: normalised latent [t, c] and rotated shared key [t, r]."""
        cfg = self.config
        latent, k_rope = self.kv_a_proj_with_mqa(x).split(
            [cfg.kv_lora_rank, cfg.qk_rope_head_dim], dim=-1
        )
        k_rope = dsk.rope(k_rope[:, None], *rotation, interleaved=cfg.rope_interleave)
        return self.kv_a_layernorm(latent), k_rope[:, 0]

    def _attend_expanded(self, q_nope, q_rope, latent, k_rope, batch) -> torch.Tensor:
        """latent [u, c], k_rope [u, r] -> [t, h, v]."""
        cfg = self.config
        kv = self.kv_b_proj(latent).view(len(latent), cfg.num_attention_heads, -1)
        k_nope, v = kv.split([cfg.qk_nope_head_dim, cfg.v_head_dim], dim=-1)
        k_rope = k_rope[:, None].expand(-1, cfg.num_attention_heads, -1)
        out, _ = dsk.mla_prefill(
            torch.cat([q_nope, q_rope], -1),
            torch.cat([k_nope, k_rope], -1),
            v,
            batch.cu_seqlens_q,
            batch.cu_seqlens_k,
            causal=True,
            softmax_scale=cfg.softmax_scale,
        )
        return out

    def _attend_absorbed(self, x, rotation, batch, pool) -> torch.Tensor:
        """Append to the pages and attend over them -> [t, h, v]. One attention call per distinct
        number of new tokens."""
        cfg = self.config
        query_latent = None if cfg.q_lora_rank is None else self.q_a_proj(x)
        query_latent = dsk.mla_latents(
            query_latent,
            self.kv_a_proj_with_mqa(x),
            None if query_latent is None else self.q_a_layernorm.weight,
            self.kv_a_layernorm.weight,
            *rotation,
            pool,
            batch.slots,
            eps=LATENT_NORM_EPS,
            interleaved=cfg.rope_interleave,
        )
        q = self.q_proj(x) if query_latent is None else self.q_b_proj(query_latent)
        w_uk, w_uv = self._up_projections(q.dtype)
        q = q.view(-1, cfg.num_attention_heads, cfg.qk_head_dim)
        q = dsk.mla_absorb_queries(q, w_uk, *rotation, interleaved=cfg.rope_interleave)
        out = q.new_empty(*q.shape[:2], cfg.kv_lora_rank)
        for _, rows, tokens in batch.groups:
            attended, _ = dsk.mla_decode(
                q[tokens],
                pool,
                batch.block_table[rows],
                batch.seq_lens[rows],
                head_dim_v=cfg.kv_lora_rank,
                softmax_scale=cfg.softmax_scale,
                causal=True,
            )
            out[tokens] = attended
        return dsk.mla_absorb_output(out, w_uv)

    def _up_projections(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """W_uk [h, n, c] and W_uv [h, v, c]: the two halves of kv_b_proj."""
        cfg = self.config
        weight = self.kv_b_proj.weight
        if self.kv_b_proj.is_fp8:
            # Decoded once: 0.3% of V3's size. FP8 weights are never trained, so it cannot go stale.
            if self._dense_kv_b is None or self._dense_kv_b.dtype != dtype:
                self._dense_kv_b = self.kv_b_proj.dense(dtype)
            weight = self._dense_kv_b
        weight = weight.view(cfg.num_attention_heads, -1, cfg.kv_lora_rank)
        return weight.split([cfg.qk_nope_head_dim, cfg.v_head_dim], dim=1)

    def _apply(self, fn, recurse: bool = True) -> nn.Module:
        self._dense_kv_b = None
        return super()._apply(fn, recurse)
