"""The sizes of a DeepSeek-style model, and its FLOPs and parameters by part.

Counts are per token of one sequence unless said otherwise; a multiply-add is 2 FLOPs.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path

from .actions import ScheduleError


@dataclass(frozen=True)
class ModelSpec:
    """Multi-head latent attention with mixture-of-experts layers. Defaults: DeepSeek-V3
    (its report, section 4.2, and the published config.json)."""

    name: str = "deepseek-v3"
    hidden: int = 7168
    layers: int = 61
    dense_layers: int = 3
    heads: int = 128
    q_lora: int = 1536
    kv_lora: int = 512
    qk_nope: int = 128
    qk_rope: int = 64
    v_head: int = 128
    dense_inter: int = 18432
    expert_inter: int = 2048
    experts: int = 256
    shared_experts: int = 1
    topk: int = 8
    groups_per_token: int = 4
    vocab: int = 129280
    mtp_layers: int = 1

    @property
    def qk_head(self) -> int:
        return self.qk_nope + self.qk_rope

    # (n, k) of the linear layers, as y[m, n] = x[m, k] w[n, k]^T
    @property
    def attention_linears(self) -> list[tuple[int, int]]:
        return [
            (self.q_lora + self.kv_lora + self.qk_rope, self.hidden),
            (self.heads * self.qk_head, self.q_lora),
            (self.heads * (self.qk_nope + self.v_head), self.kv_lora),
            (self.hidden, self.heads * self.v_head),
        ]

    @property
    def recomputed_linears(self) -> list[tuple[int, int]]:
        """The up-projections that the backward recomputes instead of keeping their outputs
        (report, 3.2.3)."""
        return self.attention_linears[1:3]

    @property
    def expert_linears(self) -> list[tuple[int, int]]:
        return [(2 * self.expert_inter, self.hidden), (self.hidden, self.expert_inter)]

    @property
    def dense_linears(self) -> list[tuple[int, int]]:
        return [(2 * self.dense_inter, self.hidden), (self.hidden, self.dense_inter)]

    @property
    def attention_params(self) -> int:
        return sum(n * k for n, k in self.attention_linears)

    @property
    def expert_params(self) -> int:
        return sum(n * k for n, k in self.expert_linears)

    @property
    def gate_params(self) -> int:
        return self.experts * self.hidden

    @property
    def moe_params(self) -> int:
        """All parameters of one MoE layer."""
        routed = (self.experts + self.shared_experts) * self.expert_params
        return self.attention_params + routed + self.gate_params

    @property
    def dense_params(self) -> int:
        return self.attention_params + sum(n * k for n, k in self.dense_linears)

    @property
    def head_params(self) -> int:
        return self.vocab * self.hidden

    @property
    def total_params(self) -> int:
        """Without multi-token prediction, as the published 671B."""
        moe = (self.layers - self.dense_layers) * self.moe_params
        return moe + self.dense_layers * self.dense_params + 2 * self.head_params

    @property
    def active_params(self) -> int:
        """Parameters that multiply one token, embedding look-up aside."""
        per_moe = self.attention_params + self.gate_params
        per_moe += (self.topk + self.shared_experts) * self.expert_params
        moe = (self.layers - self.dense_layers) * per_moe
        return moe + self.dense_layers * self.dense_params + self.head_params

    def attention_core_flops(self, context: float) -> float:
        """Scores and values of one query over `context` keys, one layer."""
        return 2 * self.heads * (self.qk_head + self.v_head) * context

    def forward_flops(self, sequence: int, *, causal: bool = True) -> float:
        """Model FLOPs per token of a forward pass; multi-token prediction not counted."""
        context = sequence / 2 if causal else sequence
        return 2 * self.active_params + self.layers * self.attention_core_flops(context)

    def training_flops(self, sequence: int, *, causal: bool = True) -> float:
        return 3 * self.forward_flops(sequence, causal=causal)

    def nodes_per_token(self, nodes: int) -> float:
        """Mean number of nodes a token visits under node-limited uniform routing."""
        allowed = min(nodes, self.groups_per_token)
        pool = self.experts * allowed // max(nodes, 1)
        outside = pool - pool // allowed
        miss = 1.0  # probability that none of the top-k falls on one allowed node
        for i in range(self.topk):
            miss *= max(0, outside - i) / (pool - i)
        return allowed * (1 - miss)


# config.json of Hugging Face checkpoints -> our fields
_HF = {
    "hidden_size": "hidden",
    "num_hidden_layers": "layers",
    "first_k_dense_replace": "dense_layers",
    "num_attention_heads": "heads",
    "q_lora_rank": "q_lora",
    "kv_lora_rank": "kv_lora",
    "qk_nope_head_dim": "qk_nope",
    "qk_rope_head_dim": "qk_rope",
    "v_head_dim": "v_head",
    "intermediate_size": "dense_inter",
    "moe_intermediate_size": "expert_inter",
    "n_routed_experts": "experts",
    "n_shared_experts": "shared_experts",
    "num_experts_per_tok": "topk",
    "topk_group": "groups_per_token",
    "vocab_size": "vocab",
    "num_nextn_predict_layers": "mtp_layers",
}


def model_spec(name: str) -> ModelSpec:
    """`deepseek-v3`, or a config.json in Hugging Face's or in our own field names."""
    if name == "deepseek-v3":
        return ModelSpec()
    if not name.endswith(".json"):
        raise ScheduleError(f"model must be deepseek-v3 or a .json file; got {name!r}")
    table = json.loads(Path(name).read_text())
    own = {f.name for f in fields(ModelSpec)}
    given = {_HF.get(k, k): v for k, v in table.items() if _HF.get(k, k) in own and v is not None}
    return ModelSpec(**{**given, "name": Path(name).stem})
