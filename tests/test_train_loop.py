"""Schedule, optimizer, losses, and the training loop on the real model at its smallest."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import nn

from model import DeepseekConfig, DeepseekV3
from model.data import BOS, build_corpus, held_out_windows
from model.losses import bits_per_byte, mtp_loss, next_token_loss, sequence_balance_loss
from model.optim import MasterAdamW
from model.schedule import Schedule
from model.trainer import TrainConfig, Trainer


@pytest.fixture(autouse=True)
def one_thread():
    """Operands this small are slower on many threads, much slower on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def text_corpus(num_files=30, seed=0):
    """A learnable language: words of a small dictionary."""
    rng = np.random.default_rng(seed)
    words = [b"alpha ", b"beta\n", b"gamma(", b"delta) "]
    documents = [
        (f"f{i}", b"".join(words[j] for j in rng.integers(0, 4, 120))) for i in range(num_files)
    ]
    return build_corpus(documents, 0.2)


def tiny_model(seed=0, **changes):
    torch.manual_seed(seed)
    sizes = dict(
        vocab_size=259,
        bos_token_id=256,
        eos_token_id=257,
        hidden_size=32,
        num_hidden_layers=2,
        n_routed_experts=8,
        num_experts_per_tok=2,
    )
    return DeepseekV3(DeepseekConfig.tiny(**{**sizes, **changes}))


def tiny_config(**changes):
    schedule = Schedule(peak_lr=5e-3, warmup_steps=3, bias_speed=0.01)
    return TrainConfig(**{**dict(schedule=schedule, seq_len=24, batch=2, max_steps=6), **changes})


def all_tensors(trainer):
    weights = {f"w.{k}": v for k, v in trainer.model.state_dict().items()}
    return {**weights, **trainer._optimizer.state_tensors(), "rng": torch.get_rng_state()}


def assert_same_state(a, b):
    a, b = all_tensors(a), all_tensors(b)
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different


class TestSchedule:
    def test_report_figures(self):
        """V3 report 4.2: at 14.8T tokens the defaults are the report's own numbers."""
        schedule = Schedule()
        rate = lambda trillions: schedule.learning_rate(10**6, trillions / 14.8)  # noqa: E731
        assert schedule.learning_rate(0, 0.0) == pytest.approx(2.2e-4 / 2000)
        assert schedule.learning_rate(1999, 0.0) == pytest.approx(2.2e-4)
        assert rate(9.99) == pytest.approx(2.2e-4)
        assert rate(12.15) == pytest.approx((2.2e-4 + 2.2e-5) / 2)
        assert rate(14.31) == pytest.approx(2.2e-5)
        assert rate(14.64) == pytest.approx(7.3e-6)
        assert schedule.mtp_weight(0.5) == 0.3 and schedule.mtp_weight(0.7) == 0.1
        assert schedule.gate_bias_speed(0.9) == 1e-3 and schedule.gate_bias_speed(0.97) == 0.0

    def test_never_rises_after_warmup(self):
        schedule = Schedule(warmup_steps=10)
        rates = [schedule.learning_rate(10 + i, i / 500) for i in range(501)]
        assert all(a >= b for a, b in zip(rates, rates[1:]))

    def test_bad_values(self):
        with pytest.raises(ValueError, match="hold_end"):
            Schedule(hold_end=0.9, decay_end=0.5)
        with pytest.raises(ValueError, match="progress"):
            Schedule().learning_rate(0, 1.5)
        with pytest.raises(ValueError, match="at least one limit"):
            TrainConfig(max_steps=None)
        with pytest.raises(ValueError, match="batch"):
            TrainConfig(batch=0)


class TestOptimizer:
    def _two(self, dtype):
        torch.manual_seed(0)
        reference = nn.Linear(8, 8)
        tested = nn.Linear(8, 8).to(dtype)
        with torch.no_grad():
            for a, b in zip(reference.parameters(), tested.parameters()):
                b.copy_(a)
                a.copy_(b)
        return reference, tested

    def test_is_adamw_with_clipping(self):
        reference, tested = self._two(torch.float32)
        ours = MasterAdamW(tested.named_parameters(), clip=0.5)
        groups = [
            {"params": [reference.weight], "weight_decay": 0.1},
            {"params": [reference.bias], "weight_decay": 0.0},
        ]
        theirs = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95))
        for _ in range(5):
            x = torch.randn(4, 8)
            for module in (reference, tested):
                module.zero_grad()
                (module(x) * 10).square().sum().backward()
            norm = float(nn.utils.clip_grad_norm_(reference.parameters(), 0.5))
            theirs.step()
            assert ours.step(0.01) == pytest.approx(norm)
        for a, b in zip(reference.parameters(), tested.parameters()):
            assert torch.allclose(a, b, rtol=1e-6, atol=1e-7)

    def test_bf16_weights_learn_from_small_updates(self):
        """One update of 1e-4 vanishes in a BF16 weight of 1; a hundred must not."""
        weight = nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16))
        optimizer = MasterAdamW([("w", weight)], weight_decay=0.0)
        for _ in range(100):
            optimizer.zero_grad()
            weight.sum().backward()
            optimizer.step(1e-4)
        assert torch.allclose(weight.float(), torch.full((4, 4), 0.99), atol=4e-3)
        assert optimizer.state_tensors()["master.w"].dtype == torch.float32

    def test_non_finite_gradient_leaves_weights(self):
        layer = nn.Linear(3, 3)
        before = layer.weight.detach().clone()
        optimizer = MasterAdamW(layer.named_parameters())
        (layer(torch.ones(1, 3)).sum() * math.nan).backward()
        with pytest.raises(FloatingPointError, match="gradient norm"):
            optimizer.step(0.1)
        assert torch.equal(before, layer.weight)

    def test_state_of_another_model_is_refused(self):
        a, b = nn.Linear(3, 3), nn.Linear(3, 3, bias=False)
        first, second = (MasterAdamW(m.named_parameters()) for m in (a, b))
        a(torch.ones(1, 3)).sum().backward()
        first.step(0.1)
        with pytest.raises(ValueError, match="names differ"):
            second.load_state_tensors(first.state_tensors())


class TestLosses:
    def test_targets(self):
        tokens = torch.tensor([[5, 6, 7, 8, 9]])
        sure = nn.functional.one_hot(tokens, 12).float() * 50
        assert next_token_loss(sure[:, 1:], tokens) < 1e-6
        assert mtp_loss([sure[:, 2:], sure[:, 3:]], tokens) < 1e-6
        assert mtp_loss([sure[:, 1:4]], tokens) > 10

    def test_balance_by_loops(self):
        torch.manual_seed(0)
        b, length, k, e = 3, 7, 2, 8
        scores = torch.rand(b * length, e)
        topk_idx = scores.topk(k).indices
        expected = 0.0
        for sequence in range(b):
            rows = range(sequence * length, (sequence + 1) * length)
            for i in range(e):
                count = sum(int((topk_idx[t] == i).sum()) for t in rows)
                p = sum(float(scores[t, i] / scores[t].sum()) for t in rows) / length
                expected += count * e / (k * length) * p / b
        actual = sequence_balance_loss(topk_idx, scores, b)
        assert float(actual) == pytest.approx(expected, rel=1e-5)

    def test_balance_is_one_when_even_and_pushes_down_the_popular(self):
        topk_idx = torch.arange(8)[:, None] % 4
        even = torch.full((8, 4), 0.5)
        assert float(sequence_balance_loss(topk_idx, even, 2)) == pytest.approx(1.0)
        scores = even.clone().requires_grad_()
        sequence_balance_loss(torch.zeros(8, 1, dtype=torch.int64), scores, 2).backward()
        assert (scores.grad[:, 0] > 0).all() and (scores.grad[:, 1:] < 0).all()
        with pytest.raises(ValueError, match="num_sequences"):
            sequence_balance_loss(topk_idx, even, 3)

    def test_bits_per_byte_of_a_known_model(self):
        """A uniform model over 512 tokens pays nine bits for every byte, BOS not counted."""

        class Uniform(nn.Module):
            def forward(self, tokens):
                return torch.zeros(*tokens.shape, 512)

        stream = np.arange(400, dtype=np.uint16) % 250
        stream[::50] = BOS
        chosen = held_out_windows(stream, 32, 10**6)
        assert bits_per_byte(Uniform(), chosen) == pytest.approx(9.0)
        assert chosen.num_bytes < chosen.windows[:, 1:].numel()


class TestLoop:
    def test_learns(self):
        corpus = text_corpus()
        config = tiny_config(max_steps=60, eval_every=20, eval_bytes=1000)
        trainer = Trainer(tiny_model(), config, corpus)
        before = trainer.evaluate()
        trainer.run()
        after = trainer.evaluate()
        assert before > 7 and after < 3.2
        assert [e["step"] for e in trainer.history.evals] == [0, 20, 40, 60, 60]
        records = trainer.history.records
        assert [r["step"] for r in records] == list(range(1, 61))
        assert records[-1]["mtp_bits"] < records[0]["mtp_bits"] - 3
        loads = torch.stack(trainer.history.loads)
        gates = trainer.model.moe_gates()
        experts = trainer.model.config.n_routed_experts
        assert loads.shape == (60, len(gates), experts)
        per_step = config.tokens_per_step * trainer.model.config.num_experts_per_tok
        assert (loads[:, :-1].sum(dim=2) == per_step).all()

    def test_bias_update_balances(self):
        """From a gate that favours one expert, the bias alone must bring the others back."""
        model = tiny_model()
        for gate in model.moe_gates():
            gate.bias[0] = 0.5
        config = tiny_config(max_steps=80, balance_alpha=0.0)
        config = dataclasses.replace(
            config, schedule=dataclasses.replace(config.schedule, bias_speed=0.02)
        )
        trainer = Trainer(model, config, text_corpus())
        trainer.run()
        imbalance = [r["imbalance"] for r in trainer.history.records]
        assert np.mean(imbalance[-20:]) < 0.7 * np.mean(imbalance[:3])

    def test_bias_rests_at_the_end(self):
        """The report stops the bias update for the last 0.5T tokens."""
        trainer = Trainer(tiny_model(), tiny_config(max_steps=60), text_corpus())
        while trainer.progress < trainer.config.schedule.decay_end:
            trainer.step()
        before = [gate.bias.clone() for gate in trainer.model.moe_gates()]
        trainer.run()
        assert any(bias.abs().max() > 0 for bias in before)
        for bias, gate in zip(before, trainer.model.moe_gates()):
            assert torch.equal(bias, gate.bias)

    def test_accumulation_equals_one_large_batch(self):
        """Equal up to rounding in gradients; the balance counts are those of the whole batch."""
        corpus = text_corpus()
        models = [tiny_model(), tiny_model()]
        large = Trainer(models[0], tiny_config(batch=4), corpus)
        small = Trainer(models[1], tiny_config(batch=1, grad_accum=4), corpus)
        a, b = large.step(), small.step()
        assert a.bits == pytest.approx(b.bits, rel=1e-5)
        assert a.grad_norm == pytest.approx(b.grad_norm, rel=1e-4)
        assert torch.equal(large.history.loads[0], small.history.loads[0])
        for x, y in zip(models[0].moe_gates(), models[1].moe_gates()):
            assert torch.equal(x.bias, y.bias) and x.bias.abs().max() > 0

    def test_time_limit_drives_the_schedule(self):
        now = [0.0]

        def clock():
            now[0] += 0.5
            return now[0]

        config = tiny_config(max_steps=None, max_seconds=20.0)
        trainer = Trainer(tiny_model(), config, text_corpus(), clock=clock)
        trainer.run()
        rates = [r["lr"] for r in trainer.history.records]
        assert 3 < len(rates) < 40 and rates[-1] < 0.2 * max(rates)

    def test_bf16_model_trains(self):
        model = tiny_model().to(torch.bfloat16)
        trainer = Trainer(model, tiny_config(max_steps=12), text_corpus())
        trainer.run()
        bits = [record["bits"] for record in trainer.history.records]
        assert bits[-1] < bits[0] - 1.5
        assert all(gate.bias.dtype == torch.float32 for gate in model.moe_gates())

    def test_non_finite_loss_is_an_error(self):
        model = tiny_model()
        trainer = Trainer(model, tiny_config(), text_corpus())
        with torch.no_grad():
            model.norm.weight.fill_(math.nan)
        with pytest.raises(FloatingPointError, match="loss: expected a finite value"):
            trainer.step()
        assert trainer.step_idx == 0


class TestResume:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_bitwise(self, tmp_path, dtype):
        corpus = text_corpus()
        straight = Trainer(tiny_model().to(dtype), tiny_config(), corpus)
        straight.run()
        first = Trainer(tiny_model().to(dtype), tiny_config(), corpus)
        for _ in range(3):
            first.step()
        first.save(tmp_path / "s")
        second = Trainer(tiny_model(seed=9).to(dtype), tiny_config(), corpus)
        second.load(tmp_path / "s")
        second.run()
        assert_same_state(straight, second)
        drop = lambda rs: [{k: v for k, v in r.items() if k != "seconds"} for r in rs]  # noqa: E731
        assert drop(straight.history.records) == drop(second.history.records)
        assert torch.equal(torch.stack(straight.history.loads), torch.stack(second.history.loads))

    def test_every_part_of_the_state_matters(self, tmp_path):
        """Drop one part at a time from the snapshot: the continuation must then differ."""
        corpus = text_corpus()
        straight = Trainer(tiny_model(), tiny_config(), corpus)
        straight.run()
        first = Trainer(tiny_model(), tiny_config(), corpus)
        for _ in range(3):
            first.step()
        first.save(tmp_path / "s")

        def moments(trainer):
            state = trainer._optimizer.state_tensors()
            state.update({k: torch.zeros_like(v) for k, v in state.items() if "exp_avg" in k})
            trainer._optimizer.load_state_tensors(state)

        def position(trainer):
            trainer._loader.load_state_dict({"seed": 0, "epoch": 0, "cursor": 0})

        def step(trainer):
            trainer.step_idx = 2

        def bias(trainer):
            for gate in trainer.model.moe_gates():
                gate.bias.zero_()

        for damage in (moments, position, step, bias):
            second = Trainer(tiny_model(seed=9), tiny_config(), corpus)
            second.load(tmp_path / "s")
            damage(second)
            while second.step_idx < 6:
                second.step()
            with pytest.raises(AssertionError):
                assert_same_state(straight, second)

    def test_another_run_is_refused(self, tmp_path):
        corpus = text_corpus()
        trainer = Trainer(tiny_model(), tiny_config(), corpus)
        trainer.step()
        trainer.save(tmp_path / "s")
        for config, name in (
            (tiny_config(seq_len=12), "seq_len was 24 in the snapshot, now 12"),
            (tiny_config(max_steps=7), "max_steps"),
            (tiny_config(schedule=Schedule()), "schedule.bias_speed was 0.01"),
        ):
            with pytest.raises(ValueError, match=name):
                Trainer(tiny_model(), config, corpus).load(tmp_path / "s")
        with pytest.raises(ValueError, match="corpus has changed"):
            Trainer(tiny_model(), tiny_config(), text_corpus(seed=1)).load(tmp_path / "s")
        with pytest.raises(ValueError, match="another model"):
            Trainer(tiny_model(hidden_size=48), tiny_config(), corpus).load(tmp_path / "s")
        Trainer(tiny_model(), tiny_config(eval_every=2), corpus).load(tmp_path / "s")
