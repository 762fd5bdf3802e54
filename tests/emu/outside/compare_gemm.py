"""FP8 GEMM of few rows beside FlashInfer's kernels, both in the emulator's timing model:

    python tests/emu/outside/compare_gemm.py [--rows 8,16,24,32,64] [--only 4096x7168]

FlashInfer's choice of kernel and tile for each shape is its own rule for 132 SMs: below 32 rows the
kernel that swaps the operands, one compiled for each (n, k). Nothing was measured on a GPU; the
model's held-out error is in bench/LOG.md. Needs nvcc and PyPI's flashinfer-python.
"""

import argparse
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).resolve().parents[3])]
import flashinfer_gemm_support as fg  # noqa: E402

from bench.emu_timing import PART, Row, operands, ours  # noqa: E402
from bench.gemm_modelled import describe  # noqa: E402
from dskernels import emu  # noqa: E402

# (n, k) of DeepSeek-V3's layers.
WEIGHTS = ((2112, 7168), (576, 7168), (24576, 1536), (32768, 512), (7168, 16384), (4096, 7168))
WEIGHTS += ((7168, 2048),)


def theirs(row: Row, module: emu.Module) -> emu.LaunchProfile:
    a, b = operands(row)
    with emu.profiling(PART, sample_ctas=1) as profile:
        fg.run(module, fg.choose(row.m, row.n, row.k), a, b, check=False)
    return profile.launches[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", default="8,16,24,32,64")
    parser.add_argument("--only", default="", help="n x k, as in 4096x7168")
    options = parser.parse_args()
    shapes = [
        Row("few rows", int(m), n, k, 1, False, ())
        for n, k in WEIGHTS
        for m in options.rows.split(",")
        if options.only in f"{n}x{k}"
    ]
    instances = dict.fromkeys(fg.choose(row.m, row.n, row.k) for row in shapes)
    module = fg.build(tuple(instances))
    print(f"modelled us on {PART} (tensor cores busy, bound by)")
    print("| rows x n x k | FlashInfer's tile | FlashInfer | our kernel | ours | ratio |")
    print("|---|---|---|---|---|---|", flush=True)
    ratios = []
    for row in shapes:
        their, our = theirs(row, module).time(), ours(row).timing
        instance = fg.choose(row.m, row.n, row.k)
        tile = "x".join(map(str, instance.tile)) + (" swapped" if instance.swapped else "")
        ratios.append(their.modelled_us / our.modelled_us)
        print(
            f"| {row.m} x {row.n} x {row.k} | {tile} | {their.modelled_us:.1f} "
            f"({their.busy['tensor']:.0%}, {their.bottleneck}) | {describe(row)} | "
            f"{our.modelled_us:.1f} ({our.busy['tensor']:.0%}, {our.bottleneck}) | "
            f"{ratios[-1]:.2f} |",
            flush=True,
        )
    print(f"ratio theirs / ours: least {min(ratios):.3f}, mean {sum(ratios) / len(ratios):.3f}")


if __name__ == "__main__":
    main()
