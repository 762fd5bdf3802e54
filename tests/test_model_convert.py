"""`python -m model.convert`: FP8 to BF16 and back, tensor by tensor, and the two command lines."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from model_support import random_ours
from synthesize import synthesize

from model import DeepseekConfig, DeepseekV3
from model.convert import convert, main
from model.generate import main as generate_main
from model.safetensors_file import CheckpointError
from model.weights import save, stored_in_fp8

FP8 = torch.float8_e4m3fn
ROOT = Path(__file__).resolve().parent.parent
RAGGED = dict(kv_lora_rank=512, qk_rope_head_dim=64, hidden_size=200, moe_intermediate_size=150)


def tensors(directory):
    out = {}
    for path in sorted(directory.glob("*.safetensors")):
        out |= safetensors.torch.load_file(path)
    return out


def test_bf16_to_fp8_equals_saving_in_fp8(tmp_path):
    model = random_ours(DeepseekConfig.tiny(**RAGGED)).bfloat16()
    save(model, tmp_path / "bf16")
    save(model, tmp_path / "fp8", dtype=FP8)
    convert(tmp_path / "bf16", tmp_path / "converted", "fp8", max_shard_bytes=200_000)
    expected, got = tensors(tmp_path / "fp8"), tensors(tmp_path / "converted")
    assert expected.keys() == got.keys()
    for name, value in expected.items():
        assert torch.equal(got[name].view(torch.uint8), value.view(torch.uint8)), name
        is_weight = stored_in_fp8(name)
        assert (value.dtype == FP8) == is_weight and (name + "_scale_inv" in got) == is_weight
    config = json.loads((tmp_path / "converted/config.json").read_text())
    assert config["quantization_config"]["weight_block_size"] == [128, 128]


def test_fp8_to_bf16_is_data_times_scale(tmp_path):
    model = random_ours(DeepseekConfig.tiny(**RAGGED))
    save(model, tmp_path / "fp8", dtype=FP8, max_shard_bytes=150_000)
    (tmp_path / "fp8/tokenizer.json").write_text("{}")
    convert(tmp_path / "fp8", tmp_path / "bf16", "bf16")
    source, got = tensors(tmp_path / "fp8"), tensors(tmp_path / "bf16")
    for name, value in got.items():
        expected = source[name]
        if expected.dtype == FP8:
            scale = source[name + "_scale_inv"]
            wide = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
            expected = expected.float() * wide[: expected.shape[0], : expected.shape[1]]
        if not name.endswith("e_score_correction_bias"):
            expected = expected.bfloat16()
        assert value.dtype == expected.dtype and torch.equal(value, expected), name
    assert not any(name.endswith("_scale_inv") for name in got)
    assert "quantization_config" not in json.loads((tmp_path / "bf16/config.json").read_text())
    assert (tmp_path / "bf16/tokenizer.json").read_text() == "{}"
    model = DeepseekV3.from_pretrained(tmp_path / "bf16")
    assert model.dtype == torch.bfloat16 and model.moe_gates()[0].bias.dtype == torch.float32


def test_converting_twice_changes_nothing(tmp_path):
    save(random_ours(DeepseekConfig.tiny(**RAGGED)), tmp_path / "a", dtype=FP8)
    convert(tmp_path / "a", tmp_path / "b", "fp8")
    a, b = tensors(tmp_path / "a"), tensors(tmp_path / "b")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[n].view(torch.uint8), b[n].view(torch.uint8)) for n in a)


def test_failures_leave_nothing(tmp_path, capsys):
    save(random_ours(), tmp_path / "a", dtype=FP8)
    path = tmp_path / "a/model.safetensors"
    data = safetensors.torch.load_file(path)
    name = "model.layers.2.mlp.experts.7.up_proj.weight_scale_inv"
    data[name].fill_(float("nan"))
    path.unlink()
    safetensors.torch.save_file(data, path)
    assert main([str(tmp_path / "a"), str(tmp_path / "b"), "--to", "bf16"]) == 1
    assert "NaN or Inf" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    data[name + "x"] = data.pop(name)
    path.unlink()
    safetensors.torch.save_file(data, path)
    with pytest.raises(CheckpointError, match="FP8 without its scales"):
        convert(tmp_path / "a", tmp_path / "b", "bf16")
    with pytest.raises(ValueError, match="to: expected one of"):
        convert(tmp_path / "a", tmp_path / "b", "int4")
    assert main([str(tmp_path / "nowhere"), str(tmp_path / "b"), "--to", "fp8"]) == 1
    assert "no such checkpoint" in capsys.readouterr().err


def test_existing_target_is_kept(tmp_path, capsys):
    save(random_ours(), tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b/precious").write_text("x")
    assert main([str(tmp_path / "a"), str(tmp_path / "b"), "--to", "fp8"]) == 1
    assert "not empty" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "b").iterdir()] == ["precious"]
    assert main([str(tmp_path / "a"), str(tmp_path / "b"), "--to", "fp8", "--overwrite"]) == 0


PEAK = """
import resource, sys, torch
torch.set_num_threads(1)
from model import DeepseekV3
from model.convert import convert
base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
if sys.argv[1] == "load":
    model = DeepseekV3.from_pretrained(sys.argv[2])
else:
    convert(sys.argv[2], sys.argv[3], "bf16")
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base) / 1024)
"""


def test_memory_stays_near_the_model(tmp_path):
    """Loading costs the model's size and little more; converting costs a few chunks."""
    config = DeepseekConfig.tiny(
        hidden_size=1024, moe_intermediate_size=1024, n_routed_experts=32, num_hidden_layers=2
    )
    size = synthesize(tmp_path / "fp8", config) / 2**20
    assert size > 150

    def peak(*args):
        command = [sys.executable, "-c", PEAK, *map(str, args)]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, capture_output=True, text=True, env=env, check=True)
        return float(done.stdout)

    assert peak("load", tmp_path / "fp8") < 1.1 * size + 100
    assert peak("convert", tmp_path / "fp8", tmp_path / "bf16") < 150


def test_generate_command(tmp_path, capsys):
    model = random_ours(DeepseekConfig.tiny(vocab_size=259, bos_token_id=256))
    save(model, tmp_path / "c")
    options = ["--prompt", "héllo", "--max-new-tokens", "12", "--mtp", "--temperature", "0.8"]
    assert generate_main([str(tmp_path / "c"), *options]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("héllo") and "MTP drafts accepted" in err and "6 prompt tokens" not in err
    assert "7 prompt tokens" in err  # BOS and six bytes: é takes two
    assert generate_main([str(tmp_path / "nowhere"), "--prompt", "x"]) == 1
    assert "error:" in capsys.readouterr().err
    save(random_ours(), tmp_path / "words")
    assert generate_main([str(tmp_path / "words"), "--prompt", "x"]) == 1
    assert "tokenizer.json: missing" in capsys.readouterr().err
