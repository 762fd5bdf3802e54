"""CUDA C++ to PTX with the user's nvcc."""

import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from dskernels.emu.errors import EmuError


def compile(source: str, arch: str = "sm_90a", options: Sequence[str] = ()) -> str:
    """Compiles CUDA C++ source text to PTX, with line information for the reports.

    source: the text of a .cu file. arch: "sm_90a", "sm_80", ... options: further nvcc options.
    Raises EmuError if nvcc is not on PATH or refuses the source (with its messages).
    """
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise EmuError("emu.compile needs nvcc on PATH; Module takes PTX text without it")
    if not arch.startswith("sm_"):
        raise EmuError(f"arch must look like 'sm_90a', got {arch!r}")
    virtual = "compute_" + arch[3:]
    with tempfile.TemporaryDirectory() as folder:
        cu = Path(folder) / "kernel.cu"
        ptx = Path(folder) / "kernel.ptx"
        cu.write_text(source)
        command = [
            nvcc,
            "-ptx",
            f"-gencode=arch={virtual},code={virtual}",
            "-std=c++17",
            "-lineinfo",
            *options,
            "-o",
            str(ptx),
            str(cu),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise EmuError(f"nvcc failed:\n{done.stderr.strip()}")
        return ptx.read_text()
