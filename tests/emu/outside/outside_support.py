"""Kernels from elsewhere: where their headers are, nvcc on a few lines of ours, findings by kind.

A kernel that is right on Hopper must be right in the emulator, under every schedule, and without
findings of the severity "error". Nothing of other projects is kept here: a test names the template
it instantiates, and is skipped with its reason where the package or the toolkit is absent.
"""

import functools
import importlib.util
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from dskernels import emu

DEFAULT_SEEDS = [0, 1]
SLOW_SEEDS = range(20)


def seeds_by_tier() -> list:
    """Parameters for `seed`: the default ones, and the rest behind the slow mark."""
    slow = [pytest.param(s, marks=pytest.mark.slow) for s in SLOW_SEEDS if s not in DEFAULT_SEEDS]
    return [*DEFAULT_SEEDS, *slow]


def need_nvcc() -> pytest.MarkDecorator:
    return pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")


def package_folder(package: str) -> Path | None:
    """Where a PyPI package is installed; found without importing it, as it may need a GPU."""
    spec = importlib.util.find_spec(package)
    return None if spec is None or spec.origin is None else Path(spec.origin).parent


def ptx_of(folder: Path, source: str, includes: tuple[Path, ...] = ()) -> str:
    """PTX of CUDA C++20 `source` for sm_90a. The outside headers' own warnings are not ours."""
    cu, ptx = folder / "kernel.cu", folder / "kernel.ptx"
    cu.write_text(source)
    command = ["nvcc", "-ptx", "-gencode=arch=compute_90a,code=compute_90a", "-std=c++20"]
    command += ["-lineinfo", "-w", "--expt-relaxed-constexpr"]
    command += [*(f"-I{path}" for path in includes), "-o", str(ptx), str(cu)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"nvcc failed:\n{done.stderr[-4000:]}"
    return ptx.read_text()


@functools.cache
def launch_log() -> Counter:
    """(kernel, kind, severity) of every finding of this process, for the table in the docs."""
    return Counter()


def findings(stats: emu.LaunchStats, family: str) -> Counter:
    """Kinds of the findings a launch ended with; none may be an error."""
    kinds = Counter((family, h.kind, h.severity) for h in stats.hazards)
    launch_log().update(kinds)
    errors = [h for h in stats.hazards if h.severity == "error"]
    assert not errors, "\n".join(f"{h.kind}: {h.message}" for h in errors)
    return kinds
