"""The Triton kernels compile for GPUs that are not here, and use what the target has."""

import importlib.util
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)


def compile_kernel(tmp_path, target: str, kernel: str = "") -> dict[str, str]:
    """Listings by kernel. In a process of its own: the tests' process runs the interpreter."""
    command = [sys.executable, "-m", "dskernels.triton.compile", "--target", target]
    command += ["--out", str(tmp_path)] + (["--kernel", kernel] if kernel else [])
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return {f.name.split(".")[0]: f.read_text() for f in tmp_path.iterdir() if f.suffix != ".json"}


def test_gemm_for_hopper_uses_the_fp8_tensor_core(tmp_path):
    ptx = compile_kernel(tmp_path, "sm_90", "gemm_masked")["gemm_masked"]
    assert ".e4m3.e4m3" in ptx and "wgmma.mma_async" in ptx


def test_unknown_kernel_is_refused_by_name(tmp_path):
    command = [sys.executable, "-m", "dskernels.triton.compile", "--kernel", "nope"]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "gemm_dense" in done.stderr and "nope" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_89", "sm_90", "gfx942"])
def test_every_kernel_compiles(tmp_path, target):
    listings = compile_kernel(tmp_path, target)
    assert len(listings) == 28
    if target == "sm_80":  # no FP8 type: decoded to fp16 by integer arithmetic
        assert ".e4m3" not in listings["gemm_dense"] and "mma.sync" in listings["gemm_dense"]
    if target == "sm_89":
        assert ".e4m3.e4m3" in listings["gemm_dense"]
