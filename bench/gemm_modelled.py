"""The FP8 GEMM family beside DeepGEMM, both in the emulator's timing model, shape by shape:

python -m bench.gemm_modelled [--only TEXT] [--json]

For each shape: the kernel chosen, its modelled time, the ratio theirs / ours (above 1 we are
faster), how busy the tensor cores are, bytes through HBM and L2 against the fewest possible, and
what the time is bound by. Nothing here was measured on a GPU; the model's held-out error is in
bench/LOG.md ("what the emulator's timing model is worth"). Theirs needs PyPI's sgl-deep-gemm and
nvcc; without them those columns are empty.

Their tiles: the rule of DeepGEMM's configuration code applied by hand (fewest waves, then the
fullest last wave), as in bench.emu_timing.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from dataclasses import dataclass

from bench.emu_timing import PART, ROWS, Row, ours, theirs
from dskernels.cuda import launchers


def _dense(m: int, n: int, k: int, tile: tuple[int, int, int, int]) -> Row:
    return Row("few rows", m, n, k, 1, False, tile)


def _masked(groups: int, m: int, n: int, k: int, tile: tuple[int, int, int, int]) -> Row:
    return Row("masked", m, n, k, 1, False, tile, "masked", groups)


# (n, k) -> their tile for 16 and 64 rows, and for 128.
_FEW_ROWS = {
    (2112, 7168): ((64, 16, 20, 1), (64, 32, 16, 1)),
    (576, 7168): ((64, 16, 20, 1), (64, 16, 20, 1)),
    (24576, 1536): ((64, 192, 5, 1), None),
    (32768, 512): ((64, 128, 8, 1), None),
    (7168, 16384): ((64, 64, 12, 1), None),
    (4096, 7168): ((64, 32, 16, 1), (64, 64, 12, 1)),
    (7168, 2048): ((64, 64, 12, 1), (64, 128, 8, 1)),
}
SHAPES = (
    *(row for row in ROWS if row.family != "small"),
    *(
        _dense(m, n, k, tile)
        for (n, k), (few, more) in _FEW_ROWS.items()
        for m, tile in ((16, few), (64, few), (128, more))
        if tile
    ),
    _masked(6, 32, 4096, 7168, (64, 128, 8, 1)),
    _masked(6, 32, 7168, 2048, (64, 128, 8, 1)),
    _masked(6, 192, 4096, 7168, (128, 128, 5, 1)),
    _masked(2, 1024, 4096, 7168, (128, 192, 4, 1)),
)


@dataclass(frozen=True)
class Result:
    label: str
    kernel: str
    ours_us: float
    theirs_us: float | None
    bracket_us: tuple[float, float]
    tensor_busy: float
    hbm_bytes: float
    l2_bytes: float
    least_bytes: float
    bottleneck: str

    @property
    def ratio(self) -> float | None:
        return self.theirs_us and self.theirs_us / self.ours_us


def least_bytes(row: Row) -> int:
    """Operands, scales and a bf16 result, each once."""
    k_blocks = -(-row.k // 128)
    a = row.rows * (row.k + 4 * k_blocks)
    b = row.groups * (row.n * row.k + 4 * -(-row.n // 128) * k_blocks)
    return a + b + 2 * row.rows * row.n


def describe(row: Row) -> str:
    """The kernel that the launcher chooses, and its cluster."""
    m = row.m if row.kind == "masked" else row.rows
    choice = launchers().gemm_config(row.kind, m=m, n=row.n, k=row.k, num_groups=row.groups)
    uses = [f"split {choice['split']}"] if choice["split"] > 1 else []
    uses += ["pairs share B"] if choice["pair_m"] > 1 else []
    uses += ["pairs share A"] if choice["pair_n"] > 1 else []
    return ", ".join([choice["kernel"].removeprefix("gemm_fp8_"), *uses])


def their_times(rows: list[Row]) -> dict[Row, float]:
    """Modelled us of DeepGEMM's kernels; empty where they cannot be compiled."""
    batches = defaultdict(list)  # a module of theirs cannot hold two equal instances
    for row in rows:
        batches[row.kind, row.m].append(row)
    try:
        return {r: p.modelled_us for rs in batches.values() for r, p in theirs(tuple(rs))}
    except (SystemExit, ModuleNotFoundError) as reason:
        print(f"without DeepGEMM: {reason}")
        return {}


def measure(rows: list[Row]) -> list[Result]:
    other = their_times(rows)
    out = []
    for row in rows:
        t = ours(row).timing
        out.append(
            Result(
                row.label,
                describe(row),
                t.modelled_us,
                other.get(row),
                (t.low_us, t.high_us),
                t.busy["tensor"],
                t.hbm_bytes,
                t.l2_bytes,
                least_bytes(row),
                t.bottleneck,
            )
        )
    return out


def print_table(results: list[Result]) -> None:
    print(f"modelled on {PART}; bytes in MB: through L2, HBM, and the fewest possible")
    print(
        f"{'shape':38} {'kernel':28} {'us':>7} {'bracket':>16} {'theirs':>7} {'ratio':>5} "
        f"{'tensor':>6} {'L2':>7} {'HBM':>6} {'least':>6}  bound by"
    )
    for r in results:
        low, high = r.bracket_us
        theirs_us, ratio = (f"{r.theirs_us:.1f}", f"{r.ratio:.2f}") if r.theirs_us else ("-", "-")
        print(
            f"{r.label:38} {r.kernel:28} {r.ours_us:7.1f} [{low:6.1f}, {high:6.1f}] {theirs_us:>7} "
            f"{ratio:>5} {100 * r.tensor_busy:5.0f}% {r.l2_bytes / 1e6:7.1f} "
            f"{r.hbm_bytes / 1e6:6.1f} {r.least_bytes / 1e6:6.1f}  {r.bottleneck}"
        )
    ratios = [r.ratio for r in results if r.ratio]
    if ratios:
        print(f"ratio theirs / ours: least {min(ratios):.3f}, mean {sum(ratios) / len(ratios):.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gemm_modelled", description=__doc__)
    parser.add_argument("--only", default="", help="only shapes whose label contains this")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    results = measure([row for row in SHAPES if options.only in row.label])
    print_table(results)
    if options.json:
        print(json.dumps([{**r.__dict__, "ratio": r.ratio} for r in results]))


if __name__ == "__main__":
    main()
