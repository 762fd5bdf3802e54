"""The training loop: what one step is, what a run's state is, and how it survives being killed.

State is everything that the next step depends on: weights, gate biases, optimizer moments, FP32
masters, the data position, the random generator, the step number. Saved and loaded together (see
snapshot.py), a resumed run continues bit for bit where the uninterrupted one would be, provided its
schedule counts steps; a schedule that counts seconds follows the clock.
"""

import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from model.data import Corpus, HeldOutSet, WindowLoader, held_out_windows
from model.losses import bits_per_byte, mtp_loss, next_token_loss, sequence_balance_loss
from model.optim import MasterAdamW
from model.schedule import Schedule
from model.snapshot import load_snapshot, save_snapshot

SNAPSHOT_NAME = "train.safetensors"
_MAX_RECORDS = 2000
_MODEL, _OPTIMIZER = "model.", "optimizer."
# May differ between a run and its continuation: they say when to look, not what to compute.
_FREE_ON_RESUME = frozenset({"checkpoint_every", "eval_every", "eval_bytes"})


@dataclass(frozen=True)
class TrainConfig:
    """One run. Lengths in tokens; `batch` sequences go through the model at once, and
    `grad_accum` such micro-batches make one optimizer step."""

    schedule: Schedule = field(default_factory=Schedule)
    seq_len: int = 256
    batch: int = 8
    grad_accum: int = 1
    max_steps: int | None = 1000
    max_seconds: float | None = None
    """The run ends, and its schedule with it, at whichever limit comes first."""
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    clip: float = 1.0
    balance_alpha: float = 1e-4
    seed: int = 0
    checkpoint_every: int = 0
    """Steps between snapshots; 0: only when asked."""
    eval_every: int = 0
    """Steps between held-out measurements; 0: never."""
    eval_bytes: int = 16384

    def __post_init__(self):
        if self.max_steps is None and self.max_seconds is None:
            raise ValueError("max_steps, max_seconds: expected at least one limit, got none")
        for name in ("seq_len", "batch", "grad_accum", "max_steps", "max_seconds"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name}: expected a positive value, got {value}")

    @property
    def tokens_per_step(self) -> int:
        return self.seq_len * self.batch * self.grad_accum


@dataclass
class History:
    """What a run has recorded so far, for plots: lists of equal length, one entry per record."""

    records: list[dict[str, float]] = field(default_factory=list)
    evals: list[dict[str, float]] = field(default_factory=list)
    loads: list[torch.Tensor] = field(default_factory=list)
    """[gates, experts] int64 each: tokens routed to every expert in the record's step."""


@dataclass(frozen=True)
class StepStats:
    """One optimizer step: losses in bits per token, worst gate's largest load over its mean."""

    step: int
    bits: float
    mtp_bits: float
    lr: float
    grad_norm: float
    imbalance: float


class Trainer:
    """Trains `model` on `corpus`.

    Args:
        model: offers forward_train(tokens) -> logits, mtp_logits, router; moe_gates() whose gates
            hold `.bias`, `.counts` [e] and `.update_bias(gamma)`; and forward(tokens) -> logits.
        clock: seconds, monotonic; replaced in tests.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrainConfig,
        corpus: Corpus,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.model, self.config, self.corpus = model, config, corpus
        self.history = History()
        self.step_idx = 0
        self._gates = model.moe_gates()
        self._optimizer = MasterAdamW(
            model.named_parameters(), config.betas, config.weight_decay, config.clip
        )
        self._loader = WindowLoader(corpus.train, config.seq_len, config.batch, config.seed)
        self._eval_set: HeldOutSet | None = None
        self._clock, self._started, self._elapsed_before = clock, None, 0.0
        limit = config.max_steps
        self._record_every = max(1, limit // _MAX_RECORDS) if limit else 1
        model.train()

    # ---- progress -----------------------------------------------------------------------------

    @property
    def elapsed(self) -> float:
        """Seconds of training, earlier parts of a resumed run included."""
        running = 0.0 if self._started is None else self._clock() - self._started
        return self._elapsed_before + running

    @property
    def progress(self) -> float:
        """Share of the run that is done, in [0, 1], by steps or by time."""
        shares = [0.0]
        if self.config.max_steps:
            shares.append(self.step_idx / self.config.max_steps)
        if self.config.max_seconds:
            shares.append(self.elapsed / self.config.max_seconds)
        return min(1.0, max(shares))

    @property
    def tokens_seen(self) -> int:
        return self.step_idx * self.config.tokens_per_step

    # ---- steps --------------------------------------------------------------------------------

    def run(
        self,
        on_step: Callable[["Trainer", StepStats], None] | None = None,
        snapshot_path: Path | None = None,
    ) -> None:
        """Train until a limit is reached; snapshots go to `snapshot_path` as configured."""
        self._started = self._clock()
        try:
            while self.progress < 1.0:
                stats = self.step()
                if _is_due(self.config.eval_every, self.step_idx):
                    self.evaluate()
                if on_step is not None:
                    on_step(self, stats)
                if snapshot_path is not None and _is_due(
                    self.config.checkpoint_every, self.step_idx
                ):
                    self.save(snapshot_path)
        finally:
            self._elapsed_before, self._started = self.elapsed, None

    def step(self) -> StepStats:
        """One optimizer step, bias update included.

        Raises:
            FloatingPointError: loss or gradients are not finite; the weights stay as they were.
        """
        config, schedule, progress = self.config, self.config.schedule, self.progress
        mtp_weight = schedule.mtp_weight(progress)
        self._optimizer.zero_grad()
        bits = mtp_bits = 0.0
        for _ in range(config.grad_accum):
            main, mtp = self._accumulate(mtp_weight)
            bits += main / (config.grad_accum * math.log(2))
            mtp_bits += mtp / (config.grad_accum * math.log(2))
        lr = schedule.learning_rate(self.step_idx, progress)
        grad_norm = self._optimizer.step(lr)
        loads = torch.stack([gate.counts for gate in self._gates]).clone() if self._gates else None
        for gate in self._gates:
            gate.update_bias(schedule.gate_bias_speed(progress))
        self.step_idx += 1
        stats = StepStats(self.step_idx, bits, mtp_bits, lr, grad_norm, _imbalance(loads))
        self._record(stats, loads)
        return stats

    def _accumulate(self, mtp_weight: float) -> tuple[float, float]:
        """Forward and backward of one micro-batch; returns both cross-entropies in nats."""
        tokens = self._loader.next_batch()
        out = self.model.forward_train(tokens[:, :-1])
        main = next_token_loss(out.logits, tokens)
        loss = main
        mtp = None
        if out.mtp_logits:
            mtp = mtp_loss(out.mtp_logits, tokens)
            loss = loss + mtp_weight * mtp
        for stats in out.router:
            balance = sequence_balance_loss(stats.topk_idx, stats.scores, len(tokens))
            loss = loss + self.config.balance_alpha * balance
        if not torch.isfinite(loss):
            raise FloatingPointError(f"loss: expected a finite value, got {loss.item()}")
        (loss / self.config.grad_accum).backward()
        return float(main.detach()), float(mtp.detach()) if mtp is not None else 0.0

    def _record(self, stats: StepStats, loads: torch.Tensor | None) -> None:
        if stats.step % self._record_every:
            return
        record = dataclasses.asdict(stats)
        record.update(tokens=self.tokens_seen, seconds=self.elapsed)
        self.history.records.append(record)
        if loads is not None:
            self.history.loads.append(loads)

    def evaluate(self) -> float:
        """Held-out bits per byte over `eval_bytes`, recorded."""
        if self._eval_set is None:
            config = self.config
            self._eval_set = held_out_windows(
                self.corpus.held_out, config.seq_len, config.eval_bytes
            )
        measured = bits_per_byte(self.model, self._eval_set, self.config.batch)
        self.history.evals.append(
            {"step": self.step_idx, "tokens": self.tokens_seen, "bits_per_byte": measured}
        )
        return measured

    # ---- state --------------------------------------------------------------------------------

    def save(self, path: Path) -> None:
        """Write the whole state to `path`, atomically."""
        tensors = {_MODEL + name: tensor for name, tensor in self.model.state_dict().items()}
        for name, tensor in self._optimizer.state_tensors().items():
            tensors[_OPTIMIZER + name] = tensor
        tensors["rng"] = torch.get_rng_state()
        if self.history.loads:
            tensors["history.loads"] = torch.stack(self.history.loads).to(torch.int32)
        values = {
            "step": self.step_idx,
            "elapsed": self.elapsed,
            "loader": self._loader.state_dict(),
            "config": dataclasses.asdict(self.config),
            "corpus": self.corpus.digest,
            "records": self.history.records,
            "evals": self.history.evals,
        }
        save_snapshot(path, tensors, values)

    def load(self, path: Path) -> None:
        """Continue from `path`.

        Raises:
            ValueError: the snapshot belongs to another configuration, corpus or model.
        """
        tensors, values = load_snapshot(path)
        self._check_same_run(values)
        model_state = _take(tensors, _MODEL)
        try:
            self.model.load_state_dict(model_state, strict=True)
        except RuntimeError as error:
            raise ValueError(f"snapshot {str(path)!r}: another model: {error}") from None
        self._optimizer.load_state_tensors(_take(tensors, _OPTIMIZER))
        self._loader.load_state_dict(values["loader"])
        torch.set_rng_state(tensors["rng"])
        self.step_idx, self._elapsed_before = values["step"], values["elapsed"]
        loads = tensors.get("history.loads")
        self.history = History(
            values["records"], values["evals"], [] if loads is None else list(loads.long())
        )

    def _check_same_run(self, values: dict[str, Any]) -> None:
        saved, current = _flatten(values["config"]), _flatten(dataclasses.asdict(self.config))
        for name in sorted(set(saved) | set(current)):
            if name not in _FREE_ON_RESUME and saved.get(name) != current.get(name):
                raise ValueError(
                    f"resume: {name} was {saved.get(name)} in the snapshot, now {current.get(name)}"
                )
        if values["corpus"] != self.corpus.digest:
            raise ValueError("resume: the corpus has changed since the snapshot was written")


def _is_due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0


def _imbalance(loads: torch.Tensor | None) -> float:
    """Largest load over mean load, of the worst gate; 1 is perfect balance."""
    if loads is None:
        return 1.0
    loads = loads.double()
    return float((loads.amax(dim=1) / loads.mean(dim=1)).max())


def _take(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}


def _flatten(config: dict[str, Any]) -> dict[str, Any]:
    """JSON turns tuples into lists and nests the schedule: one level, comparable."""
    flat = {f"schedule.{name}": value for name, value in config["schedule"].items()}
    for name, value in config.items():
        if name != "schedule":
            flat[name] = list(value) if isinstance(value, (list, tuple)) else value
    return flat
