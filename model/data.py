"""Byte-level text data: which files, how they are split, and in which order windows are read.

A token is a byte (0..255) or BOS, which opens every document. The default corpus is the source of
the Python standard library: real text that is already on every machine that can run this program.

The split is by FILE and by content: files with equal content are dropped before it, and the side a
file falls on is a hash of its name, so it depends on neither the directory order nor the machine.
"""

import hashlib
import math
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

BOS = 256
"""Opens every document; also the alphabet size of plain bytes."""

_SKIPPED_DIRS = frozenset({"site-packages", "dist-packages", "__pycache__"})
_HASH_SPAN = 2.0**64


def stdlib_root() -> Path:
    """Folder of the running interpreter's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def find_files(root: Path, suffixes: Sequence[str] = (".py",)) -> list[Path]:
    """Text files below `root`, sorted by relative path; installed packages are not entered."""
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"corpus folder: expected a directory, got {str(root)!r}")
    found = (
        path
        for path in root.rglob("*")
        if path.suffix in suffixes
        and _SKIPPED_DIRS.isdisjoint(path.relative_to(root).parts)
        and path.is_file()
    )
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def is_held_out(name: str, fraction: float) -> bool:
    """Whether the file called `name` belongs to the held-out side: a hash, so it never changes."""
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") / _HASH_SPAN < fraction


@dataclass(frozen=True)
class Corpus:
    """Two token streams (uint16, every document opened by BOS) and what went into them."""

    train: np.ndarray
    held_out: np.ndarray
    train_files: tuple[str, ...]
    held_out_files: tuple[str, ...]
    num_duplicates: int
    digest: str
    """sha256 over both streams: a resumed run refuses to continue on other text."""

    def summary(self) -> str:
        return (
            f"{len(self.train_files)} files ({len(self.train) / 1e6:.1f} MB) to train on, "
            f"{len(self.held_out_files)} files ({len(self.held_out) / 1e6:.2f} MB) held out, "
            f"{self.num_duplicates} duplicates dropped"
        )


def build_corpus(documents: Iterable[tuple[str, bytes]], held_out_fraction: float = 0.04) -> Corpus:
    """Split named documents into the two streams.

    Args:
        documents: (name, content) pairs; of documents with equal content the first one stays.
        held_out_fraction: expected share of files on the held-out side, in (0, 1).

    Raises:
        ValueError: a fraction out of range, or a side left without a single byte.
    """
    if not 0.0 < held_out_fraction < 1.0:
        raise ValueError(f"held_out_fraction: expected a value in (0, 1), got {held_out_fraction}")
    sides: tuple[list, list] = ([], [])
    seen: set[bytes] = set()
    num_duplicates = 0
    for name, content in documents:
        if not content:
            continue
        fingerprint = hashlib.sha256(content).digest()
        if fingerprint in seen:
            num_duplicates += 1
            continue
        seen.add(fingerprint)
        sides[is_held_out(name, held_out_fraction)].append((name, content))
    for side, label in zip(sides, ("train", "held-out")):
        if not side:
            total = len(sides[0]) + len(sides[1])
            raise ValueError(
                f"corpus: the {label} side is empty ({total} distinct non-empty files, "
                f"held_out_fraction {held_out_fraction}); give more files"
            )
    train, held_out = (_stream(content for _, content in side) for side in sides)
    digest = hashlib.sha256(train.tobytes() + b"|" + held_out.tobytes()).hexdigest()
    names = [tuple(name for name, _ in side) for side in sides]
    return Corpus(train, held_out, names[0], names[1], num_duplicates, digest)


def _stream(contents: Iterable[bytes]) -> np.ndarray:
    bos = np.array([BOS], dtype=np.uint16)
    parts = []
    for content in contents:
        parts += [bos, np.frombuffer(content, dtype=np.uint8).astype(np.uint16)]
    return np.concatenate(parts)


def load_corpus(
    root: Path | None = None,
    suffixes: Sequence[str] = (".py",),
    held_out_fraction: float = 0.04,
    max_bytes: int | None = None,
) -> Corpus:
    """Corpus of the files below `root` (default: the Python standard library's sources).

    `max_bytes` keeps only as many files, in path order, as fit: for tests and quick trials.
    """
    root = stdlib_root() if root is None else Path(root)
    documents, total = [], 0
    for path in find_files(root, suffixes):
        content = path.read_bytes()
        if max_bytes is not None and total + len(content) > max_bytes:
            break
        total += len(content)
        documents.append((path.relative_to(root).as_posix(), content))
    if not documents:
        raise ValueError(f"corpus: no file ending in {tuple(suffixes)} below {str(root)!r}")
    return build_corpus(documents, held_out_fraction)


class WindowLoader:
    """Endless batches of token windows, each window once per epoch, in a seeded order.

    An epoch cuts the stream into windows of `seq_len + 1` tokens (inputs and targets overlap by
    all but one), starting at an offset of its own, and shuffles them. Order and offset follow from
    (seed, epoch) alone, so the position is two integers and resuming costs nothing.
    """

    def __init__(self, stream: np.ndarray, seq_len: int, batch: int, seed: int = 0):
        if seq_len < 1 or batch < 1:
            raise ValueError(
                f"seq_len, batch: expected positive integers, got {seq_len} and {batch}"
            )
        if len(stream) < 2 * seq_len + 2:
            raise ValueError(
                f"stream: expected at least {2 * seq_len + 2} tokens for seq_len {seq_len}, "
                f"got {len(stream)}"
            )
        self._stream, self._seq_len, self._batch, self._seed = stream, seq_len, batch, seed
        self._epoch, self._cursor = 0, 0
        self._starts = self._epoch_starts(0)

    def _epoch_starts(self, epoch: int) -> np.ndarray:
        rng = np.random.default_rng([self._seed, epoch])
        offset = int(rng.integers(self._seq_len))
        num_windows = (len(self._stream) - 1 - offset) // self._seq_len
        return offset + self._seq_len * rng.permutation(num_windows)

    def next_batch(self) -> torch.Tensor:
        """[batch, seq_len + 1] int64: `[:, :-1]` are the inputs, `[:, 1:]` the targets."""
        rows = []
        while len(rows) < self._batch:
            if self._cursor == len(self._starts):
                self._epoch, self._cursor = self._epoch + 1, 0
                self._starts = self._epoch_starts(self._epoch)
            start = int(self._starts[self._cursor])
            self._cursor += 1
            rows.append(self._stream[start : start + self._seq_len + 1])
        return torch.from_numpy(np.stack(rows).astype(np.int64))

    def state_dict(self) -> dict[str, int]:
        return {"seed": self._seed, "epoch": self._epoch, "cursor": self._cursor}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._seed = int(state["seed"])
        self._epoch, cursor = int(state["epoch"]), int(state["cursor"])
        self._starts = self._epoch_starts(self._epoch)
        if not 0 <= cursor <= len(self._starts):
            raise ValueError(f"cursor: expected 0..{len(self._starts)}, got {cursor}")
        self._cursor = cursor


@dataclass(frozen=True)
class HeldOutSet:
    """Fixed held-out windows; every model, the baselines included, scores the same bytes."""

    windows: torch.Tensor
    """[n, seq_len + 1] int64."""
    positions: np.ndarray
    """[n, seq_len] stream index of every target, so that baselines see their full context."""

    @property
    def num_bytes(self) -> int:
        return int((self.windows[:, 1:] < BOS).sum())


def held_out_windows(stream: np.ndarray, seq_len: int, num_bytes: int) -> HeldOutSet:
    """About `num_bytes` of `stream` in equally spaced, non-overlapping windows."""
    available = (len(stream) - 1) // seq_len
    if available < 1:
        raise ValueError(f"held-out stream: {len(stream)} tokens are fewer than one window")
    count = min(available, max(1, math.ceil(num_bytes / seq_len)))
    starts = np.linspace(0, available - 1, count).astype(np.int64) * seq_len
    index = starts[:, None] + np.arange(seq_len + 1)
    windows = torch.from_numpy(stream[index].astype(np.int64))
    return HeldOutSet(windows, index[:, 1:])


def decode_bytes(tokens: Iterable[int]) -> str:
    """Text of generated tokens; specials are left out and broken UTF-8 is shown, not hidden."""
    return bytes(token for token in tokens if 0 <= token < BOS).decode("utf-8", "replace")
