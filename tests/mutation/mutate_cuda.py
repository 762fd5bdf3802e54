"""Plant bugs in the CUDA kernels, one at a time, and see their stem's emulator tests fail.

    python tests/mutation/mutate_cuda.py --stem gemm|rowwise|mla|moe|ep
        [--only REGEX] [--list] [--sample N] [--seeds 0,1,2] [--jobs N]

The mutants are found by pattern (cuda_mutants.py): every fence, wait, barrier, arrival, phase,
expected byte count, swizzle constant, tail bound, scale index, numerical constant and step of a
descriptor in the sources under csrc/cuda/kernels and csrc/cuda/tile that the stem's kernels
include. For each, the instances it touches are compiled to PTX, and the tests that launch them run
on the emulator with its checks on, under the fixed schedule and under random ones. A baseline run
tells which test launches what. A mutant that the stem's own tests miss, in a file that other stems'
kernels include too, is tried on theirs, one stem after the other, unless it is argued that no test
can see it.

caught          a test failed: wrong bits, a hazard, a deadlock, a timeout; or the build's gates
                complain of its machine code
same code       the compiler makes the same PTX, or machine code, of it: no mutant at all
no compile      neither
explained       it survives, and cuda_survivors.py argues why it must
SURVIVED        it survives: a test is missing

Exit status 0 when at least 95% of the real mutants are caught and each survivor is explained; 1
otherwise; 2 when the baseline fails. DSK_NVCC or nvcc on PATH is needed.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).resolve().parents[2])]

import forked_tests  # noqa: E402
from cuda_machine_code import SAME, verdict  # noqa: E402
from cuda_mutants import Instance, Mutant, includes_of, instances_of, mutants_of  # noqa: E402
from cuda_survivors import EXPLAINED  # noqa: E402
from forked_tests import Test  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ROOT / "dskernels" / "_kernels"
STEMS = ("gemm", "rowwise", "mla", "moe", "ep")
GOAL = 0.95
MUTATED = ("cuda/kernels/", "cuda/tile/")
BASELINE_LIMIT = 600.0  # seconds of CPU time for a test of the unchanged kernels


class Outcome(NamedTuple):
    mutant: Mutant
    status: str  # caught | same code | no compile | explained | SURVIVED
    how: str
    stem: str  # whose kernels and tests these are


# ---- one mutant --------------------------------------------------------------------------------


def find_nvcc() -> str:
    nvcc = os.environ.get("DSK_NVCC") or shutil.which("nvcc")
    if not nvcc:
        raise SystemExit("nvcc: expected one on PATH or in DSK_NVCC, found none")
    return nvcc


def compile_ptx(instance: Instance, overlay: Path, csrc: Path, out: Path) -> bool:
    """The instance's PTX with overlay/ in front of csrc/; False when nvcc refuses."""
    source = overlay / f"{instance.name}.cu"
    source.write_text(instance.source())
    command = [find_nvcc(), "-ptx", "-gencode=arch=compute_90a,code=compute_90a", "-std=c++17"]
    command += ["-O3", "-lineinfo", "--expt-relaxed-constexpr", f"-I{overlay}", f"-I{csrc}"]
    done = subprocess.run([*command, "-o", str(out), str(source)], capture_output=True)
    return done.returncode == 0


def code_lines(ptx: str) -> list[str]:
    """PTX without line information: two texts of equal code are the same kernel."""
    text = ptx.split("\t.section", 1)[0]
    dull = (".loc", ".file", "//")
    return [s for line in text.splitlines() if (s := line.strip()) and not s.startswith(dull)]


def used_kernels() -> list[str]:
    from dskernels.cuda import launchers

    return launchers().take_used_kernels("emu")


def run_items(items: list, limits: list[float], kernels: Path, seed: int) -> forked_tests.Outcome:
    """Run these tests on the emulator, checks on, with the kernels of that folder."""

    def prepare() -> None:
        import dskernels.cuda

        dskernels.cuda.KERNEL_DIRECTORY = kernels
        os.environ.update(DSK_EMU_SEED=str(seed), DSK_EMU_CHECK="order")

    return forked_tests.run(items, limits, prepare, used_kernels)


class BaselineFails(Exception):
    """A test fails on the unchanged kernels."""


class Sources(NamedTuple):
    """Copies: a build or an edit in the meantime must not look like a caught mutant."""

    csrc: Path
    kernels: Path

    @classmethod
    def copied_to(cls, workspace: Path) -> Sources:
        copy = cls(workspace / "csrc", workspace / "kernels")
        for folder in ("cuda", "proto"):  # what kernels may include
            if (ROOT / "csrc" / folder).is_dir():
                shutil.copytree(ROOT / "csrc" / folder, copy.csrc / folder)
        copy.kernels.mkdir()
        for file in SHIPPED.glob("*.ptx"):
            shutil.copy(file, copy.kernels)
        return copy


class Stem:
    """A stem's instances and the tests that launch them."""

    def __init__(self, name: str, seeds: list[int], sources: Sources) -> None:
        self.name, self.seeds = name, seeds
        self.csrc, self.kernels = sources
        self.instances = instances_of(self.csrc, name)
        self.files = {
            i.name: {
                f
                for f in includes_of(self.csrc, f"cuda/kernels/{i.header}")
                if f.startswith(MUTATED)
            }
            for i in self.instances
        }
        self.items: list = []  # its tests, as pytest collected them
        self.tests: list[Test] = []  # those that launch kernels

    def includes(self, file: str) -> bool:
        return any(file in files for files in self.files.values())

    def test_files(self) -> list[str]:
        found = (ROOT / "tests").glob(f"test_{self.name}*.py")
        return sorted(str(file.relative_to(ROOT)) for file in found)

    def mutants(self) -> list[Mutant]:
        files = sorted({f for files in self.files.values() for f in files})
        return [m for f in files for m in mutants_of(self.csrc, f)]

    def baseline(self) -> None:
        """Learn which test launches what. Run once more at the end: had something else broken the
        tests meanwhile, no mutant would count as caught. Raises BaselineFails."""
        items = self.items
        for seed in self.seeds:
            done = run_items(items, [BASELINE_LIMIT] * len(items), self.kernels, seed)
            if done.failure:
                raise BaselineFails(f"of {self.name} with seed {seed}: {done.failure}")
            if not self.tests:
                tests = [Test(items[i], s, frozenset(k)) for i, s, k in done.tests if k]
                self.tests = sorted(tests, key=lambda t: t.seconds)

    def tests_of(self, instance: str) -> list[Test]:
        return [t for t in self.tests if instance in t.kernels]

    def try_mutant(self, mutant: Mutant) -> Outcome:
        touched = [i for i in self.instances if mutant.file in self.files[i.name]]
        touched = [i for i in touched if self.tests_of(i.name)]
        touched.sort(key=lambda i: self.tests_of(i.name)[0].seconds)
        changed = False
        with tempfile.TemporaryDirectory(prefix="dsk-mutant-") as folder:
            overlay, kernels = Path(folder, "src"), Path(folder, "kernels")
            (overlay / mutant.file).parent.mkdir(parents=True)
            (overlay / mutant.file).write_text(mutant.text)
            kernels.mkdir()
            for file in self.kernels.glob("*.ptx"):
                (kernels / file.name).symlink_to(file)
            for instance in touched:
                ptx = kernels / f"{instance.name}.ptx"
                original = ptx.read_text()
                ptx.unlink()
                if not compile_ptx(instance, overlay, self.csrc, ptx):
                    return self._outcome(mutant, "no compile")
                if code_lines(ptx.read_text()) == code_lines(original):
                    continue
                how = self._run(instance.name, kernels)
                if not how:
                    build = Path(folder, "build", instance.name)
                    how = verdict(instance, overlay, self.csrc, find_nvcc(), build)
                    if how == SAME:
                        continue
                changed = True
                if how:
                    return self._outcome(mutant, "caught", f"{instance.name}: {how}")
        return self._uncaught(mutant, changed, bool(touched))

    def _run(self, instance: str, kernels: Path) -> str:
        """How a test failed, or "" when all pass under every schedule."""
        tests = self.tests_of(instance)
        for seed in self.seeds:
            done = run_items([t.item for t in tests], [t.limit for t in tests], kernels, seed)
            if done.failure:
                return done.failure
        return ""

    def _uncaught(self, mutant: Mutant, changed: bool, tested: bool) -> Outcome:
        why = EXPLAINED.get((mutant.file, mutant.old, mutant.new), "")
        if tested and not changed:
            return self._outcome(mutant, "same code")
        if why:
            return self._outcome(mutant, "explained", why)
        return self._outcome(mutant, "SURVIVED", "" if tested else "no test launches this code")

    def _outcome(self, mutant: Mutant, status: str, how: str = "") -> Outcome:
        return Outcome(mutant, status, how, self.name)


# ---- the whole run -----------------------------------------------------------------------------


def reason(how: str) -> str:
    """The kind of failure, for the summary."""
    if any(word in how for word in ("ptxas", "wgmma of", "setmaxnreg")):
        return "machine code"
    for word in ("race", "hazard", "deadlock", "no end", "out of bounds", "uninitiali", "died"):
        if word in how.lower():
            return word
    return "wrong result" if "differ" in how or "assert" in how else "other"


def chosen(stem: Stem, only: str | None, sample: int | None) -> list[Mutant]:
    mutants = [m for m in stem.mutants() if not only or re.search(only, m.label)]
    if sample is not None and sample < len(mutants):
        mutants = random.Random(0).sample(mutants, sample)
    return mutants


def summary(stem: str, outcomes: list[Outcome], complete: bool) -> bool:
    """Print the tally; True when the goal is met."""
    count = Counter(o.status for o in outcomes)
    hows = Counter(reason(o.how) for o in outcomes if o.status == "caught")
    real = count["caught"] + count["explained"] + count["SURVIVED"]
    rate = count["caught"] / real if real else 1.0
    print(f"\n{dict(count)}; caught by {dict(hows)}")
    elsewhere = Counter(o.stem for o in outcomes if o.status == "caught" and o.stem != stem)
    print(f"caught by other stems' tests of shared files: {dict(elsewhere) or 'none'}")
    for outcome in outcomes:
        if outcome.status in ("explained", "SURVIVED"):
            print(f"{outcome.status:9} {outcome.mutant.label}\n          {outcome.how}")
    print(f"caught {count['caught']} of {real} real mutants: {rate:.1%} (goal {GOAL:.0%})")
    return count["SURVIVED"] == 0 and (rate >= GOAL or not complete)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stem", choices=STEMS, required=True)
    parser.add_argument("--only", help="regular expression on 'file:line kind: old -> new'")
    parser.add_argument("--list", action="store_true", help="print the mutants and stop")
    parser.add_argument("--sample", type=int, help="so many mutants, drawn by a fixed seed")
    parser.add_argument("--seeds", default="0,1", help="schedules: 0 is the fixed one")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 2) // 2))
    parser.add_argument("--tests", nargs="+", help="pytest paths (default: tests/test_<stem>*.py)")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="dsk-mutants-") as workspace:
        return run(options, Path(workspace))


def run(options: argparse.Namespace, workspace: Path) -> int:
    seeds = [int(s) for s in options.seeds.split(",")]
    sources = Sources.copied_to(workspace)
    stem = Stem(options.stem, seeds, sources)
    mutants = chosen(stem, options.only, options.sample)
    if options.list:
        for mutant in mutants:
            print(mutant.label)
        print(f"{len(mutants)} mutants of {len(stem.instances)} instances")
        return 0
    others = [Stem(name, seeds, sources) for name in STEMS if name != stem.name]
    others = (
        [] if options.tests else [o for o in others if any(o.includes(m.file) for m in mutants)]
    )

    os.chdir(ROOT)
    import torch

    import dskernels  # noqa: F401  (before the forks, so that none pays for it again)

    torch.set_num_threads(1)
    paths = {s.name: s.test_files() for s in (stem, *others)}
    paths[stem.name] = options.tests or paths[stem.name]

    def work(items: list) -> int:
        for each in others:
            files = {ROOT / path for path in paths[each.name]}
            each.items = [i for i in items if i.path in files]
        theirs = {id(i) for each in others for i in each.items}
        stem.items = [i for i in items if id(i) not in theirs]
        try:
            outcomes = try_all(stem, others, mutants, options.jobs)
        except BaselineFails as error:
            print(f"baseline fails {error}")
            return 2
        complete = options.only is None and options.sample is None
        return 0 if summary(stem.name, outcomes, complete) else 1

    arguments = ["--backend", "emu", "-m", "not slow", *(p for ps in paths.values() for p in ps)]
    return forked_tests.collect(arguments, work)


_stem: Stem | None = None  # in a worker: handed down by the fork, for tests do not pickle


def _adopt(stem: Stem) -> None:
    global _stem
    _stem = stem


def _try(mutant: Mutant) -> Outcome:
    return _stem.try_mutant(mutant)


def try_on(stem: Stem, mutants: list[Mutant], jobs: int) -> list[Outcome]:
    stem.baseline()
    print(
        f"{len(mutants)} mutants, {len(stem.tests)} tests of {stem.name} launch kernels", flush=True
    )
    outcomes = []
    with multiprocessing.get_context("fork").Pool(jobs, _adopt, (stem,)) as pool:
        for outcome in pool.imap_unordered(_try, mutants):
            outcomes.append(outcome)
            first = outcome.how.splitlines()[0][:150] if outcome.how else ""
            print(f"{outcome.status:10} {outcome.mutant.label}\n{'':11}{first}", flush=True)
    stem.baseline()
    return outcomes


def try_all(stem: Stem, others: list[Stem], mutants: list[Mutant], jobs: int) -> list[Outcome]:
    """What the stem's own tests say and, where they miss a mutant, those of who shares its file."""
    said = {o.mutant: o for o in try_on(stem, mutants, jobs)}
    for other in others:
        missed = [m for m, o in said.items() if o.status == "SURVIVED"]  # no test sees the argued
        shared = [m for m in missed if other.includes(m.file)]
        if shared:
            print(f"missed, in files that {other.name} shares:", flush=True)
            caught = (o for o in try_on(other, shared, jobs) if o.status == "caught")
            said.update((o.mutant, o) for o in caught)
    return list(said.values())


if __name__ == "__main__":
    sys.exit(main())
