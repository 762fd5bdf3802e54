"""Every shipped GEMM kernel in the emulator, whatever the launcher would choose by itself: results
bitwise equal to the reference in exact tensor-core arithmetic, nothing written that is not theirs.

A launch with a hazard (race, missing proxy fence, out-of-bounds or uninitialised read) raises, so
"no hazards" is part of every call here.
"""

import pytest
import torch
from backend_axis import need
from executed_work import work_of
from test_gemm import exact_gemm, scaled_operands

import dskernels as dsk
from dskernels import emu
from dskernels.cuda import launchers
from dskernels.cuda.gemm import forced_kernel
from dskernels.ref import gemm as ref
from dskernels.ref import rowwise
from dskernels.testing import assert_bitwise_equal, calc_diff, guarded_empty


@pytest.fixture(autouse=True)
def emulator():
    need("gemm", "emu")


def guarded(shape, dtype=torch.bfloat16):
    """A NaN-filled result between canaries."""
    return guarded_empty(shape, dtype)


def check(got, exact, truth):
    assert calc_diff(got, truth) < 1e-3
    assert_bitwise_equal(got, exact)


ALONE, SHARED_A, SHARED_B = {}, {"pair_n": 2}, {"pair_m": 2}

# kernel, cluster, m, n, k, SMs. Ragged everywhere; few SMs, so that CTAs take several tiles.
DENSE = [
    ("gemm_fp8_tokens_16", ALONE, 25, 264, 656, 2),
    ("gemm_fp8_tokens_32", ALONE, 40, 264, 656, 2),
    ("gemm_fp8_64x64", ALONE, 70, 136, 528, 2),
    ("gemm_fp8_64x64", SHARED_B, 70, 136, 528, 2),
    ("gemm_fp8_64x128", ALONE, 70, 264, 656, 2),
    ("gemm_fp8_64x128", SHARED_A, 70, 264, 656, 2),
    ("gemm_fp8_128x64", ALONE, 130, 136, 528, 1),
    ("gemm_fp8_128x64", SHARED_A, 130, 200, 400, 2),
    ("gemm_fp8_128x128", ALONE, 200, 248, 528, 1),
    ("gemm_fp8_128x128", SHARED_B, 300, 136, 400, 2),
    ("gemm_fp8_128x160", ALONE, 130, 392, 272, 1),
    ("gemm_fp8_128x160", SHARED_B, 300, 648, 400, 2),
    ("gemm_fp8_128x192", ALONE, 130, 392, 272, 1),
    ("gemm_fp8_128x192", SHARED_A, 130, 392, 272, 2),
    ("gemm_fp8_128x192", SHARED_B, 300, 392, 272, 2),
]


def name_of(value):
    """Test ids: the kernel's name and what its pairs share."""
    if isinstance(value, dict):
        return "+".join(value) or "alone"
    return value if isinstance(value, str) else str(value)


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("kernel,cluster,m,n,k,num_sms", DENSE, ids=name_of)
def test_dense(kernel, cluster, m, n, k, num_sms, out_dtype):
    a, b = scaled_operands(m, n, k)
    out, canaries = guarded((m, n), out_dtype)
    with forced_kernel(kernel, **cluster):
        dsk.gemm(a, b, out=out, num_sms=num_sms, backend="emu")
    canaries()
    exact = ref.gemm(a, b, accumulate="hopper", out_dtype=out_dtype)
    check(out, exact, ref.gemm(a, b, accumulate="fp64"))


# kernel: rows, k, ways. The last share of k is shorter than the others, or empty.
SPLIT = {
    "gemm_fp8_tokens_16": (9, 1040, 4),
    "gemm_fp8_tokens_32": (30, 528, 2),
    "gemm_fp8_64x64": (60, 528, 2),
    "gemm_fp8_64x128": (60, 1152, 8),
    "gemm_fp8_128x64": (130, 528, 2),
    "gemm_fp8_128x128": (130, 528, 4),
    "gemm_fp8_128x160": (130, 272, 2),
    "gemm_fp8_128x192": (130, 272, 2),
}


@pytest.mark.parametrize("kernel", SPLIT)
@pytest.mark.parametrize("addends", [False, True], ids=["plain", "c,bias"])
def test_split_k_is_summed_in_order(kernel, addends):
    (m, k, ways), n = SPLIT[kernel], 264
    a, b = scaled_operands(m, n, k)
    options = {}
    if addends:
        options = {"c": torch.randn(m, n), "bias": torch.randn(n).bfloat16()}
    out, canaries = guarded((m, n))
    with forced_kernel(kernel, split=ways):
        dsk.gemm(a, b, out=out, backend="emu", **options)
    canaries()
    exact = exact_gemm(a, b, split=ways, **options)
    check(out, exact, ref.gemm(a, b, accumulate="fp64", **options))


GROUPS = [
    ("gemm_fp8_64x64", ALONE, [50, 0, 3, 64]),
    ("gemm_fp8_64x128", SHARED_B, [50, 0, 3, 64]),
    ("gemm_fp8_128x64", SHARED_B, [130, 0, 3]),
    ("gemm_fp8_128x128", SHARED_A, [200, 0, 130, 5]),
    ("gemm_fp8_128x160", SHARED_A, [130, 0, 5]),
    ("gemm_fp8_128x192", SHARED_A, [130, 0, 5]),
]


@pytest.mark.parametrize("kernel,cluster,sizes", GROUPS, ids=name_of)
def test_contiguous(kernel, cluster, sizes):
    m, n, k, g = sum(sizes) + 3, 392, 272, len(sizes)
    a, b = scaled_operands(m, n, k, groups=(g,))
    out, canaries = guarded((m, n))
    with forced_kernel(kernel, **cluster):
        dsk.grouped_gemm(a, b, group_sizes=sizes, out=out, num_sms=2, backend="emu")
    canaries()
    exact = ref.grouped_gemm(a, b, group_sizes=sizes, accumulate="hopper")
    check(out, exact, ref.grouped_gemm(a, b, group_sizes=sizes, accumulate="fp64"))


MASKED = [
    ("gemm_fp8_tokens_16", ALONE, [3, 0, 20, 16]),
    ("gemm_fp8_tokens_32", ALONE, [3, 0, 40, 32]),
    ("gemm_fp8_64x64", SHARED_A, [50, 0, 64, 70]),
    ("gemm_fp8_64x128", ALONE, [50, 0, 64, 70]),
    ("gemm_fp8_128x128", SHARED_A, [200, 0, 3]),
]


@pytest.mark.parametrize("kernel,cluster,counts", MASKED, ids=name_of)
def test_masked(kernel, cluster, counts):
    max_m, n, k, g = max(counts) + 2, 264, 272, len(counts)
    b = rowwise.quantize(torch.randn(g, n, k), (128, 128))
    a = rowwise.quantize(torch.randn(g, max_m, k))
    a.data.view(torch.uint8)[0, counts[0] :] = 0x7F  # NaN: must not reach the rows that count
    masked_m = torch.tensor(counts, dtype=torch.int32)
    out, canaries = guarded((g, max_m, n))
    options = {"masked_m": masked_m}
    with forced_kernel(kernel, **cluster):
        dsk.grouped_gemm(a, b, out=out, num_sms=2, backend="emu", **options)
    canaries()
    exact = ref.grouped_gemm(a, b, accumulate="hopper", **options)
    truth = ref.grouped_gemm(a, b, accumulate="fp64", **options)
    for group, rows in enumerate(counts):
        check(out[group, :rows], exact[group, :rows], truth[group, :rows])
        behind = out[group, -(-rows // 128) * 128 :]
        assert behind.isnan().all(), "rows of tiles without a row that counts were written"


@pytest.mark.parametrize("groups", [None, [256, 0, 128, 0], [0, 0, 0, 384]], ids=str)
@pytest.mark.parametrize("mode", ["plain", "c", "in place", "bf16"])
def test_along_k(groups, mode):
    m, n, k = 200, 264, 400
    a, b = rowwise.quantize(torch.randn(m, k)), rowwise.quantize(torch.randn(n, k))
    shape = (m, n) if groups is None else (len(groups), m, n)
    out, canaries = guarded(shape, torch.bfloat16 if mode == "bf16" else torch.float32)
    options = {"out_dtype": out.dtype}
    if mode in ("c", "in place"):
        options["c"] = torch.randn(shape)
    if mode == "in place":
        out.copy_(options["c"])
    passed = {**options, "c": out} if mode == "in place" else dict(options)
    if groups is None:
        got = dsk.gemm(a, b, out=out, num_sms=3, backend="emu", **passed)
        reference = ref.gemm
    else:
        passed.pop("out_dtype")
        got = dsk.grouped_gemm_k(a, b, groups, out=out, num_sms=3, backend="emu", **passed)

        def reference(a, b, **options):
            return ref.grouped_gemm_k(a, b, groups, **options)

    canaries()
    exact = reference(a, b, accumulate="hopper", **options)
    check(got, exact, reference(a, b, accumulate="fp64", **options))


def test_a_group_along_k_that_is_no_multiple_of_128_is_an_error():
    a, b = rowwise.quantize(torch.randn(8, 256)), rowwise.quantize(torch.randn(8, 256))
    from dskernels.emu.gemm import grouped_gemm_k  # the op itself refuses sizes it can see

    with pytest.raises(RuntimeError, match="trap"):
        grouped_gemm_k(a, b, [100, 156])


INDICES = {
    "padded": [2] * 3 + [-1] * 125 + [0] * 128 + [3] * 70 + [-1] * 10,
    "unaligned": [0] * 5 + [1] * 70 + [3] * 9 + [-1],
    "unsorted": [3, 3, 0, 0, 0, -1, 3, 2, 2, -1, -1, 0],
    "none": [-1] * 7,
    "long": [0] * 1100 + [3] * 40,
}


@pytest.mark.parametrize("name", INDICES)
def test_row_indices(name):
    m_indices = torch.tensor(INDICES[name], dtype=torch.int32)
    n, k = 136, 144
    a, b = scaled_operands(len(m_indices), n, k, groups=(4,))
    padding = m_indices < 0
    a.data.view(torch.uint8)[padding] = 0x7F
    out, canaries = guarded((len(m_indices), n))
    dsk.grouped_gemm(a, b, m_indices=m_indices, out=out, num_sms=2, backend="emu")
    canaries()
    assert (out[padding] == 0).all()
    exact = ref.grouped_gemm(a, b, m_indices=m_indices, accumulate="hopper")
    check(out, exact, ref.grouped_gemm(a, b, m_indices=m_indices, accumulate="fp64"))


def same_but_for_rounding(got, want):
    """Quantised values that differ by at most one step of e4m3, and few of them: the kernel's
    exponential and division are approximate (2 ulp of fp32 each)."""
    assert torch.allclose(got.scale, want.scale, rtol=1e-5, atol=0)
    steps = [x.data.view(torch.uint8).to(torch.int16) for x in (got, want)]
    steps = [torch.where(x < 128, x, 128 - x) for x in steps]  # sign and magnitude -> an order
    off = (steps[0] - steps[1]).abs()
    assert off.max() <= 1 and (off > 0).float().mean() < 0.01


def test_a_turn_for_each_1024_row_indices():
    def barriers(rows):
        a, b = scaled_operands(rows, 8, 128, groups=(1,))
        index = torch.zeros(rows, dtype=torch.int32)
        call = lambda: dsk.grouped_gemm(a, b, m_indices=index, backend="emu")  # noqa: E731
        return work_of(call)["gemm_runs"]["sync"]

    assert 2 * barriers(1024) == barriers(1025)


# i of D's columns: whole blocks; an up-projection that starts within a block of scales.
@pytest.mark.parametrize("i", [256, 80])
@pytest.mark.parametrize("epilogue", ["swiglu", "swiglu_quant"])
@pytest.mark.parametrize("form", ["dense", "group_sizes", "m_indices", "masked_m"])
def test_swiglu(form, epilogue, i):
    k, g, rows = 272, 3, 90
    lead = (g, rows) if form == "masked_m" else (rows,)
    x = torch.randn(*lead, k)
    x[..., 2, :] = 0  # a row whose scale is that of the smallest maximum
    a = rowwise.quantize(x)
    b_lead = () if form == "dense" else (g,)
    b = rowwise.quantize(torch.randn(*b_lead, 2 * i, k) / 8, (128, 128))
    options = {
        "dense": {},
        "group_sizes": {"group_sizes": torch.tensor([70, 0, 17])},
        "m_indices": {"m_indices": torch.tensor([1] * 9 + [-1] * 11 + [2] * 70, dtype=torch.int32)},
        "masked_m": {"masked_m": torch.tensor([70, 0, 3], dtype=torch.int32)},
    }[form]
    options["epilogue"] = epilogue
    function, reference = (
        (dsk.gemm, ref.gemm) if form == "dense" else (dsk.grouped_gemm, ref.grouped_gemm)
    )
    got = function(a, b, num_sms=2, backend="emu", **options)
    want = reference(a, b, accumulate="hopper", **options)
    valid = [slice(None)]
    if form == "masked_m":
        valid = [(group, slice(count)) for group, count in enumerate(options["masked_m"].tolist())]
    if epilogue == "swiglu":
        truth = reference(a, b, accumulate="fp64", **options)
        for rows in valid:
            assert calc_diff(got[rows], truth[rows]) < 1e-3
            assert torch.allclose(got[rows].float(), want[rows].float(), rtol=2**-7, atol=1e-6)
        return
    assert got.scale.stride()[-2:] == want.scale.stride()[-2:]
    for rows in valid:
        if want.data[rows].numel():
            same_but_for_rounding(
                *(dsk.ScaledTensor(x.data[rows], x.scale[rows], x.block) for x in (got, want))
            )


@pytest.mark.parametrize(
    "kernel, epilogue, n", [("gemm_fp8_64x64", None, 64), ("gemm_fp8_swiglu", "swiglu_quant", 256)]
)
def test_a_full_tile_leaves_by_tma(kernel, epilogue, n):
    """Of two groups the first ends within D: one row less than a tile has, and all of them."""

    def stores(rows):
        a, b = scaled_operands(2 * rows, n, 128, groups=(2,))
        with forced_kernel("" if epilogue else kernel):
            work = work_of(
                lambda: dsk.grouped_gemm(
                    a, b, group_sizes=[rows, rows], epilogue=epilogue, backend="emu"
                )
            )
        return work[kernel]["global"]

    assert stores(63) - stores(64) >= 64 * 128 / (32 * 16)  # a row has 128 bytes, a lane stores 16


def test_a_full_tile_of_few_tokens_leaves_by_tma():
    a, b = scaled_operands(2 * 32, 128, 128, groups=(2,))
    a = dsk.ScaledTensor(a.data.view(2, 32, -1), a.scale.view(2, 32, -1), a.block)

    def stores(rows):
        counts = torch.tensor([rows, 0], dtype=torch.int32)
        with forced_kernel("gemm_fp8_tokens_16"):
            work = work_of(lambda: dsk.grouped_gemm(a, b, masked_m=counts, backend="emu"))
        return work["gemm_fp8_tokens_16"]["global"]

    assert stores(15) > stores(16)


def copies(kernel, m, n, k, **cluster):
    """TMA copies, loads and stores, of a product."""
    a, b = scaled_operands(m, n, k)
    with forced_kernel(kernel, **cluster):
        return work_of(lambda: dsk.gemm(a, b, backend="emu"))[kernel]["async"]


@pytest.mark.parametrize("kernel", ["gemm_fp8_64x128", "gemm_fp8_tokens_16"])
def test_nothing_is_stored_behind_the_columns(kernel):
    """128 columns leave by two copies, 64 of them by one; of B both load a whole box."""
    assert copies(kernel, 16, 64, 128) < copies(kernel, 16, 128, 128)


def test_a_share_of_k_ends_with_k():
    """Of two CTAs that share 3 blocks of k, one loads 2 and the other 1."""
    two, three, four = (copies("gemm_fp8_64x128", 64, 128, k, split=2) for k in (256, 384, 512))
    assert three - two == four - three > 0


def test_four_shares_of_k_are_summed_in_one_turn():
    """A turn loads four at once: two shares take one as well, eight take two."""

    def loads(ways):
        a, b = scaled_operands(64, 64, 1024)
        with forced_kernel("gemm_fp8_64x64", split=ways):
            work = work_of(lambda: dsk.gemm(a, b, backend="emu"))
        return work["gemm_fp8_64x64"]["global"]  # as generic accesses count, those to peers too

    assert loads(2) == loads(4) < loads(8)


def test_one_warpgroup_keeps_up_with_what_memory_brings():
    """A tile of 64 rows: its next products run while it promotes. In the emulator's model 8 blocks
    of k take what L2 needs for them; taking turns with itself, a warpgroup needs 1.3 times that."""

    def modelled(k):
        a, b = scaled_operands(64, 128, k)
        with (
            forced_kernel("gemm_fp8_64x128", split=1),
            emu.profiling("h800", sample_ctas=None) as profile,
        ):
            dsk.gemm(a, b, num_sms=1, backend="emu")
        timing = profile.launches[0].timing
        return timing.modelled_us, timing.busy["L2"] * timing.modelled_us

    (few, few_bytes), (many, many_bytes) = modelled(1024), modelled(2048)
    assert many - few < 1.1 * (many_bytes - few_bytes)


def test_every_shipped_kernel_is_tested_here():
    tested = {case[0] for case in (*DENSE, *GROUPS, *MASKED)}
    assert tested | {"gemm_fp8_along_k_128x128", "gemm_fp8_swiglu"} == set(
        launchers().gemm_kernels()
    )
