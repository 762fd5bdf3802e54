"""The result of a placement, and its use at dispatch."""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Steps of an irrational rotation spread the occurrences of an expert evenly over [0, 1), whatever
# their number: every prefix of a batch splits close to the shares.
GOLDEN = 0.6180339887498949


@dataclass(frozen=True)
class Placement:
    """Experts on slots. L layers, E experts, P slots, X most replicas of one expert.

    phy2log   int64 [L, P]: the expert of each slot; -1: an empty slot (dead GPU)
    log2phy   int64 [L, E, X]: the slots of each expert, padded with -1
    logcnt    int64 [L, E]: replicas of each expert
    share     fp64 [L, P]: the part of its expert's traffic that a slot takes; sums to 1 per expert
    gpu       int64 [P]: the GPU of each slot
    max_load  fp64 [L]: load of the fullest GPU under `share`
    moves     int64 [L]: replicas that a GPU must fetch, compared with `previous` (0 without one)
    """

    phy2log: torch.Tensor
    log2phy: torch.Tensor
    logcnt: torch.Tensor
    share: torch.Tensor
    gpu: torch.Tensor
    max_load: torch.Tensor
    moves: torch.Tensor

    def replicas(
        self,
        layer: int,
        topk_idx: torch.Tensor,
        *,
        offset: int = 0,
        alive: list[bool] | None = None,
    ) -> torch.Tensor:
        """Slot numbers for a router's choice topk_idx int64 [t, k]; dispatch over P "experts".

        The i-th mention of an expert goes to the replica whose share covers the fractional part of
        (i + 1 + offset) * 0.618...: deterministic, close to the shares in every batch. Give each
        rank its own offset. alive, one bool a GPU, takes dead GPUs out and splits their traffic
        over the rest in proportion; an expert without a replica alive becomes -1.
        """
        experts = self.phy2log_width(layer, topk_idx)
        share = self.share[layer]
        if alive is not None:
            if len(alive) != int(self.gpu.max()) + 1:
                raise ValueError(
                    f"alive: expected {int(self.gpu.max()) + 1} entries, got {len(alive)}"
                )
            share = torch.where(torch.tensor(alive)[self.gpu], share, 0.0)
        slots = self.log2phy[layer]  # [E, X]
        parts = torch.where(slots >= 0, share[slots.clamp(min=0)], 0.0)
        if alive is not None:
            # A living replica of share 0 still serves when it is all that is left.
            up = (slots >= 0) & torch.tensor(alive)[self.gpu][slots.clamp(min=0)]
            parts = torch.where(parts.sum(1, keepdim=True) > 0, parts, up.double())
        total = parts.sum(1, keepdim=True)
        ends = parts.cumsum(1) / total.clamp(min=1e-300)

        flat = topk_idx.flatten()
        kept = flat.clamp(min=0)
        u = ((_occurrence(flat, experts) + 1 + offset).double() * GOLDEN) % 1.0
        # The first replica whose interval ends behind u; rounding cannot run past the last share.
        pick = (ends[kept] <= u[:, None]).sum(1)
        last = (parts > 0).long().mul(torch.arange(1, parts.shape[1] + 1)).amax(1) - 1
        pick = torch.minimum(pick, last[kept].clamp(min=0))
        chosen = torch.where((flat >= 0) & (total[kept, 0] > 0), slots[kept, pick], -1)
        return chosen.view_as(topk_idx)

    def phy2log_width(self, layer: int, topk_idx: torch.Tensor) -> int:
        """E, after checking that layer and topk_idx fit."""
        layers, experts = self.logcnt.shape
        if not 0 <= layer < layers:
            raise ValueError(f"layer: expected 0 .. {layers - 1}, got {layer}")
        if topk_idx.dtype != torch.int64:
            raise ValueError(f"topk_idx: expected int64, got {topk_idx.dtype}")
        if topk_idx.numel() and not -1 <= topk_idx.min() <= topk_idx.max() < experts:
            raise ValueError(
                f"topk_idx: expected values in [-1, {experts}), got "
                f"{int(topk_idx.min())} .. {int(topk_idx.max())}"
            )
        return experts


def _occurrence(flat: torch.Tensor, experts: int) -> torch.Tensor:
    """For every entry, how many equal entries stand before it."""
    order = torch.argsort(flat, stable=True)
    counts = torch.bincount(flat + 1, minlength=experts + 1)
    begin = counts.cumsum(0) - counts
    rank = torch.empty_like(flat)
    rank[order] = torch.arange(len(flat)) - begin[flat[order] + 1]
    return rank
