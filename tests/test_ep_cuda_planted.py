"""Planted ordering faults in the expert-parallel kernels' PTX: the emulator must object."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

emu = pytest.importorskip("dskernels.emu")
if not emu.available():
    pytest.skip(emu.available().reason, allow_module_level=True)

HERE = Path(__file__).resolve().parent
KERNELS = HERE.parent / "dskernels" / "_kernels"
RUN = """
import os, sys
from dskernels import cuda
cuda.launchers().set_kernel_directory(sys.argv[1])
from test_ep_cuda import make, run_case
group, wide = make(2), make(2, 2320)  # wide rows occupy several CTAs of each kernel
for n in range(8):
    os.environ["DSK_EMU_SEED"] = str(n)
    run_case(group, 2, n, 256)
    run_case(wide, 2, n, 2320)
"""


OVERLAP = """
import os, sys
from dskernels import cuda
cuda.launchers().set_kernel_directory(sys.argv[1])
import test_ep_overlap as overlap
overlap.experts_start_on_arrival(2, lambda n: os.environ.update(DSK_EMU_SEED=str(n)), 8)
"""


def run(folder: Path, script: str = RUN) -> subprocess.CompletedProcess:
    path = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-c", script, str(folder)],
        env=dict(os.environ, PYTHONPATH=path),
        capture_output=True,
        text=True,
        timeout=200,
    )


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "kernel, old, new",
    [
        ("ep_dispatch", "ld.acquire.sys", "ld.relaxed.sys"),
        ("ep_combine_bf16", "ld.acquire.sys", "ld.relaxed.sys"),
        ("ep_low_send", "fence.acq_rel.gpu;", "// planted"),
        ("ep_dispatch", "st.release.sys", "st.relaxed.sys"),
        ("ep_combine_bf16", "st.release.sys", "st.relaxed.sys"),
        ("ep_low_return", "st.release.sys", "st.relaxed.sys"),
        ("ep_low_receive", "ld.acquire.sys", "ld.relaxed.sys"),
    ],
)
def test_a_missing_order_is_a_hazard(tmp_path, kernel, old, new):
    folder = shutil.copytree(KERNELS, tmp_path / "kernels")
    file = folder / f"{kernel}.ptx"
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))
    result = run(folder)
    assert result.returncode != 0
    assert "HazardError" in result.stderr or "AssertionError" in result.stderr, result.stderr[
        -2000:
    ]


@pytest.mark.slow
def test_the_shipped_kernels_pass_the_same_run():
    result = run(KERNELS)
    assert result.returncode == 0, result.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "kernel, old, new",
    [
        ("gemm_fp8_tokens_16", "ld.acquire.gpu", "ld.relaxed.gpu"),
        ("gemm_fp8_tokens_16", "fence.proxy.async.global;", "// planted"),
        ("ep_low_receive", "atom.add.acq_rel.gpu", "atom.add.relaxed.gpu"),
    ],
)
def test_experts_on_arrival_need_each_order(tmp_path, kernel, old, new):
    folder = shutil.copytree(KERNELS, tmp_path / "kernels")
    file = folder / f"{kernel}.ptx"
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))
    result = run(folder, OVERLAP)
    assert result.returncode != 0 and "HazardError" in result.stderr, result.stderr[-2000:]
