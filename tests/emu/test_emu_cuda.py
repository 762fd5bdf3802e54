"""CUDA kernels through nvcc and the emulator: right on the fixed and on random schedules."""

import functools
import shutil

import numpy as np
import pytest
from cuda_sources import (
    CLUSTER,
    COLLATZ,
    GRID_BARRIER,
    MISUSE,
    PIPELINE,
    PRINTF,
    SGEMM,
    SPINLOCK,
    WGMMA,
)

emu = pytest.importorskip("dskernels.emu")
pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
SEEDS = [None, 0, 1, 2]


@functools.cache
def build(source, *defines):
    return emu.Module(emu.compile(source, options=[f"-D{d}" for d in defines]))


def run(source, name, *defines):
    return build(source, *defines).kernel(name)


def to_bf16(x):
    """Rounds float32 to bfloat16; (bits as uint16, the value as float32)."""
    bits = x.view(np.uint32)
    bits = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    return bits, (bits.astype(np.uint32) << 16).view(np.float32)


@pytest.mark.parametrize("seed", SEEDS)
def test_sgemm(seed):
    rng = np.random.default_rng(0)
    m, n, k = 70, 65, 96
    a = rng.integers(-4, 5, (m, k)).astype(np.float32)
    b = rng.integers(-4, 5, (k, n)).astype(np.float32)
    c = np.zeros((m, n), np.float32)
    run(SGEMM, "sgemm")[(3, 3), (32, 8)](a, b, c, m, n, k, seed=seed)
    assert np.array_equal(c, a @ b)


@pytest.mark.parametrize("seed", SEEDS)
def test_divergence_shuffles_votes_atomics(seed):
    rng = np.random.default_rng(1)
    x = rng.integers(1, 1000, 500).astype(np.int32)
    steps = np.zeros(512, np.int64)
    for i, v in enumerate(x.tolist()):
        while v > 1:
            v = 3 * v + 1 if v & 1 else v >> 1
            steps[i] += 1
    odd = np.repeat((steps.reshape(-1, 32) & 1).sum(1), 32)
    y, total = np.zeros(500, np.int32), np.zeros(1, np.int32)
    run(COLLATZ, "collatz")[4, 128](x, y, total, 500, seed=seed)
    assert np.array_equal(y, (steps + 1000 * odd)[:500])
    assert total[0] == steps.sum()


@pytest.mark.parametrize("seed", SEEDS)
def test_lanes_of_one_warp_take_a_lock_in_turn(seed):
    lock, value = np.zeros(1, np.int32), np.zeros(1, np.int32)
    run(SPINLOCK, "locked")[3, 64](lock, value, 2, seed=seed)
    assert value[0] == 3 * 64 * 2 and lock[0] == 0


@pytest.mark.parametrize("seed", SEEDS)
def test_ctas_wait_for_each_other(seed):
    arrived = np.zeros(1, np.int32)
    data, out = np.zeros(20 * 64, np.int32), np.zeros(20 * 64, np.int32)
    run(GRID_BARRIER, "grid_barrier")[20, 64](arrived, data, out, seed=seed)
    assert np.array_equal(out, np.repeat((np.arange(20) + 1) % 20 + 1, 64))


@pytest.mark.parametrize("seed", SEEDS)
def test_clusters_reach_each_others_shared_memory(seed):
    x, y = np.arange(8 * 64, dtype=np.int32), np.zeros(8 * 64, np.int32)
    run(CLUSTER, "rotate")[8, 64](x, y, cluster=4, seed=seed)
    expected = x.reshape(2, 4, 64)[:, [3, 0, 1, 2]].reshape(-1)
    assert np.array_equal(y, expected)


def pipeline_case(tiles=7):
    rng = np.random.default_rng(2)
    x = rng.integers(-8, 9, (tiles * 32, 64)).astype(np.float32)
    return x, emu.tensor_map(x, (32, 64)), np.zeros(64, np.float32)


@pytest.mark.parametrize("seed", SEEDS)
def test_tma_pipeline(seed):
    x, tensor_map, out = pipeline_case()
    run(PIPELINE, "pipeline")[1, 96](tensor_map, out, 7, seed=seed)
    assert np.array_equal(out, x.sum(0))


def test_wrong_expect_tx_is_a_deadlock_with_a_report():
    _, tensor_map, out = pipeline_case()
    with pytest.raises(emu.DeadlockError) as e:
        run(PIPELINE, "pipeline", "EXPECT=8200")[1, 96](tensor_map, out, 7)
    stuck = [w for w in e.value.warps if "bytes are missing" in w.state]
    assert stuck and "8 bytes are missing" in stuck[0].state and stuck[0].source_line > 0


def test_skipped_slot_wait_is_caught():
    _, tensor_map, out = pipeline_case()
    with pytest.raises(emu.EmuError) as e:
        run(PIPELINE, "pipeline", "SKIP_EMPTY_WAIT")[1, 96](tensor_map, out, 7)
    assert isinstance(e.value, emu.HazardError | emu.DeadlockError)


@pytest.mark.parametrize("numerics", ["exact", "fast"])
@pytest.mark.parametrize("seed", SEEDS)
def test_wgmma_tile(seed, numerics):
    rng = np.random.default_rng(3)
    a_bits, a = to_bf16(rng.integers(-4, 5, (64, 192)).astype(np.float32))
    b_bits, b = to_bf16(rng.integers(-4, 5, (64, 192)).astype(np.float32))
    maps = [emu.tensor_map(x, (64, 64), swizzle=128, dtype="bfloat16") for x in (a_bits, b_bits)]
    out = np.zeros((64, 64), np.float32)
    run(WGMMA, "wgmma_tile")[1, 128](*maps, out, 192, seed=seed, numerics=numerics)
    assert np.array_equal(out, a @ b.T)


@pytest.mark.parametrize(
    "define, kind",
    [("NO_FENCE", "wgmma-missing-fence"), ("NO_WAIT", "wgmma-result-before-wait")],
)
def test_wgmma_misuse(define, kind):
    x, _ = to_bf16(np.ones((64, 64), np.float32))
    tensor_map = emu.tensor_map(x, (64, 64), swizzle=128, dtype="bfloat16")
    out = np.zeros((64, 64), np.float32)
    with pytest.raises(emu.HazardError) as e:
        run(WGMMA, "wgmma_tile", define)[1, 128](tensor_map, tensor_map, out, 64)
    assert e.value.hazards[0].kind == kind and e.value.hazards[0].source_line > 0


@pytest.mark.parametrize(
    "name, block, args, kind",
    [
        ("out_of_bounds", 32, (np.zeros(32, np.float32), 1), "global-out-of-bounds"),
        ("null_pointer", 32, (None,), "null-access"),
        ("misaligned", 1, (np.zeros(8, np.uint8),), "misaligned-access"),
        ("shared_bounds", 32, (300,), "shared-out-of-bounds"),
        ("disagree", 96, (), "barrier-count-mismatch"),
        ("no_init", 1, (np.zeros(1, np.int32),), "mbarrier-uninitialized"),
        ("traps", 32, (), "trap"),
    ],
)
def test_misuse_is_named(name, block, args, kind):
    with pytest.raises(emu.HazardError) as e:
        run(MISUSE, name)[1, block](*args, shared=1024)
    hazard = e.value.hazards[0]
    assert hazard.kind == kind and hazard.kernel == name
    assert hazard.source_line > 0 and hazard.source_file.endswith("kernel.cu")


def test_missing_warp_at_a_barrier_is_a_deadlock():
    with pytest.raises(emu.DeadlockError) as e:
        run(MISUSE, "stuck")[1, 64](32)
    assert "barrier 1: 32 of 64 threads" in e.value.warps[0].state


def test_spinning_for_ever_is_a_livelock():
    with pytest.raises(emu.DeadlockError, match="livelock"):
        run(MISUSE, "spins")[1, 32](np.zeros(1, np.int32))


def test_printf_and_assert():
    lines = []
    from dskernels._C import emu as raw

    raw.set_printer(lines.append)
    try:
        run(PRINTF, "says")[1, 32](5, 2.5, None)
    finally:
        raw.set_printer(None)
    assert lines == ["a=5 b=2.50 c=z text 123456789ab\n"]
    run(PRINTF, "asserts")[1, 32](7)
    with pytest.raises(emu.HazardError, match="a == 7"):
        run(PRINTF, "asserts")[1, 32](8)
