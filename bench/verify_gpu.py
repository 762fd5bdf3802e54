"""Replay of the CUDA kernels on a real Hopper GPU: `make verify-gpu`, about five minutes.

    python -m bench.verify_gpu [--ledger bench/hardware.jsonl]

Runs every test that has a backend axis with `--backend cuda`, times the GEMM and the quantiser, and
appends one line of JSON to the ledger: commit, GPU, driver, toolkit, test counts, timings. Failed
tests are recorded, too. On a machine without such a GPU it says why, changes nothing, and exits
with status 2. Status 1: a test failed, or none ran.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

import torch

import dskernels as dsk

ROOT = Path(__file__).resolve().parent.parent
LEDGER = ROOT / "bench" / "hardware.jsonl"
# (m, n, k) of V3: down projection of a training batch, gate and up of the dense layers, a decode.
GEMMS = ((4096, 7168, 2048), (4096, 4096, 7168), (64, 7168, 2048))
ROWS = ((4096, 7168), (64, 7168))
WARMUP, RUNS = 5, 30
FLUSH_BYTES = 256 << 20  # five times Hopper's L2: every run reads its operands from memory


def refusal() -> str:
    """Why this machine cannot verify anything; empty when it can."""
    support = dsk.backends()["cuda"]
    if not support:
        return support.reason
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no CUDA device: expected a CUDA build of torch"
    capability = torch.cuda.get_device_capability()
    if capability != (9, 0):
        name, found = torch.cuda.get_device_name(), "{}.{}".format(*capability)
        return f"expected a GPU of compute capability 9.0 (Hopper), got {name} of {found}"
    return ""


def run_tests() -> dict[str, int]:
    """Counts of the tests with a backend axis, each on the GPU."""
    files = [f for f in (ROOT / "tests").glob("test_*.py") if "backend_axis" in f.read_text()]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        options = ["-q", "-k", "cuda", "--backend", "cuda", "-p", "no:cacheprovider"]
        command = [sys.executable, "-m", "pytest", *options, f"--junitxml={report}"]
        subprocess.run([*command, *map(str, sorted(files))], cwd=ROOT, check=False)
        return counts(report.read_text()) if report.exists() else dict.fromkeys(counts(""), 0)


def counts(report: str) -> dict[str, int]:
    """passed, failed (errors included) and skipped of a JUnit report; "" is a report of nothing."""
    suites = list(ElementTree.fromstring(report).iter("testsuite")) if report else []
    total, failures, errors, skipped = (
        sum(int(suite.get(name, 0)) for suite in suites)
        for name in ("tests", "failures", "errors", "skipped")
    )
    failed = failures + errors
    return {"passed": total - failed - skipped, "failed": failed, "skipped": skipped}


def median_us(run) -> float:
    """Median time of `run` in microseconds by CUDA events, with a cold L2 each time."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    times = []
    for i in range(WARMUP + RUNS):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        if i >= WARMUP:
            times.append(start.elapsed_time(end) * 1e3)
    return sorted(times)[len(times) // 2]


def time_gemm(m: int, n: int, k: int) -> dict[str, object]:
    a = dsk.quantize(torch.randn(m, k, device="cuda"), backend="ref")
    b = dsk.quantize(torch.randn(n, k, device="cuda"), (128, 128), backend="ref")
    us = median_us(lambda: dsk.gemm(a, b, backend="cuda"))
    return {"op": "gemm", "m": m, "n": n, "k": k, "us": us, "tflops": 2e-6 * m * n * k / us}


def time_quantize(m: int, k: int) -> dict[str, object]:
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    us = median_us(lambda: dsk.quantize(x, backend="cuda"))
    moved = m * k * (2 + 1) + m * k // 128 * 4
    return {"op": "quantize", "m": m, "k": k, "us": us, "gbytes_per_s": 1e-3 * moved / us}


def git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def entry(tests: dict[str, int], timings: list[dict]) -> dict[str, object]:
    """One line of the ledger."""
    info = dsk.build_info()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": git("rev-parse", "HEAD"),
        "modified": bool(git("status", "--porcelain", "--untracked-files=no")),
        "gpu": torch.cuda.get_device_name(),
        "driver": info["cuda_driver"],
        "toolkit": info["cuda_toolkit"],
        "torch": info["torch"],
        "tests": tests,
        "timings": timings,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--ledger", type=Path, default=LEDGER)
    arguments = parser.parse_args()
    reason = refusal()
    if reason:
        print(f"verify-gpu: nothing was verified, nothing was written: {reason}", file=sys.stderr)
        return 2
    tests = run_tests()
    timings = [time_gemm(*shape) for shape in GEMMS] + [time_quantize(*shape) for shape in ROWS]
    line = json.dumps(entry(tests, timings))
    with open(arguments.ledger, "a") as ledger:
        ledger.write(line + "\n")
    print(line)
    return 0 if tests["passed"] and not tests["failed"] else 1


if __name__ == "__main__":
    sys.exit(main())
