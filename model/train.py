"""`python -m model.train`: train a DeepSeek-V3 on text files of this machine.

    python -m model.train --out out/run             the standard library's sources, 1000 steps
    python -m model.train --out out/run --resume    go on after a crash, a kill or Ctrl-C
    python -m model.train --data ~/texts --suffix .txt .md --max-seconds 600

The run ends with a checkpoint in Hugging Face's DeepseekV3 format in OUT/checkpoint. Until then
OUT/train.safetensors holds the training state; it is replaced atomically, so killing the process
at any moment costs at most the steps since the last one.
"""

import argparse
import dataclasses
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from model import DeepseekConfig, DeepseekV3
from model.data import Corpus, load_corpus
from model.progress import ProgressLine, format_seconds
from model.schedule import Schedule
from model.trainer import SNAPSHOT_NAME, StepStats, TrainConfig, Trainer

CHECKPOINT_DIR = "checkpoint"
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class TrainMeter:
    """Turns steps into the progress line: smoothed loss, speed, balance, time left."""

    _SMOOTHING = 0.95

    def __init__(self, line: ProgressLine):
        self.line = line
        self._bits: float | None = None
        self._first: tuple[float, int] | None = None

    def __call__(self, trainer: Trainer, stats: StepStats) -> None:
        previous = stats.bits if self._bits is None else self._bits
        self._bits = self._SMOOTHING * previous + (1 - self._SMOOTHING) * stats.bits
        if self._first is None:  # speed is measured after the first step, which warms things up
            self._first = (trainer.elapsed, trainer.tokens_seen)
        self.line.update(self.text(trainer, stats), force=trainer.progress >= 1.0)

    def text(self, trainer: Trainer, stats: StepStats) -> str:
        seconds = trainer.elapsed - self._first[0]
        tokens = trainer.tokens_seen - self._first[1]
        speed = f"{tokens / seconds:,.0f}" if seconds > 0 and tokens else "-"
        done = trainer.progress
        left = format_seconds(trainer.elapsed * (1 - done) / done) if done > 0 else "-"
        evals = trainer.history.evals
        held_out = f" held-out {evals[-1]['bits_per_byte']:.3f}" if evals else ""
        return (
            f"step {stats.step} {100 * done:3.0f}% | loss {self._bits * math.log(2):.3f} "
            f"bits/byte {self._bits:.3f}{held_out} | {speed} tokens/s | "
            f"expert max/mean {stats.imbalance:.2f} | eta {left}"
        )


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m model.train",
        description="Train a DeepSeek-V3 over bytes on local text files.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--out", type=Path, default=Path("out/train"), help="folder of state and checkpoint")
    add("--resume", action="store_true", help="continue from the state in OUT")
    add("--overwrite", action="store_true", help="start anew although OUT holds a state")
    add("--data", type=Path, default=None, help="folder of texts; default: Python's own sources")
    add("--suffix", nargs="+", default=[".py"], help="which files of it are text")
    add("--max-corpus-bytes", type=int, default=None, help="use only so much of it")
    add("--held-out", type=float, default=0.04, help="share of files kept for measuring")
    add("--model", choices=("small_bytes", "tiny"), default="small_bytes", help="architecture")
    add("--dtype", choices=tuple(_DTYPES), default="fp32", help="of weights and activations")
    add("--threads", type=int, default=None, help="CPU threads; default: all")
    add("--seq-len", type=int, default=256, help="tokens per sequence")
    add("--batch", type=int, default=4, help="sequences per forward")
    add("--grad-accum", type=int, default=1, help="forwards per optimizer step")
    add("--max-steps", type=int, default=None, help="end after so many steps")
    add("--max-seconds", type=float, default=None, help="end after so long")
    add("--lr", type=float, default=3e-3, help="peak learning rate")
    add("--warmup", type=int, default=50, help="steps of linear warm-up")
    add("--bias-speed", type=float, default=0.01, help="gamma of the gates' bias update")
    add("--balance-alpha", type=float, default=1e-4, help="factor of the sequence balance loss")
    add("--seed", type=int, default=0, help="of weights and data order")
    add("--checkpoint-every", type=int, default=100, help="steps between saved states")
    add("--eval-every", type=int, default=100, help="steps between held-out measurements; 0: never")
    add("--eval-bytes", type=int, default=16384, help="held-out bytes per measurement")
    args = parser.parse_args(argv)
    if args.max_steps is None and args.max_seconds is None:
        args.max_steps = 1000
    if args.resume and args.overwrite:
        parser.error("--resume and --overwrite exclude each other")
    return args


def train_config(args: argparse.Namespace) -> TrainConfig:
    # Only the proportions of the report's schedule fit a short run; rate, warm-up and gamma are
    # set for one (the report's gamma needs thousands of steps to move a choice).
    schedule = Schedule(peak_lr=args.lr, warmup_steps=args.warmup, bias_speed=args.bias_speed)
    return TrainConfig(
        schedule=schedule,
        seq_len=args.seq_len,
        batch=args.batch,
        grad_accum=args.grad_accum,
        max_steps=args.max_steps,
        max_seconds=args.max_seconds,
        balance_alpha=args.balance_alpha,
        seed=args.seed,
        checkpoint_every=args.checkpoint_every,
        eval_every=args.eval_every,
        eval_bytes=args.eval_bytes,
    )


def build_model(args: argparse.Namespace) -> DeepseekV3:
    config = DeepseekConfig.small_bytes()
    if args.model == "tiny":
        config = DeepseekConfig.tiny(
            vocab_size=config.vocab_size,
            bos_token_id=config.bos_token_id,
            eos_token_id=config.eos_token_id,
        )
    config = dataclasses.replace(
        config,
        eos_token_id=config.bos_token_id,  # a document ends where the next one opens
        max_position_embeddings=max(config.max_position_embeddings, args.seq_len),
        torch_dtype=str(_DTYPES[args.dtype]).removeprefix("torch."),
    )
    torch.manual_seed(args.seed)
    return DeepseekV3(config).to(_DTYPES[args.dtype])


def train(args: argparse.Namespace, corpus: Corpus) -> Trainer:
    """Run, or resume, what `args` describe; leaves the final state and checkpoint on disk.

    Raises:
        FileExistsError: OUT holds a state and neither resume nor overwrite was asked for.
        FileNotFoundError: resume was asked for and OUT holds none.
    """
    state = args.out / SNAPSHOT_NAME
    if state.exists() and not (args.resume or args.overwrite):
        raise FileExistsError(
            f"{state} exists: pass --resume to continue it or --overwrite to start anew"
        )
    trainer = Trainer(build_model(args), train_config(args), corpus)
    line = ProgressLine()
    if args.resume:
        trainer.load(state)
        line.note(f"resumed at step {trainer.step_idx}")
    try:
        trainer.run(TrainMeter(line), state)
    except KeyboardInterrupt:
        line.close()
        raise
    line.close()
    trainer.save(state)
    trainer.model.save_pretrained(args.out / CHECKPOINT_DIR)
    return trainer


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        corpus = load_corpus(
            args.data, tuple(args.suffix), args.held_out, max_bytes=args.max_corpus_bytes
        )
        print(f"corpus: {corpus.summary()}")
        trainer = train(args, corpus)
    except KeyboardInterrupt:
        print(f"interrupted; continue with --resume --out {args.out}", file=sys.stderr)
        return 130
    except (OSError, ValueError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(
        f"trained {trainer.step_idx} steps, {trainer.tokens_seen:,} tokens, "
        f"{format_seconds(trainer.elapsed)}; state {args.out / SNAPSHOT_NAME}, "
        f"checkpoint {args.out / CHECKPOINT_DIR}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
