"""One decode step of a real-size DeepSeek-V3 MoE layer: python -m bench.moe_layer --experts 256

256 experts of 7168 x 2048 are 11.3 GB of FP8 weights, packed; a step reads those of its tokens'
experts, other ones each time, so that no cache holds them. The yardstick is the rate at which plain
sums read the same memory, measured in turn with the steps in the same process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch

from dskernels import cpu
from dskernels.cpu import moe
from dskernels.types import ScaledTensor

from .cpu import machine


def packed_stack(experts: int, n: int, k: int) -> cpu.PackedWeight:
    """Random finite E4M3 weights, every expert in memory of its own (its values repeat)."""
    w = torch.randint(0, 126, (1, n, k), dtype=torch.uint8)
    w |= torch.randint(0, 2, (1, n, k), dtype=torch.uint8) << 7
    scale = torch.full((1, -(-n // 128), -(-k // 128)), 1e-4)
    one = cpu.pack(ScaledTensor(w.view(torch.float8_e4m3fn), scale, (128, 128)))
    return cpu.PackedWeight(
        *(x.expand(experts, *x.shape[1:]).contiguous() for x in (one.data, one.marks, scale)),
        shape=torch.Size((experts, n, k)),
    )


def read_all(x: torch.Tensor) -> float:
    """Seconds to sum a stretch of memory as 64-bit words."""
    begin = time.perf_counter()
    x.sum()
    return time.perf_counter() - begin


def main() -> None:
    parse = argparse.ArgumentParser(prog="python -m bench.moe_layer", description=__doc__)
    parse.add_argument("--experts", type=int, default=256)
    parse.add_argument("--tokens", type=int, default=1)
    parse.add_argument("--topk", type=int, default=8)
    parse.add_argument("--steps", type=int, default=40)
    parse.add_argument("--d", type=int, default=7168)
    parse.add_argument("--i", type=int, default=2048)
    parse.add_argument("--w8a16", action="store_true", help="leave activations in BF16")
    parse.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parse.parse_args()
    torch.set_num_threads(args.threads)
    w13 = packed_stack(args.experts, 2 * args.i, args.d)
    w2 = packed_stack(args.experts, args.d, args.i)
    x = torch.randn(args.tokens, args.d).bfloat16()
    weights = torch.full((args.tokens, args.topk), 1.0 / args.topk)
    words = w13.data.view(torch.int64).flatten()
    stretch = min(words.numel(), (400 << 20) // 8)
    rates, reads, used = [], [], []
    for step in range(args.steps + 2):
        first = step * 31 * (1 << 20) // 8 % max(1, words.numel() - stretch + 1)
        seconds = read_all(words[first : first + stretch])
        idx = torch.stack([torch.randperm(args.experts)[: args.topk] for _ in x])
        begin, cpu_begin = time.perf_counter(), time.process_time()
        moe.moe_experts(x, w13, w2, idx, weights, quantize_activations=not args.w8a16)
        took, cpu_took = time.perf_counter() - begin, time.process_time() - cpu_begin
        if step < 2:
            continue
        moved = idx.unique().numel() * 3 * args.d * args.i
        reads.append(stretch * 8 / seconds / 1e9)
        rates.append(moved / took / 1e9)
        used.append(moved / cpu_took * args.threads / 1e9)
    step_gbs, read_gbs = statistics.median(rates), statistics.median(reads)
    print(
        json.dumps(
            {
                **{key: getattr(args, key) for key in ("experts", "tokens", "topk", "threads")},
                "weights_gb": (w13.data.nbytes + w2.data.nbytes) / 1e9,
                "step_gbs": step_gbs,
                "step_gbs_quartiles": statistics.quantiles(rates, n=4),
                "step_gbs_by_processor_time": statistics.median(used),
                "read_gbs": read_gbs,
                "best_read_gbs": max(reads),
                "share_of_read": step_gbs / read_gbs,
                "machine": machine(),
            }
        )
    )


if __name__ == "__main__":
    main()
