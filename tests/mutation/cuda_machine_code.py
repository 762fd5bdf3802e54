"""What the compiler makes of a mutant that no emulator test catches.

A compiler fence is no instruction: PTX shows its loss as another order of moves, the emulator runs
that as well as any other, and what the fence prevents (registers of a wgmma in flight touched, so
that ptxas serialises) is seen by the gates of tests/test_cuda_build.py only. So a survivor is built
as shipped kernels are: equal machine code is no mutant, and a complaint of the gates catches it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests")]

import sass  # noqa: E402
from cuda_mutants import Instance  # noqa: E402
from test_cuda_build import complaints, machine_code_complaints  # noqa: E402

SAME = "the same machine code"


def build(instance: Instance, overlay: Path, csrc: Path, nvcc: str, out: Path) -> None:
    """cubin, PTX and ptxas' report of the instance, overlay/ in front of csrc/, in folder `out`."""
    out.mkdir(parents=True)
    source = out / f"{instance.name}.cu"
    source.write_text(instance.source())
    command = ["sh", ROOT / "cmake" / "compile_kernel.sh", nvcc, csrc, source, instance.name]
    environment = {**os.environ, "NVCC_PREPEND_FLAGS": f"-I{overlay}"}
    subprocess.run([*command, out / "work", out], check=True, env=environment, capture_output=True)


def verdict(instance: Instance, overlay: Path, csrc: Path, nvcc: str, out: Path) -> str:
    """SAME, the gates' complaints about the mutant, or "" when it is other code that they pass."""
    build(instance, overlay, csrc, nvcc, out / "mutant")
    build(instance, out / "nothing", csrc, nvcc, out / "original")
    name = f"{instance.name}.cubin"
    mutant, original = (sass.disassemble(out / d / name) for d in ("mutant", "original"))
    if mutant.instructions == original.instructions:
        return SAME
    report = (out / "mutant" / f"{instance.name}.ptxas.txt").read_text()
    found = complaints(report, instance.threads)
    return "; ".join(
        found + machine_code_complaints(out / "mutant", instance.name, instance.threads)
    )
