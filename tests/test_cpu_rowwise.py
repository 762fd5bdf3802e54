"""CPU row-wise kernels against the reference, on every target this processor runs."""

from __future__ import annotations

import pytest
import torch
from cpu_targets import guarded
from hypothesis import given, settings
from hypothesis import strategies as st

from dskernels import _C
from dskernels.cpu import rowwise
from dskernels.ref import rowwise as ref

TARGETS = _C.cpu.available_targets()
FLOATS = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=TARGETS)
def target(request):
    _C.cpu.select_target(request.param)
    yield request.param
    _C.cpu.select_target("")


def awkward(m: int, k: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Gaussian values with subnormals, both zeros, huge outliers, NaN and an infinity."""
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(seed))
    specials = [0.0, -0.0, 1e-41, -1e-39, 448.0, -448.0, 6e4, -3e4, 1e-7, torch.nan, -torch.nan]
    if m * k:
        flat = x.view(-1)
        for index, value in enumerate(specials):
            flat[(index * 131 + 7) % flat.numel()] = value
    if m > 3:
        x[1] = 0
        x[2] *= 1e-12
        x[3, k // 2] = -torch.inf
    return x.to(dtype)


def assert_same_bits(actual: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    a, b = (
        torch.empty(t.numel(), dtype=t.dtype).copy_(t.reshape(-1)).view(torch.uint8)
        for t in (actual, expected)
    )
    assert torch.equal(a, b), f"{what}: {int((a != b).sum())} bytes differ"


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(5, 384), (129, 200), (1, 1), (7, 127), (0, 128), (3, 0)])
@pytest.mark.parametrize("block", [(1, 128), (128, 128)])
@pytest.mark.parametrize("scale_format", ["fp32", "ue8m0"])
def test_quantize_is_bitwise_the_reference(target, dtype, shape, block, scale_format):
    x = awkward(*shape, dtype)
    got, want = rowwise.quantize(x, block, scale_format), ref.quantize(x, block, scale_format)
    assert_same_bits(got.scale, want.scale, "scale")
    assert got.scale.stride() == want.scale.stride() or not got.scale.numel()
    a, b = got.data.view(torch.uint8), want.data.view(torch.uint8)
    nan = (a & 0x7F) == 0x7F
    assert torch.equal(nan, (b & 0x7F) == 0x7F)
    assert torch.equal(a[~nan], b[~nan])


def test_every_e4m3_rounding_boundary(target):
    """All 2^16 bf16 values, with a block that keeps the scale at 1."""
    x = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    x = x[x.abs() <= 448].reshape(-1, 1)
    rows = torch.cat([x, torch.full_like(x, 448.0)], dim=1)
    between = torch.nextafter(rows[:, :1], torch.tensor(torch.inf)).clamp(-448, 448)
    for values in (rows, torch.cat([between, rows[:, 1:]], dim=1)):
        got, want = rowwise.quantize(values), ref.quantize(values)
        assert_same_bits(got.data, want.data, "data")


def test_quantize_a_stack_and_a_strided_view(target):
    stack = awkward(6, 256, torch.bfloat16).reshape(2, 3, 256)
    got, want = rowwise.quantize(stack), ref.quantize(stack)
    assert_same_bits(got.scale, want.scale, "scale")
    assert got.scale.stride() == want.scale.stride()
    wide = awkward(9, 400, torch.float32)
    for view in (wide[::2, 3:300], wide.t()):
        got, want = rowwise.quantize(view), ref.quantize(view)
        assert_same_bits(got.scale, want.scale, "scale")


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(4, 7168), (3, 33), (1, 1), (0, 64), (2, 3, 40)])
@pytest.mark.parametrize("with_residual", [False, True])
def test_rms_norm(target, dtype, shape, with_residual):
    g = torch.Generator().manual_seed(1)
    x = (torch.randn(*shape, generator=g) * 3).to(dtype)
    weight = torch.randn(shape[-1], generator=g)
    residual = torch.randn(*shape, generator=g).to(dtype) if with_residual else None
    got, want = (f.rms_norm(x, weight, 1e-6, residual) for f in (rowwise, ref))
    if with_residual:
        assert_same_bits(got[1], want[1], "sum")
        got, want = got[0], want[0]
    exact = torch.as_tensor(want).float()
    assert got.dtype == dtype
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    torch.testing.assert_close(got.float(), exact, rtol=tolerance, atol=1e-6)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(5, 384), (129, 200), (2, 130, 70), (3, 0)])
def test_transposed_quantize_is_bitwise_the_reference(target, dtype, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    operands = [x, ref.quantize(x)] if len(shape) == 2 else [x]
    for operand in operands:
        got, want = (
            f.quantize(operand, transpose=True, scale_format="pow2") for f in (rowwise, ref)
        )
        assert_same_bits(got.scale, want.scale, "scale")
        assert_same_bits(got.data.view(torch.uint8), want.data.view(torch.uint8), "data")


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(5, 256), (3, 34), (1, 2), (0, 8), (2, 3, 70)])
def test_swiglu(target, dtype, shape):
    x = (torch.randn(*shape, generator=torch.Generator().manual_seed(2)) * 8).to(dtype)
    got, want = rowwise.swiglu(x), ref.swiglu(x)
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    torch.testing.assert_close(got, want, rtol=tolerance, atol=1e-7)


def test_swiglu_at_the_ends_of_exp(target):
    gate = torch.tensor([-torch.inf, -1e30, -104.0, -88.0, -87.0, 0.0, 88.0, 1e30, torch.nan])
    x = torch.cat([gate, torch.ones_like(gate)])[None]
    got, want = rowwise.swiglu(x), ref.swiglu(x)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-34, equal_nan=True)


@pytest.mark.parametrize("residual", [False, True])
def test_the_fused_forms_equal_their_parts(target, residual):
    g = torch.Generator().manual_seed(3)
    x = torch.randn(5, 320, generator=g).bfloat16()
    rest = torch.randn(5, 320, generator=g).bfloat16() if residual else None
    weight = torch.rand(320, generator=g) + 0.5
    got = rowwise.rms_norm_quantize(x, weight, residual=rest)
    if residual:
        got, total = got
        x = x + rest
        assert_same_bits(total, x, "sum")
    want = rowwise.quantize(rowwise.rms_norm(x.float(), weight))
    assert_same_bits(got.data, want.data, "data")
    assert_same_bits(got.scale, want.scale, "scale")
    got = rowwise.swiglu_quantize(x)
    want = rowwise.quantize(rowwise.swiglu(x.float()))
    assert_same_bits(got.data, want.data, "data")
    assert_same_bits(got.scale, want.scale, "scale")


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("shape", [(3, 5, 64), (2, 3, 4, 64), (2, 1, 6), (1, 2, 300)])
def test_rope(target, dtype, interleaved, shape):
    g = torch.Generator().manual_seed(4)
    x = torch.randn(*shape, generator=g).to(dtype)
    angle = torch.rand(*shape[:-2], shape[-1] // 2, generator=g) * 6
    for inverse in (False, True):
        arguments = dict(interleaved=interleaved, inverse=inverse)
        got = rowwise.rope(x, angle.cos(), angle.sin(), **arguments)
        want = ref.rope(x, angle.cos(), angle.sin(), **arguments)
        tolerance = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def test_bad_arguments_are_named():
    x = torch.randn(4, 128)
    data = torch.empty(4, 128, dtype=torch.float8_e4m3fn)
    scale = torch.empty(4, 1)
    call = _C.cpu.quantize
    with pytest.raises(ValueError, match=r"data: expected shape \[4, 128\].*got \[4, 64\]"):
        call(x, data[:, :64], scale, 1, 128, 0, 1)
    with pytest.raises(ValueError, match="scale: expected float32, got float16"):
        call(x, data, scale.half(), 1, 128, 0, 1)
    with pytest.raises(ValueError, match="scale: expected an output without broadcast"):
        call(x, data, torch.empty(1, 1).expand(4, 1), 1, 128, 0, 1)
    with pytest.raises(ValueError, match="x: expected float32 or bfloat16 or float16, got int64"):
        call(x.long(), data, scale, 1, 128, 0, 1)
    with pytest.raises(ValueError, match="x: expected a contiguous last dimension, got stride"):
        call(torch.randn(128, 4).t(), data, scale, 1, 128, 0, 1)
    with pytest.raises(TypeError, match="x: expected a tensor, got <class 'int'>"):
        call(3, data, scale, 1, 128, 0, 1)
    with pytest.raises(ValueError, match="target: expected one of .*portable.*, got sse9"):
        _C.cpu.select_target("sse9")


def test_numpy_crosses_by_capsule(target):
    numpy = pytest.importorskip("numpy")
    x = numpy.random.default_rng(5).standard_normal((6, 256)).astype(numpy.float32)
    y = numpy.zeros((6, 128), numpy.float32)
    _C.cpu.swiglu(x, y, 1)
    torch.testing.assert_close(torch.from_numpy(y), ref.swiglu(torch.from_numpy(x)))
    y.flags.writeable = False
    with pytest.raises((ValueError, BufferError), match="read"):
        _C.cpu.swiglu(x, y, 1)


def test_nothing_is_written_outside_the_outputs(target):
    """Canaries round every output, sizes that end in partial vectors."""
    for m, k in [(1, 1), (3, 17), (5, 129), (2, 250)]:
        x = torch.randn(m, k)
        raw = torch.full((m + 2, k + 32), 0x55, dtype=torch.uint8)
        scales = torch.full((m + 2, 5), 7.0)
        view = raw[1:-1, 16 : 16 + k].view(torch.float8_e4m3fn)
        columns = -(-k // 128)
        _C.cpu.quantize(x, view, scales[1:-1, 1 : 1 + columns], 1, 128, 0, 2)
        raw[1:-1, 16 : 16 + k] = 0x55
        scales[1:-1, 1 : 1 + columns] = 7.0
        assert bool((raw == 0x55).all()) and bool((scales == 7.0).all())


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_norm_swiglu_and_rope_stay_in_their_outputs(target, dtype):
    """Canaries round every output; inputs behind the ends of their rows are NaN."""
    for m, k in [(1, 2), (3, 18), (5, 130)]:
        wide = torch.full((m, 2 * k + 9), torch.nan).to(dtype)
        wide[:, : 2 * k] = torch.randn(m, 2 * k).to(dtype)
        x, weight = wide[:, :k].clone(), torch.rand(k)
        outputs = [guarded((m, k), dtype) for _ in range(5)]
        (norm, _), (total, _), (gated, _), (turned, _), (single, _) = outputs
        _C.cpu.rms_norm(x, weight, x, 1e-6, norm, total, 2)
        _C.cpu.rms_norm(x, weight, None, 1e-6, single, None, 2)
        _C.cpu.swiglu(wide[:, : 2 * k], gated, 2)
        angles = torch.full((m, k), torch.nan)[:, : k // 2]
        angles[:] = torch.rand(m, k // 2)
        _C.cpu.rope(x[:, None], angles, angles, True, False, turned[:, None], 2)
        assert all(intact() and bool(y.isfinite().all()) for y, intact in outputs)
        for op in (_C.cpu.rms_norm_quantize, _C.cpu.swiglu_quantize):
            data, data_intact = guarded((m, k), torch.float8_e4m3fn)
            scale, scale_intact = guarded((m, -(-k // 128)), torch.float32)
            if op is _C.cpu.swiglu_quantize:
                op(wide[:, : 2 * k], data, scale, 0, 2)
            else:
                op(x, weight, None, 1e-6, data, scale, None, 0, 2)
            assert data_intact() and scale_intact() and bool(scale.isfinite().all())


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_special_values_in_every_position(target, value):
    """Norm, SwiGLU and RoPE against the reference, the value in each column of a row in turn."""
    k = 38
    for dtype in FLOATS:
        x = torch.randn(k, 2 * k, generator=torch.Generator().manual_seed(6)).to(dtype)
        x.diagonal()[:] = value
        up = x.roll(k, dims=1)  # the value among the second half, too
        angle = torch.rand(k, 1, k)
        weight = torch.rand(2 * k)
        got, want = (
            [f.rms_norm(x, weight), f.swiglu(x), f.swiglu(up)]
            + [
                f.rope(x[:, None], angle.cos()[:, 0], angle.sin()[:, 0], interleaved=i)
                for i in (0, 1)
            ]
            for f in (rowwise, ref)
        )
        for a, b in zip(got, want):
            torch.testing.assert_close(a, b, rtol=8e-3, atol=1e-6, equal_nan=True)


def test_threads_give_the_same_bits(target):
    x = awkward(301, 1000, torch.bfloat16)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(rowwise.quantize(x))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert_same_bits(other.data, results[0].data, "data")
        assert_same_bits(other.scale, results[0].scale, "scale")


rows = st.tuples(
    st.integers(0, 20), st.integers(1, 400), st.sampled_from(FLOATS), st.integers(0, 999)
)


def run_random_rows(case) -> None:
    """Quantisation bit for bit, norm and SwiGLU within a rounding, on every target."""
    m, k, dtype, seed = case
    x = awkward(m, 2 * k, dtype, seed)
    tame = torch.randn(m, 2 * k, generator=torch.Generator().manual_seed(seed)).to(dtype)
    weight = torch.rand(2 * k, generator=torch.Generator().manual_seed(seed))
    wanted = ref.quantize(x), ref.rms_norm(tame, weight), ref.swiglu(tame)
    tolerance = {torch.float32: 3e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    for name in TARGETS:
        _C.cpu.select_target(name)
        try:
            got = rowwise.quantize(x), rowwise.rms_norm(tame, weight), rowwise.swiglu(tame)
        finally:
            _C.cpu.select_target("")
        codes, expected = (q.data.view(torch.uint8) for q in (got[0], wanted[0]))
        nan = (codes & 0x7F) == 0x7F
        assert torch.equal(nan, (expected & 0x7F) == 0x7F), name
        assert torch.equal(codes[~nan], expected[~nan]), name
        assert_same_bits(got[0].scale, wanted[0].scale, name)
        for a, b in zip(got[1:], wanted[1:]):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=1e-6)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(rows)
def test_random_rows(case):
    run_random_rows(case)


@pytest.mark.slow
@settings(max_examples=500, deadline=None)
@given(rows)
def test_many_random_rows(case):
    run_random_rows(case)
