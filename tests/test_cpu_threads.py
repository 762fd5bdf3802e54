"""The thread pool, and kernels on it under ThreadSanitizer, as programs of their own."""

import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLAGS = ["-std=c++20", "-O1", "-g1", "-fsanitize=thread", f"-I{ROOT / 'csrc'}", "-DNDEBUG"]


def compiler() -> str:
    found = shutil.which("g++") or shutil.which("clang++")
    if found is None:
        pytest.skip("no C++ compiler")
    return found


def test_a_worker_that_gets_no_processor_is_not_waited_for(tmp_path):
    """Without this two threads beside two busy processes take 7 ms for a call of 0.1 ms."""
    program = tmp_path / "check_late"
    sources = [ROOT / "csrc/cpu/threads.cpp", ROOT / "tests/cpu/check_late.cpp"]
    build = [compiler(), "-std=c++20", "-O1", f"-I{ROOT / 'csrc'}", *sources, "-pthread"]
    subprocess.run([*build, "-o", str(program)], check=True)
    result = subprocess.run([program], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0 and result.stdout == "ok\n", result.stdout + result.stderr


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_threads(tmp_path):
    cpu = ROOT / "csrc" / "cpu"
    sources = [cpu / "threads.cpp", cpu / "pack.cpp", ROOT / "tests/cpu/check_threads.cpp"]
    sources += sorted((cpu / "kernels").glob("*.cpp"))

    def build(source: Path) -> str:
        target = ["-DDSK_CPU_NS=portable"] if source.parent.name == "kernels" else []
        out = str(tmp_path / f"{source.stem}.o")
        subprocess.run([compiler(), *FLAGS, *target, "-c", source, "-o", out], check=True)
        return out

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(build, sources))
    program = tmp_path / "check_threads"
    link = [compiler(), "-fsanitize=thread", *objects, "-pthread", "-o", str(program)]
    subprocess.run(link, check=True)
    result = subprocess.run([program], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0 and result.stdout == "ok\n", result.stdout + result.stderr
