"""Configurations: the named models, Hugging Face's two forms of config.json, refusals."""

import dataclasses
import json

import pytest
import torch

from model import DeepseekConfig, DeepseekV3
from model.config import YarnConfig
from model.rotary import Rotary, inverse_frequencies


def parameters(config, prefix=""):
    with torch.device("meta"):
        model = DeepseekV3(config)
    return sum(p.numel() for name, p in model.named_parameters() if name.startswith(prefix))


@pytest.mark.parametrize(
    "config, billions",
    [
        (DeepseekConfig.v3(), 671.03 + 11.61),  # the main model, and the MTP module's own
        (DeepseekConfig.v2(), 235.74),
        (DeepseekConfig.v2_lite(), 15.71),
    ],
)
def test_sizes_of_the_published_models(config, billions):
    assert abs(parameters(config) / 1e9 - billions) < 0.01


def test_v3_figures():
    config = DeepseekConfig.v3()
    assert parameters(config, "mtp.") / 1e9 == pytest.approx(11.61, abs=0.01)
    assert config.latent_dim == 576 and config.qk_head_dim == 192
    mscale = 0.1 * 3.6888794541139363 + 1  # 0.1 ln 40 + 1
    assert config.softmax_scale == pytest.approx(192**-0.5 * mscale**2)
    assert config.yarn.rotation_scale == 1.0
    per_token = 61 * config.latent_dim * 2 / 1000  # bf16, all main layers
    assert per_token == pytest.approx(70.3, abs=0.1)
    small = parameters(DeepseekConfig.small_bytes())
    assert 1.5e6 < small < 4e6


@pytest.mark.parametrize("name", ["v3", "v2", "v2_lite", "small_bytes", "tiny"])
def test_config_json_round_trip(name):
    config = getattr(DeepseekConfig, name)()
    assert DeepseekConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config


# config.json of DeepSeek-V3 as published.
PUBLISHED = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
    "aux_loss_alpha": 0.001,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "initializer_range": 0.02,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 129280,
}


def test_the_published_config_is_v3():
    config = DeepseekConfig.from_hf(PUBLISHED)
    expected = dataclasses.replace(
        DeepseekConfig.v3(), initializer_range=0.02, extra=config.extra
    )  # 0.006 in the report
    assert config == expected
    written = config.to_hf()
    assert "auto_map" not in written and "quantization_config" not in written
    kept = PUBLISHED.keys() - {"auto_map", "quantization_config", "attention_bias"}
    fixed = {"ep_size", "moe_layer_freq"}  # one value only is supported: not worth writing
    assert {name: written[name] for name in kept - fixed} == {n: PUBLISHED[n] for n in kept - fixed}


def test_unknown_keys_survive():
    hf = {**DeepseekConfig.tiny().to_hf(), "aux_loss_alpha": 0.001, "my_note": [1, 2]}
    config = DeepseekConfig.from_hf(hf)
    assert config.extra["my_note"] == [1, 2]
    assert config.to_hf()["aux_loss_alpha"] == 0.001


def test_both_forms_of_rope():
    published = DeepseekConfig.v3().to_hf()
    modern = dict(published)
    scaling = dict(modern.pop("rope_scaling"))
    theta = modern.pop("rope_theta")
    kind = scaling.pop("type")
    modern["rope_parameters"] = {**scaling, "rope_type": kind, "rope_theta": theta}
    assert DeepseekConfig.from_hf(modern) == DeepseekConfig.from_hf(published)


def test_absent_mscales_scale_the_rotation():
    """Plain YaRN: the magnitude sits on cos and sin, none on the softmax."""
    hf = DeepseekConfig.v3().to_hf()
    for name in ("mscale", "mscale_all_dim"):
        del hf["rope_scaling"][name]
    config = DeepseekConfig.from_hf(hf)
    assert config.yarn.softmax_scale == 1.0
    assert config.yarn.rotation_scale == pytest.approx(1.3688879)


@pytest.mark.parametrize("original", [16, 4096])
def test_frequencies_equal_transformers(original):
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = DeepseekConfig.tiny(
        qk_rope_head_dim=64, yarn=YarnConfig(original_max_position_embeddings=original)
    )
    theirs = transformers.DeepseekV3Config(**config.to_hf())
    expected, scale = ROPE_INIT_FUNCTIONS["yarn"](theirs)
    assert torch.allclose(inverse_frequencies(config), expected, rtol=1e-6, atol=0)
    assert scale == config.yarn.rotation_scale
    rotary = Rotary(config).to(torch.bfloat16)
    cos, _ = rotary(torch.tensor([0, 5000]))
    assert cos.dtype == torch.float32
    assert torch.allclose(cos[1], (5000 * expected).cos(), atol=1e-3)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(model_type="llama"), "model_type"),
        (dict(attention_bias=True), "attention_bias: only False"),
        (dict(hidden_act="gelu"), "hidden_act: only 'silu'"),
        (dict(tie_word_embeddings=True), "tie_word_embeddings"),
        (dict(num_key_value_heads=2), "num_key_value_heads: MLA"),
        (dict(topk_method="greedy"), "topk_method"),
        (dict(scoring_func="tanh"), "scoring_func"),
        (dict(scoring_func="softmax"), "norm_topk_prob"),
        (dict(n_group=3), "n_routed_experts: expected a multiple of n_group 3"),
        (dict(n_group=16, topk_group=4), "only one"),
        (dict(topk_group=5), "topk_group: expected at most n_group 4"),
        (dict(num_experts_per_tok=9), "at most the 8 experts of 2 groups"),
        (dict(hidden_size=0), "hidden_size: expected a positive size"),
        (dict(hidden_size="64"), "hidden_size: expected an integer"),
        (dict(q_lora_rank=-1), "q_lora_rank"),
        (dict(qk_rope_head_dim=7), "qk_rope_head_dim: expected an even"),
        (dict(torch_dtype="int8"), "torch_dtype"),
        (dict(rope_scaling={"type": "linear", "factor": 2.0}), "rope_scaling.type"),
        (dict(rope_scaling={"type": "yarn"}), "rope_scaling.factor"),
        (dict(rope_scaling={"type": "yarn", "factor": 2.0, "truncate": False}), "truncate"),
    ],
)
def test_impossible_configs_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        DeepseekConfig.from_hf({**DeepseekConfig.tiny().to_hf(), **changes})


@pytest.mark.parametrize("text", ["{", "[]", "\udcff"])
def test_bad_config_json_is_refused(text, tmp_path):
    (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match="config.json"):
        DeepseekConfig.load(tmp_path)


def test_other_quantisations_are_refused(tmp_path):
    from model.checkpoint import Checkpoint
    from model.safetensors_file import CheckpointError

    found = {"quant_method": "gptq", "bits": 4}
    hf = {**DeepseekConfig.tiny().to_hf(), "quantization_config": found}
    (tmp_path / "config.json").write_text(json.dumps(hf))
    with pytest.raises(CheckpointError, match="quant_method 'fp8'.*got 'gptq'"):
        Checkpoint(tmp_path)
