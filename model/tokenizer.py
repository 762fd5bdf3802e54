"""Text to tokens and back: a checkpoint's tokenizer.json, or plain bytes for byte-level models."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from model.config import DeepseekConfig


class Tokenizer(Protocol):
    def encode(self, text: str) -> list[int]: ...

    def decode(self, tokens: list[int]) -> str: ...


class ByteTokenizer:
    """Token = byte value; BOS first. Tokens beyond 255 (BOS, EOS, padding) decode to nothing."""

    def __init__(self, bos: int | None) -> None:
        self.bos = bos

    def encode(self, text: str) -> list[int]:
        return ([] if self.bos is None else [self.bos]) + list(text.encode("utf-8"))

    def decode(self, tokens: list[int]) -> str:
        return bytes(token for token in tokens if token < 256).decode("utf-8", errors="replace")


class _FileTokenizer:
    def __init__(self, path: Path) -> None:
        try:
            from tokenizers import Tokenizer as Backend
        except ImportError as error:
            raise ImportError(f"{path} needs the package 'tokenizers': pip install it") from error
        self._backend = Backend.from_file(str(path))

    def encode(self, text: str) -> list[int]:
        return self._backend.encode(text).ids

    def decode(self, tokens: list[int]) -> str:
        return self._backend.decode(tokens)


def load_tokenizer(directory: str | Path, config: DeepseekConfig) -> Tokenizer:
    """The tokenizer of a checkpoint directory; ValueError if it has none and needs one."""
    path = Path(directory) / "tokenizer.json"
    if path.is_file():
        return _FileTokenizer(path)
    if 256 <= config.vocab_size <= 320:
        return ByteTokenizer(config.bos_token_id)
    raise ValueError(f"{path}: missing, and a vocabulary of {config.vocab_size} is not byte-level")
