"""Rotary position embedding: the inverse frequencies, plain or YaRN, and cos/sin for positions."""

from __future__ import annotations

import math

import torch
from torch import nn

from model.config import DeepseekConfig, YarnConfig


def inverse_frequencies(config: DeepseekConfig) -> torch.Tensor:
    """[r/2] fp32: radians per position of each rotated pair."""
    r = config.qk_rope_head_dim
    exponents = torch.arange(0, r, 2, dtype=torch.float32, device="cpu") / r
    plain = 1.0 / config.rope_theta**exponents
    if config.yarn is None:
        return plain
    keep = _kept_share(config.yarn, r, config.rope_theta)
    return plain / config.yarn.factor * (1 - keep) + plain * keep


def _kept_share(yarn: YarnConfig, r: int, theta: float) -> torch.Tensor:
    """[r/2] in 0..1: 1 keeps a pair's frequency (it turns often within the original context), 0
    divides it by the factor (arXiv 2309.00071 section 3.2, the ramp over rotations)."""

    def pair_of(rotations: float) -> float:
        wavelengths = yarn.original_max_position_embeddings / (rotations * 2 * math.pi)
        return r * math.log(wavelengths) / (2 * math.log(theta))

    low = max(math.floor(pair_of(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_of(yarn.beta_slow)), r - 1)
    width = high - low if high != low else 0.001
    pairs = torch.arange(r // 2, dtype=torch.float32, device="cpu")
    return 1 - ((pairs - low) / width).clamp(0, 1)


class Rotary(nn.Module):
    """Turns positions into the cos/sin that `dsk.rope` takes."""

    def __init__(self, config: DeepseekConfig) -> None:
        super().__init__()
        self.scale = config.yarn.rotation_scale if config.yarn else 1.0
        # A plain attribute, not a buffer: `module.to(bfloat16)` must never round it.
        self._inv_freq = inverse_frequencies(config)

    def forward(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """positions [t] integer -> cos, sin [t, r/2] fp32 on the same device."""
        if self._inv_freq.device != positions.device:
            self._inv_freq = self._inv_freq.to(positions.device)
        angles = positions.to(torch.float32)[:, None] * self._inv_freq
        return angles.cos() * self.scale, angles.sin() * self.scale
