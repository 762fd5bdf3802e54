"""What a launch's `numerics` changes, and arrays whose addresses kernels find in memory."""

import numpy as np
import pytest
from ptx_kernel import load, run, store

from dskernels import emu

EX2 = load("%r1", 0) + "ex2.approx.f32 %r2, %r1;" + store("%r2", 1)


def test_worst_moves_approximate_functions_by_their_documented_error():
    x = np.linspace(-3, 3, 32, dtype=np.float32)
    exact = np.exp2(x.astype(np.float64))
    moved = {}
    for seed in (None, 1, 2):
        y = np.zeros(32, np.float32)
        run(EX2, x, y, numerics="worst", seed=seed)
        ulps = (y - exact) / np.spacing(exact.astype(np.float32))
        assert (abs(ulps) <= 2).all() and (abs(ulps) > 0.9).all()
        moved[seed] = np.sign(ulps)
    assert (moved[None] > 0).any() and (moved[None] < 0).any()
    assert (moved[1] != moved[2]).any()
    nearest = np.zeros(32, np.float32)
    run(EX2, x, nearest)
    assert (nearest == exact.astype(np.float32)).all()


def test_worst_reaches_packed_halves_and_division():
    x = np.linspace(0.5, 3, 32, dtype=np.float32)
    half = x.astype(np.float16).view(np.uint16).astype(np.uint32) * 0x10001
    body = load("%r1", 0) + "ex2.approx.f16x2 %r2, %r1;" + store("%r2", 1)
    near, far = np.zeros(32, np.uint32), np.zeros(32, np.uint32)
    run(body, half, near)
    run(body, half, far, numerics="worst")
    assert (near != far).mean() > 0.8  # some inputs have exact results
    body = load("%r1", 0) + "div.approx.f32 %r2, %r1, %r1;" + store("%r2", 1)
    ratio = np.zeros(32, np.float32)
    run(body, x, ratio, numerics="worst")
    assert (ratio != 1).any() and (abs(ratio - 1) <= 2.0**-21).all()


def test_unknown_numerics_is_refused():
    with pytest.raises(ValueError, match="numerics: expected one of .*, got 'best'"):
        run("", numerics="best")


def test_lent_arrays_may_be_reached_through_memory():
    value, out = np.arange(32, dtype=np.int32), np.zeros(32, np.int32)
    body = "ld.global.u64 %d1, [%P0]; mad.wide.u32 %d2, %t, 4, %d1; ld.global.b32 %r1, [%d2];"
    body += store("%r1", 1)
    with emu.lend(value) as addresses:
        run(body, np.array(addresses, np.uint64), out)
    assert (out == value).all()
    with pytest.raises(emu.HazardError) as error:
        run(body, np.array(addresses, np.uint64), out)
    assert error.value.hazards[0].kind == "global-out-of-bounds"
