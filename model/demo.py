"""`make demo`: the whole chain on this machine, from Python's own sources to generated text.

Trains a small but structurally complete DeepSeek-V3 (latent attention, sigmoid gate limited to
groups and balanced by bias, shared and routed experts, multi-token prediction) over bytes, saves it
in Hugging Face's DeepseekV3 format, loads that back, generates from the paged latent cache with
MTP speculative decoding, and writes out/report.html.

The run fails (exit status 1) unless the model beats an order-2 Witten-Bell model on held-out files,
and a fixed bar: a demo that has not learned anything shows nothing.
"""

import argparse
import dataclasses
import os
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import dskernels as dsk
from model import DeepseekConfig, DeepseekV3
from model.baseline import Unigram, WittenBell
from model.data import BOS, Corpus, HeldOutSet, decode_bytes, held_out_windows, load_corpus
from model.losses import bits_per_byte
from model.pictures import backend_rows, dualpipe_charts, gate_names
from model.progress import ProgressLine, format_seconds
from model.report import ReportData, Sample, write_report
from model.schedule import Schedule
from model.train import CHECKPOINT_DIR, TrainMeter
from model.trainer import TrainConfig, Trainer

BAR = 2.6
"""Bits per byte on held-out text that the model must reach, besides beating Witten-Bell."""
SMOKE_STEPS = 80
"""Of the smoke run, which no clock ends: a busy machine reaches the same bar, only later."""
MAX_THREADS = 4  # operands this small only get slower on more
GREEDY_PROMPT = 'class Reader:\n    """Read lines from a file."""\n\n    def __init__(self, '
PROMPT_BYTES = 64


def demo_model() -> DeepseekConfig:
    """About 3M parameters, 1.6M active per token: what 2 cores can teach something in 4 minutes."""
    return dataclasses.replace(
        DeepseekConfig.small_bytes(),
        num_attention_heads=4,
        initializer_range=0.04,  # about 0.5 / sqrt(width), which 0.006 is at V3's 7168
        eos_token_id=BOS,  # a document ends where the next one opens
        max_position_embeddings=1024,
    )


def fresh_model(seed: int) -> DeepseekV3:
    """The demo's model with weights for a narrow, short-trained network.

    Beyond the normal weights of the report: tokens enter the residual stream at a size that the
    blocks do not drown (std 0.5), and what the blocks add is scaled by 1/sqrt(2 layers), so that
    the stream keeps its size over the depth.
    """
    torch.manual_seed(seed)
    model = DeepseekV3(demo_model())
    scale = (2 * model.config.num_hidden_layers) ** -0.5
    with torch.no_grad():
        model.embed_tokens.weight.normal_(0, 0.5)
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight", "experts.w2.weight")):
                weight.mul_(scale)
    return model


def demo_training(args: argparse.Namespace) -> TrainConfig:
    """The report's schedule in proportion; rate, warm-up and gamma for a run of 1,000 steps."""
    schedule = Schedule(peak_lr=args.lr, warmup_steps=100, bias_speed=0.01)
    return TrainConfig(
        schedule=schedule,
        seq_len=args.seq_len,
        batch=args.batch,
        max_steps=args.max_steps,
        max_seconds=args.seconds,
        eval_every=100,
        eval_bytes=8192,
    )


@dataclass(frozen=True)
class Scores:
    """Bits per byte on the same held-out bytes."""

    model: float
    witten_bell: float
    unigram: float

    @property
    def passed(self) -> bool:
        return self.model <= BAR and self.model < self.witten_bell

    def text(self) -> str:
        return (
            f"held-out bits/byte: model {self.model:.3f} | order-2 Witten-Bell "
            f"{self.witten_bell:.3f} | unigram {self.unigram:.3f}"
        )


@dataclass(frozen=True)
class Decoding:
    """What generation showed."""

    acceptance: float
    speculative_speed: float
    plain_speed: float
    samples: list[Sample]


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m model.demo",
        description="Train, save, load, generate, report: DeepSeek-V3 in small, on a CPU.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--out", type=Path, default=Path("out"), help="folder of report and checkpoint")
    add("--seconds", type=float, default=285.0, help="time to train for, at most")
    add("--max-steps", type=int, default=2600, help="steps to train for, at most")
    add("--lr", type=float, default=3e-3, help="peak learning rate")
    add("--seq-len", type=int, default=256, help="tokens per sequence")
    add("--batch", type=int, default=4, help="sequences per step")
    add("--threads", type=int, default=None, help=f"default: all cores, at most {MAX_THREADS}")
    add("--new-tokens", type=int, default=160, help="bytes to generate per sample")
    add("--eval-bytes", type=int, default=131072, help="held-out bytes of the final measurement")
    add("--data", type=Path, default=None, help="folder of .py files; default: Python's own")
    add("--max-corpus-bytes", type=int, default=None, help="use only so much text")
    add("--seed", type=int, default=0, help="of the weights")
    add(
        "--smoke",
        action="store_true",
        help=f"train for {SMOKE_STEPS} steps however long they take; the bar is the unigram model",
    )
    args = parser.parse_args(argv)
    if args.smoke:
        args.max_steps, args.seconds, args.eval_bytes = SMOKE_STEPS, None, 16384
    return args


class Stages:
    """Prints what is going on, with the time since the start: the demo's table of contents."""

    def __init__(self):
        self._start = time.monotonic()

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self._start

    def __call__(self, text: str) -> None:
        print(f"[{format_seconds(self.elapsed)}] {text}", flush=True)


def train(args: argparse.Namespace, corpus: Corpus) -> Trainer:
    trainer = Trainer(fresh_model(args.seed), demo_training(args), corpus)
    line = ProgressLine()
    trainer.run(TrainMeter(line))
    line.close()
    return trainer


def score_baselines(corpus: Corpus, held_out: HeldOutSet) -> tuple[float, float]:
    """(order-2 Witten-Bell, unigram), trained on the whole training side."""
    positions = held_out.positions
    return (
        WittenBell(corpus.train, 2).bits_per_byte(corpus.held_out, positions),
        Unigram(corpus.train).bits_per_byte(corpus.held_out, positions),
    )


def save_and_reload(model: DeepseekV3, folder: Path, probe: torch.Tensor) -> DeepseekV3:
    """The model as it comes back from disk.

    Raises:
        RuntimeError: its logits for `probe` [b, s] differ from those of the model in memory.
    """
    model.eval()
    model.save_pretrained(folder, overwrite=True)  # the folder is the demo's own; it may run again
    loaded = DeepseekV3.from_pretrained(folder).eval()
    with torch.no_grad():
        difference = float((model(probe) - loaded(probe)).abs().max())
    if difference != 0.0:
        raise RuntimeError(f"checkpoint: logits differ by {difference} after saving and loading")
    return loaded


def decode(model: DeepseekV3, held_out: HeldOutSet, new_tokens: int) -> Decoding:
    """Generate with and without speculation; the texts must agree.

    Raises:
        RuntimeError: speculation changed a text.
    """
    options = dict(max_new_tokens=new_tokens, eos_token_id=None, temperature=0.7, top_p=0.95)
    # Continuations of held-out text: acceptance on the model's own greedy loops would flatter.
    rows = held_out.windows[:: max(1, len(held_out.windows) // 4)][:4, :PROMPT_BYTES].tolist()
    speculative = model.generate(rows, use_mtp=True, **options)
    plain = model.generate(rows, **options)
    written = [[BOS, *GREEDY_PROMPT.encode()]]
    greedy = model.generate(written, max_new_tokens=new_tokens, eos_token_id=None, use_mtp=True)
    check = model.generate(written, max_new_tokens=new_tokens, eos_token_id=None)
    if speculative.tokens != plain.tokens or greedy.tokens != check.tokens:
        raise RuntimeError("speculative decoding changed the text that the model generates")
    samples = [
        Sample("Sample, greedy", GREEDY_PROMPT, decode_bytes(greedy.tokens[0])),
        *(
            Sample(
                f"Sample {i}, temperature 0.7, continuing a held-out file",
                decode_bytes(row),
                decode_bytes(tokens),
            )
            for i, (row, tokens) in enumerate(zip(rows[:2], speculative.tokens), start=1)
        ),
    ]
    return Decoding(
        speculative.stats.acceptance[0],
        speculative.stats.tokens_per_second,
        plain.stats.tokens_per_second,
        samples,
    )


def report_data(trainer: Trainer, scores: Scores, decoding: Decoding) -> ReportData:
    speed = trainer.tokens_seen / max(trainer.elapsed, 1e-9)
    config = trainer.model.config
    parameters = sum(p.numel() for p in trainer.model.parameters())
    figures = [
        ("held-out bits/byte", f"{scores.model:.3f}"),
        ("order-2 Witten-Bell", f"{scores.witten_bell:.3f}"),
        ("unigram", f"{scores.unigram:.3f}"),
        ("tokens trained on", f"{trainer.tokens_seen / 1e6:.2f} M"),
        ("training", f"{speed:,.0f} tokens/s"),
        ("MTP drafts accepted", f"{100 * decoding.acceptance:.0f} %"),
        ("speculative decoding", f"{decoding.speculative_speed:.0f} tokens/s"),
        ("plain decoding", f"{decoding.plain_speed:.0f} tokens/s"),
    ]
    settings = [
        ("parameters", f"{parameters:,}"),
        ("corpus", trainer.corpus.summary()),
        ("machine", f"{platform.machine()}, {os.cpu_count()} cores"),
        ("python, torch", f"{platform.python_version()}, {torch.__version__}"),
        *((f.name, str(getattr(config, f.name))) for f in dataclasses.fields(config)),
        *((f.name, str(getattr(trainer.config, f.name))) for f in dataclasses.fields(TrainConfig)),
    ]
    return ReportData(
        title="DeepSeek-V3 in small: training and speculative decoding on a CPU",
        figures=figures,
        history=trainer.history,
        baselines={"order-2 Witten-Bell": scores.witten_bell, "unigram": scores.unigram},
        final_bits=scores.model,
        load_labels=gate_names(config),
        settings=settings,
        backends=backend_rows(),
        samples=decoding.samples,
        charts=dualpipe_charts(),
    )


def run(args: argparse.Namespace) -> bool:
    """The demo; whether the model reached the bar. The report is written either way."""
    stage = Stages()
    corpus = load_corpus(args.data, max_bytes=args.max_corpus_bytes)
    stage(f"corpus: {corpus.summary()}")
    held_out = held_out_windows(corpus.held_out, args.seq_len, args.eval_bytes)
    witten_bell, unigram = score_baselines(corpus, held_out)
    stage(f"baselines: order-2 Witten-Bell {witten_bell:.3f}, unigram {unigram:.3f} bits/byte")
    clock = "" if args.seconds is None else f", at most {format_seconds(args.seconds)}"
    stage(f"training for {args.max_steps} steps{clock}, on {dsk.supports('gemm').reason}")
    trainer = train(args, corpus)
    stage(f"trained on {trainer.tokens_seen:,} tokens in {trainer.step_idx} steps")
    scores = Scores(bits_per_byte(trainer.model, held_out, 16), witten_bell, unigram)
    stage(scores.text())
    folder = args.out / "demo" / CHECKPOINT_DIR
    model = save_and_reload(trainer.model, folder, held_out.windows[:2, :-1])
    stage(f"saved and loaded {folder} (Hugging Face DeepseekV3): logits equal")
    decoding = decode(model, held_out, args.new_tokens)
    stage(
        f"generation: {100 * decoding.acceptance:.1f}% of MTP drafts accepted, "
        f"{decoding.speculative_speed:.1f} tokens/s speculative, "
        f"{decoding.plain_speed:.1f} plain, same text"
    )
    greedy = decoding.samples[0]
    print(f"----\n{greedy.prompt}{greedy.continuation}\n----", flush=True)
    write_report(args.out / "report.html", report_data(trainer, scores, decoding))
    stage(f"wrote {args.out / 'report.html'}")
    if args.smoke:
        passed, bar = scores.model < scores.unigram, "smoke run: below the unigram model"
    else:
        passed, bar = scores.passed, f"at most {BAR}, and below Witten-Bell"
    stage(f"{scores.text()}: bar ({bar}) {'reached' if passed else 'NOT reached'}")
    return passed


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    torch.set_num_threads(args.threads or min(MAX_THREADS, torch.get_num_threads()))
    try:
        return 0 if run(args) else 1
    except (OSError, ValueError, RuntimeError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
