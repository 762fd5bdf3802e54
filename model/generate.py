"""Text from a model: chunked prefill, decoding over the paged latent cache, MTP speculation.

    python -m model.generate CHECKPOINT --prompt "def main(" --max-new-tokens 200 --mtp

Prompts of different lengths share every forward without padding. With speculation the MTP modules
draft a token each, the model checks all drafts in one forward, and what it would have chosen itself
is kept up to the first disagreement. Drafts therefore change the speed and never the text.

Terms, for one sequence: `tokens` are known; the last one has not been through the model yet, all
before it have their rows in the cache.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from model.cache import PagedLatentCache, Sequence, TokenBatch
from model.sampling import Sampling
from model.transformer import DeepseekV3


@dataclass
class Stats:
    """Counts and times (seconds) of one generation."""

    prompt_tokens: int = 0
    new_tokens: int = 0  # by decoding; the first of each sequence comes from prefill
    decode_steps: int = 0  # forwards of the main model after prefill
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    drafted: list[int] = field(default_factory=list)  # per MTP depth: drafts that were checked
    accepted: list[int] = field(default_factory=list)  # per MTP depth: drafts that were kept

    @property
    def acceptance(self) -> list[float]:
        """Per MTP depth: the share of checked drafts that were kept."""
        return [a / d if d else 0.0 for a, d in zip(self.accepted, self.drafted, strict=True)]

    @property
    def tokens_per_second(self) -> float:
        """New tokens after the first of each sequence, per second of decoding."""
        return self.new_tokens / self.decode_seconds if self.decode_seconds else 0.0

    def summary(self) -> str:
        text = (
            f"{self.prompt_tokens} prompt tokens in {self.prefill_seconds:.2f} s, "
            f"{self.new_tokens} new in {self.decode_seconds:.2f} s "
            f"({self.tokens_per_second:.1f} tokens/s, {self.decode_steps} steps)"
        )
        if self.drafted:
            shares = ", ".join(f"{100 * share:.1f}%" for share in self.acceptance)
            text += f", MTP drafts accepted: {shares}"
        return text


@dataclass
class Generation:
    """The new tokens of each prompt (an end token included when it came), and the statistics."""

    tokens: list[list[int]]
    stats: Stats


@dataclass(eq=False)
class _Running:
    """One sequence on its way. `hidden` holds the final states of positions `mtp_start` on that the
    MTP modules have not seen with confirmed tokens yet."""

    index: int
    tokens: list[int]
    prompt_len: int
    pages: Sequence = field(default_factory=Sequence)
    processed: int = 0
    drafts: list[int] = field(default_factory=list)
    mtp_start: int = 0
    hidden: torch.Tensor | None = None

    @property
    def new_tokens(self) -> int:
        return len(self.tokens) - self.prompt_len


def generate(
    model: DeepseekV3, prompts: torch.Tensor | Iterable[list[int]], **options
) -> Generation:
    """Run `stream` to its end; takes its options."""
    stats = options.pop("stats", None) or Stats()
    out: dict[int, list[int]] = {}
    for index, tokens in stream(model, prompts, stats=stats, **options):
        out.setdefault(index, []).extend(tokens)
    return Generation([out[i] for i in sorted(out)], stats)


def stream(
    model: DeepseekV3,
    prompts: torch.Tensor | Iterable[list[int]],
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    eos_token_id: int | None = -1,
    use_mtp: bool = False,
    chunk_size: int = 512,
    page_size: int = 64,
    cache_dtype: torch.dtype | str | None = None,
    stats: Stats | None = None,
) -> Iterator[tuple[int, list[int]]]:
    """Continue `prompts` (token lists, or a tensor [b, s]), yielding (prompt index, new tokens).

    temperature   0 is greedy; top_p, seed: see `model.sampling`
    eos_token_id  ends a sequence; -1: the config's; None: never
    use_mtp       speculate with all MTP modules; the text stays the same
    chunk_size    most prompt tokens per sequence and forward
    cache_dtype   None: the model's; "fp8": 656-byte rows

    ValueError, TypeError or IndexError for prompts and options that make no sense, at once.
    """
    sampling = Sampling(temperature, top_p, seed)
    rows = _checked_prompts(model, prompts, max_new_tokens)
    if chunk_size < 1:
        raise ValueError(f"chunk_size: expected at least 1, got {chunk_size}")
    if use_mtp and not len(model.mtp):
        raise ValueError("use_mtp: this model has no MTP modules (num_nextn_predict_layers is 0)")
    depth = len(model.mtp) if use_mtp else 0
    pages = sum(-(-(len(row) + max_new_tokens + depth) // page_size) for row in rows)
    cache = PagedLatentCache(
        model.config,
        pages,
        page_size=page_size,
        dtype=model.dtype if cache_dtype is None else cache_dtype,
        device=model.device,
    )
    eos = model.config.eos_token_id if eos_token_id == -1 else eos_token_id
    engine = _Engine(model, cache, sampling, depth, max_new_tokens, eos, stats or Stats())
    return engine.run(rows, chunk_size)


class _Engine:
    def __init__(
        self,
        model: DeepseekV3,
        cache: PagedLatentCache,
        sampling: Sampling,
        depth: int,
        max_new_tokens: int,
        eos: int | None,
        stats: Stats,
    ) -> None:
        self.model, self.cache, self.sampling = model, cache, sampling
        self.depth, self.max_new_tokens, self.eos = depth, max_new_tokens, eos
        self.stats = stats
        stats.drafted, stats.accepted = [0] * depth, [0] * depth

    def run(self, rows: list[list[int]], chunk_size: int) -> Iterator[tuple[int, list[int]]]:
        running = [_Running(i, list(row), len(row)) for i, row in enumerate(rows)]
        self.stats.prompt_tokens += sum(len(row) for row in rows)
        start = time.perf_counter()
        first = self._prefill(running, chunk_size)
        self.stats.prefill_seconds += time.perf_counter() - start
        # Time is counted only while this runs, not while the caller handles what was yielded.
        for sequence, tokens in first:
            yield sequence.index, tokens
        while running := [sequence for sequence in running if not self._done(sequence)]:
            start = time.perf_counter()
            produced = self._decode(running)
            self.stats.decode_seconds += time.perf_counter() - start
            for sequence, tokens in produced:
                yield sequence.index, tokens

    @torch.no_grad()
    def _prefill(
        self, running: list[_Running], chunk_size: int
    ) -> list[tuple[_Running, list[int]]]:
        """Put all prompts through the model; the first new token of each sequence."""
        out = []
        while waiting := [s for s in running if s.processed < s.prompt_len]:
            counts = [min(chunk_size, s.prompt_len - s.processed) for s in waiting]
            hidden = self._forward(waiting, counts)
            ends = [s for s in waiting if s.processed == s.prompt_len]
            last = [h[-1] for s, h in zip(waiting, hidden, strict=True) if s in ends]
            if ends:
                picked = self._pick(torch.stack(last), [(s, len(s.tokens)) for s in ends])
                out += [(s, self._extend(s, [token])) for s, token in zip(ends, picked)]
            if self.depth:
                self._absorb_prompt(waiting)
        return out

    @torch.no_grad()
    def _decode(self, running: list[_Running]) -> list[tuple[_Running, list[int]]]:
        """One step: draft, check the drafts together with the last token, keep what agrees."""
        if self.depth:
            self._draft(running)
        counts = []
        for s in running:
            # The last of the allowed tokens comes from the model itself: more drafts are wasted.
            s.drafts = s.drafts[: self.max_new_tokens - s.new_tokens - 1]
            counts.append(1 + len(s.drafts))
        hidden = self._forward(running, counts)
        keys = [(s, len(s.tokens) + j) for s, n in zip(running, counts) for j in range(n)]
        picked = iter(self._pick(torch.cat(hidden), keys))
        self.stats.decode_steps += 1
        out = []
        for s, count in zip(running, counts, strict=True):
            choices = [next(picked) for _ in range(count)]
            kept = 0
            while kept < len(s.drafts) and s.drafts[kept] == choices[kept]:
                kept += 1
            self._count_drafts(len(s.drafts), kept)
            self._forget(s, len(s.drafts) - kept)
            out.append((s, self._extend(s, choices[: kept + 1])))
            self.stats.new_tokens += len(out[-1][1])
        return out

    def _forward(self, running: list[_Running], counts: list[int]) -> list[torch.Tensor]:
        """Put the next `counts[i]` tokens (drafts included) of each sequence through the model."""
        tokens: list[int] = []
        for s, count in zip(running, counts, strict=True):
            tokens += (s.tokens + s.drafts)[s.processed : s.processed + count]
        batch = self._batch(running, [s.processed for s in running], counts)
        hidden = self.model.hidden_states(self._tensor(tokens), batch).split(counts)
        for s, count, states in zip(running, counts, hidden, strict=True):
            s.processed += count
            if self.depth:
                s.hidden = states if s.hidden is None else torch.cat([s.hidden, states])
        return list(hidden)

    def _forget(self, s: _Running, rejected: int) -> None:
        """Take back the last positions: their rows in the cache will be overwritten."""
        s.drafts = []
        if rejected:
            s.processed -= rejected
            s.hidden = s.hidden[:-rejected]

    def _extend(self, s: _Running, tokens: list[int]) -> list[int]:
        """Append confirmed tokens up to an end token; returns them. Frees a finished sequence."""
        if self.eos in tokens:
            tokens = tokens[: tokens.index(self.eos) + 1]
        s.tokens += tokens
        if self._done(s):
            self.cache.release(s.pages)
        return tokens

    def _done(self, s: _Running) -> bool:
        return s.new_tokens >= self.max_new_tokens or (
            s.new_tokens > 0 and self.eos is not None and s.tokens[-1] == self.eos
        )

    # ---- MTP ------------------------------------------------------------------------------------

    def _absorb_prompt(self, running: list[_Running]) -> None:
        """Show the MTP modules the positions whose following tokens are all part of the prompt."""
        ready, counts = [], []
        for s in running:
            count = min(s.processed, s.prompt_len - self.depth) - s.mtp_start
            if count > 0 and not self._done(s):
                ready.append(s)
                counts.append(count)
        if not ready:
            return
        hidden = torch.cat([s.hidden[:n] for s, n in zip(ready, counts, strict=True)])
        for k in range(1, self.depth + 1):
            hidden = self._mtp_forward(k, hidden, ready, counts)
        for s, count in zip(ready, counts, strict=True):
            s.hidden = s.hidden[count:]
            s.mtp_start += count

    def _draft(self, running: list[_Running]) -> None:
        """One draft per depth, each built on the one before.

        Depth k at the newest position uses the draft of depth k - 1, so its rows for the last
        depth - 1 positions are provisional: they stay in `hidden` and are computed again."""
        counts = [len(s.hidden) for s in running]
        hidden = torch.cat([s.hidden for s in running])
        last = torch.tensor(counts).cumsum(0) - 1
        for k in range(1, self.depth + 1):
            hidden = self._mtp_forward(k, hidden, running, counts)
            logits = self.model.lm_head(hidden[last.to(hidden.device)])
            for s, token in zip(running, logits.argmax(-1).tolist(), strict=True):
                s.drafts.append(token)
        for s in running:
            settled = max(0, len(s.hidden) - (self.depth - 1))
            s.hidden = s.hidden[settled:]
            s.mtp_start += settled

    def _mtp_forward(
        self, k: int, hidden: torch.Tensor, running: list[_Running], counts: list[int]
    ) -> torch.Tensor:
        tokens: list[int] = []
        for s, count in zip(running, counts, strict=True):
            tokens += (s.tokens + s.drafts)[s.mtp_start + k : s.mtp_start + k + count]
        batch = self._batch(running, [s.mtp_start for s in running], counts)
        return self.model.mtp_hidden_states(k, hidden, self._tensor(tokens), batch)

    def _count_drafts(self, drafted: int, kept: int) -> None:
        """A draft counts as checked if all before it were kept."""
        for k in range(min(drafted, kept + 1)):
            self.stats.drafted[k] += 1
            self.stats.accepted[k] += k < kept

    # ---- helpers --------------------------------------------------------------------------------

    def _batch(self, running: list[_Running], starts: list[int], counts: list[int]) -> TokenBatch:
        pages = [s.pages for s in running]
        return TokenBatch(counts, starts, self.model.device, self.cache, pages)

    def _tensor(self, tokens: list[int]) -> torch.Tensor:
        return torch.tensor(tokens, dtype=torch.int64, device=self.model.device)

    def _pick(self, hidden: torch.Tensor, keys: list[tuple[_Running, int]]) -> list[int]:
        logits = self.model.lm_head(hidden)
        return self.sampling.pick(logits, [(s.index, position) for s, position in keys])


def _checked_prompts(
    model: DeepseekV3, prompts: torch.Tensor | Iterable[list[int]], max_new_tokens: int
) -> list[list[int]]:
    if isinstance(prompts, torch.Tensor):
        model.check_tokens(prompts)
        prompts = prompts.tolist()
    rows = [list(row) for row in prompts]
    if not rows:
        raise ValueError("prompts: expected at least one")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: expected at least 1, got {max_new_tokens}")
    limit = model.config.max_position_embeddings
    for i, row in enumerate(rows):
        if not row:
            raise ValueError(f"prompts[{i}]: empty; a model needs a token to continue")
        if not all(type(token) is int for token in row):
            raise TypeError(f"prompts[{i}]: expected a list of integers")
        bad = [token for token in row if not 0 <= token < model.config.vocab_size]
        if bad:
            raise IndexError(
                f"prompts[{i}]: expected tokens in 0..{model.config.vocab_size - 1}, got {bad[0]}"
            )
        if len(row) + max_new_tokens > limit:
            raise ValueError(
                f"prompts[{i}]: {len(row)} tokens and {max_new_tokens} new ones exceed "
                f"max_position_embeddings {limit}"
            )
    return rows


# ---- command line --------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m model.generate", description="Continue a prompt, streaming the text."
    )
    parser.add_argument("checkpoint", help="checkpoint directory (safetensors)")
    parser.add_argument("--prompt", help="the text to continue; standard input if absent")
    parser.add_argument("--max-new-tokens", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mtp", action="store_true", help="speculate with the MTP modules")
    parser.add_argument("--dtype", choices=["auto", "fp32", "bf16", "fp8"], default="auto")
    parser.add_argument("--cache", choices=["auto", "fp8"], default="auto")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(argv)
    try:
        stats = _run(args)
    except (OSError, ValueError, IndexError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"\n[{stats.summary()}]", file=sys.stderr)
    return 0


def _run(args: argparse.Namespace) -> Stats:
    from model.tokenizer import load_tokenizer

    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}
    model = DeepseekV3.from_pretrained(
        Path(args.checkpoint), dtype=dtypes.get(args.dtype), device=args.device
    )
    tokenizer = load_tokenizer(args.checkpoint, model.config)
    prompt = sys.stdin.read() if args.prompt is None else args.prompt
    stats = Stats()
    pieces = stream(
        model,
        [tokenizer.encode(prompt)],
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        seed=args.seed,
        use_mtp=args.mtp,
        cache_dtype="fp8" if args.cache == "fp8" else None,
        stats=stats,
    )
    print(prompt, end="", flush=True)
    print_stream((tokens for _, tokens in pieces), tokenizer.decode)
    return stats


def print_stream(pieces: Iterable[list[int]], decode: Callable[[list[int]], str]) -> None:
    """Print text as its tokens come; a character split between tokens waits for its rest."""
    tokens: list[int] = []
    shown = ""
    for piece in pieces:
        tokens += piece
        text = decode(tokens)
        if text.endswith("\ufffd"):
            continue
        print(text[len(shown) :], end="", flush=True)
        shown = text
    print(decode(tokens)[len(shown) :], flush=True)


if __name__ == "__main__":
    sys.exit(main())
