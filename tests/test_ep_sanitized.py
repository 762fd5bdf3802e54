"""The exchange under AddressSanitizer, UBSan and ThreadSanitizer, ranks as threads."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_exchange(tmp_path, sanitizers):
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    program = tmp_path / "check_exchange"
    sources = [
        *sorted((ROOT / "csrc" / "comm").glob("*.cpp")),
        ROOT / "tests/comm/check_exchange.cpp",
    ]
    build = [compiler, "-std=c++20", "-O1", "-g", "-ffp-contract=off", f"-fsanitize={sanitizers}",
             "-fno-sanitize-recover=all", f"-I{ROOT / 'csrc'}", *map(str, sources), "-pthread",
             "-o", str(program)]  # fmt: skip
    subprocess.run(build, check=True, timeout=600)
    result = subprocess.run([program], capture_output=True, text=True, timeout=600)  # hangs only
    assert result.returncode == 0 and result.stdout == "ok\n", result.stdout + result.stderr
