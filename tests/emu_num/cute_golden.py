"""Reduces cute_oracle's output to one digest a line, and says how to build the oracle.

To regenerate cute_golden.txt, run this file and write its output there.
"""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
GOLDEN = HERE / "cute_golden.txt"


def digest(values) -> str:
    """A short digest of a sequence of integers."""
    return hashlib.sha256(" ".join(str(v) for v in values).encode()).hexdigest()[:16]


def reduce_line(line: str) -> str:
    """'D ...' has 6 leading words, 'F ...' 6: the rest becomes a digest."""
    words = line.split()
    return " ".join([*words[:6], digest(words[6:])])


def missing() -> str:
    """Why the oracle cannot be built here, or ''."""
    if importlib.util.find_spec("cutlass_library") is None:
        return "PyPI nvidia-cutlass==4.2.0.0 (its CuTe headers) is not installed"
    if cuda_include() is None:
        return "no CUDA toolkit headers (cuda_fp16.h) found"
    return "" if shutil.which("g++") else "no g++"


def cuda_include() -> Path | None:
    """The toolkit's include folder: beside nvcc, or CUDA_HOME."""
    nvcc = shutil.which("nvcc")
    roots = [Path(os.environ["CUDA_HOME"])] if "CUDA_HOME" in os.environ else []
    if nvcc:
        roots.append(Path(nvcc).resolve().parent.parent)
    for root in [*roots, Path("/usr/local/cuda")]:
        if (root / "include" / "cuda_fp16.h").exists():
            return root / "include"
    return None


def run_oracle() -> list[str]:
    """Builds and runs the oracle (about a minute of compilation); returns the reduced lines."""
    spec = importlib.util.find_spec("cutlass_library")
    headers = Path(spec.submodule_search_locations[0]) / "source" / "include"
    include = cuda_include()
    with tempfile.TemporaryDirectory() as folder:
        program = str(Path(folder) / "oracle")
        flags = ["-std=c++17", "-O0", "-w"]
        paths = [f"-I{p}" for p in (headers, include, include / "cccl")]
        source = str(HERE / "cute_oracle.cpp")
        subprocess.run(["g++", *flags, *paths, source, "-o", program], check=True)
        text = subprocess.run([program], check=True, capture_output=True, text=True).stdout
    return [reduce_line(line) for line in text.splitlines() if line[:2] in ("D ", "F ")]


if __name__ == "__main__":
    sys.stdout.write("\n".join(run_oracle()) + "\n")
