"""Microseconds per emulated tensor-core instruction, one core: `python -m bench.emu_num`.

User time of this process (the machine may be shared), best of several batches. `load + mma` unpacks
the B tile for every instruction; `mma` reuses the unpacked panel.
"""

import argparse
import resource

import dskernels._C as _C
import numpy as np

NUM = _C._emu_num
KINDS = [("e4m3", 32), ("bf16", 16), ("f16", 16), ("tf32", 8)]


def user_seconds() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_utime


def operand(rng: np.random.Generator, name: str, rows: int, k: int) -> np.ndarray:
    """Packed rows of ordinary values (a normal times a power of two), as bytes."""
    x = rng.standard_normal((rows, k)) * 2.0 ** rng.integers(-4, 4, (rows, k))
    codes = NUM.encode(name, x.reshape(-1), "rn", True).reshape(rows, k)
    width = {"e4m3": np.uint8, "bf16": np.uint16, "f16": np.uint16, "tf32": np.uint32}[name]
    return np.ascontiguousarray(codes.astype(width)).view(np.uint8)


def measure(kind: str, k: int, n: int, mode: str, reuse: bool, repeat: int) -> float:
    """Best user microseconds per m64nNkK over five batches."""
    rng = np.random.default_rng(0)
    a, b = operand(rng, kind, 64, k), operand(rng, kind, n, k)
    best = float("inf")
    for _ in range(5):
        d = np.zeros((64, n), np.float32)
        start = user_seconds()
        NUM.mma("wgmma", "f32", kind, kind, k, a, b, d, mode=mode, repeat=repeat, reuse_panel=reuse)
        best = min(best, (user_seconds() - start) / repeat)
    return best * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=128, help="columns of the instruction")
    parser.add_argument("--repeat", type=int, default=2000, help="instructions a batch")
    parser.add_argument("--isa", default="", help="avx512, avx2 or scalar; default: the best")
    args = parser.parse_args()
    NUM.force_isa(args.isa)
    print(f"isa {NUM.active_isa()}, user microseconds per m64n{args.n}")
    print(f"{'kind':>6} {'mode':>6} {'load + mma':>11} {'mma':>8}")
    for kind, k in KINDS:
        for mode in ("fast", "exact"):
            times = [measure(kind, k, args.n, mode, r, args.repeat) for r in (False, True)]
            print(f"{kind:>6} {mode:>6} {times[0]:11.2f} {times[1]:8.2f}")


if __name__ == "__main__":
    main()
