"""Machine instructions that a k block costs a warp in the GEMM main loops:

python -m bench.gemm_issue

Ours from the shipped cubins, DeepGEMM's from its headers (PyPI's sgl-deep-gemm, compiled by nvcc
here, without it only ours). A main loop is an innermost loop with QGMMA instructions; four of them
are one k block of 64 rows (four steps of 32 along k), and everything else in the loop is what the
block costs: waiting, descriptors, scales, promotion. Instructions are counted as they lie in the
loop, those on seldom taken paths included.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import dskernels

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests/emu/outside")]

import sass  # noqa: E402

TILES = ((64, 64, 12), (64, 128, 8), (128, 64, 8), (128, 128, 5), (128, 192, 4))  # m, n, stages
SHOWN = ("FFMA", "FMUL", "LDS", "SHFL", "R2UR", "SYNCS", "IMAD", "IADD3", "LEA", "MOV", "BRA")


@dataclass(frozen=True)
class Loop:
    instructions: int
    blocks: int  # of k, for 64 rows
    mix: Counter

    @property
    def each(self) -> float:
        return self.instructions / self.blocks


def main_loop(cubin: Path) -> Loop:
    """The loop with the fewest instructions for each block: a loop around it has more, and so has
    a jump back from a wait that was moved out of line. Raises ValueError without any QGMMA."""
    listing = sass.disassemble(cubin)
    loops = []
    for end, instruction in enumerate(listing.instructions):
        if instruction.name != "BRA":
            continue
        start = min(listing.successors(end))
        body = listing.instructions[start : end + 1]
        blocks = sum(i.name == "QGMMA" for i in body) // 4
        if start <= end and blocks:
            loops.append(Loop(len(body), blocks, Counter(i.name for i in body)))
    if not loops:
        raise ValueError(f"{cubin.name}: no loop with QGMMA instructions")
    return min(loops, key=lambda loop: loop.each)


def our_loops() -> dict[str, Loop]:
    folder = Path(dskernels.__file__).parent / "_kernels"
    cubins = [folder / f"gemm_fp8_{m}x{n}.cubin" for m, n, _ in TILES]
    cubins += [folder / f"gemm_fp8_{name}.cubin" for name in ("tokens_16", "tokens_32")]
    cubins += [folder / f"gemm_fp8_{name}.cubin" for name in ("swiglu", "along_k_128x128")]
    return {cubin.stem.removeprefix("gemm_fp8_"): main_loop(cubin) for cubin in cubins}


def their_loops() -> dict[str, Loop]:
    import deepgemm_support as dg

    if dg.FOLDER is None:
        print("without DeepGEMM: pip install --no-deps sgl-deep-gemm==0.2.5")
        return {}
    found = {}
    for recipe in ("1d2d", "1d1d"):
        for m, n, stages in TILES:
            if recipe == "1d1d" and (m, n) != (128, 128):
                continue
            instance = dg.Instance(recipe, m, n, stages=stages, sms=132, shape=(0, 4096, 7168))
            name = f"{m}x{n}" if recipe == "1d2d" else f"along_k_{m}x{n}"
            found[name] = main_loop_of(dg.source((instance,)), dg.FOLDER / "include")
    return found


def main_loop_of(source: str, include: Path) -> Loop:
    """The main loop of the one kernel that CUDA C++ `source` instantiates."""
    with tempfile.TemporaryDirectory() as folder:
        cu, cubin = Path(folder) / "kernel.cu", Path(folder) / "kernel.cubin"
        cu.write_text(source)
        command = ["nvcc", "-cubin", "-gencode=arch=compute_90a,code=sm_90a", "-std=c++20", "-O3"]
        command += ["-w", "--expt-relaxed-constexpr", f"-I{include}", "-o", str(cubin), str(cu)]
        subprocess.run(command, check=True)
        return main_loop(cubin)


def line(name: str, loop: Loop) -> str:
    mix = "  ".join(f"{k} {loop.mix[k] / loop.blocks:g}" for k in SHOWN if loop.mix[k])
    return f"{name:24} {loop.each:7.1f}  of a loop of {loop.blocks}: {mix}"


def main() -> None:
    ours, theirs = our_loops(), their_loops()
    print("machine instructions of a warp for one k block of its 64 rows")
    for name, loop in ours.items():
        print(line(f"{name}, ours", loop))
        if name in theirs:
            print(line(f"{name}, DeepGEMM", theirs[name]))


if __name__ == "__main__":
    main()
