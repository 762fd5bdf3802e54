"""Plant bugs in the emulator's numerics, one at a time, and see tests/emu_num fail.

    python tests/mutation/mutate_emu_num.py [--only NAME-PART] [--list]

Each mutant replaces one piece of one file in a temporary copy; only that object is rebuilt and
linked into a small module that holds the numerics alone. Exit status 0 when every mutant is caught,
1 when one survives, 2 when a mutant no longer applies or builds (update the table).
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import pybind11

ROOT = Path(__file__).resolve().parents[2]
FLAGS = ["-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off"]
MODULE = """#include "api/bindings.hpp"
PYBIND11_MODULE(_C, m) { dsk::api::bind_emu_num(m); }
"""


class Mutant(NamedTuple):
    name: str
    file: str  # in csrc/emu/num
    old: str
    new: str
    tests: str  # tests/emu_num/test_<tests>.py


MUTANTS = [
    Mutant(
        "encode: ties away",
        "convert.cpp",
        "(rest == 0.5 && std::fmod",
        "(rest >= 0.5 || std::fmod",
        "convert",
    ),
    Mutant(
        "encode: rm as rp",
        "convert.cpp",
        "return negative && rest > 0.0",
        "return !negative && rest > 0.0",
        "convert",
    ),
    Mutant("encode: relu forgotten", "convert.cpp", "if (mode.relu &&", "if (false &&", "convert"),
    Mutant(
        "encode: saturate forgotten",
        "convert.cpp",
        "mode.satfinite || !s.has_nan ||",
        "!s.has_nan ||",
        "convert",
    ),
    Mutant("e5m2: bias", "convert.cpp", "<2, 112,", "<2, 113,", "convert"),
    Mutant(
        "e4m3: clamp above max",
        "convert.cpp",
        "0x46800000u, 0x7e>",
        "0x46800000u, 0x7f>",
        "convert",
    ),
    Mutant("f16: overflow threshold", "convert.cpp", "0x477ff000u", "0x47800000u", "convert"),
    Mutant("bf16: truncates", "convert.cpp", "u + 0x7fffu +", "u +", "convert"),
    Mutant("tf32: no rounding", "convert.cpp", "(u + 0x1000u)", "u", "convert"),
    Mutant(
        "x2: halves swapped",
        "convert.cpp",
        "(e4m3_from(a[i]) << 8) | e4m3_from(b[i])",
        "(e4m3_from(b[i]) << 8) | e4m3_from(a[i])",
        "convert",
    ),
    Mutant(
        "model: F 14",
        "tensorcore.cpp",
        "model.fraction_bits = 13;",
        "model.fraction_bits = 14;",
        "tensorcore",
    ),
    Mutant(
        "model: keeps 14 bits",
        "tensorcore.cpp",
        "model.kept_bits = 13;",
        "model.kept_bits = 14;",
        "tensorcore",
    ),
    Mutant("model: zero exponent", "tensorcore.cpp", "? -21 : -133", "? -14 : -133", "tensorcore"),
    Mutant(
        "model: tf32 group 4",
        "tensorcore.cpp",
        "model.group = 8;",
        "model.group = 4;",
        "tensorcore",
    ),
    Mutant(
        "model: fp8 mma.sync in plain order",
        "tensorcore.cpp",
        "((k / 2) % 2) * (kind.k / 2)",
        "(k / 2) % 2 * 0 + (k >= kind.k / 2) * 0",
        "tensorcore",
    ),
    Mutant(
        "model: C joins the first HMMA",
        "tensorcore.cpp",
        "group != 0 || (accumulate && !widened)",
        "group != 0 || accumulate",
        "tensorcore",
    ),
    Mutant(
        "model: subnormals normalised",
        "tensorcore.cpp",
        "field == 0 ? 1 : field) - f.bias",
        "field) - f.bias",
        "tensorcore",
    ),
    Mutant(
        "model: inf * 0 is not NaN", "tensorcore.cpp", "(x.inf && y.sig == 0) ||", "", "tensorcore"
    ),
    Mutant(
        "model: negate one operand only",
        "tensorcore.cpp",
        "const bool flip = kind.negate_a != kind.negate_b;\n  for (int i = 0; i < kind.k; ++i) {\n    if (sum",
        "const bool flip = kind.negate_a;\n  for (int i = 0; i < kind.k; ++i) {\n    if (sum",
        "tensorcore",
    ),
    Mutant(
        "integers: saturate ignored",
        "tensorcore.cpp",
        "if (kind.saturate)",
        "if (false)",
        "tensorcore",
    ),
    Mutant("avx512: F 14", "tensorcore_avx512.cpp", "kF13 = 13", "kF13 = 14", "tensorcore"),
    Mutant(
        "avx512: rounds to nearest",
        "tensorcore_avx512.cpp",
        "_MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC;\n  for (int k = 0;",
        "_MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;\n  for (int k = 0;",
        "tensorcore",
    ),
    Mutant(
        "avx512: sign swap lost",
        "tensorcore_avx512.cpp",
        "k * 128 + (row.negative[k] ? 64 : 0)",
        "k * 128",
        "tensorcore",
    ),
    Mutant(
        "avx512: RZ gives max, not inf",
        "tensorcore_avx512.cpp",
        "_mm512_set1_pd(0x1p128)",
        "_mm512_set1_pd(0x1p200)",
        "tensorcore",
    ),
    Mutant(
        "avx512: f16 rounded twice",
        "tensorcore_avx512.cpp",
        "_mm256_set1_epi32(1));",
        "_mm256_set1_epi32(0));",
        "tensorcore",
    ),
    Mutant(
        "avx512: C infinity not redone",
        "tensorcore_avx512.cpp",
        "redo |= static_cast<uint64_t>(not_finite(c[v]) & live) << (16 * v);",
        "",
        "tensorcore",
    ),
    Mutant(
        "avx512: special column missed",
        "panel_avx512.cpp",
        "_mm_maskz_set1_epi8(special, 1)",
        "_mm_setzero_si128()",
        "tensorcore",
    ),
    Mutant(
        "avx2: rounding mode not set",
        "tensorcore_avx2.cpp",
        "saved_ | 0x6000u",
        "saved_",
        "tensorcore",
    ),
    Mutant(
        "avx2: -0 kept",
        "tensorcore_avx2.cpp",
        "bits == 0x80000000u ? 0u : bits",
        "bits",
        "tensorcore",
    ),
    Mutant(
        "accumulator move: odd columns",
        "panel_avx512.cpp",
        "(pair & 1) * 8) * ldd + (pair >> 1) * 8",
        "(pair >> 1) * 8) * ldd + (pair & 1) * 8",
        "tensorcore",
    ),
    Mutant(
        "descriptor: swizzle modes reversed",
        "wgmma_desc.cpp",
        "layout == 0 ? 0 : 4 - layout",
        "layout",
        "wgmma_desc",
    ),
    Mutant(
        "descriptor: LBO for SBO",
        "wgmma_desc.cpp",
        "desc.start + (mn / 8) * desc.sbo",
        "desc.start + (mn / 8) * desc.lbo",
        "cute_oracle",
    ),
    Mutant(
        "descriptor: MN strides swapped",
        "wgmma_desc.cpp",
        "desc.start + mn8 * desc.sbo + (k % 8) * 16 + (k / 8) * desc.lbo",
        "desc.start + mn8 * desc.lbo + (k % 8) * 16 + (k / 8) * desc.sbo",
        "cute_oracle",
    ),
    Mutant(
        "descriptor: base offset added",
        "wgmma_desc.cpp",
        "(address >> 7) - desc.base_offset",
        "(address >> 7) + desc.base_offset",
        "wgmma_desc",
    ),
    Mutant(
        "descriptor: bounds off by a chunk",
        "wgmma_desc.cpp",
        "plan.high = sorted.back() + 16",
        "plan.high = sorted.back()",
        "wgmma_desc",
    ),
    Mutant(
        "swizzle: wrong source bits",
        "wgmma_desc.hpp",
        "(address >> 7) & mask",
        "(address >> 8) & mask",
        "wgmma_desc",
    ),
    Mutant(
        "fragment: A halves swapped",
        "fragments.hpp",
        "return {lane / 4 + 8 * (reg & 1),\n          (lane % 4) * per_reg",
        "return {lane / 4 + 8 * (reg >> 1),\n          (lane % 4) * per_reg",
        "fragments",
    ),
    Mutant(
        "fragment: ldmatrix trans ignored",
        "fragments.hpp",
        "return trans ? Coord{c.col, c.row} : c",
        "return c",
        "cute_oracle",
    ),
    Mutant(
        "map: 17 accepted as stride",
        "tensor_map.cpp",
        "a.strides[i] % alignment != 0",
        "a.strides[i] % 8 != 0",
        "tensor_map",
    ),
    Mutant("map: box 257", "tensor_map.cpp", "kMaxBox = 256", "kMaxBox = 257", "tensor_map"),
    Mutant(
        "map: swizzle span unchecked",
        "tensor_map.cpp",
        "&& inner > span",
        "&& inner > 4096",
        "tensor_map",
    ),
    Mutant(
        "walk: negative coordinates read",
        "tensor_map.cpp",
        "c < 0 || static_cast<uint64_t>(c) >= args.dims[d]",
        "static_cast<uint64_t>(c < 0 ? 0 : c) >= args.dims[d]",
        "tensor_map",
    ),
    Mutant(
        "walk: right edge off by one",
        "tensor_map.cpp",
        "std::clamp<int64_t>(size - start, 0, count)",
        "std::clamp<int64_t>(size - start + 1, 0, count)",
        "tensor_map",
    ),
    Mutant(
        "walk: element stride ignored",
        "tensor_map.cpp",
        "int64_t{index[d]} * args.element_strides[d]",
        "int64_t{index[d]}",
        "tensor_map",
    ),
    Mutant(
        "replace: driver's type numbers",
        "tensor_map.cpp",
        "static_cast<uint8_t>(kPtxTypes[value])",
        "static_cast<uint8_t>(value)",
        "tensor_map",
    ),
    Mutant(
        "fill: zeros for NaN",
        "tensor_map.cpp",
        "if (args.fill == TmaFill::zero)",
        "if (true)",
        "tensor_map",
    ),
    Mutant("approx: ftz forgotten", "approx.cpp", "if (ftz) x = flush(x);", "", "approx"),
    Mutant(
        "approx: worst is nearest",
        "approx.cpp",
        "return crossed || !std::isfinite(value) ? encode(format, exact) : bits;",
        "return encode(format, exact);",
        "approx",
    ),
    Mutant(
        "approx: bound doubled",
        "approx.cpp",
        "return ulp_f32(exact);",
        "return 2 * ulp_f32(exact);",
        "approx",
    ),
    Mutant(
        "approx: one sign only",
        "approx.cpp",
        "return ((z ^ (z >> 31)) & 1) != 0;",
        "return true;",
        "approx",
    ),
    Mutant(
        "div: huge divisor divides", "approx.cpp", "size > 0x1p126f", "size > 0x1p127f", "approx"
    ),
]


class Tree:
    """A copy of the numerics that can be built piecewise."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.units = folder / "csrc/emu/num"
        shutil.copytree(ROOT / "csrc/emu/num", self.units)
        (folder / "csrc/api").mkdir()
        for name in ("bind_emu_num.cpp", "bindings.hpp"):
            shutil.copy(ROOT / "csrc/api" / name, folder / "csrc/api")
        (folder / "csrc/api/module.cpp").write_text(MODULE)
        (folder / "dskernels").mkdir()
        (folder / "dskernels/__init__.py").touch()
        shutil.copytree(ROOT / "tests/emu_num", folder / "emu_num")
        (folder / "pytest.ini").write_text("[pytest]\nmarkers = slow: nightly\n")
        self.sources = sorted(self.units.glob("*.cpp")) + sorted(
            (folder / "csrc/api").glob("*.cpp")
        )

    def compile(self, sources: list[Path]) -> None:
        includes = [f"-I{self.folder / 'csrc'}", f"-I{pybind11.get_include()}"]
        includes.append(f"-I{sysconfig.get_paths()['include']}")
        for source in sources:
            target = str(source.with_suffix(".o"))
            command = ["g++", *FLAGS, *includes, "-c", str(source), "-o", target]
            subprocess.run(command, check=True, stderr=subprocess.DEVNULL)

    def link(self) -> None:
        objects = [str(s.with_suffix(".o")) for s in self.sources]
        target = str(self.folder / "dskernels/_C") + sysconfig.get_config_var("EXT_SUFFIX")
        subprocess.run(["g++", "-shared", *objects, "-o", target], check=True)

    def run(self, tests: str) -> bool:
        """True when the tests pass."""
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "not slow"]
        command += ["-p", "no:cacheprovider", f"emu_num/test_{tests}.py"]
        environment = {**os.environ, "PYTHONPATH": str(self.folder)}
        done = subprocess.run(command, cwd=self.folder, env=environment, capture_output=True)
        if done.returncode not in (0, 1):
            raise RuntimeError(done.stdout.decode()[-2000:] + done.stderr.decode()[-2000:])
        return done.returncode == 0


def try_mutant(tree: Tree, mutant: Mutant) -> str:
    """'caught', 'SURVIVED' or 'stale'."""
    path = tree.units / mutant.file
    original = path.read_text()
    if original.count(mutant.old) == 0:
        return "stale"
    path.write_text(original.replace(mutant.old, mutant.new, 1))
    # A header may be seen by any unit.
    touched = [path] if path.suffix == ".cpp" else tree.sources
    try:
        tree.compile(touched)
        tree.link()
        return "SURVIVED" if tree.run(mutant.tests) else "caught"
    except subprocess.CalledProcessError:
        return "stale"
    finally:
        path.write_text(original)
        if path.suffix == ".hpp":
            tree.compile(tree.sources)
        else:
            tree.compile([path])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="mutants whose name contains this")
    parser.add_argument("--list", action="store_true")
    args = parser.parse_args()
    chosen = [m for m in MUTANTS if args.only in m.name]
    if args.list:
        print("\n".join(m.name for m in chosen))
        return 0
    outcomes = []
    with tempfile.TemporaryDirectory() as folder:
        tree = Tree(Path(folder))
        tree.compile(tree.sources)
        tree.link()
        for tests in sorted({m.tests for m in chosen}):
            if not tree.run(tests):
                print(f"test_{tests}.py fails without a mutant")
                return 2
        for mutant in chosen:
            start = time.monotonic()
            outcomes.append(try_mutant(tree, mutant))
            print(f"{outcomes[-1]:9} {time.monotonic() - start:5.1f}s  {mutant.name}", flush=True)
    print(f"{outcomes.count('caught')} of {len(outcomes)} caught")
    return 2 if "stale" in outcomes else int("SURVIVED" in outcomes)


if __name__ == "__main__":
    sys.exit(main())
