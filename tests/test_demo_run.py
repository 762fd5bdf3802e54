"""The demo from end to end, a few steps of it; the full run is `make demo`."""

import json

import pytest
import torch

from model import demo
from model.trainer import TrainConfig

pytest.importorskip("matplotlib")


@pytest.fixture(autouse=True)
def threads():
    """main() sets the thread count of this process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def options(out, *more):
    return [
        *("--out", str(out), "--max-steps", "3", "--batch", "2", "--seq-len", "64"),
        *("--threads", "1", "--max-corpus-bytes", "2500000", "--eval-bytes", "2048"),
        *("--new-tokens", "12", *more),
    ]


def test_untrained_model_fails_the_demo_but_leaves_everything(tmp_path, capsys):
    """Three steps teach nothing, and the exit status must say so."""
    assert demo.main(options(tmp_path)) == 1
    printed = capsys.readouterr().out
    for part in ("baselines:", "tokens/s", "expert max/mean", "logits equal", "same text"):
        assert part in printed
    assert "MTP drafts accepted" in printed and "NOT reached" in printed
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    for heading in ("Loss", "Expert load", "Sample, greedy", "Backends"):
        assert f"<h2>{heading}</h2>" in page
    config = json.loads((tmp_path / "demo" / "checkpoint" / "config.json").read_text())
    assert config["architectures"] == ["DeepseekV3ForCausalLM"]
    assert config["num_nextn_predict_layers"] == 1


def test_model_has_every_part_of_v3():
    config = demo.demo_model()
    assert config.q_lora_rank and config.kv_lora_rank and config.qk_rope_head_dim
    assert config.scoring_func == "sigmoid" and config.topk_group < config.n_group
    assert config.n_shared_experts and config.first_k_dense_replace < config.num_hidden_layers
    assert config.num_nextn_predict_layers == 1
    training = demo.demo_training(demo.parse_args([]))
    assert isinstance(training, TrainConfig) and training.max_seconds < 6 * 60 - 60


def test_smoke_run_counts_steps():
    """Whether it passes must not depend on what else the machine does."""
    training = demo.demo_training(demo.parse_args(["--smoke"]))
    assert training.max_seconds is None and training.max_steps == demo.SMOKE_STEPS


@pytest.mark.parametrize(
    ("scores", "passed"),
    [
        (demo.Scores(2.5, 2.56, 4.4), True),
        (demo.Scores(2.57, 2.56, 4.4), False),
        (demo.Scores(2.61, 2.7, 4.4), False),
    ],
)
def test_bar(scores, passed):
    assert scores.passed is passed


def test_errors_are_one_line(tmp_path, capsys):
    assert demo.main(options(tmp_path, "--data", str(tmp_path / "nowhere"))) == 1
    assert "corpus folder: expected a directory" in capsys.readouterr().err


def test_damaged_checkpoint_is_noticed(tmp_path, monkeypatch):
    """What is loaded is compared with what was saved: a weight lost on the way must not pass."""
    torch.manual_seed(0)
    model = demo.DeepseekV3(demo.demo_model())
    probe = torch.arange(20)[None]
    load = demo.DeepseekV3.from_pretrained.__func__

    def lossy(cls, folder, **kwargs):
        loaded = load(cls, folder, **kwargs)
        with torch.no_grad():
            loaded.layers[1].mlp.gate.bias += torch.arange(8.0)
        return loaded

    demo.save_and_reload(model, tmp_path / "a", probe)
    monkeypatch.setattr(demo.DeepseekV3, "from_pretrained", classmethod(lossy))
    with pytest.raises(RuntimeError, match="logits differ"):
        demo.save_and_reload(model, tmp_path / "b", probe)
