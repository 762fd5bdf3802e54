"""A checkpoint directory: config.json, safetensors shards and their index; read, and written anew.

Reading never holds more than a few rows beyond what it fills. Writing goes to a hidden directory
beside the target and takes the target's name only when complete: a crash leaves what was there.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

import dskernels as dsk
from model.config import FP8_BLOCK, read_config_json
from model.safetensors_file import (
    DTYPE_NAMES,
    CheckpointError,
    SafetensorsFile,
    SafetensorsWriter,
    TensorInfo,
)

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
SCALE_SUFFIX = "_scale_inv"  # of the fp32 scales beside an FP8 weight
CHUNK_ELEMENTS = 4 << 20  # read, converted or written at once: 16 MiB in fp32
QUANTIZATION_CONFIG = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
}
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


class Checkpoint:
    """All shards of a directory opened for reading, headers checked. Use as a context manager.

    tensors  name -> TensorInfo of every tensor in every shard, scales included
    config   the raw config.json
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        if not self.directory.is_dir():
            raise FileNotFoundError(f"{self.directory}: no such checkpoint directory")
        self.config = read_config_json(self.directory)
        _check_quantization(self.config)
        self._files: list[SafetensorsFile] = []
        self._owner: dict[str, SafetensorsFile] = {}
        try:
            for path in self._shard_paths():
                self._files.append(SafetensorsFile(path))
            self._collect()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        for file in self._files:
            file.close()

    def is_fp8(self, name: str) -> bool:
        return self.tensors[name].dtype == torch.float8_e4m3fn

    def read(self, name: str, first: int = 0, last: int | None = None) -> torch.Tensor:
        """Rows of a tensor as stored (FP8 without its scales)."""
        return self._owner[name].read(name, first, last)

    def read_into(self, name: str, out: torch.Tensor) -> None:
        """A whole tensor as stored, straight into contiguous CPU memory of its dtype."""
        self._owner[name].read_into(name, out)

    def read_scale(self, name: str) -> torch.Tensor:
        """The scales [ceil(n/128), ceil(k/128)] fp32 of FP8 weight `name`, checked."""
        scale_name = name + SCALE_SUFFIX
        if scale_name not in self.tensors:
            raise CheckpointError(f"{name}: FP8 without its scales {scale_name!r}")
        info, weight = self.tensors[scale_name], self.tensors[name]
        expected = tuple(-(-size // FP8_BLOCK) for size in weight.shape)
        if info.shape != expected:
            raise CheckpointError(
                f"{scale_name}: expected shape {expected} for a weight of {weight.shape}, "
                f"got {info.shape}"
            )
        scale = self.read(scale_name).to(torch.float32)
        if not bool(torch.isfinite(scale).all()):
            raise CheckpointError(f"{scale_name}: {_count_bad(scale)} of its scales are NaN or Inf")
        if bool((scale < 0).any()):
            raise CheckpointError(f"{scale_name}: negative scales")
        return scale

    def chunks(self, name: str, dtype: torch.dtype) -> Iterator[tuple[int, torch.Tensor]]:
        """(first row, rows) of the whole tensor, dequantised if need be, as `dtype`.

        Chunks begin at multiples of 128 rows, so that they quantise as the whole would."""
        scale = self.read_scale(name) if self.is_fp8(name) else None
        for first, last in row_chunks(self.tensors[name]):
            rows = self.read(name, first, last)
            if scale is None:
                yield first, rows.to(dtype)
                continue
            own = scale[first // FP8_BLOCK : -(-last // FP8_BLOCK)]
            yield first, dsk.ScaledTensor(rows, own, (FP8_BLOCK, FP8_BLOCK)).dequantize(dtype)

    def _shard_paths(self) -> list[Path]:
        index = self.directory / INDEX_NAME
        if index.is_file():
            self._weight_map = _read_index(index)
            return [self.directory / name for name in sorted(set(self._weight_map.values()))]
        self._weight_map = None
        single = self.directory / SINGLE_NAME
        if single.is_file():
            return [single]
        pickles = [p.name for p in self.directory.iterdir() if p.suffix in _PICKLE_SUFFIXES]
        if pickles:
            raise CheckpointError(
                f"{self.directory}: only pickle checkpoints ({sorted(pickles)[0]}); loading one "
                "runs code from the file: refused, convert it to safetensors"
            )
        raise FileNotFoundError(f"{self.directory}: neither {SINGLE_NAME} nor {INDEX_NAME}")

    def _collect(self) -> None:
        self.tensors: dict[str, TensorInfo] = {}
        for file in self._files:
            for name, info in file.tensors.items():
                if name in self.tensors:
                    raise CheckpointError(f"{file.path}: tensor {name!r} is in another shard too")
                self.tensors[name] = info
                self._owner[name] = file
        for name, shard in (self._weight_map or {}).items():
            if name not in self._owner or self._owner[name].path.name != shard:
                raise CheckpointError(f"{self.directory}: {name!r} is missing from shard {shard}")


class CheckpointWriter:
    """Writes a checkpoint directory whose tensors are announced first and then arrive in rows.

    Nothing appears under `directory` before everything is written; leaving the `with` block by an
    exception removes the unfinished copy. FileExistsError if `directory` holds anything, unless
    `overwrite`.
    """

    def __init__(
        self,
        directory: str | Path,
        tensors: Iterable[TensorInfo],
        config: dict[str, Any],
        *,
        max_shard_bytes: int = 5 << 30,
        overwrite: bool = False,
    ) -> None:
        self.directory = Path(directory).absolute()
        self.overwrite = overwrite
        self._refuse_existing()
        self._shards = _split(list(tensors), max_shard_bytes)
        self._names = [
            SINGLE_NAME
            if len(self._shards) == 1
            else f"model-{i:05d}-of-{len(self._shards):05d}.safetensors"
            for i in range(1, len(self._shards) + 1)
        ]
        self._shard_of = {t.name: i for i, shard in enumerate(self._shards) for t in shard}
        self._open: dict[int, SafetensorsWriter] = {}
        self._config = config
        self._finished = 0
        self.directory.parent.mkdir(parents=True, exist_ok=True)
        self._temporary = Path(
            tempfile.mkdtemp(prefix=f".{self.directory.name}.", dir=self.directory.parent)
        )

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            for writer in self._open.values():
                writer.abandon()
            if self._temporary.exists():
                shutil.rmtree(self._temporary)

    def write(self, name: str, value: torch.Tensor, first: int = 0) -> None:
        """Rows of one announced tensor, from row `first` on."""
        shard = self._shard_of[name]
        if shard not in self._open:
            path = self._temporary / self._names[shard]
            self._open[shard] = SafetensorsWriter(path, self._shards[shard])
        writer = self._open[shard]
        writer.write(name, value, first)
        if writer.complete:
            writer.close()
            del self._open[shard]
            self._finished += 1

    def add_file(self, path: Path) -> None:
        """Copy a further file (a tokenizer, say) into the checkpoint."""
        shutil.copyfile(path, self._temporary / path.name)

    def _finish(self) -> None:
        for writer in self._open.values():
            writer.close()  # names what is missing
        if self._finished != len(self._shards):
            raise RuntimeError(
                f"{self.directory}: {self._finished} of {len(self._shards)} shards written"
            )
        if len(self._shards) > 1:
            total = sum(t.nbytes for shard in self._shards for t in shard)
            index = {
                "metadata": {"total_size": total},
                "weight_map": {name: self._names[i] for name, i in sorted(self._shard_of.items())},
            }
            _write_json(self._temporary / INDEX_NAME, index)
        _write_json(self._temporary / "config.json", self._config)
        self._temporary.chmod(0o755)
        self._take_name()

    def _take_name(self) -> None:
        self._refuse_existing()
        if self.directory.exists() and any(self.directory.iterdir()):
            # The old checkpoint leaves with the temporary name, and `__exit__` removes it.
            _exchange(self._temporary, self.directory)
        else:
            os.rename(self._temporary, self.directory)
        parent = os.open(self.directory.parent, os.O_RDONLY)
        try:
            os.fsync(parent)
        finally:
            os.close(parent)

    def _refuse_existing(self) -> None:
        if not self.directory.exists():
            return
        if not self.directory.is_dir():
            raise FileExistsError(f"{self.directory}: exists and is not a directory")
        if any(self.directory.iterdir()) and not self.overwrite:
            raise FileExistsError(f"{self.directory}: not empty; pass overwrite=True to replace it")


def row_chunks(info: TensorInfo) -> Iterator[tuple[int, int]]:
    """(first, last) rows of about CHUNK_ELEMENTS, at multiples of 128; (0, 1) for a scalar."""
    rows = info.shape[0] if info.shape else 1
    row = max(1, info.row_bytes // info.dtype.itemsize)
    blocks = max(1, CHUNK_ELEMENTS // (row * FP8_BLOCK))
    for first in range(0, rows, blocks * FP8_BLOCK):
        yield first, min(rows, first + blocks * FP8_BLOCK)


def _check_quantization(config: dict[str, Any]) -> None:
    found = config.get("quantization_config")
    if found is None:
        return
    method, block = found.get("quant_method"), found.get("weight_block_size")
    if method != "fp8" or list(block or []) != [FP8_BLOCK, FP8_BLOCK]:
        raise CheckpointError(
            "quantization_config: expected quant_method 'fp8' with weight_block_size [128, 128], "
            f"got {method!r} with {block}"
        )


def _read_index(path: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        shards = set(weight_map.values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: corrupted index: {error!r}") from error
    for shard in shards:
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise CheckpointError(f"{path}: shard {shard!r} is not a plain file name")
        if Path(shard).suffix in _PICKLE_SUFFIXES:
            raise CheckpointError(f"{path}: shard {shard!r} is a pickle checkpoint: refused")
        if not (path.parent / shard).is_file():
            raise CheckpointError(f"{path}: shard {shard} is missing")
    return weight_map


def _split(tensors: list[TensorInfo], max_bytes: int) -> list[list[TensorInfo]]:
    """Shards in the given order, each at most `max_bytes` (one larger tensor stands alone)."""
    shards: list[list[TensorInfo]] = [[]]
    used = 0
    for info in tensors:
        if info.dtype not in DTYPE_NAMES:
            raise TypeError(f"{info.name}: safetensors cannot store {info.dtype}")
        if shards[-1] and used + info.nbytes > max_bytes:
            shards.append([])
            used = 0
        shards[-1].append(info)
        used += info.nbytes
    return shards


def _exchange(a: Path, b: Path) -> None:
    """Swap the names of two directories, in one step where the system can."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is not None:
        here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
        if renameat2(here, os.fsencode(a), here, os.fsencode(b), exchange) == 0:
            return
    aside = a.with_name(a.name + ".old")  # not atomic, but nothing is lost: two hidden copies stay
    os.rename(b, aside)
    os.rename(a, b)
    os.rename(aside, a)


def _count_bad(scale: torch.Tensor) -> int:
    return int((~torch.isfinite(scale)).sum())


def _write_json(path: Path, value: dict[str, Any]) -> None:
    with path.open("x", encoding="utf-8") as file:
        json.dump(value, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
