"""`eplb`: DeepSeek's expert-parallel load balancer by its own name, with its own results.

`dskernels.eplb.rebalance` places better; this is for code that calls the published function.
"""

from __future__ import annotations

import torch

from ..eplb import greedy

__all__ = ["rebalance_experts"]


def rebalance_experts(
    weight: torch.Tensor, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(phy2log [L, P], log2phy [L, E, X], logcnt [L, E]) for loads weight [L, E]."""
    return greedy(weight, num_replicas, num_groups, num_nodes, num_gpus)
