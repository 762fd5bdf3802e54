"""Logits against transformers' DeepseekV3 and DeepseekV2, by checkpoints in both directions."""

import pytest
import torch
from model_support import ATOL, assert_close, hf_load, hf_logits, hf_v2, hf_v3, random_ours, tokens

from model import DeepseekConfig, DeepseekV3

V3_CASES = {
    "yarn": dict(),
    "no yarn": dict(yarn=False),
    "negative biases": dict(bias_shift=-1.2),
    "no query latent": dict(q_lora_rank=None),
    "half-split rope": dict(rope_interleave=False),
    "one group": dict(n_group=1, topk_group=1),
    "no renormalisation": dict(norm_topk_prob=False),
    "all dense": dict(first_k_dense_replace=3),
}
V2_CASES = {
    "V2": dict(),
    "V2-Lite": dict(q_lora_rank=None, topk_method="greedy", routed_scaling_factor=1.0),
}


@pytest.mark.filterwarnings("ignore:.*announces 1 MTP module")
@pytest.mark.parametrize("case", V3_CASES)
def test_v3_logits_of_a_transformers_checkpoint(case, tmp_path):
    theirs = hf_v3(seed=1, **V3_CASES[case])
    theirs.save_pretrained(tmp_path / "hf")
    ours = DeepseekV3.from_pretrained(tmp_path / "hf")
    ids = tokens(2, 33)
    expected = hf_logits(theirs, ids)
    assert expected.abs().max() > 1  # a model whose logits vanish would prove nothing
    with torch.no_grad():
        assert_close(ours(ids), expected)


@pytest.mark.parametrize("case", V2_CASES)
def test_v2_logits_of_a_transformers_checkpoint(case, tmp_path):
    theirs = hf_v2(seed=2, **V2_CASES[case])
    theirs.save_pretrained(tmp_path / "hf")
    ours = DeepseekV3.from_pretrained(tmp_path / "hf")
    ids = tokens(2, 29)
    with torch.no_grad():
        assert_close(ours(ids), hf_logits(theirs, ids))


@pytest.mark.parametrize("yarn", [True, False])
def test_transformers_reads_our_v3_checkpoint(yarn, tmp_path):
    from model.config import YarnConfig

    yarn_config = YarnConfig(original_max_position_embeddings=16) if yarn else None
    ours = random_ours(DeepseekConfig.tiny(yarn=yarn_config), seed=3)
    ours.save_pretrained(tmp_path / "ours")
    theirs = hf_load(tmp_path / "ours")
    ids = tokens(2, 31)
    with torch.no_grad():
        assert_close(ours(ids), hf_logits(theirs, ids))


@pytest.mark.parametrize("lite", [False, True])
def test_transformers_reads_our_v2_checkpoint(lite, tmp_path):
    changes = dict(n_group=1, topk_group=1, q_lora_rank=None) if lite else {}
    config = DeepseekConfig.tiny(
        model_type="deepseek_v2",
        scoring_func="softmax",
        norm_topk_prob=False,
        routed_scaling_factor=4.0,
        n_shared_experts=2,
        num_nextn_predict_layers=0,
        **changes,
    )
    ours = random_ours(config, seed=4)
    ours.save_pretrained(tmp_path / "ours")
    ids = tokens(2, 31)
    with torch.no_grad():
        assert_close(ours(ids), hf_logits(hf_load(tmp_path / "ours"), ids))


@pytest.mark.filterwarnings("ignore:.*announces 1 MTP module")
def test_bfloat16_stays_near_fp32(tmp_path):
    """Means, not maxima: rounding flips a routing decision here and there."""
    theirs = hf_v3(seed=5)
    theirs.save_pretrained(tmp_path / "hf")
    ours = DeepseekV3.from_pretrained(tmp_path / "hf", dtype=torch.bfloat16)
    assert ours.dtype == torch.bfloat16
    assert all(gate.bias.dtype == torch.float32 for gate in ours.moe_gates())
    ids = tokens(2, 33)
    with torch.no_grad():
        error = (ours(ids).float() - hf_logits(theirs, ids)).abs().mean()
        their_error = hf_logits(theirs.bfloat16(), ids).float() - hf_logits(theirs.float(), ids)
    assert error < 0.05
    assert their_error.abs().max() > ATOL


def test_forward_train_gives_the_logits_of_forward():
    ours = random_ours(seed=6)
    ids = tokens(3, 19)
    with torch.no_grad():
        out = ours.forward_train(ids)
        assert_close(out.logits, ours(ids))
    assert [tuple(x.shape) for x in out.mtp_logits] == [(3, 18, 131)]
    assert len(out.router) == len(ours.moe_gates()) == 3  # two of the main model, one of MTP
    assert [int(stats.counts.sum()) for stats in out.router] == [3 * 19 * 4] * 2 + [3 * 18 * 4]
