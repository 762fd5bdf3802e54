"""Plain bf16 products: within bf16 of fp64 on every backend, and on the CUDA kernels bit for bit
what Hopper's tensor core computes over all of k."""

import pytest
import torch
from backend_axis import on_cpu, on_device

import dskernels as dsk
from dskernels.cuda import _gemm_bf16
from dskernels.ref import gemm as ref
from dskernels.testing import assert_bitwise_equal, assert_close_to_exact, poison_rows

KERNELS = ["gemm_bf16_64x128", "gemm_bf16_128x256"]


@pytest.fixture
def bf16(backend):
    if backend == "triton":
        pytest.skip("the triton backend has no plain bf16 product")
    return backend


@pytest.fixture(params=KERNELS)
def kernel(request, backend):
    """Each instance in turn, where the launch can be steered."""
    if backend not in ("emu", "cuda"):
        if request.param != KERNELS[0]:
            pytest.skip("instances are the CUDA kernels'")
        yield request.param
        return
    with _gemm_bf16.forced_kernel(request.param):
        yield request.param


def draw(*shape):
    scale = torch.exp2(torch.randint(-4, 5, (*shape[:-1], 1)).float())
    return (torch.randn(shape) * scale).bfloat16()


def check(backend, got, call, *operands, **options):
    """call(*operands, accumulate=...) is the reference."""
    exact = call(*operands, accumulate="fp64", **{**options, "out_dtype": torch.float64})
    # The tensor core truncates fp32 once for each 16 of k.
    floor = 2.0**-23 * (1 + operands[0].shape[-1] // 16)
    assert_close_to_exact(on_cpu(got), exact, call(*operands, **options), floor=floor)
    if backend == "emu":
        assert_bitwise_equal(on_cpu(got), call(*operands, accumulate="hopper", **options))


@pytest.mark.parametrize("m,n,k", [(1, 8, 8), (70, 136, 200), (130, 264, 64)])
def test_dense(bf16, kernel, m, n, k):
    a, b = draw(m, k), draw(n, k)
    got = dsk.gemm(on_device(a, bf16), on_device(b, bf16), backend=bf16)
    assert got.dtype == torch.bfloat16
    check(bf16, got, ref.gemm, a, b)


def test_a_long_sum_walks_the_ring_many_times(bf16, kernel):
    a, b = draw(5, 1480), draw(24, 1480)
    got = dsk.gemm(
        on_device(a, bf16), on_device(b, bf16), out_dtype=torch.float32, backend=bf16
    )  # fmt: skip
    check(bf16, got, ref.gemm, a, b, out_dtype=torch.float32)


def test_one_sm_takes_every_tile(bf16, kernel):
    a, b = draw(150, 72), draw(272, 72)
    got = dsk.gemm(on_device(a, bf16), on_device(b, bf16), num_sms=1, backend=bf16)
    check(bf16, got, ref.gemm, a, b)


def test_more_rows_than_one_band_of_tiles(bf16, kernel):
    """The schedule walks 8 blocks of rows for each column of tiles: one band and a short one."""
    a, b = draw(8 * 64 + 70, 16), draw(136, 16)
    got = dsk.gemm(on_device(a, bf16), on_device(b, bf16), backend=bf16)
    check(bf16, got, ref.gemm, a, b)


def test_c_and_bias_are_added_before_the_one_rounding(bf16):
    a, b, c, bias = draw(70, 136), draw(72, 136), torch.randn(70, 72), torch.randn(72).bfloat16()
    for options in ({"c": c}, {"bias": bias}, {"c": c, "bias": bias, "out_dtype": torch.float32}):
        given = {k: on_device(v, bf16) if k != "out_dtype" else v for k, v in options.items()}
        got = dsk.gemm(on_device(a, bf16), on_device(b, bf16), **given, backend=bf16)
        check(bf16, got, ref.gemm, a, b, **options)


def test_out_is_written_and_its_surroundings_are_not(bf16):
    a, b = draw(70, 64), draw(136, 64)
    storage = on_device(torch.full((72, 136), 7.0, dtype=torch.bfloat16), bf16)
    dsk.gemm(on_device(a, bf16), on_device(b, bf16), out=storage[1:71], backend=bf16)
    check(bf16, storage[1:71].clone(), ref.gemm, a, b)
    assert (storage[0] == 7).all() and (storage[71] == 7).all()


@pytest.mark.parametrize("sizes", [[3, 0, 70, 1], [0, 0, 5], [64, 64, 10]], ids=str)
def test_contiguous_groups(bf16, kernel, sizes):
    a = poison_rows(draw(sum(sizes) + 2, 136), sum(sizes))
    b = draw(len(sizes), 72, 136)
    got = dsk.grouped_gemm(on_device(a, bf16), on_device(b, bf16), group_sizes=sizes, backend=bf16)
    check(bf16, got, ref.grouped_gemm, a, b, group_sizes=sizes)
    assert (on_cpu(got)[sum(sizes) :] == 0).all()


def test_groups_row_by_row(bf16):
    indices = torch.tensor([2] * 5 + [-1] * 3 + [0] * 70 + [-1] + [1], dtype=torch.int32)
    a = poison_rows(draw(len(indices), 64), indices >= 0)
    b = draw(3, 136, 64)
    got = dsk.grouped_gemm(
        on_device(a, bf16), on_device(b, bf16), m_indices=on_device(indices, bf16), backend=bf16
    )
    check(bf16, got, ref.grouped_gemm, a, b, m_indices=indices)


@pytest.mark.parametrize("counts", [[3, 0, 70], [80, 80, 80], [0, 0, 0]], ids=str)
def test_masked_groups(bf16, kernel, counts):
    a, b = draw(3, 80, 72), draw(3, 136, 72)
    for group, count in enumerate(counts):
        a[group, count:] = float("nan")
    masked_m = torch.tensor(counts, dtype=torch.int32)
    got = dsk.grouped_gemm(
        on_device(a, bf16), on_device(b, bf16), masked_m=on_device(masked_m, bf16), expected_m=40,
        backend=bf16,
    )  # fmt: skip
    for group, rows in enumerate(counts):
        if rows:
            check(bf16, got[group, :rows], ref.gemm, a[group, :rows], b[group])


# On one SM, and deeper than its ring of stages: an empty group must not let go of one.
@pytest.mark.parametrize("sizes", [[64, 0, 640], [0, 128]], ids=str)
def test_groups_along_k(bf16, kernel, sizes):
    a, b = draw(70, sum(sizes)), draw(136, sum(sizes))
    c = torch.randn(len(sizes), 70, 136)
    for options in ({}, {"c": c}):
        given = {k: on_device(v, bf16) for k, v in options.items()}
        got = dsk.grouped_gemm_k(on_device(a, bf16), on_device(b, bf16), sizes, **given,
                                 num_sms=1, backend=bf16)  # fmt: skip
        check(bf16, got, ref.grouped_gemm_k, a, b, group_sizes=sizes, **options)


def test_accumulating_in_place_skips_empty_groups(bf16):
    sizes, d = [0, 64], torch.randn(2, 70, 72)
    a, b = draw(70, 64), draw(72, 64)
    out = on_device(d.clone(), bf16)
    dsk.grouped_gemm_k(on_device(a, bf16), on_device(b, bf16), sizes, c=out, out=out, backend=bf16)
    check(bf16, out, ref.grouped_gemm_k, a, b, group_sizes=sizes, c=d)
    assert_bitwise_equal(on_cpu(out)[0], d[0])


def test_the_same_row_gives_the_same_bits_whatever_the_batch(bf16):
    a, b = draw(70, 136), on_device(draw(72, 136), bf16)
    whole = on_cpu(dsk.gemm(on_device(a, bf16), b, deterministic=True, backend=bf16))
    for rows in (slice(0, 1), slice(3, 20), slice(40, 70)):
        got = dsk.gemm(on_device(a[rows], bf16), b, deterministic=True, backend=bf16)
        if bf16 == "emu":
            assert_bitwise_equal(on_cpu(got), whole[rows])


def test_what_no_kernel_covers_is_refused_by_name(backend):
    if backend != "emu":
        pytest.skip("these are the CUDA kernels' limits")
    for a, b, message in (
        (torch.randn(4, 64), torch.randn(8, 64), "plain bf16, got torch.float32"),
        (draw(4, 60), draw(8, 60), "k a positive multiple of 8"),
        (draw(4, 64), draw(9, 64), "n a multiple of 8"),
    ):
        with pytest.raises(dsk.BackendError, match=message):
            dsk.gemm(a, b, backend="emu")
    with pytest.raises(dsk.BackendError, match="multiples of 64"):
        dsk.grouped_gemm_k(draw(8, 96), draw(8, 96), [32, 64], backend="emu")
    with pytest.raises(dsk.BackendError, match="expected None for bf16"):
        dsk.gemm(draw(4, 64), draw(8, 64), epilogue="swiglu", backend="emu")
