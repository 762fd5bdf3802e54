"""Approximate functions: special values, documented bounds, the worst-error mode."""

import math

import numpy as np
import pytest

from .conftest import NUM

NAN, INF = math.nan, math.inf
TINY = 2.0**-149
SPECIAL = {
    # -inf, -1, -0, +0, smallest subnormal, +inf, NaN
    "ex2": [0.0, 0.5, 1.0, 1.0, 1.0, INF, NAN],
    "lg2": [NAN, NAN, -INF, -INF, -149.0, INF, NAN],
    "rcp": [-0.0, -1.0, -INF, INF, INF, 0.0, NAN],
    "rsqrt": [NAN, NAN, -INF, INF, 2.0**74.5, 0.0, NAN],
    "sqrt": [NAN, NAN, -0.0, 0.0, 2.0**-74.5, INF, NAN],
    "sin": [NAN, math.sin(-1), -0.0, 0.0, TINY, NAN, NAN],
    "cos": [NAN, math.cos(1), 1.0, 1.0, 1.0, NAN, NAN],
    "tanh": [-1.0, math.tanh(-1), -0.0, 0.0, TINY, 1.0, NAN],
}
INPUTS = np.array([-INF, -1, -0.0, 0.0, TINY, INF, NAN], np.float32)


def bits(x):
    return np.asarray(x, np.float32).view(np.uint32)


@pytest.mark.parametrize("fn", SPECIAL)
def test_special_values(fn):
    with np.errstate(over="ignore"):
        want = bits(np.array(SPECIAL[fn], np.float64).astype(np.float32)).copy()
    want[np.isnan(np.array(SPECIAL[fn]))] = 0x7FFFFFFF
    np.testing.assert_array_equal(bits(NUM.approx_f32(fn, INPUTS)), want)


def test_ftz_flushes_inputs_and_results():
    sub = np.array([1e-40, -1e-40], np.float32)
    assert NUM.approx_f32("rcp", sub, ftz=True).tolist() == [INF, -INF]
    assert NUM.approx_f32("lg2", sub, ftz=True).tolist() == [-INF, -INF]
    assert bits(NUM.approx_f32("sin", sub, ftz=True)).tolist() == [0, 0x80000000]
    assert NUM.approx_f32("ex2", np.array([-127.0], np.float32), ftz=True)[0] == 0
    assert NUM.approx_f32("ex2", np.array([-127.0], np.float32))[0] == 2.0**-127


def ulp(x):
    e = np.maximum(np.floor(np.log2(np.abs(x))), -126)
    return 2.0 ** (e - 23)


BOUNDS = {  # documented, as an absolute error at input x with exact value y
    "ex2": lambda x, y: 2 * ulp(y),
    "lg2": lambda x, y: np.where((x > 0.5) & (x < 2), 2.0**-22.6, np.abs(y) * 2.0**-22),
    "rcp": lambda x, y: ulp(y),
    "rsqrt": lambda x, y: np.abs(y) * 2.0**-22.9,
    "sqrt": lambda x, y: np.abs(y) * 2.0**-23,
    "sin": lambda x, y: np.where(np.abs(x) <= 2 * math.pi, 2.0**-20.5, 2.0**-14.7),
    "cos": lambda x, y: np.where(np.abs(x) <= 2 * math.pi, 2.0**-20.5, 2.0**-14.7),
    "tanh": lambda x, y: np.abs(y) * 2.0**-11,
}
EXACT = {
    "ex2": np.exp2,
    "lg2": np.log2,
    "rcp": lambda x: 1 / x,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "sqrt": np.sqrt,
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
}


def samples(fn):
    rng = np.random.default_rng(len(fn))
    if fn in ("lg2", "rsqrt", "sqrt"):
        x = np.concatenate([2.0 ** rng.uniform(-100, 100, 4000), rng.uniform(0.4, 2.1, 4000)])
    elif fn == "ex2":
        x = rng.uniform(-120, 120, 8000)
    elif fn == "rcp":
        x = 2.0 ** rng.uniform(-100, 100, 8000) * rng.choice([-1, 1], 8000)
    else:
        x = np.concatenate([rng.uniform(-7, 7, 4000), rng.uniform(-90, 90, 4000)])
    x = x.astype(np.float32)
    return x[x != 1]


@pytest.mark.parametrize("fn", EXACT)
def test_nearest_and_worst_stay_within_the_documented_bound(fn):
    x = samples(fn)
    y = EXACT[fn](x.astype(np.float64))
    bound = BOUNDS[fn](x.astype(np.float64), y)
    nearest = NUM.approx_f32(fn, x).astype(np.float64)
    assert (np.abs(nearest - y) <= 0.5 * ulp(y) * (1 + 1e-9)).all()
    worst = NUM.approx_f32(fn, x, worst=True, seed=3).astype(np.float64)
    error = np.abs(worst - y)
    grid = np.maximum(bound, 0.5 * ulp(y))
    assert (error <= grid * (1 + 1e-6)).all()
    # Never a whole ulp (of the moved value) short of the bound, unless clamped to |result| <= 1.
    free = np.abs(np.abs(y) + bound) < 1 if fn in ("sin", "cos", "tanh") else np.ones(len(y), bool)
    assert (error[free] >= (bound - ulp(np.abs(y) + bound) * 1.001)[free]).all()
    assert free.mean() > 0.2
    signs = np.sign(worst - y)
    assert 0.3 < (signs > 0).mean() < 0.7
    other = NUM.approx_f32(fn, x, worst=True, seed=4)
    assert (other != worst.astype(np.float32)).mean() > 0.2
    again = NUM.approx_f32(fn, x, worst=True, seed=3)
    np.testing.assert_array_equal(again, worst.astype(np.float32))


def test_worst_keeps_exact_values():
    for fn in SPECIAL:
        got = NUM.approx_f32(fn, INPUTS[[0, 2, 3, 5, 6]], worst=True, seed=1)
        want = NUM.approx_f32(fn, INPUTS[[0, 2, 3, 5, 6]])
        np.testing.assert_array_equal(bits(got), bits(want))


def test_division():
    rng = np.random.default_rng(9)
    x = (rng.standard_normal(4000) * 2.0 ** rng.integers(-30, 30, 4000)).astype(np.float32)
    y = (rng.standard_normal(4000) * 2.0 ** rng.integers(-30, 30, 4000)).astype(np.float32)
    exact = x.astype(np.float64) / y.astype(np.float64)
    for full in (False, True):
        np.testing.assert_array_equal(NUM.div_f32(x, y, full), exact.astype(np.float32))
        worst = NUM.div_f32(x, y, full, worst=True).astype(np.float64)
        error = np.abs(worst - exact)
        assert (error <= 2 * ulp(exact)).all() and (error >= ulp(exact)).all()
    huge = np.array([1.5 * 2.0**126] * 4 + [INF, 0, 0], np.float32)
    top = np.array([1.0, -(2.0**100), INF, NAN, 1.0, 1.0, 0.0], np.float32)
    got = bits(NUM.div_f32(top, huge))
    assert got.tolist() == [0, 0x80000000, 0x7FFFFFFF, 0x7FFFFFFF, 0, 0x7F800000, 0x7FFFFFFF]
    assert NUM.div_f32(top[1:2], huge[1:2], True)[0] == np.float32(-(2.0**100) / (1.5 * 2.0**126))
    sub = np.array([1e-40], np.float32)
    one = np.ones(1, np.float32)
    assert (
        NUM.div_f32(one, sub, False, True)[0] == INF and NUM.div_f32(sub, one, True, True)[0] == 0
    )


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("fn", ["ex2", "tanh"])
def test_half_forms_every_code(fn, bf16):
    name = "bf16" if bf16 else "f16"
    codes = np.arange(65536, dtype=np.uint16)
    x = NUM.decode(name, codes.astype(np.uint32))
    with np.errstate(over="ignore", invalid="ignore"):
        y = EXACT[fn](x)
    np.testing.assert_array_equal(NUM.approx_half(fn, codes, bf16), NUM.encode(name, y))
    worst = NUM.decode(name, NUM.approx_half(fn, codes, bf16, worst=True).astype(np.uint32))
    nearest = NUM.decode(name, NUM.encode(name, y))
    fine = np.isfinite(worst)
    bound = {("ex2", 0): y * 2.0**-9.9, ("ex2", 1): y * 2.0**-7, ("tanh", 0): 2.0**-10.987}
    allowed = np.broadcast_to(bound.get((fn, int(bf16)), 2.0**-8), y.shape)[fine]
    y, worst, nearest = y[fine], worst[fine], nearest[fine]
    limit = np.maximum(allowed, np.abs(nearest - y))
    assert (np.abs(worst - y) <= limit * (1 + 1e-9)).all()
    assert (worst != nearest).mean() > 0.05
    with pytest.raises(ValueError, match="ex2 and tanh only"):
        NUM.approx_half("rcp", codes[:1], bf16)


def test_f64_seeds_for_newton():
    x = np.array([3.0, -7.0, 0.0, -0.0, INF, 2.0**-1040, NAN])
    got = NUM.approx_f64("rcp", x)
    assert (np.abs(got[:2] * x[:2] - 1) < 2.0**-20).all()
    assert got[2] == INF and got[3] == -INF and got[4] == 0 and got[5] == INF and np.isnan(got[6])
    assert (got.view(np.uint64) & 0xFFFFFFFF == 0).all()
    got = NUM.approx_f64("rsqrt", np.array([2.0, -1.0, 0.0]))
    assert abs(got[0] * 2**0.5 - 1) < 2.0**-20 and np.isnan(got[1]) and got[2] == INF
