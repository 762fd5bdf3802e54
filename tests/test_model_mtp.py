"""Multi-token prediction against transformers' MtpModel on checkpoints of ours."""

import pytest
import torch
from model_support import assert_close, hf_load, random_ours, tokens

from model import DeepseekConfig
from model.config import YarnConfig


@pytest.fixture
def mtp_layers_known(monkeypatch):
    """transformers knows MTP modules as `model.layers.61` only; these models have 3 layers."""
    modeling = pytest.importorskip("transformers.models.deepseek_v3.modeling_deepseek_v3")
    patterns = [r"model\.layers\.[345]\..*"]
    base = modeling.DeepseekV3PreTrainedModel
    monkeypatch.setattr(base, "_keys_to_ignore_on_load_unexpected", patterns)


@pytest.mark.parametrize("depth", [1, 2])
def test_logits_equal_transformers(depth, tmp_path, mtp_layers_known):
    from transformers.modeling_layers import MtpModel

    config = DeepseekConfig.tiny(
        num_nextn_predict_layers=depth, yarn=YarnConfig(original_max_position_embeddings=16)
    )
    ours = random_ours(config, seed=depth)
    ours.save_pretrained(tmp_path / "ckpt")
    theirs = hf_load(tmp_path / "ckpt")
    mtp = MtpModel.from_pretrained(theirs).float().eval()
    ids = tokens(2, 23)
    with torch.no_grad():
        out = ours.forward_train(ids)
        hidden = theirs.model(input_ids=ids, use_cache=False).last_hidden_state
        for k in range(1, depth + 1):
            kept = 23 - k
            # Positions count from the embedded token, ours from the hidden state: RoPE is relative.
            hidden = mtp.forward_layer(
                k - 1,
                hidden[:, :kept],
                torch.arange(k, kept + k)[None],
                None,
                input_ids=ids[:, k:],
            )
            assert_close(out.mtp_logits[k - 1], mtp.shared_head(hidden))


def test_speculative_text_equals_transformers(tmp_path, mtp_layers_known):
    ours = random_ours(seed=3)
    ours.save_pretrained(tmp_path / "ckpt")
    theirs = hf_load(tmp_path / "ckpt")
    ids = tokens(1, 9)
    expected = theirs.generate(
        ids, max_new_tokens=16, do_sample=False, use_mtp=True, eos_token_id=None
    )
    text = ours.generate(ids, max_new_tokens=16, use_mtp=True, eos_token_id=None)
    assert text.tokens == expected[:, 9:].tolist()


def test_every_part_of_the_module_matters():
    """Gradients reach all MTP weights from the MTP logits alone, and the shared ones too."""
    ours = random_ours(seed=4)
    ours.forward_train(tokens(2, 17)).mtp_logits[0].square().mean().backward()
    for name, value in ours.named_parameters():
        if name.startswith(("mtp.", "embed_tokens.", "lm_head.")):
            assert value.grad is not None and value.grad.abs().sum() > 0, name
