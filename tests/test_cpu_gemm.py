"""CPU FP8 GEMM against fp64 on every target, on ordinary, ragged and adversarial data."""

from __future__ import annotations

import pytest
import torch
from cpu_targets import TARGETS, guarded, relative_error, use_target
from hypothesis import given, settings
from hypothesis import strategies as st

from dskernels import _C
from dskernels.cpu import PackedWeight, gemm, pack, rowwise
from dskernels.cpu.packing import packed
from dskernels.ref import gemm as ref
from dskernels.types import ScaledTensor

# fp32 sums of exact products, and fp16 chains of 32 (csrc/cpu/kernels/gemm_half.hpp).
EXACT, HALF = 2e-6, 2e-3
WORST_CHAIN = 16 * 2**-11  # every rounding of a chain of 32 the same way: half of 32 half-ulps
FP8 = torch.float8_e4m3fn


@pytest.fixture(params=TARGETS)
def target(request):
    with use_target(request.param) as name:
        yield name


def bound(target: str, m: int) -> float:
    return HALF if target == "avx512_fp16" or (target == "amx" and m <= 8) else EXACT


def operands(m, n, k, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(m, k, generator=g)
    return x, rowwise.quantize(torch.randn(n, k, generator=g) * 0.02, (128, 128))


def fp64(a, b):
    wide = a.dequantize(torch.float64) if isinstance(a, ScaledTensor) else a.double()
    return wide @ b.dequantize(torch.float64).T


SHAPES = [(1, 64, 128), (2, 1, 1), (3, 576, 200), (5, 65, 576), (8, 130, 33), (9, 192, 512)]
SHAPES += [(13, 70, 129), (17, 64, 300), (40, 576, 576), (100, 200, 128), (800, 64, 160)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_w8a8_and_w8a16(target, shape):
    x, weight = operands(*shape)
    for a in (rowwise.quantize(x), x.bfloat16(), x, x.half()):
        got = gemm.gemm(a, weight, out_dtype=torch.float32)
        kind = a.dtype if isinstance(a, torch.Tensor) else None
        limit = HALF if kind == torch.float16 else bound(target, shape[0])
        assert relative_error(got, fp64(a, weight)) < limit


def test_w8a8_is_nearly_the_pinned_sum(target):
    """The reference rounds each block's exact sum once; fp32 units differ in their last bits."""
    x, weight = operands(33, 130, 576)
    a = rowwise.quantize(x)
    got = gemm.gemm(a, weight, out_dtype=torch.float32)
    want = ref.gemm(a, weight, out_dtype=torch.float32)
    assert relative_error(got, want) < (HALF if target == "avx512_fp16" else 1e-6)


def test_c_bias_out_and_epilogues(target):
    x, weight = operands(20, 256, 300)
    a = rowwise.quantize(x)
    c, bias = torch.randn(20, 256).bfloat16(), torch.randn(256)
    want = fp64(a, weight) + c.double() + bias.double()
    got = gemm.gemm(a, weight, c=c, bias=bias, out_dtype=torch.float32)
    assert relative_error(got, want) < bound(target, 20)
    wide = torch.zeros(20, 300)
    out = wide[:, 7:263]
    assert gemm.gemm(a, weight, out=out) is out and bool((wide[:, :7] == 0).all())
    assert relative_error(out, fp64(a, weight)) < bound(target, 20)
    transposed = torch.zeros(256, 20).t()
    gemm.gemm(a, weight, out=transposed)
    assert relative_error(transposed, fp64(a, weight)) < bound(target, 20)
    for epilogue in ("swiglu", "swiglu_quant"):
        got = gemm.gemm(a, weight, epilogue=epilogue)
        want = ref.gemm(a, weight, epilogue=epilogue)
        got, want = (
            v.dequantize() if isinstance(v, ScaledTensor) else v.float() for v in (got, want)
        )
        assert relative_error(got, want) < 1e-2


def test_grouped_by_sizes(target):
    g = torch.Generator().manual_seed(2)
    weight = rowwise.quantize(torch.randn(4, 130, 200, generator=g), (128, 128))
    a = rowwise.quantize(torch.randn(50, 200, generator=g))
    sizes = [20, 0, 3, 22]
    got = gemm.grouped_gemm(a, weight, group_sizes=sizes, out_dtype=torch.float32)
    want = ref.grouped_gemm(a, weight, group_sizes=sizes, out_dtype=torch.float32)
    assert relative_error(got, want) < HALF
    assert bool((got[45:] == 0).all())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_two_operands_with_scales_of_their_rows(target, shape):
    """1d1d: weight gradients. Scales of one block differ by powers of ten from column to column."""
    m, n, k = shape
    x, _ = operands(m, 1, k)
    w = torch.randn(n, k) * torch.logspace(-3, 3, n)[:, None]
    a, b = rowwise.quantize(x), rowwise.quantize(w)
    got = gemm.gemm(a, b)
    want = ref.gemm(a, b)
    assert got.dtype == torch.float32
    scale = fp64(a, b).abs().amax(0).clamp_min(1e-30)
    assert bool(((got.double() - want.double()).abs() <= 2e-6 * scale).all())
    c = torch.randn(m, n).bfloat16()
    assert torch.equal(gemm.gemm(a, b, c=c), got + c.float())


def test_groups_along_k(target):
    g = torch.Generator().manual_seed(3)
    a, b = (rowwise.quantize(torch.randn(rows, 600, generator=g)) for rows in (70, 200))
    sizes = [128, 0, 256]
    poisoned = b.data.clone().view(torch.uint8)
    poisoned[:, 384:] = 0x7F  # behind the last group: never read
    b = ScaledTensor(poisoned.view(FP8), b.scale, b.block)
    c = torch.randn(3, 70, 200, generator=g)
    want = ref.grouped_gemm_k(a, b, sizes)
    got = gemm.grouped_gemm_k(a, b, sizes)
    assert relative_error(got, want) < 1e-6 and bool((got[1] == 0).all())
    out = torch.zeros(3, 70, 200, dtype=torch.bfloat16)
    assert gemm.grouped_gemm_k(a, b, sizes, c=c, out=out) is out
    assert relative_error(out, want + c) < 4e-3
    assert gemm.grouped_gemm_k(a, b, []).shape == (0, 70, 200)
    with pytest.raises(ValueError, match="group_sizes: expected multiples of 128"):
        gemm.grouped_gemm_k(a, b, [100])
    with pytest.raises(ValueError, match="c: expected shape"):
        gemm.grouped_gemm_k(a, b, sizes, c=c[:2])


@pytest.mark.parametrize("epilogue", [None, "swiglu", "swiglu_quant"])
def test_grouped_by_indices_and_masks(target, epilogue):
    """Padding rows are NaN and 0 in the result, whatever c holds."""
    g = torch.Generator().manual_seed(4)
    weight = rowwise.quantize(torch.randn(4, 128, 200, generator=g) * 0.07, (128, 128))
    x = torch.randn(4, 12, 200, generator=g)
    masked = torch.tensor([5, 0, 12, 1], dtype=torch.int32)
    for group, count in enumerate(masked.tolist()):
        x[group, count:] = torch.nan
    indices = torch.tensor([2, -1, 0, 0, 3, 2, -1, 3], dtype=torch.int32)
    rows = torch.randn(8, 200, generator=g).masked_fill((indices < 0)[:, None], torch.nan)
    bias = torch.randn(4, 128, generator=g)
    forms = [(x.view(48, 200), x.shape, dict(masked_m=masked)), (rows, rows.shape, {})]
    for flat, shape, form in forms:
        form = form or dict(m_indices=indices)
        q = rowwise.quantize(flat)
        a = ScaledTensor(q.data.view(shape), q.scale.reshape(*shape[:-1], -1), (1, 128))
        c = torch.randn(*shape[:-1], 128, generator=g)
        modes = dict(c=c, bias=bias, epilogue=epilogue, **form)
        got, want = (f.grouped_gemm(a, weight, **modes) for f in (gemm, ref))
        if epilogue == "swiglu_quant":
            got, want = got.dequantize(), want.dequantize()
        assert got.shape == want.shape and got.dtype == want.dtype
        assert relative_error(got, want) < (5e-2 if epilogue == "swiglu_quant" else 5e-3)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("deterministic", [True, False])
def test_plain_products_are_not_widened_whole(monkeypatch, kind, deterministic):
    """Slices, ragged at the end, give what one product of fp32 copies gives."""
    g = torch.Generator().manual_seed(5)
    a, b = torch.randn(5, 96, generator=g).to(kind), torch.randn(203, 96, generator=g).to(kind)
    want = ref.gemm(a, b)
    monkeypatch.setattr(gemm, "_SLICE_BYTES", 10 * 96 * 4)
    for native in (True, False):
        monkeypatch.setattr(gemm, "_onednn_has_bf16", lambda native=native: native)
        got = gemm.gemm(a, b, deterministic=deterministic)
        assert got.dtype == kind
        assert relative_error(got, a.double() @ b.double().T) < 1.2 * relative_error(
            want, a.double() @ b.double().T
        )
    leaf = a.clone().requires_grad_()
    gemm.gemm(leaf, b).sum().backward()
    assert leaf.grad is not None


def test_empty_dimensions(target):
    for m, n, k in [(0, 64, 128), (3, 0, 128), (3, 64, 0)]:
        a = ScaledTensor(torch.empty(m, k, dtype=FP8), torch.empty(m, -(-k // 128)), (1, 128))
        shape = (-(-n // 128), -(-k // 128))
        b = ScaledTensor(torch.empty(n, k, dtype=FP8), torch.empty(shape), (128, 128))
        got = gemm.gemm(a, b)
        assert got.shape == (m, n) and bool((got == 0).all())


def e4m3(codes: torch.Tensor) -> torch.Tensor:
    return codes.to(torch.uint8).view(FP8)


def scaled(a, b):
    m, n, k = a.shape[0], b.shape[0], a.shape[1]
    blocks = -(-k // 128)
    return (
        ScaledTensor(a, torch.ones(m, blocks), (1, 128)),
        ScaledTensor(b, torch.ones(-(-n // 128), blocks), (128, 128)),
    )


@pytest.mark.parametrize("m", [1, 6, 30])
def test_every_pair_of_codes(target, m):
    """One product at a time: 254 x 254 finite codes, each alone in its sum, exact or within 2^-18.

    2^-18 is the product of the two smallest positive E4M3 numbers: the fp16 unit's quantum.
    """
    codes = torch.tensor([c for c in range(256) if c & 0x7F != 0x7F])
    weights = torch.zeros(254, 128, dtype=torch.long)
    weights[:, 77] = codes
    for start in range(0, 254, m):
        piece = codes[start : start + m]
        rows = torch.zeros(len(piece), 128, dtype=torch.long)
        rows[:, 77] = piece
        a, b = scaled(e4m3(rows), e4m3(weights))
        got = gemm.gemm(a, b, out_dtype=torch.float32)
        want = fp64(a, b)
        error = (got.double() - want).abs()
        if bound(target, len(piece)) == EXACT:
            assert bool((error == 0).all())
        else:
            assert bool((error <= 2**-18 + want.abs() * 2**-10).all())


@pytest.mark.parametrize("m", [1, 12, 40])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_sums_do_not_overflow(target, m, sign):
    """448 x 448 at every position: the worst case of the fp16 range argument."""
    a, b = scaled(torch.full((m, 512), 448.0).to(FP8), torch.full((64, 512), 448.0 * sign).to(FP8))
    got = gemm.gemm(a, b, out_dtype=torch.float32)
    want = torch.full((m, 64), 448.0 * 448.0 * 512 * sign)
    assert relative_error(got, want) <= (0 if bound(target, m) == EXACT else WORST_CHAIN)
    x = torch.full((m, 512), 1.9921875 * 2.0**100).bfloat16()  # just below a power of two
    got = gemm.gemm(x, b, out_dtype=torch.float32)
    assert relative_error(got, fp64(x, b)) < (EXACT if bound(target, m) == EXACT else WORST_CHAIN)


@pytest.mark.parametrize("m", [2, 20])
@pytest.mark.parametrize("outlier", [1e4, 1e10, 1e20, 1e30])
def test_an_outlier_does_not_swallow_its_block(target, m, outlier):
    """W8A16: the outlier meets a zero weight, so the answer is the sum of its small neighbours."""
    x, weight = operands(m, 70, 256, 3)
    x[:, 5] = outlier
    data = weight.data.clone()
    data[:, 5] = 0
    weight = ScaledTensor(data, weight.scale, weight.block)
    for a in (x.bfloat16(), x):
        got = gemm.gemm(a, weight, out_dtype=torch.float32)
        assert relative_error(got, fp64(a, weight)) < bound(target, m)


@pytest.mark.parametrize("m", [2, 20])
def test_small_values_are_not_flushed(target, m):
    """Blocks of activations around 1e-30, zero blocks, and blocks of E4M3 subnormals."""
    x, weight = operands(m, 70, 512, 4)
    x[:, :128] *= 1e-30
    x[:, 128:256] = 0
    for a in (x.bfloat16(), x):
        only = a.clone()
        only[:, 128:] = 0
        got = gemm.gemm(only, weight, out_dtype=torch.float32)
        assert relative_error(got, fp64(only, weight)) < bound(target, m)
    codes = torch.randint(1, 8, (m, 256), generator=torch.Generator().manual_seed(5))
    a, b = scaled(e4m3(codes), e4m3(torch.full((64, 256), 9)))
    got = gemm.gemm(a, b, out_dtype=torch.float32)
    assert relative_error(got, fp64(a, b)) < bound(target, m)


@pytest.mark.parametrize("m", [1, 9, 20])
def test_values_at_the_lower_end_of_bf16(target, m):
    """Rows from 1 down to the smallest subnormal number, with sums that cancel; rows do not mix.

    AMX takes subnormal operands for zeros and is held to the normal ones only."""
    x, weight = operands(m, 70, 256, 9)
    exponents = torch.arange(m) * -133 // max(m - 1, 1)
    lowest = -118 if target == "amx" else -133
    tiny = torch.ldexp(x.sign(), exponents.clamp_min(lowest)[:, None]).bfloat16()
    assert bool((tiny != 0).all())
    got = gemm.gemm(tiny, weight, out_dtype=torch.float32).double()
    want = fp64(tiny, weight)
    magnitude = tiny.double().abs() @ weight.dequantize(torch.float64).abs().T
    # Half an ulp of a subnormal number is 2^-150, however small the sum.
    assert bool(((got - want).abs() <= bound(target, m) * magnitude + 2.0**-150).all())


@pytest.mark.parametrize("m", [1, 11, 40])
def test_nan_and_infinity_in_every_position(target, m):
    """In an activation they show in its row and nowhere else; in a weight, in its column."""
    x, weight = operands(m, 70, 160, 6)
    for position in range(160):
        for value in (torch.nan, torch.inf):
            poisoned = x.bfloat16()
            poisoned[m - 1, position] = value
            got = gemm.gemm(poisoned, packed(weight), out_dtype=torch.float32)
            assert bool(got[: m - 1].isfinite().all())
            assert not bool(got[m - 1].isfinite().any())
    for position in range(0, 160, 7):
        data = weight.data.clone().view(torch.uint8)
        data[3, position] = 0xFF
        poisoned = ScaledTensor(data.view(FP8), weight.scale, weight.block)
        for a in (x.bfloat16(), rowwise.quantize(x)):
            got = gemm.gemm(a, poisoned, out_dtype=torch.float32)
            bad = got.isnan()
            assert bool(bad[:, 3].all()) and int(bad.sum()) == m
        rows = rowwise.quantize(x)
        codes = rows.data.clone().view(torch.uint8)
        codes[0, position] = 0x7F
        got = gemm.gemm(ScaledTensor(codes.view(FP8), rows.scale, rows.block), weight)
        assert bool(got[0].isnan().all()) and bool(got[1:].isfinite().all())


def test_threads_give_the_same_bits(target):
    x, weight = operands(70, 300, 512)
    a, before, results = rowwise.quantize(x), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            results.append(gemm.gemm(a, weight))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_outputs_have_intact_canaries(target):
    for m, n, k in [(1, 1, 1), (3, 65, 40), (17, 100, 130)]:
        x, weight = operands(m, n, k)
        out, intact = guarded((m, n), torch.bfloat16)
        gemm.gemm(x.bfloat16(), weight, out=out)
        assert intact()


def test_pack_and_its_file(tmp_path):
    g = torch.Generator().manual_seed(8)
    for shape in [(1, 1), (70, 33), (3, 130, 257)]:
        codes = torch.randint(0, 256, shape, generator=g)
        scale = torch.rand(*shape[:-2], -(-shape[-2] // 128), -(-shape[-1] // 128), generator=g)
        weight = ScaledTensor(e4m3(codes), scale, (128, 128))
        path = tmp_path / "weight"
        pack(weight).save(path)
        loaded = PackedWeight.load(path)
        back = loaded.unpack()
        assert torch.equal(back.data.view(torch.uint8), weight.data.view(torch.uint8))
        assert torch.equal(back.scale, scale)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match="expected .* bytes for data, got 5000"):
        PackedWeight.load(path)
    path.write_bytes(b"x" * 8192)
    with pytest.raises(ValueError, match="expected a file that starts with"):
        PackedWeight.load(path)


def test_the_cache_notices_a_written_weight():
    x, weight = operands(4, 64, 128)
    first = gemm.gemm(x.bfloat16(), weight)
    weight.data.view(torch.uint8).zero_()
    assert bool((gemm.gemm(x.bfloat16(), weight) == 0).all()) and not bool((first == 0).all())


def test_bad_arguments_are_named():
    x, weight = operands(4, 64, 128)
    with pytest.raises(ValueError, match=r"a, b: expected \[m, k\] and \[n, k\]"):
        gemm.gemm(x[:, :100], weight)
    with pytest.raises(ValueError, match=r"out: expected \(4, 64\), got \(4, 63\)"):
        gemm.gemm(x, weight, out=torch.empty(4, 63))
    with pytest.raises(ValueError, match=r"c: expected shape \[4, 64\]"):
        gemm.gemm(x, weight, c=torch.empty(4, 63))
    with pytest.raises(ValueError, match=r"weight: expected e4m3 in blocks \(128, 128\)"):
        pack(rowwise.quantize(x))


def test_a_target_by_environment():
    """A fresh process: the variable is read once."""
    import os
    import subprocess
    import sys

    code = "from dskernels.cpu import info; print(info()['target'], '|', info()['reason'])"
    for name in TARGETS:
        environment = dict(os.environ, DSK_CPU_TARGET=name)
        run = [sys.executable, "-c", "import dskernels._C as c; print(c.cpu.target())"]
        done = subprocess.run(run, env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == name
    environment = dict(os.environ, DSK_CPU_TARGET="vax")
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert "DSK_CPU_TARGET: expected one of" in done.stderr and "got vax" in done.stderr
    assert _C.cpu.target() == TARGETS[0]


shapes = st.tuples(
    st.integers(1, 60), st.integers(1, 200), st.integers(1, 700), st.integers(0, 2**16)
)


def run_random(shape) -> None:
    m, n, k, seed = shape
    x, weight = operands(m, n, k, seed)
    a = rowwise.quantize(x)
    positive = weight.dequantize(torch.float64).abs().T
    for operand in (a, x.bfloat16()):
        wide = operand.dequantize(torch.float64) if operand is a else operand.double()
        want, magnitude = fp64(operand, weight), wide.abs() @ positive
        for name in TARGETS:
            with use_target(name):
                got = gemm.gemm(operand, weight, out_dtype=torch.float32)
            error = (got.double() - want).norm()
            assert error <= bound(name, m) * magnitude.norm(), name


@settings(max_examples=50, deadline=None, derandomize=True)
@given(shapes)
def test_random_shapes(shape):
    run_random(shape)


@pytest.mark.slow
@settings(max_examples=500, deadline=None)
@given(shapes)
def test_many_random_shapes(shape):
    run_random(shape)
