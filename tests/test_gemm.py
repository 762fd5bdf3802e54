"""The GEMM stem on every backend, against the reference."""

import math

import pytest
import torch
from backend_axis import need, on_cpu, on_device

import dskernels as dsk
from dskernels.cuda import launchers
from dskernels.ref import gemm as ref
from dskernels.ref import rowwise
from dskernels.testing import assert_bitwise_equal, calc_diff

SHAPES = [
    (1, 128, 128),
    (5, 576, 512),
    (27, 200, 1088),
    (64, 136, 144),
    (70, 264, 1152),
    (130, 200, 256),
]


def scaled_operands(m, n, k, groups=()):
    a = rowwise.quantize(torch.randn(m, k) * torch.exp2(torch.randint(-4, 5, (m, 1)).float()))
    return a, rowwise.quantize(torch.randn(*groups, n, k), (128, 128))


def exact_gemm(a, b, split=None, **options):
    """ref.gemm in the kernels' arithmetic and order: where the launcher splits k, by its shares."""
    (m, k), n = a.shape, b.shape[0]
    if split is None:
        split = launchers().gemm_config("dense", m, n, k)["split"]
    if split == 1:
        return ref.gemm(a, b, accumulate="hopper", **options)
    share = math.ceil(math.ceil(k / 128) / split) * 128
    total = torch.zeros(m, n)
    for start in range(0, k, share):
        piece = (ref._take_columns(x, slice(start, min(start + share, k))) for x in (a, b))
        product = ref.gemm(*piece, accumulate="hopper", out_dtype=torch.float32)
        total = total + product if start else product
    dtype = options.pop("out_dtype", torch.bfloat16)
    return ref._epilogue(total, options.pop("c", None), options.pop("bias", None), None).to(dtype)


def check(backend, got, a, b, reference=ref.gemm, **options):
    """DeepGEMM's own bar everywhere; bitwise where the kernel's PTX runs in exact arithmetic."""
    got = on_cpu(got)
    assert calc_diff(got, reference(a, b, accumulate="fp64", **options)) < 1e-3
    if backend != "emu":
        return
    if reference is ref.gemm:
        assert_bitwise_equal(got, exact_gemm(a, b, **options))
    else:
        assert_bitwise_equal(got, reference(a, b, accumulate="hopper", **options))


def check_groups(backend, got, reference, a, b, **options):
    """As check, where the launcher does not split k. No element may be all there is to compare."""
    got, exact = on_cpu(got), reference(a, b, accumulate="fp64", **options)
    if exact.any():
        assert calc_diff(got, exact) < 1e-3
    else:
        assert not got.any()
    if backend == "emu":
        assert_bitwise_equal(got, reference(a, b, accumulate="hopper", **options))


@pytest.mark.parametrize("m,n,k", SHAPES)
def test_dense(backend, m, n, k):
    need("gemm", backend, m=m, n=n, k=k)
    a, b = scaled_operands(m, n, k)
    got = dsk.gemm(on_device(a, backend), on_device(b, backend), backend=backend)
    assert got.dtype == torch.bfloat16
    check(backend, got, a, b)


ADDENDS = [
    {"out_dtype": torch.float32},
    {"c": torch.float32, "bias": torch.bfloat16},
    {"c": torch.bfloat16, "bias": torch.float32, "out_dtype": torch.float32},
    {"c": torch.float16, "out_dtype": torch.float16},
]


def make_addends(options, c_shape, bias_shape):
    shapes = {"c": c_shape, "bias": bias_shape}
    return {k: torch.randn(shapes[k]).to(v) if k in shapes else v for k, v in options.items()}


def moved(options, backend):
    return {
        k: on_device(v, backend) if isinstance(v, torch.Tensor) else v for k, v in options.items()
    }


@pytest.mark.parametrize("options", ADDENDS, ids=lambda o: ",".join(o))
def test_dense_with_c_bias_and_other_results(backend, options):
    need("gemm", backend, m=70, n=136, k=256)
    a, b = scaled_operands(70, 136, 256)
    options = make_addends(options, (70, 136), (136,))
    got = dsk.gemm(
        on_device(a, backend), on_device(b, backend), backend=backend, **moved(options, backend)
    )
    assert got.dtype == options.get("out_dtype", torch.bfloat16)
    check(backend, got, a, b, **options)


@pytest.mark.parametrize("options", ADDENDS, ids=lambda o: ",".join(o))
@pytest.mark.parametrize("form", ["group_sizes", "masked_m"])
def test_groups_with_c_bias_and_other_results(backend, options, form):
    need("grouped_gemm", backend, n=136, k=256)
    counts = torch.tensor([3, 0, 70], dtype=torch.int32)
    lead = (75,) if form == "group_sizes" else (3, 70)
    a = rowwise.quantize(torch.randn(*lead, 256))
    b = rowwise.quantize(torch.randn(3, 136, 256), (128, 128))
    options = {**make_addends(options, (*lead, 136), (3, 136)), form: counts}
    got = dsk.grouped_gemm(
        on_device(a, backend), on_device(b, backend), backend=backend, **moved(options, backend)
    )
    if form == "masked_m":  # rows behind masked_m may be anything
        for group, rows in enumerate(counts.tolist()):
            got[group, rows:] = 0
    check(backend, got, a, b, ref.grouped_gemm, **options)


def test_accumulating_in_place(backend):
    need("gemm", backend, m=70, n=136, k=256)
    a, b = scaled_operands(70, 136, 256)
    c = torch.randn(70, 136)
    out = on_device(c.clone(), backend)
    dsk.gemm(on_device(a, backend), on_device(b, backend), c=out, out=out, backend=backend)
    check(backend, out, a, b, c=c, out_dtype=torch.float32)


def test_no_rows(backend):
    need("gemm", backend, m=0, n=128, k=128)
    a, b = scaled_operands(0, 128, 128)
    got = dsk.gemm(on_device(a, backend), on_device(b, backend), backend=backend)
    assert got.shape == (0, 128)


def test_out_is_written_and_its_surroundings_are_not(backend):
    need("gemm", backend, m=70, n=136, k=256)
    a, b = scaled_operands(70, 136, 256)
    storage = on_device(torch.full((72, 136), 7.0, dtype=torch.bfloat16), backend)
    out = storage[1:71]
    dsk.gemm(on_device(a, backend), on_device(b, backend), out=out, backend=backend)
    check(backend, out, a, b)
    assert (storage[0] == 7).all() and (storage[71] == 7).all()


@pytest.mark.parametrize("m,n,k", [(1, 8, 128), (70, 136, 400)])
@pytest.mark.parametrize(
    "options", [{}, {"c": torch.float32, "out_dtype": torch.bfloat16}], ids=str
)
def test_scales_of_b_by_row(backend, m, n, k, options):
    need("gemm", backend, m=m, n=n, k=k)
    a, b = rowwise.quantize(torch.randn(m, k)), rowwise.quantize(torch.randn(n, k))
    options = make_addends(options, (m, n), (n,))
    got = dsk.gemm(
        on_device(a, backend), on_device(b, backend), backend=backend, **moved(options, backend)
    )
    assert got.dtype == options.get("out_dtype", torch.float32)
    check_groups(backend, got, ref.gemm, a, b, **options)


@pytest.mark.parametrize("sizes", [[128, 0, 256, 0], [0, 128]], ids=str)
@pytest.mark.parametrize("addend", [False, True], ids=["plain", "c"])
def test_groups_along_k(backend, sizes, addend):
    m, n, k = 70, 136, sum(sizes)
    need("grouped_gemm_k", backend, n=n, k=k)
    a, b = rowwise.quantize(torch.randn(m, k)), rowwise.quantize(torch.randn(n, k))
    options = {"c": torch.randn(len(sizes), m, n)} if addend else {}
    got = dsk.grouped_gemm_k(
        on_device(a, backend), on_device(b, backend), sizes, backend=backend,
        **moved(options, backend),
    )  # fmt: skip
    assert got.dtype == torch.float32
    check_groups(backend, got, ref.grouped_gemm_k, a, b, group_sizes=sizes, **options)


INDICES = [[3, 3, 0, 0, 0, -1, 3, 2, 2, -1, -1, 0], [0] * 40 + [1] * 30 + [-1] * 2, [-1] * 3]


@pytest.mark.parametrize("indices", INDICES, ids=["unsorted", "padded", "padding"])
@pytest.mark.parametrize("addend", [False, True], ids=["plain", "c"])
def test_row_indices(backend, indices, addend):
    n, k = 136, 144
    need("grouped_gemm", backend, n=n, k=k)
    a, b = scaled_operands(len(indices), n, k, groups=(4,))
    m_indices = torch.tensor(indices, dtype=torch.int32)
    a.data.view(torch.uint8)[m_indices < 0] = 0x7F  # NaN: padding is not read
    options = {"c": torch.randn(len(indices), n)} if addend else {}
    got = dsk.grouped_gemm(
        on_device(a, backend), on_device(b, backend), m_indices=on_device(m_indices, backend),
        backend=backend, **moved(options, backend),
    )  # fmt: skip
    assert (on_cpu(got)[m_indices < 0] == 0).all()
    check_groups(backend, got, ref.grouped_gemm, a, b, m_indices=m_indices, **options)


SIZES = [[3, 0, 70, 1], [0, 0, 5, 0], [128, 64, 0, 10]]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_contiguous_groups_of_any_size(backend, sizes):
    need("grouped_gemm", backend, n=136, k=256)
    a, b = scaled_operands(sum(sizes) + 2, 136, 256, groups=(len(sizes),))
    got = dsk.grouped_gemm(
        on_device(a, backend), on_device(b, backend), group_sizes=sizes, backend=backend
    )
    check(backend, got, a, b, ref.grouped_gemm, group_sizes=sizes)
    assert (on_cpu(got)[sum(sizes) :] == 0).all()


@pytest.mark.parametrize("counts", [[3, 0, 70], [80, 80, 80], [0, 0, 0]], ids=str)
def test_masked_groups(backend, counts):
    need("grouped_gemm", backend, n=136, k=256)
    a, b = scaled_operands(80, 136, 256, groups=(3,))
    a = rowwise.quantize(torch.randn(3, 80, 256))
    masked_m = torch.tensor(counts, dtype=torch.int32)
    got = dsk.grouped_gemm(
        on_device(a, backend),
        on_device(b, backend),
        masked_m=on_device(masked_m, backend),
        expected_m=40,
        backend=backend,
    )
    got = on_cpu(got)
    want = ref.grouped_gemm(a, b, masked_m=masked_m, accumulate="fp64")
    exact = ref.grouped_gemm(a, b, masked_m=masked_m, accumulate="hopper")
    for group, rows in enumerate(counts):
        if rows:
            assert calc_diff(got[group, :rows], want[group, :rows]) < 1e-3
        if backend == "emu":
            assert_bitwise_equal(got[group, :rows], exact[group, :rows])


def test_the_same_row_gives_the_same_bits_whatever_the_batch(backend):
    need("gemm", backend, m=70, n=136, k=512)
    a, b = scaled_operands(70, 136, 512)
    b = on_device(b, backend)
    whole = dsk.gemm(on_device(a, backend), b, deterministic=True, backend=backend)
    for rows in (slice(0, 1), slice(3, 20), slice(40, 70)):
        part = dsk.ScaledTensor(a.data[rows], a.scale[rows], a.block)
        got = dsk.gemm(on_device(part, backend), b, deterministic=True, backend=backend)
        assert_bitwise_equal(on_cpu(got), on_cpu(whole[rows]))
