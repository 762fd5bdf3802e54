"""The mutation script of the CUDA kernels: its patterns find what they must, and (nightly) a sample
of the bugs it plants is caught."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "mutation"))

from cuda_mutants import Mutant, includes_of, instances_of, mutants_of  # noqa: E402
from cuda_survivors import EXPLAINED  # noqa: E402
from mutate_cuda import Outcome, summary, try_all  # noqa: E402

CSRC = ROOT / "csrc"
SOURCE = """// if (a < b) wgmma_fence();
template <int kN>
__device__ void f(Ring& ring, Position at) {
  static_assert(kN < 4);
  for (int i = 0; i < kN; ++i) x[i] = 0;
  for (int row = 0; row < p.rows; row += 8) {
    ring.acquire(at, Shape::kStageBytes);
    ring.init(kWarps);
    ptx::wgmma_fence();
    if (lane == 0) cp_async_bulk_wait_group_read(n32_t<0>{});
    named_barrier_sync(barrier, 128);
    ring.consume(at);
    wait(&empty[s], at.phase ^ 1);
    const uint32_t to = base + swizzle128(row, chunk);
    const float scale = sfa[row + 8] * sfb[k / 128];
    constexpr float kLn2 = 0.6931f, kOne = 1.f;
    mma(d, advance_k_rows(values, 16 * k), 1);
  }
}
"""


def test_the_patterns_find_every_kind_and_skip_what_is_no_code(tmp_path):
    (tmp_path / "k.cuh").write_text(SOURCE)
    found = list(mutants_of(tmp_path, "k.cuh"))
    kinds = Counter(m.kind for m in found)
    assert kinds == {
        "tail": 1, "wait": 4, "expect_tx": 2, "arrive": 3, "fence": 1, "barrier": 1, "phase": 1,
        "swizzle": 1, "scale": 3, "constant": 1, "descriptor": 1,
    }, [m.label for m in found]  # fmt: skip
    assert not {m.line for m in found} & {1, 2, 4, 5}
    assert len({m.text for m in found}) == len(found)


def test_every_stem_has_mutants_of_the_kinds_it_uses():
    for table in (CSRC / "cuda" / "instances").glob("*.def"):
        instances = instances_of(CSRC, table.stem)
        assert len(instances) == table.read_text().count("\nDSK_KERNEL("), table
        for header in {i.header for i in instances}:
            files = includes_of(CSRC, f"cuda/kernels/{header}")
            assert any(list(mutants_of(CSRC, f)) for f in files if f.startswith("cuda/kernels"))


def test_every_explained_survivor_still_applies():
    for (file, old, new), why in EXPLAINED.items():
        assert why and any((m.old, m.new) == (old, new) for m in mutants_of(CSRC, file)), (
            file,
            new,
        )


class FakeStem:
    """Stands for a stem whose tests catch the mutants of the files in `sees`."""

    def __init__(self, name, shares, sees):
        self.name, self.shares, self.sees = name, shares, sees
        self.tests, self.baselines = [], 0

    def includes(self, file):
        return file in self.shares

    def baseline(self):
        self.baselines += 1

    def try_mutant(self, mutant):
        return Outcome(mutant, "caught" if mutant.file in self.sees else "SURVIVED", "", self.name)


def test_what_a_stem_misses_in_a_shared_file_is_tried_on_who_shares_it(capsys):
    own = FakeStem("own", ["a", "b", "c", "d"], ["a"])
    stranger = FakeStem("stranger", ["a"], ["b", "c", "d"])
    first = FakeStem("first", ["b", "c"], ["b", "d"])
    second = FakeStem("second", ["b", "c"], ["b", "c"])
    mutants = [Mutant(file, 1, "tail", "old", "new", "text") for file in "abcd"]
    outcomes = try_all(own, [stranger, first, second], mutants, 1)
    assert [(o.mutant.file, o.status, o.stem) for o in outcomes] == [
        ("a", "caught", "own"), ("b", "caught", "first"), ("c", "caught", "second"),
        ("d", "SURVIVED", "own"),
    ]  # fmt: skip
    # Before and after; not at all where nothing is asked.
    assert [s.baselines for s in (own, stranger, first, second)] == [2, 0, 2, 2]
    summary("own", outcomes, complete=True)
    said = capsys.readouterr().out
    assert "caught by other stems' tests of shared files: {'first': 1, 'second': 1}" in said
    assert "caught 3 of 4 real mutants: 75.0%" in said


PLANTED = """
import os, time
def test_passes(): pass
def test_fails(): assert 1 == 2
def test_spins():
    while True: pass
def test_dies(): os.abort()
"""
FORKS = """
import sys
sys.path.insert(0, "tests/mutation")
import forked_tests as f
def work(items):
    for item in items:
        done = f.run([items[0], item], [0.5, 0.5], lambda: None, lambda: ["kernel"])
        print([done.failure.split(": ")[-1], len(done.tests)])
    return 7
raise SystemExit(f.collect([sys.argv[1]], work))
"""


def test_a_test_that_spins_or_dies_is_told_from_one_that_passes(tmp_path):
    (tmp_path / "test_planted.py").write_text(PLANTED)
    command = [sys.executable, "-c", FORKS, str(tmp_path / "test_planted.py")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 7, done.stdout + done.stderr
    said = [line for line in done.stdout.splitlines() if line.startswith("[")]
    assert said == ["['', 2]", "['assert 1 == 2', 1]", "['no end', 0]", "['the process died', 0]"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "stem", sorted(t.stem for t in (CSRC / "cuda" / "instances").glob("*.def"))
)
def test_a_sample_of_mutants_is_caught(stem):
    if not (ROOT / "dskernels" / "_kernels").is_dir():
        pytest.skip("built without nvcc: the CUDA kernels were left out")
    command = [sys.executable, "tests/mutation/mutate_cuda.py", "--stem", stem, "--sample", "10"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
