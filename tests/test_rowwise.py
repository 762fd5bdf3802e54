"""The row-wise stem on every backend, against the reference."""

import pytest
import torch
from backend_axis import need, on_cpu, on_device

import dskernels as dsk
from dskernels.ref import rowwise as ref
from dskernels.testing import assert_bitwise_equal, assert_close_to_exact

SHAPES = [(1, 128), (3, 576), (17, 100), (64, 512), (0, 256)]
DTYPES = [torch.bfloat16, torch.float32]


def awkward(m, k, dtype):
    """Rows of very different magnitude, a zero row, and the exact ends of the format."""
    x = torch.randn(m, k) * torch.exp2(torch.randint(-30, 30, (m, 1)).float())
    if m > 2:
        x[1] = 0
        x[2, :4] = torch.tensor([448.0, -448.0, 1e-10, -0.0])
    return x.to(dtype)


@pytest.mark.parametrize("scale_format", ["fp32", "ue8m0"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m,k", SHAPES)
def test_quantize_is_bitwise_the_reference(backend, m, k, dtype, scale_format):
    need("quantize", backend)
    x = awkward(m, k, dtype)
    want = ref.quantize(x, scale_format=scale_format)
    got = dsk.quantize(on_device(x, backend), scale_format=scale_format, backend=backend)
    assert_bitwise_equal(on_cpu(got.data), want.data)
    assert_bitwise_equal(on_cpu(got.scale), want.scale)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_quantize_keeps_what_is_not_finite(backend, value):
    need("quantize", backend)
    x = torch.randn(4, 256)
    x[2, 130] = value
    want = ref.quantize(x).dequantize()
    got = on_cpu(dsk.quantize(on_device(x, backend), backend=backend)).dequantize()
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got[want.isfinite()], want[want.isfinite()])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m,k", SHAPES)
def test_rms_norm(backend, m, k, dtype):
    need("rms_norm", backend)
    x, weight = torch.randn(m, k).to(dtype), torch.randn(k).to(dtype)
    exact = ref.rms_norm(x.double(), weight.double())
    got = dsk.rms_norm(on_device(x, backend), on_device(weight, backend), backend=backend)
    assert got.dtype == dtype
    assert_close_to_exact(on_cpu(got), exact, ref.rms_norm(x, weight))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m,k", [(1, 128), (5, 1152), (0, 64)])
def test_swiglu(backend, m, k, dtype):
    need("swiglu", backend)
    x = (3 * torch.randn(m, k)).to(dtype)
    got = on_cpu(dsk.swiglu(on_device(x, backend), backend=backend))
    assert got.shape == (m, k // 2)
    assert_close_to_exact(got, ref.swiglu(x.double()), ref.swiglu(x))


@pytest.mark.parametrize("scale_format", ["fp32", "ue8m0"])
def test_swiglu_quantize(backend, scale_format):
    need("swiglu_quantize", backend)
    x = 3 * torch.randn(7, 576)
    got = dsk.swiglu_quantize(on_device(x, backend), scale_format=scale_format, backend=backend)
    want = ref.swiglu_quantize(x, scale_format=scale_format)
    # The exponential's last bit may move a scale by an ulp and a value by a step of the format.
    torch.testing.assert_close(on_cpu(got.scale), want.scale, rtol=1e-5, atol=0)
    torch.testing.assert_close(on_cpu(got).dequantize(), want.dequantize(), rtol=2**-3, atol=1e-3)
    exact = ref.swiglu(x.double())
    error = (on_cpu(got).dequantize() - exact).abs().max()
    assert error <= 1.01 * (want.dequantize() - exact).abs().max()


@pytest.mark.parametrize("interleaved", [True, False])
def test_rope_turns_and_turns_back(backend, interleaved):
    need("rope", backend)
    x, angle = torch.randn(7, 3, 64), torch.rand(7, 32) * 100
    cos, sin = on_device(angle.cos(), backend), on_device(angle.sin(), backend)
    x = on_device(x, backend)
    options = dict(interleaved=interleaved, backend=backend)
    turned = dsk.rope(x, cos, sin, **options)
    exact = ref.rope(on_cpu(x).double(), on_cpu(cos), on_cpu(sin), interleaved=interleaved)
    torch.testing.assert_close(on_cpu(turned).double(), exact.double(), rtol=1e-5, atol=1e-5)
    back = dsk.rope(turned, cos, sin, inverse=True, **options)
    torch.testing.assert_close(back, x, rtol=1e-5, atol=1e-5)
    assert (turned - x).abs().max() > 0.5
