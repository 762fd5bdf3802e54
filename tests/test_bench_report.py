"""The benchmark report: what it concludes from figures, and one small run of it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench import report, roofline

ROOT = Path(__file__).resolve().parent.parent


def candidate(name, milliseconds, gflops, gbs):
    seconds = milliseconds / 1e3
    spread = dict(low=seconds, high=seconds, best=seconds, processor=seconds, samples=3)
    rates = dict(gflops=gflops, weight_gbs=gbs, error=1e-3)
    return {"candidate": name, "median": seconds, **spread, **rates}


ROW = report.Row("--op gemm --m 16", 3.0, 2.3, 0.5)


def result(**changes):
    rows = [candidate("dskernels w8a8", 2.0, 50, 5), candidate("dskernels w8a16", 1.0, 100, 10)]
    rows += [candidate("vllm w8a16", 4.0, 25, 2.5), candidate("torch bf16", 2.0, 50, 5)]
    return {"op": "gemm", "row": vars(ROW), "rows": rows, **changes}


def test_verdict_takes_our_faster_form_and_the_lower_roof():
    memory_bound = roofline.Ceilings(read_gbs=12.0, gflops=1000.0, product="x")
    verdict = report.judge(ROW, result(), memory_bound)
    assert verdict["ours"] == "dskernels w8a16"
    assert verdict["vllm"] == pytest.approx(4.0) and verdict["torch"] == pytest.approx(2.0)
    assert verdict["share"] == pytest.approx(100 / 120)
    compute_bound = roofline.Ceilings(read_gbs=1000.0, gflops=200.0, product="x")
    assert report.judge(ROW, result(), compute_bound)["share"] == pytest.approx(0.5)
    alone = result(rows=result()["rows"][:2])
    verdict = report.judge(ROW, alone, compute_bound)
    assert verdict["vllm"] is None and verdict["error"] is None


def test_errors_are_compared_on_the_same_activations():
    rows = result()["rows"]
    for row, error in zip(rows, (3e-2, 2.5e-3, 2e-3, 4e-3)):
        row["error"] = error
    rows.append({"candidate": "torch fp32", "error": 1e-7})
    assert report.error_ratio({"rows": rows}) == pytest.approx(1.25)
    assert 'class="short">1.25x' in report.accuracy(1.25)
    rows[1]["error"] = None
    assert report.error_ratio({"rows": rows}) is None and "not measured" in report.accuracy(None)


def test_nothing_lies_above_the_roof():
    low = roofline.Ceilings(10.0, 60.0, "a")
    assert roofline.raised(low, result()["rows"]) == roofline.Ceilings(10.0, 100, "dskernels w8a16")
    high = roofline.Ceilings(10.0, 600.0, "a")
    assert roofline.raised(high, result()["rows"]) is high


def test_page_shows_shortfalls_failures_and_the_picture():
    ceilings = roofline.Ceilings(12.0, 1000.0, "x")
    good = result()
    good["verdict"] = report.judge(ROW, good, ceilings)
    bad = {"row": vars(ROW), "failed": "no <peer>"}
    fields = dict(date="today", threads=2, load=0.5, machine={"cpu": "c"}, gpu={"none": "no GPU"})
    suites = [{"name": "test_op[gate]", "median": 1e-5, "q1": 1e-5, "q3": 2e-5, "rounds": 3}]
    page = report.page(
        {**fields, "ceilings": vars(ceilings), "rows": [good, bad], "suites": suites}, b"png"
    )
    assert 'class="good">4.00x' in page and 'class="short">2.00x' in page
    assert "failed: no &lt;peer&gt;" in page and "no GPU" in page and "10.0 us" in page
    assert "base64,cG5n" in page


def test_telemetry_says_why_there_is_none_or_lists_gpus():
    found = report.telemetry()
    assert found.get("none") or all(gpu["watts"] >= 0 for gpu in found["gpus"])


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_small_report(tmp_path):
    command = [
        sys.executable,
        "-m",
        "bench.report",
        "--quick",
        "--peers",
        "torch",
        "--threads",
        "1",
    ]
    command += ["--seconds", "1", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    stored = json.loads((tmp_path / "bench.json").read_text())
    assert {row["op"] for row in stored["rows"]} == {"gemm", "moe", "mla"}
    assert all(row["verdict"]["share"] > 0 for row in stored["rows"])
    assert (tmp_path / "roofline.png").read_bytes().startswith(b"\x89PNG")
    assert "<h2>Roofline</h2>" in (tmp_path / "bench.html").read_text()
