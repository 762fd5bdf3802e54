"""Stages for the pipeline runtime's tests, their data, and their single-process gradients."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from dskernels.pipeline import Op

HIDDEN, TOKENS = 16, 6  # per micro-batch


class MLP(nn.Module):
    """Two linears with biases around a GELU, a norm before, a residual around."""

    def __init__(self, hidden: int = HIDDEN):
        super().__init__()
        self.norm = nn.LayerNorm(hidden)
        self.up = nn.Linear(hidden, 2 * hidden)
        self.down = nn.Linear(2 * hidden, hidden, bias=False)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(self.norm(x))))


class V3Block(nn.Module):
    """Latent attention with rotary part and a mixture of experts with shared expert and sigmoid
    gate, in plain torch so that it runs in any dtype. x [tokens, hidden] -> the same."""

    def __init__(self, hidden: int = HIDDEN, heads: int = 2, experts: int = 4, topk: int = 2):
        super().__init__()
        self.heads, self.nope, self.rope, self.topk = heads, 4, 4, topk
        self.norm1, self.norm2 = nn.RMSNorm(hidden), nn.RMSNorm(hidden)
        self.q_a, self.q_norm = nn.Linear(hidden, 8, bias=False), nn.RMSNorm(8)
        self.q_b = nn.Linear(8, heads * (self.nope + self.rope), bias=False)
        self.kv_a, self.kv_norm = nn.Linear(hidden, 6 + self.rope, bias=False), nn.RMSNorm(6)
        self.kv_b = nn.Linear(6, heads * 2 * self.nope, bias=False)
        self.out = nn.Linear(heads * self.nope, hidden, bias=False)
        self.gate = nn.Linear(hidden, experts, bias=False)
        self.experts = nn.ModuleList(
            nn.ModuleList([nn.Linear(hidden, 16, bias=False), nn.Linear(8, hidden, bias=False)])
            for _ in range(experts + 1)
        )

    def attention(self, x):
        t = x.shape[0]
        q = self.q_b(self.q_norm(self.q_a(x))).view(t, self.heads, -1)
        latent, k_rope = self.kv_a(x).split([6, self.rope], -1)
        k, v = self.kv_b(self.kv_norm(latent)).view(t, self.heads, -1).chunk(2, -1)
        angle = torch.arange(t, dtype=x.dtype)[:, None] / torch.tensor([1.0, 10.0], dtype=x.dtype)

        def rotate(y):  # [t, h, rope]
            a, b = y.chunk(2, -1)
            cos, sin = angle.cos()[:, None], angle.sin()[:, None]
            return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)

        q_nope, q_rope = q.split([self.nope, self.rope], -1)
        shared = rotate(k_rope[:, None]).expand(-1, self.heads, -1)
        q, k = torch.cat([q_nope, rotate(q_rope)], -1), torch.cat([k, shared], -1)
        scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
        mask = torch.ones(t, t, dtype=torch.bool).triu(1)
        weights = scores.masked_fill(mask, float("-inf")).softmax(-1)
        return self.out(torch.einsum("hqk,khd->qhd", weights, v).reshape(t, -1))

    def expert(self, index, x):
        up, down = self.experts[index]
        gate, value = up(x).chunk(2, -1)
        return down(F.silu(gate) * value)

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        y = self.norm2(x)
        scores = self.gate(y).sigmoid()
        picked = scores.topk(self.topk, -1).indices
        chosen = torch.zeros_like(scores).scatter(-1, picked, 1.0)
        weights = scores * chosen
        weights = weights / weights.sum(-1, keepdim=True)
        total = self.expert(len(self.experts) - 1, y)
        for e in range(len(self.experts) - 1):
            total = total + weights[:, e : e + 1] * self.expert(e, y)
        return x + total


class ManyTensors(nn.Module):
    """A signature of its own: two tensors and an index list in, three out."""

    def __init__(self, hidden: int = HIDDEN):
        super().__init__()
        self.mix = nn.Linear(hidden, hidden)
        self.scale = nn.Parameter(torch.ones(hidden))

    def forward(self, x, side, index, *, gain):
        y = torch.tanh(self.mix(x)) * self.scale * gain
        return y, side + y[index].sum(0), index


class ModelBlock(nn.Module):
    """One layer of the end-to-end model, router and experts included. x [tokens, hidden]."""

    def __init__(self, hidden: int = HIDDEN):
        super().__init__()
        from model import DeepseekConfig, DeepseekV3

        config = DeepseekConfig(
            vocab_size=11, hidden_size=hidden, intermediate_size=24, moe_intermediate_size=8,
            num_hidden_layers=1, num_attention_heads=2, n_shared_experts=1, n_routed_experts=8,
            num_experts_per_tok=2, n_group=2, topk_group=1, first_k_dense_replace=0,
            kv_lora_rank=8, q_lora_rank=12, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8,
        )  # fmt: skip
        whole = DeepseekV3(config)
        whole.reset_parameters(torch.Generator().manual_seed(int(torch.randint(1 << 30, ()))))
        self.block, self.rotary = whole.layers[0], whole.rotary

    def forward(self, x):
        from model.cache import TokenBatch

        batch = TokenBatch([x.shape[0]], [0], x.device)
        return self.block(x, self.rotary(batch.positions), batch)


KINDS = {"mlp": MLP, "v3": V3Block, "model": ModelBlock}


def build_stages(kind: str, stages: int, dtype: torch.dtype, layers: int = 1) -> list[nn.Module]:
    """The same weights in every process."""
    torch.manual_seed(7)
    total = [KINDS[kind]().to(dtype) for _ in range(stages * layers)]
    return [nn.Sequential(*total[s * layers : (s + 1) * layers]) for s in range(stages)]


def batches(count: int, dtype: torch.dtype) -> tuple[list, list]:
    g = torch.Generator().manual_seed(11)

    def shape():
        return torch.randn(TOKENS, HIDDEN, generator=g, dtype=torch.float64).to(dtype)

    return [(shape(),) for _ in range(count)], [(shape(),) for _ in range(count)]  # fmt: skip


def reference(kind: str, schedule, dtype, layers: int = 1) -> tuple[dict, dict]:
    """Single-process gradients, summed in the schedule's order: per stage over the micro-batches
    as its weight gradients happen, per direction, then direction 0 plus direction 1."""
    inputs, targets = batches(schedule.num_microbatches, dtype)
    sums: list[list[dict]] = []
    losses = {}
    for d in range(schedule.num_directions):
        stages = build_stages(kind, schedule.num_stages, dtype, layers)
        grads: dict[tuple[int, int], list] = {}
        for mb in schedule.microbatches_of(d):
            x = inputs[mb][0]
            for stage in stages:
                stage.zero_grad()
                x = stage(x)
            loss = F.mse_loss(x, targets[mb][0])
            loss.backward()
            losses[mb] = loss.detach()
            for s, stage in enumerate(stages):
                grads[s, mb] = [p.grad.clone() for p in stage.parameters()]
        sums.append(_sum_in_order(schedule, d, grads))
    total = sums[0]
    for other in sums[1:]:
        total = {s: [a + b for a, b in zip(total[s], other[s], strict=True)] for s in total}
    return total, losses


def _sum_in_order(schedule, direction: int, grads: dict) -> dict[int, list]:
    total: dict[int, list] = {}
    for acts in schedule.actions:
        for action in acts:
            for a in action.atoms:
                # Deferred linears add at W, everything else at Bi; both run in the same order.
                if a.op in (Op.B, Op.W) and a.direction == direction:
                    new = grads[a.stage, a.microbatch]
                    old = total.get(a.stage)
                    total[a.stage] = (
                        [g.clone() for g in new]
                        if old is None
                        else [x + y for x, y in zip(old, new, strict=True)]
                    )
    return total
