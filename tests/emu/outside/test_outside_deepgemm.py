"""DeepGEMM's SM90 FP8 kernels (PyPI sgl-deep-gemm) in the emulator, bit for bit against ref."""

import functools

import pytest
import torch
from outside_support import findings, need_nvcc, seeds_by_tier

emu = pytest.importorskip("dskernels.emu")
import deepgemm_support as dg  # noqa: E402
from deepgemm_support import CONTIGUOUS, K_GROUPED, MASKED, Instance  # noqa: E402

from dskernels.ref import gemm as ref_gemm  # noqa: E402
from dskernels.ref import rowwise  # noqa: E402
from dskernels.testing import assert_bitwise_equal  # noqa: E402

pytestmark = [
    need_nvcc(),
    pytest.mark.skipif(
        dg.FOLDER is None, reason="PyPI sgl-deep-gemm is not installed (pip install .[outside])"
    ),
]
SEEDS = seeds_by_tier()

PLAIN = Instance("1d2d", 64, 64)
CLUSTER = Instance("1d2d", 64, 64, multicast=2)
QUICK = (PLAIN, CLUSTER)

# One for each way the kernel's code divides: math warpgroups, waves of M, two rows of B's scales,
# the store's swizzle, multicast on either operand, shapes known to the compiler.
DENSE = (
    Instance("1d2d", 128, 128, stages=4),
    Instance("1d2d", 128, 112),
    Instance("1d2d", 64, 160, stages=5),
    Instance("1d2d", 256, 64),
    Instance("1d2d", 128, 64, shape=(0, 256, 384), sms=2),
    Instance("1d2d", 128, 96, multicast=2, on_a=True),
    Instance("1d2d", 128, 96, multicast=2),
)
GROUPED = (
    Instance("1d2d", 128, 64, CONTIGUOUS, groups=3),
    Instance("1d2d", 128, 64, CONTIGUOUS, groups=3, multicast=2),
    Instance("1d2d", 64, 128, MASKED, groups=3),
    Instance("1d2d", 64, 64, MASKED, groups=3, multicast=2, on_a=True),
)
SQUARE = (
    Instance("1d1d", 128, 64, stages=3),
    Instance("1d1d", 64, 128, stages=4),
    Instance("1d1d", 128, 128, stages=2, multicast=2),
    Instance("1d1d", 128, 64, stages=2, multicast=2, on_a=True),
)
BY_DEPTH = (
    Instance("1d1d", 128, 64, K_GROUPED, groups=3),
    Instance("1d1d", 128, 128, K_GROUPED, groups=3, stages=2, multicast=2),
)


def label(instance: Instance) -> str:
    name = f"{instance.block_m}x{instance.block_n}"
    if instance.multicast > 1:
        name += "-cluster2" + ("-on_a" if instance.on_a else "-on_b")
    return name + ("-static" if any(instance.shape) else "")


def operand(*shape: int, block: tuple[int, int], seed: int):
    """A random scaled tensor, rows and columns of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator)
    x = x * torch.exp2(torch.randint(-6, 7, (*shape[:-1], 1), generator=generator).float())
    return rowwise.quantize(x, block)


@functools.cache
def dense_case(m: int, n: int, k: int, seed: int):
    """(a, b, the product); kept, as the reference costs more than the emulation."""
    a = operand(m, k, block=(1, 128), seed=seed)
    b = operand(n, k, block=(128, 128), seed=seed + 100)
    return a, b, ref_gemm.gemm(a, b, accumulate="hopper")


def check_dense(module, instance, m, n, k, seed):
    """The seed is the schedule's; the data has two."""
    a, b, want = dense_case(m, n, k, seed % 2)
    d, stats = dg.run_1d2d(module, instance, a, b, seed=seed)
    assert_bitwise_equal(d, want)
    findings(stats, "1d2d dense")


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("instance", QUICK, ids=label)
def test_dense(instance, seed):
    check_dense(dg.build(QUICK), instance, 168, 136, 384, seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("instance", DENSE, ids=label)
def test_dense_variants(instance, seed):
    n, k = instance.shape[1:] if any(instance.shape) else (264, 400)
    check_dense(dg.build(DENSE), instance, 300, n, k, seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_tile_shorter_than_the_instruction(seed):
    """A tile of 16 rows: wgmma takes 64, so it also reads what lies behind the tile, which TMA may
    be writing. The kernel drops those rows: by the byte a race, and a formal one."""
    short = (Instance("1d2d", 16, 64),)
    a, b, want = dense_case(100, 136, 400, seed % 2)
    d, stats = dg.run_1d2d(dg.build(short), short[0], a, b, seed=seed)
    assert_bitwise_equal(d, want)
    kinds = findings(stats, "1d2d, 16 rows")
    assert kinds["1d2d, 16 rows", "shared-race", "formal"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("instance", [i for i in GROUPED if i.kind == CONTIGUOUS], ids=label)
def test_grouped_contiguous(instance, seed):
    n, k = 192, 384
    # Rows and rows with padding: two blocks of one group (shared by a cluster), two of different
    # groups (not shared), a last one of padding only.
    groups = []
    for group, rows, padded in ((0, 256, 256), (1, 100, 128), (2, 7, 128), (-1, 128, 128)):
        groups += [group] * rows + [-1] * (padded - rows)
    m_indices = torch.tensor(groups, dtype=torch.int32)
    a = operand(len(groups), k, block=(1, 128), seed=seed)
    b = operand(3, n, k, block=(128, 128), seed=seed + 100)
    d, stats = dg.run_1d2d(dg.build(GROUPED), instance, a, b, m_indices, seed=seed)
    want = ref_gemm.grouped_gemm(a, b, m_indices=m_indices, accumulate="hopper")
    valid = m_indices >= 0
    assert_bitwise_equal(d[valid], want[valid])
    findings(stats, "1d2d contiguous")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("instance", [i for i in GROUPED if i.kind == MASKED], ids=label)
def test_grouped_masked(instance, seed):
    n, k = 200 - 200 % instance.block_n, 384
    sizes = torch.tensor([70, 0, 128], dtype=torch.int32)
    a = operand(3, 128, k, block=(1, 128), seed=seed)
    b = operand(3, n, k, block=(128, 128), seed=seed + 100)
    d, stats = dg.run_1d2d(dg.build(GROUPED), instance, a, b, sizes, seed=seed)
    want = ref_gemm.grouped_gemm(a, b, masked_m=sizes, accumulate="hopper")
    valid = torch.arange(128)[None] < sizes[:, None]
    assert_bitwise_equal(d[valid], want[valid])
    # Tiles of 64 rows: the last begun one is written whole, the ones behind it are not touched.
    assert d[0, 128:].isnan().all() and d[1].isnan().all()
    findings(stats, "1d2d masked")


@pytest.mark.parametrize("seed", SEEDS)
def test_weight_gradient(seed):
    """D += A B^T by TMA's reduction, both operands scaled (1, 128)."""
    check_1d1d(dg.build(SQUARE[:1]), SQUARE[0], seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("instance", SQUARE[1:], ids=label)
def test_weight_gradient_variants(instance, seed):
    check_1d1d(dg.build(SQUARE[1:]), instance, seed)


def check_1d1d(module, instance, seed):
    m, n, k = 200, 136, 384
    a = operand(m, k, block=(1, 128), seed=seed)
    b = operand(n, k, block=(1, 128), seed=seed + 100)
    c = torch.randn(m, n, generator=torch.Generator().manual_seed(seed))
    d = c.clone()
    stats = dg.run_1d1d(module, instance, a, b, d, seed=seed)
    assert_bitwise_equal(d, ref_gemm.gemm(a, b, c=c, accumulate="hopper"))
    findings(stats, "1d1d dense")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("instance", BY_DEPTH, ids=label)
def test_weight_gradient_grouped_by_depth(instance, seed):
    """Every group rewrites the tensor maps of A and B in memory; an empty group adds nothing."""
    m, n = 200, 136
    groups = [
        (
            operand(m, k, block=(1, 128), seed=seed + k),
            operand(n, k, block=(1, 128), seed=seed + k + 1),
        )
        for k in (256, 0, 384)
    ]
    c = torch.randn(3, m, n, generator=torch.Generator().manual_seed(seed))
    d = c.clone()
    stats = dg.run_k_grouped(dg.build(BY_DEPTH), instance, groups, d, seed=seed)
    want = [ref_gemm.gemm(a, b, c=c[i], accumulate="hopper") for i, (a, b) in enumerate(groups)]
    assert_bitwise_equal(d, torch.stack(want))
    findings(stats, "1d1d grouped by depth")
