"""What the model's tests share: tiny checkpoints made by transformers, the outside oracle."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from model import DeepseekConfig, DeepseekV3

ATOL = 1e-5  # fp32 logits against transformers; its own fp32 differs from its fp64 by 4e-6

YARN = {
    "type": "yarn",
    "factor": 40.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
# Every size differs from every other, so that a swapped dimension cannot pass.
TINY = dict(
    vocab_size=131,
    hidden_size=64,
    intermediate_size=112,
    moe_intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=4,
    n_shared_experts=1,
    n_routed_experts=16,
    num_experts_per_tok=4,
    n_group=4,
    topk_group=2,
    first_k_dense_replace=1,
    kv_lora_rank=32,
    q_lora_rank=40,
    qk_nope_head_dim=16,
    qk_rope_head_dim=8,
    v_head_dim=24,
    max_position_embeddings=640,
)


def hf_v3(seed: int = 0, *, yarn: bool = True, bias_shift: float = 0.0, **changes):
    """A random DeepseekV3ForCausalLM whose every parameter matters: norms and router biases too."""
    transformers = pytest.importorskip("transformers")
    fields = {**TINY, "routed_scaling_factor": 2.5, **changes}
    if yarn:
        fields["rope_scaling"] = dict(YARN)
    config = transformers.DeepseekV3Config(**fields)
    return _randomised(transformers.DeepseekV3ForCausalLM, config, seed, bias_shift)


def hf_v2(seed: int = 0, **changes):
    """A random DeepseekV2ForCausalLM: softmax scores, groups ranked by their best expert."""
    transformers = pytest.importorskip("transformers")
    fields = {
        **TINY,
        "n_shared_experts": 2,
        "topk_method": "group_limited_greedy",
        "routed_scaling_factor": 16.0,
        "norm_topk_prob": False,
        "rope_scaling": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
        **changes,
    }
    config = transformers.DeepseekV2Config(**fields)
    return _randomised(transformers.DeepseekV2ForCausalLM, config, seed, 0.0)


def _randomised(cls, config, seed: int, bias_shift: float):
    config._attn_implementation = "eager"
    torch.manual_seed(seed)
    model = cls(config).eval()
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("e_score_correction_bias"):
                value.copy_(torch.randn_like(value) * 0.3 + bias_shift)
            elif "norm" in name and name.endswith("weight"):
                value.copy_(1 + 0.3 * torch.randn_like(value))
            elif name.endswith("weight") or name.endswith("proj"):
                value.copy_(torch.randn_like(value) * 0.1)
    return model


def random_ours(config: DeepseekConfig | None = None, seed: int = 0) -> DeepseekV3:
    """A random model of ours with norms, biases and weights that all matter."""
    torch.manual_seed(seed)
    model = DeepseekV3(config or DeepseekConfig.tiny()).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.copy_(
                1 + 0.3 * torch.randn_like(value)
                if "norm" in name
                else torch.randn_like(value) * 0.1
            )
        for gate in model.moe_gates():
            if gate.bias is not None:
                gate.bias.copy_(torch.randn_like(gate.bias) * 0.3)
    return model


def hf_load(directory: Path):
    """Load with transformers, fp32 and eager attention."""
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(
        directory, attn_implementation="eager", dtype=torch.float32
    ).eval()


@torch.no_grad()
def hf_logits(model, tokens: torch.Tensor) -> torch.Tensor:
    return model(input_ids=tokens, use_cache=False).logits


def tokens(b: int, s: int, seed: int = 0, vocab: int = 131) -> torch.Tensor:
    return torch.randint(0, vocab, (b, s), generator=torch.Generator().manual_seed(seed))


def assert_close(actual: torch.Tensor, expected: torch.Tensor, atol: float = ATOL) -> None:
    assert actual.shape == expected.shape
    difference = float((actual - expected).abs().max())
    assert difference <= atol, f"max difference {difference:.3g} > {atol:g}"
