"""Training state on disk: one safetensors file that is always either the old one or the new one.

The file is written beside its final place, flushed to the disk, and renamed: rename within a file
system is atomic, so a process killed at any moment leaves the previous state intact. Values that
are not tensors travel as JSON in the file's own header, so that state and numbers cannot fall
apart. No pickle: loading a snapshot never runs code.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

_FORMAT = "dskernels-train-1"


def save_snapshot(path: Path, tensors: dict[str, torch.Tensor], values: dict[str, Any]) -> None:
    """Replace `path` by a file holding `tensors` and `values` (JSON), durably and atomically."""
    path = Path(path)
    # In a folder of its own: safetensors writes through a file with a random name, and those that
    # killed processes leave behind would pile up.
    folder = path.with_name(path.name + ".tmp")
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    metadata = {"format": _FORMAT, "values": json.dumps(values)}
    save_file(contiguous, folder / path.name, metadata=metadata)
    _flush(folder / path.name)
    os.replace(folder / path.name, path)
    _flush(path.parent)
    folder.rmdir()


def _flush(path: Path) -> None:
    """fsync a file or a folder: without it a rename may reach the disk before the data."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load_snapshot(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """(tensors, values) of a file that `save_snapshot` wrote.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not safetensors (truncated, or a pickle), or not a training snapshot.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"snapshot: no such file {str(path)!r}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise ValueError(
                    f"snapshot {str(path)!r}: expected format {_FORMAT!r}, "
                    f"got {metadata.get('format')!r}"
                )
            # Cloned: tensors of an open file alias its mapping, and the file is to be replaced.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(
            f"snapshot {str(path)!r}: not a readable safetensors file: {error}"
        ) from None
    return tensors, json.loads(metadata["values"])
