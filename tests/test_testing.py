"""The test helpers themselves: each must fail when it should."""

import math

import pytest
import torch

from dskernels import testing


def test_calc_diff():
    x = torch.randn(100)
    assert testing.calc_diff(x, x) == pytest.approx(0, abs=1e-15)
    assert testing.calc_diff(x, -x) == pytest.approx(2)
    assert testing.calc_diff(x, 1.01 * x) == pytest.approx(0.01**2 / 2, rel=0.02)
    assert testing.calc_diff(x * 0, x * 0) == 0.0
    assert math.isnan(testing.calc_diff(x * torch.nan, x))
    assert testing.relative_error(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 2.0])) == 0.5
    assert testing.relative_error(x[:0], x[:0]) == testing.relative_error(x, x) == 0.0


def test_error_budget():
    torch.manual_seed(0)
    exact = torch.randn(50, dtype=torch.float64)
    exact[3], exact[4] = torch.nan, torch.inf
    baseline = exact.bfloat16()
    testing.assert_close_to_exact(exact.bfloat16(), exact, baseline)
    testing.assert_close_to_exact(exact, exact, exact)
    worse = baseline.double() + 2 * (baseline.double() - exact)
    worse[3:5] = exact[3:5]
    with pytest.raises(AssertionError, match="exceeds"):
        testing.assert_close_to_exact(worse, exact, baseline)
    testing.assert_close_to_exact(worse, exact, baseline, factor=3.01)
    testing.assert_close_to_exact(worse, exact, exact, floor=0.1)
    for position, value, message in (
        (3, 0.0, "NaN or infinite"),
        (4, -torch.inf, "NaN or infinite"),
        (5, torch.nan, "is finite"),
    ):
        broken = exact.clone()
        broken[position] = value
        with pytest.raises(AssertionError, match=message):
            testing.assert_close_to_exact(broken, exact, baseline)
    with pytest.raises(AssertionError, match="shapes"):
        testing.assert_close_to_exact(exact[1:], exact, baseline)


def test_bitwise():
    nan = torch.tensor([0x7FC00000, 0x7FFFFFFF], dtype=torch.int32).view(torch.float32)
    testing.assert_bitwise_equal(nan[:1], nan[1:])
    with pytest.raises(AssertionError, match=r"1 of 2 .* \(1,\): expected -0.0, got 0.0"):
        testing.assert_bitwise_equal(torch.zeros(2), torch.tensor([0.0, -0.0]))
    with pytest.raises(AssertionError, match="expected torch.float32"):
        testing.assert_bitwise_equal(torch.zeros(2).half(), torch.zeros(2))
    with pytest.raises(AssertionError, match=r"\(2,\), got torch.float32 \(3,\)"):
        testing.assert_bitwise_equal(torch.zeros(3), torch.zeros(2))
    testing.assert_bitwise_equal(torch.arange(3), torch.arange(3))


def test_poison():
    x = torch.ones(4, 2)
    assert testing.poison_rows(x, 3).isnan().sum() == 2 and not x.isnan().any()
    keep = torch.tensor([True, False, True, False])
    fp8 = testing.poison_rows(x.to(torch.float8_e4m3fn), keep)
    assert fp8.float().isnan().any(1).tolist() == [False, True, False, True]
    cache, table = testing.poisoned_pages(
        torch.ones(3, 2, 5), torch.tensor([[2, 0]]), torch.tensor([3])
    )
    assert table.tolist() == [[2, 0]] and cache.isnan().any(-1).tolist() == [
        [False, True],
        [True, True],
        [False, False],
    ]
    _, table = testing.poisoned_pages(cache, torch.tensor([[2, 0]]), torch.tensor([2]))
    assert table.tolist() == [[2, testing.UNUSED_PAGE]]


def test_guarded_buffer_notices_writes_on_both_sides():
    for shape, dtype in (((3, 4), torch.float32), ((0,), torch.bfloat16), ((5,), torch.uint8)):
        x, check = testing.guarded_empty(shape, dtype)
        assert x.shape == shape and x.dtype == dtype and x.is_contiguous()
        if dtype.is_floating_point:
            assert x.isnan().all()
        check()
        x.fill_(1)
        check()
    x, check = testing.guarded_empty((4,), torch.uint8)
    whole = x.as_strided((6,), (1,), x.storage_offset() - 1)
    whole[5] = 1
    with pytest.raises(AssertionError, match="1 bytes behind the tensor were written.*offset 0"):
        check()
    whole[5], whole[0] = 0xA5, 0
    with pytest.raises(AssertionError, match="before the tensor .*offset 255"):
        check()
