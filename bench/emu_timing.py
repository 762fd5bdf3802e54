"""The emulator's modelled times beside published ones: python -m bench.emu_timing [--fit] [--json]

DeepGEMM's own SM90 kernels (PyPI sgl-deep-gemm, compiled by nvcc here) run in the emulator and are
timed by its model; the figures that its README gives for the H800 are what they should come to. The
model's four fitted parameters are fitted on the rows marked "fit"; the others are held out, and the
error over them is what the model is worth. Our GEMM beside theirs: python -m bench.gemm_modelled.

Tile configurations are those that DeepGEMM's published selection rule (fewest waves, then the
fullest last wave) gives for each shape; the rule was applied by hand.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import dskernels as dsk
from dskernels import emu
from dskernels.types import ScaledTensor

OUTSIDE = Path(__file__).resolve().parent.parent / "tests" / "emu" / "outside"
PART = "h800"
TRUST = 0.15  # no absolute claim for a family whose held-out error is above this
FITTED = {  # parameter -> values tried
    "l2_bytes": (4560, 5000, 5500, 6000, 7000, 8448),
    "hbm_efficiency": (0.80, 0.85, 0.90, 0.95, 1.0),
    "launch_us": (0.5, 1.0, 1.5, 2.0, 3.0),
    "issue_scale": (0.8, 0.9, 1.0, 1.1, 1.25, 1.4, 1.6),
}


@dataclass(frozen=True)
class Row:
    """One published figure. groups 1 is dense; tile (block_m, block_n, stages, multicast)."""

    family: str
    m: int
    n: int
    k: int
    tflops: float
    fit: bool
    tile: tuple[int, int, int, int]
    kind: str = "dense"
    groups: int = 1

    @property
    def rows(self) -> int:
        return self.m * self.groups

    @property
    def published_us(self) -> float:
        return 2e-6 * self.rows * self.n * self.k / self.tflops

    @property
    def label(self) -> str:
        many = f"{self.groups} x " if self.groups > 1 else ""
        return f"{self.kind} {many}{self.m} x {self.n} x {self.k}"


ROWS = (
    Row("large", 4096, 7168, 16384, 1519, True, (256, 128, 3, 2)),
    Row("large", 4096, 4096, 7168, 1439, False, (256, 128, 3, 2)),
    Row("large", 4096, 24576, 1536, 1270, False, (256, 128, 3, 2)),
    Row("large", 4096, 7168, 2048, 1215, True, (256, 128, 3, 2)),
    Row("store", 4096, 32768, 512, 836, True, (256, 128, 3, 2)),
    Row("small", 64, 2112, 7168, 206, True, (64, 16, 20, 1)),
    Row("small", 64, 7168, 16384, 336, False, (64, 64, 12, 1)),
    Row("grouped", 8192, 4096, 7168, 1381, False, (128, 192, 4, 2), "contiguous", 4),
    Row("grouped", 8192, 7168, 2048, 1262, True, (128, 192, 4, 2), "contiguous", 4),
    Row("grouped", 256, 4096, 7168, 932, False, (128, 128, 5, 1), "masked", 4),
)


def operands(row: Row) -> tuple[ScaledTensor, ScaledTensor]:
    """Zeros with scales of one: the time of a GEMM does not depend on its values here."""
    shape = (row.groups, row.m, row.k) if row.kind == "masked" else (row.rows, row.k)
    a = torch.zeros(shape, dtype=torch.uint8).view(torch.float8_e4m3fn)
    n = (row.groups, row.n) if row.groups > 1 else (row.n,)
    b = torch.zeros(*n, row.k, dtype=torch.uint8).view(torch.float8_e4m3fn)
    sfa = torch.ones(*shape[:-1], -(-row.k // 128))
    sfb = torch.ones(*n[:-1], -(-row.n // 128), -(-row.k // 128))
    return ScaledTensor(a, sfa, (1, 128)), ScaledTensor(b, sfb, (128, 128))


def theirs(rows: tuple[Row, ...]) -> Iterator[tuple[Row, emu.LaunchProfile]]:
    """DeepGEMM's kernel for each row, profiled."""
    sys.path.insert(0, str(OUTSIDE))
    import deepgemm_support as dg

    if dg.FOLDER is None:
        raise SystemExit("needs PyPI's sgl-deep-gemm: pip install --no-deps sgl-deep-gemm==0.2.5")
    kinds = {"dense": dg.NORMAL, "contiguous": dg.CONTIGUOUS, "masked": dg.MASKED}
    instance = {
        row: dg.Instance(
            "1d2d",
            *row.tile[:2],
            kinds[row.kind],
            groups=row.groups,
            stages=row.tile[2],
            multicast=row.tile[3],
            on_a=row.tile[0] > row.tile[1],
            sms=132,
            shape=(0, row.n, row.k),
        )  # fmt: skip
        for row in rows
    }
    module = dg.build(tuple(instance.values()))
    for row in rows:
        a, b = operands(row)
        layout = None
        if row.kind == "contiguous":
            layout = torch.arange(row.groups, dtype=torch.int32).repeat_interleave(row.m)
        elif row.kind == "masked":
            layout = torch.full((row.groups,), row.m, dtype=torch.int32)
        with emu.profiling(PART, sample_ctas=1) as profile:
            dg.run_1d2d(module, instance[row], a, b, layout, check=False)
        yield row, profile.launches[0]


def ours(row: Row) -> emu.LaunchProfile:
    """Our kernel for a row, profiled."""
    a, b = operands(row)
    with emu.profiling(PART, sample_ctas=1) as profile:
        if row.kind == "dense":
            dsk.gemm(a, b, backend="emu")
        elif row.kind == "masked":
            counts = torch.full((row.groups,), row.m, dtype=torch.int32)
            dsk.grouped_gemm(a, b, masked_m=counts, expected_m=row.m, backend="emu")
        else:
            dsk.grouped_gemm(a, b, group_sizes=[row.m] * row.groups, backend="emu")
    return profile.launches[0]


def error(row: Row, us: float) -> float:
    return us / row.published_us - 1


def loss(profiles: dict[Row, emu.LaunchProfile], model: dict[str, float]) -> float:
    """Mean squared relative error over the rows to fit."""
    errors = [error(r, p.replay(**model)["us"]) for r, p in profiles.items() if r.fit]
    return sum(e * e for e in errors) / len(errors)


def fit(profiles: dict[Row, emu.LaunchProfile]) -> dict[str, float]:
    """Coordinate descent over the tried values; the defaults are the start."""
    start = emu.model_of(PART)
    best = {name: start[name] for name in FITTED}
    least = loss(profiles, best)
    for _ in range(3):
        before = least
        for name, values in FITTED.items():
            for value in values:
                trial = {**best, name: value}
                if (now := loss(profiles, trial)) < least:
                    best, least = trial, now
        if least == before:
            break
    return best


def compare(profiles: dict[Row, emu.LaunchProfile]) -> list[dict]:
    out = []
    for row, profile in profiles.items():
        t = profile.time()
        out.append(
            {
                **asdict(row),
                "label": row.label,
                "published_us": row.published_us,
                "modelled_us": t.modelled_us,
                "bracket_us": [t.low_us, t.high_us],
                "error": error(row, t.modelled_us),
                "bottleneck": t.bottleneck,
            }
        )
    return out


def verdicts(results: list[dict]) -> dict[str, float]:
    """Mean absolute held-out error by family, and over all."""
    held = [r for r in results if not r["fit"]]
    families = {f: [r for r in held if r["family"] == f] for f in {r["family"] for r in results}}
    mean = {f: sum(abs(r["error"]) for r in rs) / len(rs) for f, rs in families.items() if rs}
    mean["all"] = sum(abs(r["error"]) for r in held) / len(held)
    return mean


def print_table(results: list[dict]) -> None:
    print(f"DeepGEMM's kernels, modelled on {PART} against its published figures")
    print(f"{'shape':38} {'tile':>12} {'published':>11} {'modelled us':>26} {'error':>7}  bound by")
    for r in results:
        tile = "{}x{} x{}".format(r["tile"][0], r["tile"][1], r["tile"][3])
        low, high = r["bracket_us"]
        modelled = f"{r['modelled_us']:.1f} [{low:.1f}, {high:.1f}]"
        role = "fit" if r["fit"] else "held out"
        print(
            f"{r['label']:38} {tile:>12} {r['published_us']:8.1f} us {modelled:>26} "
            f"{100 * r['error']:+6.1f}%  {r['bottleneck']}, {role}"
        )
    for family, e in sorted(verdicts(results).items()):
        claim = "" if e <= TRUST else ": no absolute claim, only comparisons"
        print(f"held-out error, {family}: {100 * e:.1f} %{claim}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.emu_timing", description=__doc__)
    parser.add_argument("--fit", action="store_true", help="fit the parameters and print them")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    profiles = dict(theirs(ROWS))
    if options.fit:
        best = fit(profiles)
        print("fitted:", ", ".join(f"{k} = {v:g}" for k, v in best.items()))
        for profile in profiles.values():
            profile.overrides.update(best)
    results = compare(profiles)
    print_table(results)
    if options.json:
        print(json.dumps({"published": results, "held_out": verdicts(results)}))


if __name__ == "__main__":
    main()
