"""DeepseekV3: embedding, blocks, final norm, head, and the MTP modules (V2 is the same class)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from model.block import Block
from model.cache import PagedLatentCache, TokenBatch
from model.config import DeepseekConfig
from model.linear import Linear, RMSNorm, Weight
from model.moe import Gate, RouterStats
from model.mtp import MTPModule
from model.rotary import Rotary

if TYPE_CHECKING:
    from model.generate import Generation


@dataclass
class TrainOutput:
    """Everything a loss needs, from one forward over [b, s] tokens."""

    logits: torch.Tensor  # [b, s, vocab]: position i predicts token i + 1
    mtp_logits: list[torch.Tensor]  # entry k - 1, [b, s - k, vocab]: position i predicts i + 1 + k
    router: list[RouterStats]  # one per MoE layer in order, MTP modules' last
    hidden: torch.Tensor  # [b, s, d], after the final norm


class DeepseekV3(nn.Module):
    """DeepSeek-V3 and V2. Tokens are handled flattened, so prompts of different lengths need no
    padding; every multiplication goes through `dskernels`."""

    def __init__(self, config: DeepseekConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = Weight(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = Linear(config.vocab_size, config.hidden_size)
        self.mtp = nn.ModuleList(
            MTPModule(config, i)
            for i in range(config.num_hidden_layers, config.num_layers_with_mtp)
        )
        self.rotary = Rotary(config)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Normal weights of std `initializer_range`, unit norms, zero biases (V3 section 4.2)."""
        for module in self.modules():
            if isinstance(module, (Weight, Gate)) and not module.weight.is_meta:
                module.weight.normal_(0, self.config.initializer_range, generator=generator)

    @property
    def dtype(self) -> torch.dtype:
        """Of the activations; FP8 weights do not change it."""
        return self.embed_tokens.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.embed_tokens.weight.device

    def moe_gates(self) -> list[Gate]:
        """The routers in order, MTP modules' last; each has `.bias` and `.counts` buffers."""
        return [module for module in self.modules() if isinstance(module, Gate)]

    # ---- forward --------------------------------------------------------------------------------

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """input_ids [b, s] -> logits [b, s, vocab], without a cache.

        Raises ValueError for another shape, TypeError for non-integers, IndexError for a token
        outside the vocabulary."""
        self.check_tokens(input_ids)
        batch = self._whole(*input_ids.shape)
        hidden = self.hidden_states(input_ids.flatten(), batch)
        return self.lm_head(hidden).view(*input_ids.shape, -1)

    def forward_train(self, input_ids: torch.Tensor) -> TrainOutput:
        """The forward of a training step over input_ids [b, s], s > MTP depth; differentiable."""
        self.check_tokens(input_ids)
        b, s = input_ids.shape
        if s <= len(self.mtp):
            raise ValueError(f"input_ids: expected more than {len(self.mtp)} tokens a row, got {s}")
        router: list[RouterStats] = []
        embedded = self.embed(input_ids)
        batch = self._whole(b, s)
        rotation = self.rotary(batch.positions)
        x = embedded.flatten(0, 1)
        for layer in self.layers:
            x = layer(x, rotation, batch, None, router)
        hidden = self.norm(x).view(b, s, -1)
        logits = self.lm_head(hidden.flatten(0, 1)).view(b, s, -1)
        mtp_logits = []
        previous = hidden
        for depth, module in enumerate(self.mtp, start=1):
            kept = s - depth
            batch = self._whole(b, kept)
            previous = module(
                previous[:, :kept].flatten(0, 1),
                embedded[:, depth:].flatten(0, 1),
                self.rotary(batch.positions),
                batch,
                None,
                router,
            ).view(b, kept, -1)
            mtp_logits.append(self.lm_head(previous.flatten(0, 1)).view(b, kept, -1))
        return TrainOutput(logits, mtp_logits, router, hidden)

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens [...] -> [..., d]."""
        return nn.functional.embedding(tokens, self.embed_tokens.weight)

    def hidden_states(self, tokens: torch.Tensor, batch: TokenBatch) -> torch.Tensor:
        """tokens [t] as `batch` lays them out -> [t, d] after the final norm; fills its cache."""
        pools = batch.cache.pools if batch.cache else [None] * len(self.layers)
        rotation = self.rotary(batch.positions)
        x = self.embed(tokens)
        for layer, pool in zip(self.layers, pools, strict=False):
            x = layer(x, rotation, batch, pool)
        return self.norm(x)

    def mtp_hidden_states(
        self, depth: int, hidden: torch.Tensor, tokens: torch.Tensor, batch: TokenBatch
    ) -> torch.Tensor:
        """One MTP module: hidden [t, d] of depth - 1 and tokens [t], each `depth` after its
        position, -> [t, d] ready for the head. depth counts from 1."""
        pool = batch.cache.pools[len(self.layers) + depth - 1] if batch.cache else None
        rotation = self.rotary(batch.positions)
        return self.mtp[depth - 1](hidden, self.embed(tokens), rotation, batch, pool)

    def new_cache(
        self, num_tokens: int, *, page_size: int = 64, **options: Any
    ) -> PagedLatentCache:
        """A cache with room for `num_tokens` in sequences that share no page."""
        options.setdefault("dtype", self.dtype)
        options.setdefault("device", self.device)
        num_pages = max(1, -(-num_tokens // page_size))
        return PagedLatentCache(self.config, num_pages, page_size=page_size, **options)

    def check_tokens(self, input_ids: torch.Tensor) -> None:
        """Refuse what would index outside the embedding, or is not [b, s] integers."""
        if input_ids.dim() != 2 or input_ids.numel() == 0:
            raise ValueError(f"input_ids: expected shape [b, s], got {tuple(input_ids.shape)}")
        if input_ids.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"input_ids: expected int64 or int32, got {input_ids.dtype}")
        low, high = int(input_ids.min()), int(input_ids.max())
        if low < 0 or high >= self.config.vocab_size:
            raise IndexError(
                f"input_ids: expected tokens in 0..{self.config.vocab_size - 1}, "
                f"got {low if low < 0 else high}"
            )

    def _whole(self, b: int, s: int) -> TokenBatch:
        return TokenBatch([s] * b, [0] * b, self.device)

    # ---- checkpoints and text -------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> DeepseekV3:
        """Load a Hugging Face checkpoint (safetensors); see `model.weights.load`."""
        from model.weights import load

        return load(directory, dtype=dtype, device=device)

    def save_pretrained(self, directory: str | Path, **options: Any) -> None:
        """Write a Hugging Face checkpoint; see `model.weights.save` for the options."""
        from model.weights import save

        save(self, directory, **options)

    def generate(self, prompts: torch.Tensor | Iterable[list[int]], **options: Any) -> Generation:
        """Continue `prompts`; see `model.generate.generate` for the options and the result."""
        from model.generate import generate

        return generate(self, prompts, **options)

    def stream(
        self, prompts: torch.Tensor | Iterable[list[int]], **options: Any
    ) -> Iterator[tuple[int, list[int]]]:
        """Like `generate`, yielding (prompt index, new tokens) as they are known."""
        from model.generate import stream

        return stream(self, prompts, **options)
