"""The safetensors file format, read and written tensor by tensor, rows at a time.

A file is: header length (8 bytes, little endian), a JSON header, then the tensors' bytes without
gaps. Reading and writing go through plain file offsets, so no more than the rows at hand is in
memory. Everything a damaged or hostile file can say is checked before a byte of data is used.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded as it stands: damaged, incomplete or of another shape."""


@dataclass(frozen=True)
class TensorInfo:
    """One tensor's header entry. `offset` is in bytes from the start of the file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int = 0

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def row_bytes(self) -> int:
        """Bytes of one index of the first dimension (of the whole tensor if it has none)."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize


class SafetensorsFile:
    """A file opened for reading: `tensors` maps names to TensorInfo. Closes with `close()`."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._fd = os.open(self.path, os.O_RDONLY)
        try:
            self.tensors = self._parse_header()
        except BaseException:
            os.close(self._fd)
            raise

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def read(self, name: str, first: int = 0, last: int | None = None) -> torch.Tensor:
        """Rows first..last of tensor `name` (all of it by default) in a new CPU tensor."""
        info = self.tensors[name]
        shape = info.shape
        if shape:
            last = shape[0] if last is None else last
            shape = (last - first, *shape[1:])
        out = torch.empty(shape, dtype=info.dtype)
        self.read_into(name, out, first)
        return out

    def read_into(self, name: str, out: torch.Tensor, first: int = 0) -> None:
        """Fill the contiguous CPU tensor `out` with rows from `first` on, without a copy."""
        info = self.tensors[name]
        view = memoryview(_bytes_of(out))
        offset = info.offset + first * info.row_bytes
        done = 0
        while done < len(view):
            got = os.preadv(self._fd, [view[done : done + (1 << 30)]], offset + done)
            if got == 0:
                raise CheckpointError(f"{self.path}: ends within tensor {name!r}: truncated")
            done += got

    def _parse_header(self) -> dict[str, TensorInfo]:
        size = os.fstat(self._fd).st_size
        start = os.pread(self._fd, 8, 0)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > MAX_HEADER_BYTES or 8 + length > size:
            if start[:4] == b"PK\x03\x04" or start[:1] == b"\x80":  # zip archive, bare pickle
                raise CheckpointError(
                    f"{self.path}: a pickle checkpoint; loading it would run its code: refused"
                )
            raise CheckpointError(
                f"{self.path}: header of {length} bytes in a file of {size}: truncated or corrupted"
            )
        header = self._parse_json(os.pread(self._fd, length, 8))
        header.pop("__metadata__", None)
        data_start = 8 + length
        infos = sorted(
            (_parse_entry(self.path, name, entry, data_start) for name, entry in header.items()),
            key=lambda info: (info.offset, info.nbytes),
        )
        end = data_start
        for info in infos:
            if info.offset != end:
                raise CheckpointError(f"{self.path}: tensor {info.name!r} overlaps or leaves a gap")
            end += info.nbytes
        if end != size:
            raise CheckpointError(
                f"{self.path}: header describes {end} bytes, the file has {size}: "
                f"{'truncated' if size < end else 'corrupted'}"
            )
        return {info.name: info for info in infos}

    def _parse_json(self, raw: bytes) -> dict[str, Any]:
        try:
            header = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
        except (UnicodeDecodeError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{self.path}: corrupted header: {error}") from error
        if not isinstance(header, dict):
            raise CheckpointError(f"{self.path}: corrupted header: not a JSON object")
        return header


class SafetensorsWriter:
    """Writes one file of tensors that are announced first and arrive in any order, in rows."""

    def __init__(self, path: str | Path, infos: Iterable[TensorInfo]) -> None:
        # Widest elements first keeps every tensor aligned to its element size.
        infos = sorted(infos, key=lambda info: (-info.dtype.itemsize, info.name))
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for info in infos:
            header[info.name] = {
                "dtype": DTYPE_NAMES[info.dtype],
                "shape": list(info.shape),
                "data_offsets": [end, end + info.nbytes],
            }
            end += info.nbytes
        raw = json.dumps(header, separators=(",", ":")).encode()
        raw += b" " * (-len(raw) % 8)
        self.path = Path(path)
        self._fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        self._tensors = {
            info.name: TensorInfo(
                info.name,
                info.dtype,
                info.shape,
                8 + len(raw) + header[info.name]["data_offsets"][0],
            )
            for info in infos
        }
        self._pending = {info.name: info.nbytes for info in infos}
        _write_all(self._fd, memoryview(len(raw).to_bytes(8, "little") + raw), 0)

    def write(self, name: str, value: torch.Tensor, first: int = 0) -> None:
        """Write rows of tensor `name` from row `first` on; its dtype must be the announced one."""
        info = self._tensors[name]
        if value.dtype != info.dtype or value.shape[1:] != info.shape[1:]:
            raise ValueError(
                f"{name}: expected {info.dtype} rows of {info.shape}, "
                f"got {value.dtype} {tuple(value.shape)}"
            )
        view = memoryview(_bytes_of(value.detach().cpu().contiguous()))
        _write_all(self._fd, view, info.offset + first * info.row_bytes)
        self._pending[name] -= len(view)

    @property
    def complete(self) -> bool:
        return not any(self._pending.values())

    def close(self) -> None:
        """Flush to the disk; RuntimeError if a tensor is not fully written."""
        missing = [name for name, left in self._pending.items() if left]
        if missing:
            raise RuntimeError(f"{self.path}: tensors not fully written: {missing[:5]}")
        os.fsync(self._fd)
        self.abandon()

    def abandon(self) -> None:
        """Close the file as it stands."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _parse_entry(path: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    try:
        dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
        begin, end = entry["data_offsets"]
        sizes = (*shape, begin, end)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: tensor {name!r}: corrupted entry {entry!r}") from error
    if not all(type(n) is int and n >= 0 for n in sizes):
        raise CheckpointError(f"{path}: tensor {name!r}: corrupted sizes in {entry!r}")
    info = TensorInfo(name, dtype, shape, data_start + begin)
    if info.nbytes != end - begin:
        raise CheckpointError(
            f"{path}: tensor {name!r}: {dtype} {shape} takes {info.nbytes} bytes, "
            f"the header says {end - begin}"
        )
    return info


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        raise ValueError("a name appears twice")
    return out


def _bytes_of(tensor: torch.Tensor) -> Any:
    """The bytes of a contiguous CPU tensor, without a copy."""
    return tensor.reshape(-1).view(torch.uint8).numpy()


def _write_all(fd: int, view: memoryview, offset: int) -> None:
    done = 0
    while done < len(view):
        done += os.pwrite(fd, view[done : done + (1 << 30)], offset + done)
