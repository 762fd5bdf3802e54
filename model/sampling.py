"""Choosing the next token from logits: greedy, or by temperature and nucleus (top-p).

The random draw for a token depends on (seed, sequence, position) and nothing else. So batching,
chunked prefill and speculation, which change the order of the work, do not change the text.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

_MASK = (1 << 64) - 1


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy; top_p keeps the fewest tokens that have that much probability."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature: expected 0 or more, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: expected more than 0 and at most 1, got {self.top_p}")

    def pick(self, logits: torch.Tensor, keys: list[tuple[int, int]]) -> list[int]:
        """logits [n, vocab], keys n pairs (sequence, position) -> n tokens.

        Greedy ties go to the lowest token. FloatingPointError for NaN logits."""
        logits = logits.float()
        if bool(logits.isnan().any()):
            raise FloatingPointError("logits: NaN; the model's weights or activations overflowed")
        if self.temperature == 0:
            return logits.argmax(-1).tolist()
        probs = torch.softmax(logits.double() / self.temperature, dim=-1)
        probs, order = probs.sort(dim=-1, descending=True, stable=True)
        before = probs.cumsum(-1) - probs
        probs = probs.masked_fill(before >= self.top_p, 0.0)  # the first token always stays
        draws = torch.tensor([uniform(self.seed, *key) for key in keys], dtype=torch.float64)
        limits = draws.to(probs.device)[:, None] * probs.sum(-1, keepdim=True)
        rank = (probs.cumsum(-1) <= limits).sum(-1, keepdim=True)
        rank = torch.minimum(rank, (probs > 0).sum(-1, keepdim=True) - 1)
        return order.gather(-1, rank)[:, 0].tolist()


def uniform(seed: int, sequence: int, position: int) -> float:
    """A number in [0, 1) that looks random and depends on the arguments alone (splitmix64)."""
    state = seed & _MASK
    for value in (sequence, position):
        state = _mix((state + (value + 1) * 0x9E3779B97F4A7C15) & _MASK)
    return (state >> 11) * 2.0**-53


def _mix(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)
