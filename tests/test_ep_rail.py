"""The optional rail kernel (csrc/rail) compiles and links against NCCL's device API. It is not run
anywhere: there is no network card to run it on."""

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def nccl_folder() -> Path:
    """DSK_NCCL_HOME, or an installed nvidia-nccl wheel, with nccl_device.h and the library."""
    folders = [Path(os.environ["DSK_NCCL_HOME"])] if "DSK_NCCL_HOME" in os.environ else []
    spec = importlib.util.find_spec("nvidia")
    folders += [Path(p) / "nccl" for p in (spec.submodule_search_locations or [])] if spec else []
    for folder in folders:
        if (folder / "include" / "nccl_device.h").exists():
            return folder
    pytest.skip("no NCCL with nccl_device.h: install nvidia-nccl-cu13, or set DSK_NCCL_HOME")


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_rail_compiles_and_links(tmp_path):
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc")
    nccl = nccl_folder()
    library = tmp_path / "libep_rail.so"
    command = [
        nvcc, "-std=c++17", "-gencode", "arch=compute_90a,code=sm_90a", "-shared", "-Xcompiler",
        "-fPIC,-Wall", "-Xptxas", "-v", f"-I{ROOT / 'csrc'}", f"-I{nccl / 'include'}",
        str(ROOT / "csrc/rail/ep_rail.cu"), "-o", str(library), f"-L{nccl / 'lib'}",
        "-l:libnccl.so.2", "-Xlinker", "--no-undefined",
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, timeout=350)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "0 bytes spill stores, 0 bytes spill loads" in result.stderr
    symbols = subprocess.run(["nm", "-D", library], capture_output=True, text=True, check=True)
    for name in ("ep_rail_open", "ep_rail_exchange", "ep_rail_close"):
        assert re.search(rf" T {name}$", symbols.stdout, re.M)
    assert "U ncclDevCommCreate" in symbols.stdout


def test_nothing_else_knows_nccl():
    files = subprocess.run(
        ["git", "ls-files", "csrc", "dskernels", "cmake", "CMakeLists.txt", "setup.py"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    nccl = re.compile(r"#\s*include\s*<nccl|find_package\(NCCL|libnccl")
    users = [f for f in files if nccl.search((ROOT / f).read_text(errors="ignore"))]
    assert users == ["csrc/rail/nccl_gin.cuh"]
