"""The GEMM reference: the pinned sum rebuilt by hand, every grouping against the dense product."""

import pytest
import torch

from dskernels.ref import fp8, rowwise, tensorcore
from dskernels.ref import gemm as ref
from dskernels.testing import assert_bitwise_equal, assert_close_to_exact
from dskernels.types import ScaledTensor


def operands(m=5, n=200, k=576, one_d=False, seed=0):
    torch.manual_seed(seed)
    a = rowwise.quantize(torch.randn(m, k) * torch.exp2(torch.randint(-4, 5, (m, 1))))
    return a, rowwise.quantize(torch.randn(n, k), (1, 128) if one_d else (128, 128))


@pytest.mark.parametrize("one_d", [False, True], ids=["1d2d", "1d1d"])
@pytest.mark.parametrize("k", [576, 512, 100])
def test_scaled_gemm_is_the_pinned_sum(one_d, k):
    a, b = operands(k=k, one_d=one_d)
    final = torch.zeros(5, 200)
    for j in range(-(-k // 128)):
        ks = slice(128 * j, 128 * (j + 1))
        acc = (a.data[:, ks].double()[:, None] * b.data[:, ks].double()[None]).sum(-1).float()
        row_of_b = torch.arange(200) // b.block[0]
        scale = a.scale[:, j, None] * b.scale[row_of_b, j][None]
        final = tensorcore.fma(scale, acc, final)
    got = ref.gemm(a, b, out_dtype=torch.float32)
    assert_bitwise_equal(got, final)
    default = ref.gemm(a, b)
    assert_bitwise_equal(default, final if one_d else final.bfloat16())
    exact = ref.gemm(a, b, accumulate="fp64", out_dtype=torch.float64)
    torch_fp32 = a.dequantize() @ b.dequantize().T
    assert_close_to_exact(got, exact, torch_fp32)


def test_promotion_happens_every_128_in_blocks_of_any_depth():
    torch.manual_seed(1)
    x, y = torch.rand(4, 512), torch.rand(6, 512)
    a, b = rowwise.quantize(x, (1, 512)), rowwise.quantize(y, (128, 512))
    scale = a.scale * b.scale
    final, alone = torch.zeros(4, 6), torch.zeros(4, 6)
    for ks in (slice(j, j + 128) for j in range(0, 512, 128)):
        acc = tensorcore.wgmma(a.data[:, ks], b.data[:, ks], torch.zeros(4, 6))
        final = tensorcore.fma(scale, acc, final)
        alone = tensorcore.wgmma(a.data[:, ks], b.data[:, ks], alone)
    hopper = dict(out_dtype=torch.float32, accumulate="hopper")
    assert_bitwise_equal(ref.gemm(a, b, **hopper), final)
    hopper["accumulate"] = "hopper_no_promotion"
    assert_bitwise_equal(ref.gemm(a, b, **hopper), scale * alone)
    assert not torch.equal(final, scale * alone)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_plain_gemm(dtype):
    torch.manual_seed(2)
    a, b = torch.randn(7, 300).to(dtype), torch.randn(40, 300).to(dtype)
    got = ref.gemm(a, b)
    assert got.dtype == dtype
    exact = a.double() @ b.double().T
    assert_close_to_exact(got, exact, a @ b.T)
    if dtype in (torch.bfloat16, torch.float16):
        hopper = ref.gemm(a, b, accumulate="hopper", out_dtype=torch.float32)
        assert_bitwise_equal(hopper, tensorcore.wgmma(a, b, torch.zeros(7, 40)))
        assert (hopper - exact).abs().max() < 1e-5 * exact.abs().max()
    else:
        with pytest.raises(TypeError, match="expects fp16 or bf16"):
            ref.gemm(a, b, accumulate="hopper")


def test_c_bias_out_and_epilogues():
    a, b = operands()
    c, bias = torch.randn(5, 200).bfloat16(), torch.randn(200)
    raw = ref.gemm(a, b, out_dtype=torch.float32)
    full = raw + c.float() + bias
    out = torch.empty(5, 200, dtype=torch.bfloat16)
    got = ref.gemm(a, b, c=c, bias=bias, out=out, num_sms=4, deterministic=True)
    assert got is out
    assert_bitwise_equal(out, full.bfloat16())
    gated = ref.gemm(a, b, c=c, bias=bias, epilogue="swiglu", out_dtype=torch.float32)
    assert_bitwise_equal(gated, rowwise.swiglu(full))
    quantized = ref.gemm(a, b, c=c, bias=bias, epilogue="swiglu_quant")
    want = rowwise.quantize(rowwise.swiglu(full))
    assert isinstance(quantized, ScaledTensor)
    assert_bitwise_equal(quantized.data, want.data)
    assert_bitwise_equal(quantized.scale, want.scale)


def test_empty_gemms():
    bias = torch.randn(4)
    assert ref.gemm(torch.zeros(0, 8), torch.zeros(4, 8)).shape == (0, 4)
    assert torch.equal(ref.gemm(torch.zeros(3, 0), torch.zeros(4, 0), bias=bias)[2], bias)
    a, b = rowwise.quantize(torch.zeros(3, 0)), rowwise.quantize(torch.zeros(4, 0), (128, 128))
    assert not ref.gemm(a, b).any()
    for mode in ("hopper", "fp64"):
        assert ref.gemm(a, b, accumulate=mode).shape == (3, 4)
        assert ref.gemm(*operands(m=0, n=4), accumulate=mode).shape == (0, 4)


def test_nan_reaches_its_row_and_column_only():
    a, b = operands()
    a.data.view(torch.uint8)[2, 570] = 0x7F
    b.data.view(torch.uint8)[7, 3] = 0xFF
    nan = ref.gemm(a, b).isnan()
    assert nan[2].all() and nan[:, 7].all() and nan.sum() == 200 + 5 - 1


def grouped_weights(scaled, groups=4, n=24, k=256, seed=3):
    torch.manual_seed(seed)
    plain = torch.randn(groups, n, k)
    return rowwise.quantize(plain, (128, 128)) if scaled else plain


def as_operand(x, scaled):
    return rowwise.quantize(x) if scaled else x


def poison(a):
    """Rows 3 .. 5 must never be read: NaN in data, and in scales."""
    if isinstance(a, ScaledTensor):
        a.data.view(torch.uint8)[3:6] = 0x7F
        a.scale[3:6] = torch.nan
    else:
        a[3:6] = torch.nan
    return a


@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
@pytest.mark.parametrize("epilogue", [None, "swiglu"])
def test_grouped_contiguous_forms(scaled, epilogue):
    b = grouped_weights(scaled)
    x = torch.randn(12, 256)
    m_indices = torch.tensor([1, 1, 1, -1, -1, -1, 3, 3, 0, 3, 0, 0], dtype=torch.int32)
    c, bias = torch.randn(12, 24), torch.randn(4, 24)
    keep = dict(out_dtype=torch.float32, epilogue=epilogue)
    a = poison(as_operand(x, scaled))
    got = ref.grouped_gemm(a, b, m_indices=m_indices, c=c, bias=bias, **keep)
    clean = as_operand(x, scaled)
    for row, group in enumerate(m_indices.tolist()):
        if group < 0:
            assert not got[row].any(), "padding rows are zero, whatever c and bias hold"
            continue
        rows = torch.tensor([row])
        one = ref.gemm(
            ref._take_rows(clean, rows), ref._take_group(b, group), c=c[rows], bias=bias[group],
            **keep,
        )  # fmt: skip
        torch.testing.assert_close(got[rows], one, atol=1e-4, rtol=1e-5)
    sizes = torch.tensor([3, 0, 7, 1])
    by_size = ref.grouped_gemm(clean, b, group_sizes=sizes, **keep)
    names = torch.tensor([0] * 3 + [2] * 7 + [3] + [-1])
    assert_bitwise_equal(by_size, ref.grouped_gemm(clean, b, m_indices=names, **keep))
    assert not by_size[11].any()


@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
def test_grouped_masked(scaled):
    b = grouped_weights(scaled)
    x = torch.randn(4, 6, 256)
    masked_m = torch.tensor([6, 0, 3, 1], dtype=torch.int32)
    a = as_operand(x, scaled)
    for group, count in enumerate(masked_m.tolist()):
        if scaled:
            a.data.view(torch.uint8)[group, count:] = 0x7F
            a.scale[group, count:] = torch.nan
        else:
            a[group, count:] = torch.nan
    got = ref.grouped_gemm(a, b, masked_m=masked_m, expected_m=3)
    assert got.shape == (4, 6, 24) and got.dtype == (torch.bfloat16 if scaled else torch.float32)
    for group, count in enumerate(masked_m.tolist()):
        one = ref.gemm(as_operand(x[group, :count], scaled), ref._take_group(b, group))
        assert_bitwise_equal(got[group, :count], one)
        assert not got[group, count:].any()


def test_grouped_swiglu_quant_and_nothing_to_do():
    b = grouped_weights(True, n=256)
    a = rowwise.quantize(torch.randn(9, 256))
    sizes = [2, 0, 4, 3]
    got = ref.grouped_gemm(a, b, group_sizes=sizes, epilogue="swiglu_quant")
    wide = ref.grouped_gemm(a, b, group_sizes=sizes, epilogue="swiglu", out_dtype=torch.float32)
    assert_bitwise_equal(got.data, rowwise.quantize(wide).data)
    assert got.scale.shape == (9, 1)
    none = ref.grouped_gemm(rowwise.quantize(torch.zeros(0, 256)), b, group_sizes=[0] * 4)
    assert none.shape == (0, 256) and none.dtype == torch.bfloat16


@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
def test_grouped_along_k(scaled):
    torch.manual_seed(4)
    x, y = torch.randn(6, 640), torch.randn(10, 640)
    a, b = as_operand(x, scaled), as_operand(y, scaled)
    sizes = torch.tensor([128, 0, 384])
    if not scaled:
        a, b = a.clone(), b.clone()
        a[:, 512:] = b[:, 512:] = torch.nan
    c = torch.randn(3, 6, 10)
    got = ref.grouped_gemm_k(a, b, sizes, c=c)
    assert got.shape == (3, 6, 10) and got.dtype == torch.float32
    for group, ks in enumerate((slice(0, 128), slice(0, 0), slice(128, 512))):
        one = ref.gemm(as_operand(x[:, ks], scaled), as_operand(y[:, ks], scaled), c=c[group])
        assert_bitwise_equal(got[group], one)
    assert_bitwise_equal(got[1], c[1])
    assert ref.grouped_gemm_k(a, b, []).shape == (0, 6, 10)


def test_gradients():
    torch.manual_seed(5)
    f64 = dict(dtype=torch.float64, requires_grad=True)
    a, b = torch.randn(5, 6, **f64), torch.randn(4, 6, **f64)
    assert torch.autograd.gradcheck(lambda a, b: ref.gemm(a, b, epilogue="swiglu"), (a, b))
    w = torch.randn(3, 4, 6, **f64)
    assert torch.autograd.gradcheck(
        lambda a, w: ref.grouped_gemm(a, w, group_sizes=[2, 0, 3]), (a, w)
    )
    assert torch.autograd.gradcheck(
        lambda a, b: ref.grouped_gemm_k(a, b, [4, 2], out_dtype=torch.float64), (a, b)
    )


def test_errors_name_the_argument():
    a, b = operands()
    x, y = torch.randn(5, 8), torch.randn(4, 8)
    w = torch.randn(2, 4, 8)
    cases = [
        (lambda: ref.gemm(a, y), TypeError, "two plain tensors or two ScaledTensors"),
        (lambda: ref.gemm(x, y[:, :7]), ValueError, r"same k, got \(5, 8\) and \(4, 7\)"),
        (lambda: ref.gemm(x, y.double()), TypeError, "one dtype"),
        (lambda: ref.gemm(x.int(), y.int()), TypeError, "expected fp16, bf16, fp32 or fp64"),
        (lambda: ref.gemm(b, a), ValueError, r"expected blocks .* got \(128, 128\) and \(1, 128"),
        (lambda: ref.gemm(x, y, epilogue="relu"), ValueError, "epilogue: expected .*'relu'"),
        (lambda: ref.gemm(x, y, accumulate="int8"), ValueError, "accumulate: expected .*'int8'"),
        (lambda: ref.gemm(x, y, c=x), ValueError, r"c: expected shape \(5, 4\), got \(5, 8\)"),
        (lambda: ref.gemm(x, y, bias=x[0]), ValueError, r"bias: expected \[n = 4\]"),
        (lambda: ref.gemm(x, y, out=x), ValueError, r"out: expected \(5, 4\), got \(5, 8\)"),
        (lambda: ref.grouped_gemm(x, w), ValueError, "exactly one of"),
        (lambda: ref.grouped_gemm(x, w, group_sizes=[3, 3]), ValueError, "sum of at most 5"),
        (lambda: ref.grouped_gemm(x, w, group_sizes=[5]), ValueError, "expected 2 values, got 1"),
        (
            lambda: ref.grouped_gemm(x, w, m_indices=torch.tensor([0, 1, 2, 0, 0])),
            ValueError,
            r"values in \[-1, 2\), got 0 .. 2",
        ),
        (
            lambda: ref.grouped_gemm(x.expand(2, 5, 8), w, masked_m=torch.tensor([1, 6])),
            ValueError,
            r"masked_m: expected 2 values in \[0, 5\], got \[1, 6\]",
        ),
        (lambda: ref.grouped_gemm_k(a, a, [100]), ValueError, "multiples of 128"),
        (lambda: ref.grouped_gemm_k(a, b, [128]), ValueError, "b: expected block"),
    ]
    for call, error, message in cases:
        with pytest.raises(error, match=message):
            call()
    cached = ScaledTensor(fp8.cast_e5m6(torch.ones(1, 128)), torch.ones(1, 1), (1, 128), "e5m6")
    with pytest.raises(TypeError, match="expected e4m3 data"):
        ref.gemm(cached, cached)
