"""The three terms of the V3 training loss and the held-out measure.

    L = CE(next token) + lambda / D * sum_k CE(MTP depth k) + alpha * sum over gates of L_bal

V3 report (arXiv 2412.19437) sections 2.1.2 (balance) and 2.2 (MTP).
"""

import math
from collections.abc import Sequence

import torch
from torch import nn

from model.data import BOS, HeldOutSet


def next_token_loss(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats of logits [b, s, v] against tokens [b, >= s + 1].

    logits[:, i] predicts tokens[:, i + 1].
    """
    s = logits.shape[1]
    return _cross_entropy(logits, tokens[:, 1 : s + 1])


def mtp_loss(mtp_logits: Sequence[torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
    """Mean over depths k = 1..D of the cross-entropy of mtp_logits[k - 1] [b, s - k, v].

    Depth k at position i predicts tokens[:, i + k + 1].
    """
    losses = [
        _cross_entropy(logits, tokens[:, depth + 1 : depth + 1 + logits.shape[1]])
        for depth, logits in enumerate(mtp_logits, start=1)
    ]
    return torch.stack(losses).mean()


def _cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def sequence_balance_loss(
    topk_idx: torch.Tensor, scores: torch.Tensor, num_sequences: int
) -> torch.Tensor:
    """Complementary sequence-wise balance loss of one gate, without its factor alpha.

    For each sequence sum_i f_i P_i with f_i = N_r / (K_r T) * (tokens routed to expert i) and P_i
    the mean of the scores normalised over all experts; then the mean over sequences. It is 1 at
    perfect balance. f carries no gradient.

    Args:
        topk_idx: [t, k] int64, the t = num_sequences * T tokens in sequence order.
        scores: [t, e] unbiased affinities (V3: sigmoid).
    """
    t, k = topk_idx.shape
    num_experts = scores.shape[1]
    if t % num_sequences:
        raise ValueError(f"num_sequences: expected a divisor of {t} tokens, got {num_sequences}")
    length = t // num_sequences
    load = torch.zeros(num_sequences, num_experts, dtype=scores.dtype)
    load.scatter_add_(
        1, topk_idx.reshape(num_sequences, -1), torch.ones(num_sequences, length * k).to(load)
    )
    f = load * (num_experts / (k * length))
    normalised = scores / (scores.sum(dim=-1, keepdim=True) + 1e-20)
    p = normalised.reshape(num_sequences, length, num_experts).mean(dim=1)
    return (f * p).sum(dim=-1).mean()


@torch.no_grad()
def bits_per_byte(model: nn.Module, held_out: HeldOutSet, batch: int = 8) -> float:
    """Mean -log2 P(byte) of `model` (tokens [b, s] -> logits [b, s, v]) over the held-out bytes.

    Probability that the model gives to special tokens counts against it. Only the context inside
    a window is used.
    """
    was_training = model.training
    model.eval()
    total = 0.0
    for tokens in held_out.windows.split(batch):
        logits = model(tokens[:, :-1]).float().flatten(0, 1)
        targets = tokens[:, 1:].flatten()
        nats = nn.functional.cross_entropy(logits, targets, reduction="none")
        total += float(nats[targets < BOS].double().sum())
    model.train(was_training)
    return total / (held_out.num_bytes * math.log(2))
