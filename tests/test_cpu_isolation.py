"""Code compiled for one instruction set must not be shared with code for another.

A weak symbol (an inline function or template of a header) exists once per object file and the
linker keeps any one of them: on an older processor that one may hold instructions it lacks.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TARGETS = ("portable", "avx2", "avx512", "avx512_bf16", "avx512_fp16", "amx")


def objects(target: str) -> list[Path]:
    return sorted((ROOT / "build").glob(f"**/dsk_cpu_{target}.dir/kernels/*.o"))


@pytest.mark.parametrize("target", TARGETS)
def test_a_target_owns_every_function_it_defines(target):
    if shutil.which("nm") is None or not objects(target):
        pytest.skip("needs nm and the object files of a build in this checkout")
    foreign = []
    for path in objects(target):
        done = subprocess.run(
            ["nm", "--demangle", "--defined-only", str(path)],
            capture_output=True,
            text=True,
            check=True,
        )
        for line in done.stdout.splitlines():
            _, kind, name = line.split(maxsplit=2)
            if kind in "WVu" and f"dsk::cpu::{target}::" not in name:
                foreign.append(f"{path.name}: {name}")
    # Type information and references to it hold no instructions.
    data = ("typeinfo", "vtable", "DW.ref.")
    assert [name for name in foreign if not any(kind in name for kind in data)] == []
