"""The row-wise reference: quantisation block by block, RMSNorm, RoPE, SwiGLU."""

import math

import numpy as np
import pytest
import torch

from dskernels.ref import fp8, rowwise
from dskernels.testing import assert_bitwise_equal
from dskernels.types import FORMAT_MAX, ScaledTensor, Support

BLOCKS = [(1, 128), (128, 128), (3, 5), (1, 4096)]


def quantize_by_hand(x, block, scale_format, dtype):
    """One block at a time, scalars in NumPy fp32."""
    m, k = x.shape
    rows, columns = block
    data = np.zeros((m, k), np.float32)
    scale = np.zeros((-(-m // rows), -(-k // columns)), np.float32)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            part = np.s_[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
            amax = np.float32(max(np.abs(x[part]).max(), np.float32(1e-4)))
            s = amax / np.float32(FORMAT_MAX[dtype])
            if scale_format != "fp32":
                s = np.float32(2.0 ** next(e for e in range(-126, 128) if 2.0**e >= s))
            scale[i, j] = s
            data[part] = x[part] / s
    return data, scale


@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("scale_format", ["fp32", "ue8m0", "pow2"])
@pytest.mark.parametrize("dtype", ["e4m3", "e5m6"])
def test_quantize_block_by_block(block, scale_format, dtype):
    torch.manual_seed(0)
    x = torch.randn(9, 576) * torch.exp2(torch.randint(-20, 20, (9, 1)))
    x[4], x[5, :128] = 0.0, 448.0
    got = rowwise.quantize(x, block, scale_format, dtype)
    data, scale = quantize_by_hand(x.numpy(), block, scale_format, dtype)
    cast = {"e4m3": fp8.cast_e4m3, "e5m6": fp8.cast_e5m6}[dtype]
    assert_bitwise_equal(got.scale.contiguous(), torch.from_numpy(scale))
    assert_bitwise_equal(got.data, cast(torch.from_numpy(data)))
    assert got.block == block and got.dtype == dtype and got.data.is_contiguous()
    if block[0] == 1:
        assert got.scale.stride() == (1, 12), "MN-major, rows aligned to 4"
    # Half a step of the block's largest binade, and of the smallest subnormal.
    step = {"e4m3": 2**-4, "e5m6": 2**-7}[dtype]
    error = (got.dequantize() - x).abs()
    amax = torch.from_numpy(scale).repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    assert (error <= step * FORMAT_MAX[dtype] * amax[:9, :576] * 1.0001).all()


def test_ue8m0_is_exact_on_powers_of_two_and_never_saturates():
    for exponent in range(-10, 30):
        x = torch.zeros(3, 128)
        top = 448 * 2.0**exponent
        x[:, 0] = torch.tensor([top, np.nextafter(np.float32(top), np.float32(np.inf)), top / 1.01])
        got = rowwise.quantize(x, scale_format="ue8m0")
        # Just above a power of two the next one is needed, at it and below it is not.
        want = [2.0**exponent, 2.0 ** (exponent + 1), 2.0**exponent]
        assert got.scale.flatten().tolist() == want


def test_quantize_divides_and_never_multiplies_by_an_inverse():
    """The two differ where a quotient lies on a tie: look for such values, block by block."""
    torch.manual_seed(11)
    amax = torch.rand(64, 1) + 1.0
    scale = amax / 448
    ties = torch.tensor([17.0, 19, 21, 23, 25, 27, 29, 31, 34, 38, 42, 46, 50, 54, 58, 62])
    x = torch.zeros(64, 128)
    x[:, :16], x[:, 127] = ties * scale, amax[:, 0]
    divided, multiplied = fp8.cast_e4m3(x / scale), fp8.cast_e4m3(x * (1 / scale))
    assert (divided.float() != multiplied.float()).sum() > 20
    assert_bitwise_equal(rowwise.quantize(x).data, divided)


def test_quantize_transpose_and_requantize():
    torch.manual_seed(1)
    x = torch.randn(200, 130)
    got = rowwise.quantize(x, transpose=True)
    want = rowwise.quantize(x.T.contiguous())
    assert got.data.shape == (130, 200) and got.scale.shape == (130, 2)
    assert_bitwise_equal(got.data, want.data)
    assert_bitwise_equal(got.scale, want.scale)
    # A power-of-two 1x128 tile becomes a 128x1 tile: the backward of the report's E5M6 cache.
    cached = rowwise.quantize(x, scale_format="pow2", dtype="e5m6")
    again = rowwise.quantize(cached, scale_format="pow2", dtype="e5m6", transpose=True)
    assert_bitwise_equal(
        again.data, rowwise.quantize(cached.dequantize().T, (1, 128), "pow2", "e5m6").data
    )
    assert (again.dequantize().T - cached.dequantize()).abs().max() < 2**-6 * x.abs().max()


def test_quantize_empty_batched_and_other_dtypes():
    for shape in ((0, 576), (7, 0), (0, 0), (2, 0, 576)):
        got = rowwise.quantize(torch.zeros(shape))
        assert got.shape == shape and got.dequantize().shape == shape
        assert got.scale.shape == (*shape[:-1], -(-shape[-1] // 128))
    torch.manual_seed(2)
    weights = torch.randn(3, 200, 576).bfloat16()
    got = rowwise.quantize(weights, (128, 128))
    assert got.scale.shape == (3, 2, 5)
    for g in range(3):
        one = rowwise.quantize(weights[g].float(), (128, 128))
        assert_bitwise_equal(got.data[g], one.data)
        assert_bitwise_equal(got.scale[g], one.scale)
    assert rowwise.quantize(weights).scale.stride() == (5 * 200, 1, 200)


def test_quantize_nan_and_infinity():
    x = torch.ones(1, 384)
    x[0, 3], x[0, 130] = torch.nan, -torch.inf
    got = rowwise.quantize(x)
    assert got.scale[0].tolist() == [x.new_tensor(1 / 448).item(), math.inf, got.scale[0, 2].item()]
    back = got.dequantize()[0]
    assert back[3].isnan() and back[:128].isnan().sum() == 1
    assert back[128:256].isnan().all() and back[256:].isfinite().all()
    assert rowwise.quantize(torch.full((1, 128), torch.nan)).scale.isfinite().all()


def test_quantize_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="scale_format: expected one of .* got 'int8'"):
        rowwise.quantize(torch.ones(1, 1), scale_format="int8")
    with pytest.raises(ValueError, match="dtype: expected one of .* got 'e3m4'"):
        rowwise.quantize(torch.ones(1, 1), dtype="e3m4")
    with pytest.raises(ValueError, match="at least 2 dimensions"):
        rowwise.quantize(torch.ones(128))


def test_scaled_tensor_checks_itself_and_keeps_its_layout():
    q = rowwise.quantize(torch.randn(6, 576))
    assert q.to("cpu").scale.stride() == q.scale.stride() == (1, 8)
    assert q.dequantize(torch.bfloat16).dtype == torch.bfloat16
    wide = q.dequantize(torch.float64)
    assert (wide - q.dequantize()).abs().max() < 2**-24 * wide.abs().max()
    with pytest.raises(ValueError, match=r"scale: expected shape \(6, 5\) .* got \(6, 4\)"):
        ScaledTensor(q.data, q.scale[:, :4], (1, 128))
    with pytest.raises(TypeError, match="data: expected torch.float8_e4m3fn"):
        ScaledTensor(q.data.float(), q.scale, (1, 128))
    with pytest.raises(TypeError, match="scale: expected torch.float32, got torch.float64"):
        ScaledTensor(q.data, q.scale.double(), (1, 128))
    with pytest.raises(ValueError, match="dtype: expected one of"):
        ScaledTensor(q.data, q.scale, (1, 128), "e5m2")
    assert Support(True, "built") and not Support(False, "no GPU")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rms_norm(dtype):
    torch.manual_seed(3)
    x, weight = torch.randn(4, 3, 64).to(dtype), torch.rand(64) + 0.5
    exact = x.double() / (x.double().pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float64: 1e-12}[dtype]
    y = rowwise.rms_norm(x, weight)
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), exact, atol=tolerance, rtol=tolerance)
    residual = torch.randn_like(x)
    y, total = rowwise.rms_norm(x, weight, residual=residual)
    assert_bitwise_equal(total, x + residual)
    assert_bitwise_equal(y, rowwise.rms_norm(x + residual, weight))
    zeros = rowwise.rms_norm(torch.zeros(2, 64, dtype=dtype), weight)
    assert not zeros.any(), "eps keeps an all-zero row at zero"
    assert rowwise.rms_norm(torch.full((1, 64), 1e-4), torch.ones(64), eps=1e-8)[0, 0] < 0.71


def test_rope_is_a_rotation_of_interleaved_pairs():
    torch.manual_seed(4)
    x = torch.randn(5, 2, 8)
    angle = torch.arange(5)[:, None] * torch.tensor([1.0, 0.5, 0.25, 0.125])
    y = rowwise.rope(x, angle.cos(), angle.sin())
    for t in range(5):
        for p in range(4):
            z = torch.complex(x[t, :, 2 * p], x[t, :, 2 * p + 1])
            want = z * complex(math.cos(angle[t, p]), math.sin(angle[t, p]))
            torch.testing.assert_close(torch.view_as_complex(y[t, :, 2 * p : 2 * p + 2]), want)
    back = rowwise.rope(y, angle.cos(), angle.sin(), inverse=True)
    torch.testing.assert_close(back, x)
    # The half-split form is the same rotation on permuted elements.
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
    split = rowwise.rope(x[..., order], angle.cos(), angle.sin(), interleaved=False)
    assert_bitwise_equal(split, y[..., order])
    batched = rowwise.rope(x.expand(3, 5, 2, 8), angle.cos(), angle.sin())
    assert_bitwise_equal(batched[2], y)
    assert rowwise.rope(x.bfloat16(), angle.cos(), angle.sin()).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="even r"):
        rowwise.rope(x, angle.cos()[:, :3], angle.sin()[:, :3])


def test_swiglu_has_the_gate_first():
    x = torch.tensor([[1.0, -2.0, 10.0, 100.0]])
    want = [10 / (1 + math.exp(-1)), -200 / (1 + math.exp(2))]
    torch.testing.assert_close(rowwise.swiglu(x), torch.tensor([want]))
    assert rowwise.swiglu(x.bfloat16()).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="even last dimension"):
        rowwise.swiglu(x[:, :3])


def test_fused_forms_quantise_the_unrounded_value():
    torch.manual_seed(5)
    x, weight = torch.randn(6, 256).bfloat16(), torch.rand(256)
    fused = rowwise.rms_norm_quantize(x, weight)
    assert_bitwise_equal(fused.data, rowwise.quantize(rowwise.rms_norm(x.float(), weight)).data)
    rounded = rowwise.quantize(rowwise.rms_norm(x, weight))
    assert not torch.equal(fused.scale, rounded.scale)
    fused, total = rowwise.rms_norm_quantize(x, weight, residual=x)
    assert_bitwise_equal(total, x + x)
    assert_bitwise_equal(fused.data, rowwise.rms_norm_quantize(total, weight).data)
    gated = rowwise.swiglu_quantize(x, scale_format="ue8m0")
    want = rowwise.quantize(rowwise.swiglu(x.float()), scale_format="ue8m0")
    assert_bitwise_equal(gated.data, want.data)
    assert_bitwise_equal(gated.scale, want.scale)


def test_rowwise_gradients():
    torch.manual_seed(6)
    x = torch.randn(3, 2, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(8, dtype=torch.float64, requires_grad=True)
    angle = torch.rand(3, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(rowwise.rms_norm, (x, weight))
    assert torch.autograd.gradcheck(lambda v: rowwise.rope(v, angle.cos(), angle.sin()), (x,))
    assert torch.autograd.gradcheck(rowwise.swiglu, (x,))
