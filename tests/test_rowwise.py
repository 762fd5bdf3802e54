"""The row-wise stem on every backend, against the reference."""

import pytest
import torch
from backend_axis import need, on_cpu, on_device
from executed_work import work_of

import dskernels as dsk
from dskernels.ref import rowwise as ref
from dskernels.ref import rowwise_backward as ref_backward
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


def test_a_whole_run_is_one_access():
    """Of a lane's four values: one load, one store; and the row's scale."""
    need("quantize", "emu")
    work = work_of(lambda: dsk.quantize(torch.randn(1, 128), backend="emu"))
    assert work["rowwise_quantize_f32"]["global"] == 3


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_quantize_keeps_what_is_not_finite(backend, value):
    need("quantize", backend)
    x = torch.randn(4, 256)
    x[2, 130] = value
    want = ref.quantize(x).dequantize()
    got = on_cpu(dsk.quantize(on_device(x, backend), backend=backend)).dequantize()
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got[want.isfinite()], want[want.isfinite()])


FORMS = {
    "planes": ((2, 5, 200), {}),
    "e5m6": ((5, 200), {"dtype": "e5m6", "scale_format": "pow2"}),
    "e5m6-wide": ((3, 576), {"dtype": "e5m6"}),
    "blocks": ((150, 260), {"block": (128, 128)}),
    "blocks-planes": ((2, 129, 100), {"block": (128, 128), "scale_format": "ue8m0"}),
    "transposed": ((130, 70), {"transpose": True}),
    "transposed-odd": ((3, 65), {"transpose": True}),
    "transposed-one": ((1, 130), {"transpose": True, "scale_format": "ue8m0"}),
    "transposed-aligned": ((256, 128), {"transpose": True}),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_form_of_quantisation_is_bitwise_the_reference(backend, dtype, form):
    need("quantize", backend)
    shape, options = FORMS[form]
    *lead, m, k = shape
    x = (
        torch.stack([awkward(m, k, dtype) for _ in range(lead[0])])
        if lead
        else awkward(m, k, dtype)
    )
    want = ref.quantize(x, **options)
    got = dsk.quantize(on_device(x, backend), **options, backend=backend)
    assert_bitwise_equal(on_cpu(got.data), want.data)
    assert_bitwise_equal(on_cpu(got.scale), want.scale)
    assert (got.block, got.dtype) == (want.block, want.dtype)


@pytest.mark.parametrize("rows", [1, 128])
@pytest.mark.parametrize("m,k", [(1, 128), (130, 200), (256, 64)])
def test_quantised_activations_become_the_weight_gradients_operand(backend, m, k, rows):
    """1x128 (or 128x128) e4m3 to 128x1 e4m3, without a wider copy in memory."""
    need("quantize", backend)
    q = ref.quantize(awkward(m, k, torch.bfloat16), (rows, 128))
    want = ref.quantize(q, transpose=True, scale_format="ue8m0")
    got = dsk.quantize(
        on_device(q, backend), transpose=True, scale_format="ue8m0", backend=backend
    )  # fmt: skip
    assert_bitwise_equal(on_cpu(got.data), want.data)
    assert_bitwise_equal(on_cpu(got.scale), want.scale)


def test_every_e5m6_value_survives_quantisation_and_packing(backend):
    """All 4096 bit patterns but the NaNs: cast to themselves, 12 bits each and back."""
    need("quantize", backend)
    need("pack_e5m6", backend)
    bits = (torch.arange(4096, dtype=torch.int32) << 4).to(torch.int16)
    values = bits.view(torch.float16)
    values = values[values.isfinite()].reshape(-1, 124)
    top = torch.full((len(values), 4), 65024.0)  # makes every row's scale 1
    x = torch.cat([top, values.float()], dim=1)
    q = dsk.quantize(on_device(x, backend), dtype="e5m6", backend=backend)
    assert (on_cpu(q.scale) == 1).all()
    assert_bitwise_equal(on_cpu(q.data)[:, 4:].contiguous(), values)
    packed = dsk.pack_e5m6(q.data[:, 1:], backend=backend)
    assert_bitwise_equal(on_cpu(packed), dsk.ref.fp8.pack_e5m6(on_cpu(q.data)[:, 1:]))
    back = dsk.unpack_e5m6(packed, 127, backend=backend)
    assert_bitwise_equal(on_cpu(back), on_cpu(q.data)[:, 1:].contiguous())


@pytest.fixture
def one_sm(backend):
    """The kernels with a grid for one SM: every CTA takes many pieces of the work in turn."""
    if backend != "emu":
        pytest.skip("the grid is the CUDA kernels'")
    from dskernels.cuda.rowwise import Rowwise

    return Rowwise("emu", num_sms=1)


def test_one_sm_quantises_everything(one_sm):
    x = awkward(300, 400, torch.bfloat16)
    for options in ({}, {"block": (128, 128)}, {"transpose": True}, {"dtype": "e5m6"}):
        got, want = one_sm.quantize(x, **options), ref.quantize(x, **options)
        assert_bitwise_equal(got.data, want.data)
        assert_bitwise_equal(got.scale, want.scale)
    q = ref.quantize(x)
    assert_bitwise_equal(one_sm.quantize(q, transpose=True).data,
                         ref.quantize(q, transpose=True).data)  # fmt: skip
    assert_bitwise_equal(one_sm.dequantize(q), q.dequantize(torch.bfloat16))
    wide = ref.quantize(x, dtype="e5m6").data
    packed = dsk.ref.fp8.pack_e5m6(wide)
    assert_bitwise_equal(one_sm.pack_e5m6(wide), packed)
    assert_bitwise_equal(one_sm.unpack_e5m6(packed, 400), wide)


def test_one_sm_does_every_other_row_wise_op(one_sm):
    x, weight = torch.randn(70, 640), torch.randn(640)
    assert_close_to_exact(
        one_sm.rms_norm(x, weight), ref.rms_norm(x.double(), weight.double()),
        ref.rms_norm(x, weight),
    )  # fmt: skip
    assert_close_to_exact(one_sm.swiglu(x), ref.swiglu(x.double()), ref.swiglu(x))
    grad = torch.randn(70, 320)
    assert_close_to_exact(
        one_sm.swiglu_backward(grad, x),
        ref_backward.swiglu_backward(grad.double(), x.double()),
        ref_backward.swiglu_backward(grad, x),
    )
    angle = torch.randn(70, 32)
    heads = x.view(70, 10, 64)
    assert_bitwise_equal(
        one_sm.rope(heads, angle.cos(), angle.sin()), ref.rope(heads, angle.cos(), angle.sin())
    )


DEQUANTIZED = {
    "groups": ((3, 300), {}),
    "planes": ((2, 5, 130), {}),
    "blocks": ((2, 130, 200), {"block": (128, 128)}),
    "e5m6": ((3, 200), {"dtype": "e5m6"}),
    "odd-block": ((5, 35), {"block": (2, 7)}),  # whole blocks, no whole run of 4
}


@pytest.mark.parametrize("form", DEQUANTIZED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dequantize_is_bitwise_the_reference(backend, dtype, form):
    need("dequantize", backend)
    shape, options = DEQUANTIZED[form]
    q = ref.quantize(torch.randn(shape), **options)
    got = dsk.dequantize(on_device(q, backend), dtype, backend=backend)
    assert_bitwise_equal(on_cpu(got), q.dequantize(dtype))


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
@pytest.mark.parametrize("m,k", [(1, 128), (3, 576), (17, 100), (2, 1024), (2, 2304)])
def test_rms_norm_adds_the_residual_first(backend, m, k, dtype):
    need("rms_norm", backend)
    x, rest, weight = torch.randn(m, k).to(dtype), torch.randn(m, k).to(dtype), torch.randn(k)
    got, total = dsk.rms_norm(
        on_device(x, backend), on_device(weight, backend), 1e-5, on_device(rest, backend),
        backend=backend,
    )  # fmt: skip
    assert_bitwise_equal(on_cpu(total), x + rest)
    exact = ref.rms_norm((x + rest).double(), weight.double(), 1e-5)
    assert_close_to_exact(on_cpu(got), exact, ref.rms_norm(x + rest, weight, 1e-5))


@pytest.mark.parametrize("scale_format", ["fp32", "ue8m0"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 576), (2, 5, 100), (1, 1280)], ids=str)
def test_rms_norm_quantize(backend, shape, dtype, scale_format):
    need("rms_norm_quantize", backend)
    x, rest = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    weight = torch.randn(shape[-1]).to(dtype)
    q, total = dsk.rms_norm_quantize(
        on_device(x, backend), on_device(weight, backend), 1e-6, on_device(rest, backend),
        scale_format=scale_format, backend=backend,
    )  # fmt: skip
    want, want_total = ref.rms_norm_quantize(x, weight, 1e-6, rest, scale_format=scale_format)
    assert_bitwise_equal(on_cpu(total), want_total)
    check_quantised(q, want, ref.rms_norm(total.double().cpu(), weight.double()))


def check_quantised(got, want, exact):
    """A value's last bit before quantisation may move a scale by an ulp (a power-of-two scale by a
    step), and a value by a step of the format: no more error than the reference's, in sum."""
    got, want = on_cpu(got), want
    torch.testing.assert_close(got.scale, want.scale, rtol=1e-5, atol=0)
    error = (got.dequantize().double() - exact).abs()
    budget = (want.dequantize().double() - exact).abs()
    assert error.max() <= 1.01 * budget.max()
    assert error.mean() <= 1.01 * budget.mean()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m,k", [(1, 128), (5, 1152), (0, 64), (3, 200)])
def test_swiglu_backward(backend, m, k, dtype):
    need("swiglu", backend)
    x = (3 * torch.randn(m, k)).to(dtype)
    grad = torch.randn(m, k // 2).to(dtype)
    leaf = on_device(x, backend).requires_grad_()
    dsk.swiglu(leaf, backend=backend).backward(on_device(grad, backend))
    exact = ref_backward.swiglu_backward(grad.double(), x.double())
    assert leaf.grad.dtype == dtype
    assert_close_to_exact(on_cpu(leaf.grad), exact, ref_backward.swiglu_backward(grad, x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m,k", [(1, 128), (5, 1152), (0, 64), (3, 200)])
def test_swiglu(backend, m, k, dtype):
    need("swiglu", backend)
    x = (3 * torch.randn(m, k)).to(dtype)
    got = on_cpu(dsk.swiglu(on_device(x, backend), backend=backend))
    assert got.shape == (m, k // 2)
    assert_close_to_exact(got, ref.swiglu(x.double()), ref.swiglu(x))


@pytest.mark.parametrize("scale_format", ["fp32", "ue8m0"])
@pytest.mark.parametrize("shape", [(7, 576), (2, 3, 400)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_swiglu_quantize(backend, dtype, shape, scale_format):
    need("swiglu_quantize", backend)
    x = (3 * torch.randn(shape)).to(dtype)
    got = dsk.swiglu_quantize(on_device(x, backend), scale_format=scale_format, backend=backend)
    want = ref.swiglu_quantize(x, scale_format=scale_format)
    check_quantised(got, want, ref.swiglu(x.double()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 64), (2, 5, 3, 6), (0, 2, 8)], ids=str)
def test_rope(backend, shape, interleaved, dtype):
    need("rope", backend)
    x = torch.randn(shape).to(dtype)
    angle = torch.rand(*shape[-3:-2], shape[-1] // 2) * 100
    cos, sin = angle.cos(), angle.sin()
    got = dsk.rope(
        *(on_device(t, backend) for t in (x, cos, sin)),
        interleaved=interleaved, inverse=True, backend=backend,
    )  # fmt: skip
    want = ref.rope(x, cos, sin, interleaved=interleaved, inverse=True)
    if backend == "emu":
        assert_bitwise_equal(on_cpu(got), want)
    exact = ref.rope(x.double(), cos, sin, interleaved=interleaved, inverse=True)
    assert_close_to_exact(on_cpu(got), exact, want, floor=1e-7)


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
