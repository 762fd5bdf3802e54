"""Mutates PTX and feeds it to the emulator: whatever comes, no crash, no hang, only EmuError.

    python tests/emu/fuzz_ptx.py --seconds 600 [--seed 0]

Mutants run in a child process, a batch at a time. A batch that dies is run again one by one, and the
mutant that kills the child is written to the folder given by --keep and counted as a crash.
"""

from __future__ import annotations

import argparse
import random
import re
import subprocess
import sys
import time
from pathlib import Path

BATCH = 500
BATCH_SECONDS = 900

# Small kernels that between them use most of the machine; the seeds of all mutants.
BARRIER = """
setp.eq.u32 %p9, %t, 0;
add.u32 %r90, %s, 4096;
@%p9 mbarrier.init.shared.b64 [%r90], 1;
@%p9 fence.mbarrier_init.release.cluster;
bar.sync 0;
"""
LOOP = """
LOOP:
mbarrier.try_wait.parity.shared.b64 %p8, [%r90], 0;
@!%p8 bra LOOP;
"""
BODIES = [
    "mad.wide.u32 %A0, %t, 4, %P0;\nld.global.v2.u32 {%r1, %r2}, [%P0];\nadd.u32 %r3, %r1, %r2;\n"
    "shfl.sync.bfly.b32 %r4, %r3, 1, 31, 0xffffffff;\nst.global.u32 [%A0], %r4;\n",
    BARRIER
    + "@%p9 mbarrier.arrive.expect_tx.shared.b64 _, [%r90], 256;\n"
    + "@%p9 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "
    + "[%s], [%P0], 256, [%r90];\n"
    + LOOP
    + "mad.lo.u32 %r1, %t, 4, %s;\nld.shared.u32 %r2, [%r1];\nst.shared.u32 [%r1], %r2;\n"
    + "fence.proxy.async;\nbar.sync 0;\n"
    + "@%p9 cp.async.bulk.global.shared::cta.bulk_group [%P1], [%s], 256;\n"
    + "cp.async.bulk.commit_group;\ncp.async.bulk.wait_group.read 0;\n",
    "mad.lo.u32 %r1, %t, 16, %s;\nmad.wide.u32 %A0, %t, 4, %P0;\n"
    "cp.async.ca.shared.global [%r1], [%A0], 4;\ncp.async.commit_group;\ncp.async.wait_group 0;\n"
    "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r2, %r3, %r4, %r5}, [%r1];\n"
    "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%r6, %r7, %r8, %r9}, "
    "{%r2, %r3, %r4, %r5}, {%r2, %r3}, {%r6, %r7, %r8, %r9};\nst.global.u32 [%A0], %r6;\n",
    "cvt.u64.u32 %d9, %s;\nshr.u64 %d9, %d9, 4;\nmov.b64 %d0, 1099511758848;\n"
    "add.u64 %d0, %d0, %d9;\nsetp.ne.b32 %p1, 0, 0;\nwgmma.fence.sync.aligned;\n"
    "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%r20, %r21, %r22, %r23}, %d0, %d0, "
    "%p1, 1, 1, 0, 0;\nwgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;\n",
    "atom.global.add.u32 %r1, [%P0], 1;\nred.global.max.s32 [%P0], %r1;\n"
    "atom.shared.cas.b32 %r2, [%s], 0, 1;\nvote.sync.ballot.b32 %r3, %p1, 0xffffffff;\n"
    "setp.lt.u32 %p1, %t, 7;\n@%p1 bra SKIP;\ncvt.rn.f16.f32 %h1, %r3;\nSKIP:\n"
    "prmt.b32 %r4, %r1, %r2, 0x1234;\nlop3.b32 %r5, %r1, %r2, %r3, 0xe8;\n"
    "bfe.u32 %r6, %r1, %r2, %r3;\ndiv.u32 %r7, %r1, %r2;\nst.global.u32 [%P1], %r7;\n",
    "mapa.shared::cluster.u32 %r6, %s, %c;\nst.shared::cluster.u32 [%r6], %t;\n"
    "barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;\n"
    "tensormap.replace.tile.box_dim.global.b1024.b32 [%P0], 0, %r1;\n"
    "fence.proxy.tensormap::generic.acquire.gpu [%P0], 128;\nmov.b32 %r5, 0;\n"
    "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%P0, {%r5, %r5}], [%s];\n",
]
NUMBERS = ["0", "1", "-1", "3", "15", "16", "31", "32", "64", "255", "4095", "65536", "0x7fffffff",
           "0x80000000", "0xffffffff", "0xffffffffffffffff", "-9223372036854775808",
           "18446744073709551616", "1e308"]  # fmt: skip
TOKEN = re.compile(r"0[xXfFdD][0-9a-fA-F]+|%?[\w$]+|::|\S")


def seeds() -> list[str]:
    from ptx_kernel import text

    return [text(body, 2, 8192) for body in BODIES]


def vocabulary() -> list[str]:
    """Words of the instruction table and of the seeds."""
    from dskernels import emu

    words = {w for row in emu.instruction_table() for w in re.split(r"[.|?{}]", row["pattern"])}
    words |= {t for s in seeds() for t in TOKEN.findall(s)}
    return sorted(w for w in words if w)


def mutate(source: str, words: list[str], rng: random.Random) -> str:
    """`source` with a few tokens changed, dropped, doubled or swapped, or bytes damaged."""
    lines = source.splitlines()
    for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
        at = rng.randrange(len(lines))
        kind = rng.randrange(10)
        if kind == 0:
            del lines[at]
            lines = lines or [""]
        elif kind == 1:
            lines.insert(at, rng.choice(lines))
        elif kind == 2:
            other = rng.randrange(len(lines))
            lines[at], lines[other] = lines[other], lines[at]
        elif kind == 3 and lines[at]:
            cut = rng.randrange(len(lines[at]))
            lines[at] = lines[at][:cut] + chr(rng.randrange(1, 256)) + lines[at][cut + 1 :]
        else:
            lines[at] = _mutate_tokens(lines[at], words, rng)
    text = "\n".join(lines)
    if rng.randrange(50) == 0:
        text = text[: rng.randrange(len(text) + 1)]
    return text


def _mutate_tokens(line: str, words: list[str], rng: random.Random) -> str:
    spans = [m.span() for m in TOKEN.finditer(line)]
    if not spans:
        return rng.choice(words)
    begin, end = rng.choice(spans)
    token = line[begin:end]
    pick = rng.randrange(5)
    if token[0].isdigit() or pick == 0:
        new = rng.choice(NUMBERS)
    elif token.startswith("%") and pick < 4:
        new = rng.choice([w for w in words if w.startswith("%")])
    elif pick == 1:
        new = ""
    elif pick == 2:
        new = token + rng.choice((".", " ")) + rng.choice(words)
    else:
        new = rng.choice(words)
    return line[:begin] + new + line[end:]


def run_one(source: str, seed: int) -> str:
    """How it ended: "refused", "hazard", "deadlock", "error" or "ran"."""
    import numpy as np

    from dskernels import emu

    try:
        module = emu.Module(source + "\n", "mutant")
        ended = "refused"
        for name in module.kernels:
            kernel = module.kernel(name)
            args = [np.arange(256, dtype=np.uint32) for _ in kernel.info["params"]]
            if any(p["size"] != 8 for p in kernel.info["params"]):
                continue
            launch = kernel[seed % 3 + 1, (32, 64, 128, 48)[seed % 4]]
            launch(*args, seed=seed % 5 or None, max_instructions=100000)
            ended = "ran"
        return ended
    except emu.PtxError:
        return "refused"
    except emu.HazardError:
        return "hazard"
    except emu.DeadlockError:
        return "deadlock"
    except emu.EmuError:
        return "error"


def run_batch(first: int, count: int) -> None:
    """Runs mutants `first`... and prints a line for each."""
    sys.path.insert(0, str(Path(__file__).parent))
    pool, words = seeds(), vocabulary()
    for seed in range(first, first + count):
        print(seed, flush=True, end=" ")
        print(run_one(mutant(seed, pool, words), seed), flush=True)


def mutant(seed: int, pool: list[str], words: list[str]) -> str:
    rng = random.Random(seed)
    return mutate(rng.choice(pool), words, rng)


def child(first: int, count: int) -> tuple[int | str, list[str]]:
    command = [sys.executable, __file__, "--batch", str(first), str(count)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=BATCH_SECONDS)
    except subprocess.TimeoutExpired as error:
        out = (error.stdout or b"").decode()
        return "timeout", out.split("\n")
    return done.returncode, (done.stdout + done.stderr).split("\n")


def fuzz(seconds: float, first: int, batch: int = BATCH) -> tuple[dict, list[tuple[int, str]]]:
    """Counts by ending, and (seed, what happened) of each crash or hang."""
    counts: dict[str, int] = {}
    crashes: list[tuple[int, str]] = []
    stop, at = time.monotonic() + seconds, first
    while time.monotonic() < stop:
        code, lines = child(at, batch)
        done = [line.split() for line in lines if re.fullmatch(r"\d+ [a-z]+", line)]
        for _, ending in done:
            counts[ending] = counts.get(ending, 0) + 1
        at += len(done)
        if code != 0:  # the next one is to blame
            crashes.append((at, f"exit {code}: " + "\n".join(lines[-15:])))
            at += 1
        elif len(done) != batch:
            raise RuntimeError(f"batch at {at} ended early: {lines}")
    return counts, crashes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=0, help="number of the first mutant")
    parser.add_argument("--keep", type=Path, help="folder for the mutants that crash")
    parser.add_argument("--batch", type=int, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.batch:
        run_batch(*options.batch)
        return 0
    sys.path.insert(0, str(Path(__file__).parent))
    counts, crashes = fuzz(options.seconds, options.seed)
    print(f"{sum(counts.values())} mutants: {counts}; {len(crashes)} crashes or hangs")
    for seed, what in crashes:
        print(f"--- mutant {seed}: {what}")
        if options.keep:
            options.keep.mkdir(parents=True, exist_ok=True)
            (options.keep / f"{seed}.ptx").write_text(mutant(seed, seeds(), vocabulary()))
    return 1 if crashes else 0


if __name__ == "__main__":
    sys.exit(main())
