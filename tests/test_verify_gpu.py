"""`make verify-gpu` where there is no Hopper GPU: it says so, fails, and writes nothing.

What it does on a GPU is written and not executed here; its bookkeeping is tested on its own.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import verify_gpu

ROOT = Path(__file__).resolve().parent.parent
EMULATED = sorted(ROOT.glob("build/cmake-*/emulated/libcuda.so.1"))
ENTRIES = [json.loads(line) for line in verify_gpu.LEDGER.read_text().splitlines()]


def refused(tmp_path, **environment):
    ledger = tmp_path / "ledger.jsonl"
    ledger.write_text("before\n")
    command = [sys.executable, "-m", "bench.verify_gpu", "--ledger", str(ledger)]
    variables = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run(
        command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    assert done.stdout == "" and ledger.read_text() == "before\n"
    return done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_driver(tmp_path):
    message = refused(tmp_path, DSK_CUDA_DRIVER=str(tmp_path / "libcuda.so.1"))
    assert message.startswith("verify-gpu: nothing was verified, nothing was written: ")
    assert "no CUDA driver" in message or "left out" in message


@pytest.mark.skipif(not EMULATED, reason="built without nvcc: no kernels, no emulated driver")
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_the_emulated_driver_is_no_gpu(tmp_path):
    message = refused(tmp_path, DSK_CUDA_DRIVER=str(EMULATED[-1]))
    assert "sees no CUDA device" in message


REPORT = """<testsuites><testsuite name="pytest" errors="1" failures="2" skipped="3" tests="10"/>
</testsuites>"""


def test_counts_of_a_report():
    assert verify_gpu.counts(REPORT) == {"passed": 4, "failed": 3, "skipped": 3}
    assert verify_gpu.counts("") == {"passed": 0, "failed": 0, "skipped": 0}


@pytest.mark.parametrize(
    "tests,status",
    [
        ({"passed": 9, "failed": 0, "skipped": 2}, 0),
        ({"passed": 9, "failed": 1, "skipped": 0}, 1),
        ({"passed": 0, "failed": 0, "skipped": 9}, 1),
    ],
)
def test_every_replay_is_recorded(tests, status, tmp_path, monkeypatch, capsys):
    """Failures included, one line each, behind what the ledger holds."""
    ledger = tmp_path / "ledger.jsonl"
    ledger.write_text('{"old": 1}\n')
    for name, value in {
        "refusal": lambda: "",
        "run_tests": lambda: tests,
        "time_gemm": lambda m, n, k: {"op": "gemm", "us": 1.0},
        "time_quantize": lambda m, k: {"op": "quantize", "us": 1.0},
    }.items():
        monkeypatch.setattr(verify_gpu, name, value)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(sys, "argv", ["verify_gpu", "--ledger", str(ledger)])
    assert verify_gpu.main() == status
    old, new = map(json.loads, ledger.read_text().splitlines())
    assert old == {"old": 1} and new["tests"] == tests
    assert len(new["timings"]) == len(verify_gpu.GEMMS) + len(verify_gpu.ROWS)
    assert len(new["commit"]) == 40


def test_the_ledger_holds_replays_on_hopper_gpus_only():
    """An empty ledger says that the kernels never ran on a GPU."""
    for entry in ENTRIES:
        assert {"date", "commit", "gpu", "driver", "toolkit", "tests", "timings"} <= set(entry)
        assert any(name in entry["gpu"] for name in ("H100", "H200", "H800", "H20", "GH200"))
