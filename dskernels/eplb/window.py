"""Expert loads of the last steps, gathered while the model runs."""

from __future__ import annotations

from collections import deque

import torch


class LoadWindow:
    """Counts tokens per expert over the last `steps` steps.

    layers, experts  the shape of `load()`
    steps            how many steps count; older ones fall out
    decay            weight of each step relative to the next one, in (0, 1]

    Usage: `add` for every layer of a step, then `step()`; `load()` feeds `rebalance`.
    """

    def __init__(self, layers: int, experts: int, steps: int, decay: float = 1.0) -> None:
        if min(layers, experts, steps) < 1:
            raise ValueError(
                "layers, experts, steps: expected positive numbers, got "
                f"{layers}, {experts}, {steps}"
            )
        if not 0 < decay <= 1:
            raise ValueError(f"decay: expected a number in (0, 1], got {decay}")
        self.decay = decay
        self._current = torch.zeros(layers, experts, dtype=torch.int64)
        self._past: deque[torch.Tensor] = deque(maxlen=steps)

    def __len__(self) -> int:
        return len(self._past)

    def add(self, layer: int, topk_idx: torch.Tensor) -> None:
        """Count the experts a router chose: topk_idx integers of any shape, -1 for none."""
        layers, experts = self._current.shape
        if not 0 <= layer < layers:
            raise ValueError(f"layer: expected 0 .. {layers - 1}, got {layer}")
        chosen = topk_idx[topk_idx >= 0].flatten().cpu()
        if chosen.numel() and int(chosen.max()) >= experts:
            raise ValueError(
                f"topk_idx: expected values in [-1, {experts}), got {int(chosen.max())}"
            )
        self._current[layer] += torch.bincount(chosen, minlength=experts)

    def step(self) -> None:
        """Close the current step."""
        self._past.append(self._current)
        self._current = torch.zeros_like(self._current)

    def load(self, group=None) -> torch.Tensor:
        """fp64 [layers, experts]: the weighted sum over the closed steps of the window.

        group: a torch.distributed process group to add up over; None: this process alone.
        """
        total = torch.zeros(self._current.shape, dtype=torch.float64)
        for age, counts in enumerate(reversed(self._past)):
            total += counts * self.decay**age
        if group is not None:
            torch.distributed.all_reduce(total, group=group)
        return total
