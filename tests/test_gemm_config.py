"""Which instance runs a shape: pure functions of the launcher, over thousands of shapes."""

import ctypes
import math
import random
import shutil
import subprocess
from pathlib import Path

import pytest

from dskernels.cuda import launchers

ROOT = Path(__file__).resolve().parent.parent
MAX_SHARED = 232448  # bytes a CTA of sm_90 may have
REGISTERS = 65536  # of an SM; the launch reserves the compiler's figure for every thread
KINDS = {"dense": 0, "contiguous": 1, "masked": 2, "along_k": 3}  # as GroupKind

# (n, k) that DeepGEMM tests, and rows from one token to a large batch.
DEEPGEMM_NK = [
    (2112, 7168),
    (576, 7168),
    (24576, 1536),
    (32768, 512),
    (7168, 16384),
    (4096, 7168),
    (7168, 2048),
]
ROWS = (1, 8, 16, 32, 48, 64, 128, 256, 512, 1024, 2048, 4096, 8192)


def problems(count, seed=0):
    """Random (kind, sizes) with sizes of every magnitude."""
    rng = random.Random(seed)

    def size(limit, unit=1):
        return max(1, int(2 ** rng.uniform(0, math.log2(limit // unit)))) * unit

    for _ in range(count):
        kind = rng.choice(list(KINDS))
        yield {
            "kind": kind,
            "m": size(2048),
            "n": size(8192, 8),
            "k": size(8192, 128 if kind == "along_k" else 16),
            "num_groups": 1 if kind == "dense" else rng.randint(1, 20),
            "num_sms": rng.choice([1, 2, 3, 20, 78, 114, 132]),
            "swiglu": kind in ("contiguous", "masked") and rng.random() < 0.2,
            "deterministic": rng.random() < 0.3,
        }


@pytest.fixture(scope="module")
def walk(tmp_path_factory):
    """The kernels' scheduler, compiled for the host."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler on PATH")
    library = tmp_path_factory.mktemp("walk") / "walk.so"
    source = ROOT / "tests/gemm/walk_scheduler.cpp"
    command = [compiler, "-std=c++17", "-O2", "-shared", "-fPIC", f"-I{ROOT / 'csrc'}"]
    subprocess.run([*command, str(source), "-o", str(library)], check=True)
    function = ctypes.CDLL(str(library)).walk_scheduler
    function.restype = ctypes.c_char_p
    return function


def cluster_use(choice):
    """As ClusterUse."""
    if choice["split"] > 1:
        return 3
    return 2 if choice["pair_m"] > 1 else int(choice["pair_n"] > 1)


def group_sizes(problem, rng):
    """Sizes that fit the problem: rows of the groups, or their shares of k; None when dense."""
    g = problem["num_groups"]
    if problem["kind"] == "dense":
        return None
    if problem["kind"] == "masked":
        return [rng.randint(0, problem["m"]) for _ in range(g)]
    unit = 128 if problem["kind"] == "along_k" else 1
    whole = problem["k" if problem["kind"] == "along_k" else "m"] // unit
    cuts = sorted(rng.randint(0, whole) for _ in range(g))
    return [(b - a) * unit for a, b in zip([0, *cuts], cuts)]


def test_every_element_is_computed_exactly_once(walk):
    rng = random.Random(1)
    used = set()
    for problem in problems(2000):
        choice = launchers().gemm_config(**problem)
        used.add(choice["kernel"])
        sizes = group_sizes(problem, rng)
        array = None if sizes is None else (ctypes.c_int32 * len(sizes))(*sizes)
        cluster = choice["pair_m"] * choice["pair_n"] * choice["split"]
        wrong = walk(
            choice["block_m"],
            choice["block_n"],
            KINDS[problem["kind"]],
            cluster_use(choice),
            problem["m"],
            problem["n"],
            problem["k"],
            problem["num_groups"],
            array,
            choice["raster"],
            choice["num_ctas"],
            cluster,
        )
        assert wrong == b"", (problem, sizes, choice, wrong)
    assert used == set(launchers().gemm_kernels())


def test_choices_fit_the_machine():
    for problem in problems(3000, seed=2):
        choice = launchers().gemm_config(**problem)
        assert choice["shared_bytes"] <= MAX_SHARED, choice
        # ptxas is told the thread count and may use 65536 / threads, in steps of 8.
        assert choice["threads"] * (REGISTERS // choice["threads"] // 8 * 8) <= REGISTERS
        # Accumulators and sums of a math thread, within what setmaxnreg gives it.
        columns = choice["block_n"]
        if "tokens" in choice["kernel"]:
            columns = choice["block_m"]
        elif "swiglu" in choice["kernel"]:
            columns //= 2
        assert columns <= 192
        cluster = choice["pair_m"] * choice["pair_n"] * choice["split"]
        assert choice["num_ctas"] % cluster == 0 and choice["num_ctas"] <= problem["num_sms"]
        assert choice["raster"] >= 1
        if choice["split"] > 1:
            assert not problem["deterministic"] and problem["kind"] == "dense"
            assert choice["tiles"] * choice["split"] == choice["num_ctas"]
        assert f"{choice['block_m']}x{choice['block_n']}" in choice["reason"]


def full_space(m, n, k, num_sms=132):
    """The fewest modelled cycles over every tile wgmma allows, every pairing and every split."""
    k_blocks = math.ceil(k / 128)
    tiles = [(bm, bn, False) for bm in (64, 128) for bn in range(16, 193, 16)]
    tiles += [(tokens, 128, True) for tokens in range(8, 65, 8)]
    fewest = math.inf
    for block_m, block_n, swapped in tiles:
        count = math.ceil(m / block_m) * math.ceil(n / block_n)
        clusters = [(1, 1, split) for split in (1, 2, 4, 8)]
        if not swapped:
            clusters += [(2, 1, 1), (1, 2, 1)]
        for pair_m, pair_n, split in clusters:
            if split > 1 and (k_blocks < 2 * split or count * split > num_sms):
                continue
            cycles = launchers().gemm_cycles(
                "dense", m, n, k, 1, num_sms, block_m, block_n, swapped, pair_m, pair_n, split
            )
            fewest = min(fewest, cycles)
    return fewest


def test_the_shipped_tiles_lose_little_against_all_tiles():
    losses = {}
    for m in ROWS:
        for n, k in DEEPGEMM_NK:
            chosen = launchers().gemm_config("dense", m=m, n=n, k=k)["modelled_cycles"]
            losses[m, n, k] = chosen / full_space(m, n, k) - 1
    assert min(losses.values()) >= 0

    def mean(values):
        return sum(values) / len(values)

    # The goal is 3 %. What is lost is lost above 256 rows, where widths of 144 and 176 are missing.
    assert mean([loss for (m, _, _), loss in losses.items() if m <= 256]) < 0.015
    assert mean(list(losses.values())) < 0.02
    assert max(losses.values()) < 0.11


@pytest.mark.parametrize("n,k", DEEPGEMM_NK)
def test_deterministic_choices_never_split_k(n, k):
    for m in ROWS:
        assert launchers().gemm_config("dense", m=m, n=n, k=k, deterministic=True)["split"] == 1


def test_what_is_forced_is_what_runs_or_an_error():
    choice = launchers().gemm_config(
        "dense", m=64, n=512, k=2048, force=("gemm_fp8_128x64", 1, 2, 1)
    )
    assert (choice["kernel"], choice["pair_n"]) == ("gemm_fp8_128x64", 2)
    for force in (("gemm_fp8_tokens_16", 2, 1, 1), ("gemm_fp8_swiglu", 1, 1, 1), ("none", 1, 1, 1)):
        with pytest.raises(ValueError, match="no GEMM kernel fits"):
            launchers().gemm_config("dense", m=64, n=512, k=2048, force=force)
