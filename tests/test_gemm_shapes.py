"""FP8 GEMM in the emulator over many shapes: DeepGEMM's own tests', and random ones off that
list. Each result: DeepGEMM's bar against fp64, and bitwise the reference in exact tensor-core
arithmetic and the kernel's order, over all elements or 32 rows x 32 columns of them; canaries
whole. A launch with a hazard raises. The default tier compares all elements of small products.
"""

import math
import random

import pytest
import torch
from backend_axis import need

import dskernels as dsk
from dskernels.cuda import launchers
from dskernels.cuda.gemm import forced_kernel
from dskernels.ref import gemm as ref
from dskernels.ref import rowwise
from dskernels.testing import assert_bitwise_equal, calc_diff, guarded_empty

SLOW = pytest.mark.slow
SAMPLE = 32
# Products of a launch up to which every element is compared; the reference makes 6e7 a second.
FEW_PRODUCTS, MANY_PRODUCTS = 2**22, 2**30
every_element = FEW_PRODUCTS


@pytest.fixture(autouse=True)
def emulator(request, monkeypatch):
    need("gemm", "emu")
    if request.node.get_closest_marker("slow"):
        monkeypatch.setitem(globals(), "every_element", MANY_PRODUCTS)


def sample(size, whole):
    """Indices to compare: all, or 32 of them with both ends."""
    if whole or size <= SAMPLE:
        return torch.arange(size)
    return torch.cat([torch.tensor([0, size - 1]), torch.randperm(size)[: SAMPLE - 2]])


def rows_of(x, rows):
    """Rows of an operand; of a ScaledTensor as one in blocks (1, 128) of the same values."""
    if isinstance(x, torch.Tensor):
        return x[rows]
    data = x.data.view(torch.uint8)[rows].view(torch.float8_e4m3fn)
    return dsk.ScaledTensor(data, x.scale[rows // x.block[0]], (1, 128))


def columns_of(x, start, end):
    if isinstance(x, torch.Tensor):
        return x[:, start:end]
    return dsk.ScaledTensor(
        x.data[:, start:end], x.scale[:, start // 128 : -(-end // 128)], x.block
    )


def exact_product(a, b, split, dtype):
    """a b^T in the kernel's arithmetic, k in `split` shares added in order."""
    k = a.shape[1]
    share = math.ceil(math.ceil(k / 128) / split) * 128
    total = None
    for start in range(0, k, share):
        piece = (columns_of(x, start, min(start + share, k)) for x in (a, b))
        product = ref.gemm(*piece, accumulate="hopper", out_dtype=torch.float32)
        total = product if total is None else total + product
    return total.to(dtype)


def check(got, a, b, whole, split=1):
    """got [m, n] against a [m, k] and b [n, k]: every element, or 32 rows x 32 columns."""
    m, n = a.shape[0], b.shape[0]
    if m == 0:
        return
    rows, columns = sample(m, whole), sample(n, whole)
    got = got[rows][:, columns]
    a, b = rows_of(a, rows), rows_of(b, columns)
    assert calc_diff(got, ref.gemm(a, b, accumulate="fp64", out_dtype=torch.float64)) < 1e-3
    assert_bitwise_equal(got, exact_product(a, b, split, got.dtype))


def activations(*shape, fp8=True):
    x = torch.randn(shape)
    return rowwise.quantize(x) if fp8 else x.bfloat16()


def weights(*shape, fp8=True):
    x = torch.randn(shape)
    return rowwise.quantize(x, (128, 128)) if fp8 else x.bfloat16()


def group(b, index):
    if isinstance(b, torch.Tensor):
        return b[index]
    return dsk.ScaledTensor(b.data[index], b.scale[index], b.block)


def run_dense(m, n, k, fp8=True, split=None):
    """split: of the launch, where the launcher does not choose the kernel."""
    a, b = activations(m, k, fp8=fp8), weights(n, k, fp8=fp8)
    out, canaries = guarded_empty((m, n), torch.bfloat16)
    dsk.gemm(a, b, out=out, backend="emu")
    canaries()
    if split is None:
        split = launchers().gemm_config("dense", m=m, n=n, k=k)["split"] if fp8 else 1
    check(out, a, b, m * n * k <= every_element, split)


def run_bf16(m, n, k):
    run_dense(m, n, k, fp8=False)


def run_weight_gradient(m, n, k):
    """Both operands' scales by row, an fp32 result on top of C."""
    a, b, c = activations(m, k), activations(n, k), torch.randn(m, n)
    out, canaries = guarded_empty((m, n), torch.float32)
    dsk.gemm(a, b, c=c, out=out, backend="emu")
    canaries()
    if m == 0:
        return
    whole = m * n * k <= every_element
    rows, columns = sample(m, whole), sample(n, whole)
    a, b, c = rows_of(a, rows), rows_of(b, columns), c[rows][:, columns]
    got = out[rows][:, columns]
    assert calc_diff(got, ref.gemm(a, b, c=c, accumulate="fp64")) < 1e-3
    assert_bitwise_equal(got, ref.gemm(a, b, c=c, accumulate="hopper"))


def run_contiguous(sizes, n, k, by_index=False, fp8=True):
    m = sum(sizes)
    a, b = activations(m, k, fp8=fp8), weights(len(sizes), n, k, fp8=fp8)
    out, canaries = guarded_empty((m, n), torch.bfloat16)
    groups = {"group_sizes": torch.tensor(sizes)}
    if by_index:
        experts = torch.arange(len(sizes), dtype=torch.int32)
        groups = {"m_indices": experts.repeat_interleave(torch.tensor(sizes))}
    dsk.grouped_gemm(a, b, out=out, backend="emu", **groups)
    canaries()
    start = 0
    for index, size in enumerate(sizes):
        rows = torch.arange(start, start + size)
        check(out[rows], rows_of(a, rows), group(b, index), m * n * k <= every_element)
        start += size


def run_masked(counts, max_m, n, k, fp8=True):
    a = activations(len(counts), max_m, k, fp8=fp8)
    b = weights(len(counts), n, k, fp8=fp8)
    out, canaries = guarded_empty((len(counts), max_m, n), torch.bfloat16)
    expected = sum(counts) // len(counts)
    masked_m = torch.tensor(counts, dtype=torch.int32)
    dsk.grouped_gemm(a, b, masked_m=masked_m, expected_m=expected, out=out, backend="emu")
    canaries()
    whole = sum(counts) * n * k <= every_element
    for index, count in enumerate(counts):
        rows = rows_of(group(a, index), torch.arange(count))
        check(out[index, :count], rows, group(b, index), whole)


def run_along_k(m, n, sizes, fp8=True):
    k = sum(sizes)
    a, b = activations(m, k, fp8=fp8), activations(n, k, fp8=fp8)
    c = torch.randn(len(sizes), m, n)
    out, canaries = guarded_empty(c.shape, torch.float32)
    out.copy_(c)
    dsk.grouped_gemm_k(a, b, sizes, c=out, out=out, backend="emu")
    canaries()
    whole = m * n * k <= every_element
    rows, columns = sample(m, whole), sample(n, whole)
    start = 0
    for index, size in enumerate(sizes):
        x = columns_of(rows_of(a, rows), start, start + size)
        y = columns_of(rows_of(b, columns), start, start + size)
        options = {"c": c[index][rows][:, columns], "out_dtype": torch.float32}
        got = out[index][rows][:, columns]
        assert calc_diff(got, ref.gemm(x, y, accumulate="fp64", **options)) < 1e-3
        exact = ref.gemm(x, y, accumulate="hopper", **options) if size else options["c"]
        assert_bitwise_equal(got, exact)
        start += size


# ---- DeepGEMM's shapes ---------------------------------------------------------------------------

NK = [(576, 7168), (7168, 2048), (2112, 7168), (24576, 1536), (32768, 512), (4096, 7168)]
NK += [(7168, 16384)]
# The emulator makes 6e9 products a second on two idle cores: 4096 rows where that takes less than a
# minute.
DENSE = [pytest.param(1, *NK[0]), pytest.param(128, *NK[0])]
DENSE += [pytest.param(m, *nk, marks=SLOW) for m in (1, 128) for nk in NK[1:]]
DENSE += [pytest.param(4096, *nk, marks=SLOW) for nk in NK[:-1]]


@pytest.mark.parametrize("m,n,k", DENSE)
def test_dense(m, n, k):
    run_dense(m, n, k)


# Their 4 x 8192 and 8 x 4096 rows, each group's size off by up to 30 %, cut to 4096 rows in all.
@SLOW
@pytest.mark.parametrize("n,k", [(4096, 7168), (7168, 2048)])
@pytest.mark.parametrize("groups,rows", [(4, 1024), (8, 512)])
@pytest.mark.parametrize("by_index", [False, True], ids=["sizes", "indices"])
def test_contiguous(groups, rows, n, k, by_index):
    sizes = [int(rows * random.uniform(0.7, 1.3)) for _ in range(groups)]
    run_contiguous(sizes, n, k, by_index)


@pytest.mark.parametrize(
    "groups,expected,n,k",
    [
        pytest.param(2, 20, 576, 2048),
        *(pytest.param(6, 20, *nk, marks=SLOW) for nk in ((4096, 7168), (7168, 2048))),
        *(pytest.param(6, 192, *nk, marks=SLOW) for nk in ((4096, 7168), (7168, 2048))),
        *(pytest.param(4, 1024, *nk, marks=SLOW) for nk in ((4096, 7168), (7168, 2048))),
    ],
)
def test_masked(groups, expected, n, k):
    counts = [int(expected * random.uniform(0.7, 1.3)) for _ in range(groups)]
    run_masked(counts, 4096 if expected > 20 else 64, n, k)


@pytest.mark.parametrize(
    "m,n,sizes",
    [
        pytest.param(256, 384, [128, 0, 384]),
        *(
            pytest.param(*mn, [1024, 0, 2048, 896], marks=SLOW)
            for mn in ((4096, 7168), (7168, 2048))
        ),
    ],
)
def test_along_k(m, n, sizes):
    run_along_k(m, n, sizes)


@SLOW
@pytest.mark.parametrize("m,n", [(4096, 7168), (7168, 2112)])
def test_weight_gradient(m, n):
    run_weight_gradient(m, n, 4096)


@SLOW
@pytest.mark.parametrize("m", [1, 128])
@pytest.mark.parametrize("n,k", NK[:3])
def test_bf16(m, n, k):
    run_bf16(m, n, k)


@SLOW
@pytest.mark.parametrize("groups,rows", [(4, 128), (8, 64)])
def test_bf16_groups(groups, rows):
    n, k = 7168, 2048
    sizes = [int(rows * random.uniform(0.7, 1.3)) for _ in range(groups)]
    run_contiguous(sizes, n, k, fp8=False)
    run_masked(sizes, 192, n, k, fp8=False)
    run_along_k(256, 7168, [128, 0, 384, 256], fp8=False)


# ---- every kernel, whatever the launcher would choose --------------------------------------------

# The rows that fill a tile of each; 7168 x 16384 is the launcher's choice only, above.
TILES = {
    "gemm_fp8_tokens_16": 16,
    "gemm_fp8_tokens_32": 32,
    "gemm_fp8_64x64": 64,
    "gemm_fp8_64x128": 64,
    "gemm_fp8_128x64": 128,
    "gemm_fp8_128x128": 128,
    "gemm_fp8_128x160": 128,
    "gemm_fp8_128x192": 128,
}
OTHER = {"gemm_fp8_along_k_128x128", "gemm_fp8_swiglu"}  # a kind each: above; test_gemm_kernels.py


def test_every_kernel_has_a_tile_here():
    assert set(TILES) | OTHER == set(launchers().gemm_kernels())


@SLOW
@pytest.mark.parametrize("n,k", NK[:-1])
@pytest.mark.parametrize("kernel", TILES)
def test_every_kernel_dense(kernel, n, k):
    with forced_kernel(kernel):
        run_dense(TILES[kernel], n, k, split=1)


@SLOW
@pytest.mark.parametrize("kernel", TILES)
def test_every_kernel_grouped(kernel):
    """Groups that end within a tile, and one that is empty."""
    rows, n, k = TILES[kernel], 7168, 2048
    with forced_kernel(kernel):
        if "tokens" not in kernel:
            run_contiguous([rows // 2, 0, rows // 2 + 3], n, k)
        run_masked([rows - 1, 0, 1], rows, n, k)


# ---- off the list --------------------------------------------------------------------------------


FP8_SEEDS = 200  # behind them: bf16, and both scales by row


def random_case(seed):
    """A runner and its arguments: m from 0 up, n any multiple of 8, k any of 16 (along k: 128)."""
    rng = random.Random(seed)

    def size(limit):
        return int(2 ** rng.uniform(0, math.log2(limit)))

    n, k = size(60) * 8, size(70) * 16
    sizes = [rng.choice([0, size(100), size(300)]) for _ in range(rng.randint(1, 5))]
    rows = rng.choice([size(300), size(40), 1, 0])
    if seed >= FP8_SEEDS:
        return (run_bf16, run_weight_gradient)[seed % 2], (rows, n, k)
    kind = seed % 5
    if kind == 0:
        return run_dense, (rows, n, k)
    if kind == 1:
        return run_contiguous, (sizes, n, k)
    if kind == 2:
        return run_contiguous, (sizes, n, k, True)
    if kind == 3:
        return run_masked, (sizes, max(sizes) + rng.randint(1, 9), n, k)
    return run_along_k, (size(260), n, [rng.choice([0, 128, 256]) for _ in range(3)] + [128])


@pytest.mark.parametrize(
    "seed",
    [
        pytest.param(s, marks=SLOW if 20 <= s < 200 or s > 203 else ())
        for s in range(FP8_SEEDS + 40)
    ],
)
def test_random_shapes(seed):
    run, arguments = random_case(seed)
    run(*arguments)
