"""The thread pool and kernels on it under ThreadSanitizer, as a program of its own."""

import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLAGS = ["-std=c++20", "-O1", "-g1", "-fsanitize=thread", f"-I{ROOT / 'csrc'}", "-DNDEBUG"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_threads(tmp_path):
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    cpu = ROOT / "csrc" / "cpu"
    sources = [cpu / "threads.cpp", cpu / "pack.cpp", ROOT / "tests/cpu/check_threads.cpp"]
    sources += sorted((cpu / "kernels").glob("*.cpp"))

    def build(source: Path) -> str:
        target = ["-DDSK_CPU_NS=portable"] if source.parent.name == "kernels" else []
        out = str(tmp_path / f"{source.stem}.o")
        subprocess.run([compiler, *FLAGS, *target, "-c", source, "-o", out], check=True)
        return out

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(build, sources))
    program = tmp_path / "check_threads"
    link = [compiler, "-fsanitize=thread", *objects, "-pthread", "-o", str(program)]
    subprocess.run(link, check=True)
    result = subprocess.run([program], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0 and result.stdout == "ok\n", result.stdout + result.stderr
