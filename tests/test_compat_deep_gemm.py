"""DeepGEMM's interface on every backend, in the manner of its own tests: random operands, the
result of the product of the unquantised ones, calc_diff below 1e-3."""

import inspect

import pytest
import torch
from backend_axis import interpret_once, need, on_cpu, on_device

import dskernels as dsk
from dskernels.compat import deep_gemm
from dskernels.testing import assert_bitwise_equal, calc_diff

LAYOUTS = ["nt", "nn", "tn", "tt"]
BOUND = 1e-3


@pytest.fixture
def fp8(backend):
    """Calls run on this backend; FP8 quantisation errors are no part of the comparison."""
    need("gemm", backend, n=128, k=128)
    with dsk.use_backend(backend):
        yield backend


def cast_pair(cast, x, backend):
    data, scale = cast(x, use_ue8m0=False)
    return on_device(data, backend), on_device(scale, backend)


def value(pair, rows):
    return dsk.ScaledTensor(on_cpu(pair[0]), on_cpu(pair[1]), (rows, 128)).dequantize()


def turned(pair):
    """As DeepGEMM's tests make a transposed operand: the data and the scales, both turned."""
    data = pair[0].view(torch.uint8).transpose(-2, -1).contiguous().view(pair[0].dtype)
    return data, pair[1].transpose(-2, -1).contiguous()


def empty(*shape, backend, dtype=torch.bfloat16):
    return on_device(torch.full(shape, float("nan"), dtype=dtype), backend)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("m,n,k", [(1, 576, 256), (130, 264, 384)])
def test_gemm(fp8, m, n, k, layout):
    a = cast_pair(deep_gemm.per_token_cast_to_fp8, torch.randn(m, k), fp8)
    b = cast_pair(deep_gemm.per_block_cast_to_fp8, torch.randn(n, k), fp8)
    want = value(a, 1) @ value(b, 128).t()
    d = empty(m, n, backend=fp8)
    given_a = turned(a) if layout[0] == "t" else a
    given_b = turned(b) if layout[1] == "n" else b
    assert getattr(deep_gemm, f"fp8_gemm_{layout}")(given_a, given_b, d) is None
    assert calc_diff(on_cpu(d), want) < BOUND
    direct = empty(m, n, backend=fp8)
    deep_gemm.gemm_fp8_fp8_bf16_nt(a, b, direct)
    assert_bitwise_equal(on_cpu(d), on_cpu(direct))


@pytest.mark.parametrize("m,n,k", [(70, 136, 256)])
def test_weight_gradient_accumulates(fp8, m, n, k):
    a = cast_pair(deep_gemm.per_token_cast_to_fp8, torch.randn(m, k), fp8)
    b = cast_pair(deep_gemm.per_token_cast_to_fp8, torch.randn(n, k), fp8)
    c = torch.randn(m, n)
    want = value(a, 1) @ value(b, 1).t() + c
    d = empty(m, n, backend=fp8, dtype=torch.float32)
    deep_gemm.fp8_gemm_nt(a, b, d, c=on_device(c, fp8), recipe=(1, 1, 128))
    assert calc_diff(on_cpu(d), want) < BOUND
    by_name = on_device(c.clone(), fp8)
    deep_gemm.wgrad_gemm_fp8_fp8_fp32_nt(a, b, by_name)
    assert_bitwise_equal(on_cpu(by_name), on_cpu(d))
    recipes = empty(m, n, backend=fp8, dtype=torch.float32)
    deep_gemm.fp8_gemm_nt(
        a, b, recipes, c=on_device(c, fp8), recipe_a=(1, 128), recipe_b=(1, 128)
    )  # fmt: skip
    assert_bitwise_equal(on_cpu(recipes), on_cpu(d))


SIZES = [100, 0, 128, 3]


def padded_groups(k):
    """Rows of the groups, each at a multiple of 128, and both layouts that describe them."""
    starts, ends, at = [], [], 0
    for size in SIZES:
        starts.append(at)
        ends.append(at + size)
        at = deep_gemm.align(at + size, 128)
    a = torch.full((at, k), float("nan"))
    indices = torch.full((at,), -1, dtype=torch.int32)
    for group, (start, end) in enumerate(zip(starts, ends)):
        a[start:end] = torch.randn(end - start, k)
        indices[start:end] = group
    return a, indices, torch.tensor(ends, dtype=torch.int32)


def per_row(a, b, indices):
    want = torch.zeros(a.shape[0], b.shape[1])
    for row, group in enumerate(indices.tolist()):
        if group >= 0:
            want[row] = a[row] @ b[group].t()
    return want


@pytest.mark.parametrize("layout", ["nt", "nn"])
@pytest.mark.parametrize("psum", [False, True])
def test_contiguous_groups(fp8, layout, psum):
    interpret_once(fp8, layout == "nt" and not psum)
    n, k = 136, 256
    x, indices, ends = padded_groups(k)
    # A NaN in a padding row must not reach any result.
    a = cast_pair(deep_gemm.per_token_cast_to_fp8, x, fp8)
    b = cast_pair(deep_gemm.per_block_cast_to_fp8, torch.randn(len(SIZES), n, k), fp8)
    d = empty(len(x), n, backend=fp8)
    call = getattr(deep_gemm, f"m_grouped_fp8_gemm_{layout}_contiguous")
    given_b = turned(b) if layout == "nn" else b
    call(a, given_b, d, on_device(ends if psum else indices, fp8), use_psum_layout=psum)
    want = per_row(value(a, 1), value(b, 128), indices)
    assert calc_diff(on_cpu(d), want) < BOUND
    assert (on_cpu(d)[indices == -1] == 0).all()
    if layout == "nt" and not psum:
        by_name = empty(len(x), n, backend=fp8)
        deep_gemm.m_grouped_gemm_fp8_fp8_bf16_nt_contiguous(a, b, by_name, on_device(indices, fp8))
        assert_bitwise_equal(on_cpu(by_name), on_cpu(d))


def test_masked_groups(fp8):
    groups, rows, n, k = 3, 80, 136, 256
    a = cast_pair(deep_gemm.per_token_cast_to_fp8, torch.randn(groups, rows, k), fp8)
    b = cast_pair(deep_gemm.per_block_cast_to_fp8, torch.randn(groups, n, k), fp8)
    masked_m = torch.tensor([5, 0, 80], dtype=torch.int32)
    want = value(a, 1) @ value(b, 128).transpose(1, 2)
    for name in ("m_grouped_fp8_gemm_nt_masked", "m_grouped_gemm_fp8_fp8_bf16_nt_masked"):
        d = empty(groups, rows, n, backend=fp8)
        getattr(deep_gemm, name)(a, b, d, on_device(masked_m, fp8), 40)
        for group, count in enumerate(masked_m.tolist()):
            if count:
                assert calc_diff(on_cpu(d)[group, :count], want[group, :count]) < BOUND


@pytest.mark.parametrize("psum", [False, True])
def test_groups_along_k(backend, psum):
    need("grouped_gemm_k", backend, n=128, k=128)
    interpret_once(backend, not psum)
    ks, m, n = [128, 0, 384], 72, 136
    pieces = [(torch.randn(m, k), torch.randn(n, k)) for k in ks]
    start = torch.randn(len(ks), m, n)
    want = start + torch.stack([x @ y.t() for x, y in pieces])

    def operand(side):
        quantised = dsk.quantize(torch.cat([p[side] for p in pieces], dim=1))
        bytes_ = quantised.data.view(torch.uint8).split(ks, dim=1)
        flat = torch.cat([piece.reshape(-1) for piece in bytes_])
        return on_device(flat.view(torch.float8_e4m3fn), backend), on_device(
            quantised.scale, backend
        )

    with dsk.use_backend(backend):
        d = on_device(start.clone(), backend)
        layout = torch.tensor(ks, dtype=torch.int32)
        layout = on_device(layout.cumsum(0).int() if psum else layout, backend)
        a, b = operand(0), operand(1)
        deep_gemm.k_grouped_fp8_gemm_nt_contiguous(a, b, d, ks, layout, c=d, use_psum_layout=psum)
        by_name = on_device(start.clone(), backend)
        deep_gemm.k_grouped_wgrad_gemm_fp8_fp8_fp32_nt(a, b, by_name, ks)
    assert calc_diff(on_cpu(d), want) < BOUND
    assert_bitwise_equal(on_cpu(d)[1], start[1])
    assert_bitwise_equal(on_cpu(by_name), on_cpu(d))


BF16_BACKENDS = ("ref", "cpu", "emu", "cuda")


@pytest.fixture
def bf16(backend):
    if backend not in BF16_BACKENDS:
        pytest.skip(f"{backend} has no bf16 GEMM")
    with dsk.use_backend(backend):
        yield backend


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bf16_gemm(bf16, layout):
    m, n, k = 70, 136, 200
    a, b = torch.randn(m, k).bfloat16(), torch.randn(n, k).bfloat16()
    d = empty(m, n, backend=bf16)
    given_a = a.t().contiguous() if layout[0] == "t" else a
    given_b = b.t().contiguous() if layout[1] == "n" else b
    call = getattr(deep_gemm, f"bf16_gemm_{layout}")
    call(on_device(given_a, bf16), on_device(given_b, bf16), d)
    assert calc_diff(on_cpu(d), a.double() @ b.double().t()) < 1e-5
    c = torch.randn(m, n)
    d = empty(m, n, backend=bf16, dtype=torch.float32)
    call(on_device(given_a, bf16), on_device(given_b, bf16), d, c=on_device(c, bf16))
    assert calc_diff(on_cpu(d), a.double() @ b.double().t() + c) < 1e-5


def test_bf16_groups(bf16):
    n, k = 136, 256
    x, indices, ends = padded_groups(k)
    a, b = x.bfloat16(), torch.randn(len(SIZES), n, k).bfloat16()
    want = per_row(a.float(), b.float(), indices)
    given = on_device(a, bf16)
    for layout, psum in ((indices, False), (ends, True)):
        d = empty(len(a), n, backend=bf16)
        deep_gemm.m_grouped_bf16_gemm_nt_contiguous(
            given, on_device(b, bf16), d, on_device(layout, bf16), use_psum_layout=psum
        )
        assert calc_diff(on_cpu(d), want) < 1e-5
        turned_b = on_device(b.transpose(1, 2).contiguous(), bf16)
        again = empty(len(a), n, backend=bf16)
        deep_gemm.m_grouped_bf16_gemm_nn_contiguous(
            given, turned_b, again, on_device(layout, bf16), use_psum_layout=psum
        )
        assert_bitwise_equal(on_cpu(again), on_cpu(d))
    stack = torch.randn(len(SIZES), 70, k).bfloat16()
    counts = torch.tensor([3, 0, 70, 8], dtype=torch.int32)
    d = empty(len(SIZES), 70, n, backend=bf16)
    deep_gemm.m_grouped_bf16_gemm_nt_masked(
        on_device(stack, bf16), on_device(b, bf16), d, on_device(counts, bf16), 20
    )
    want = stack.double() @ b.double().transpose(1, 2)
    for group, count in enumerate(counts.tolist()):
        if count:
            assert calc_diff(on_cpu(d)[group, :count], want[group, :count]) < 1e-5


def test_bf16_groups_along_k(bf16):
    ks, m, n = [64, 0, 192], 72, 136
    a, b = torch.randn(sum(ks), m).bfloat16(), torch.randn(sum(ks), n).bfloat16()
    c = torch.randn(len(ks), m, n)
    d = empty(len(ks), m, n, backend=bf16, dtype=torch.float32)
    deep_gemm.k_grouped_bf16_gemm_tn_contiguous(
        on_device(a, bf16), on_device(b, bf16), d, ks,
        on_device(torch.tensor(ks, dtype=torch.int32), bf16), c=on_device(c, bf16),
    )  # fmt: skip
    pieces = zip(a.double().split(ks), b.double().split(ks))
    assert calc_diff(on_cpu(d), torch.stack([x.t() @ y for x, y in pieces]) + c) < 1e-5


# ---- layouts, settings, signatures, errors -----------------------------------------------------


def test_scales_keep_their_values_and_get_their_strides():
    sf = torch.randn(2, 70, 3)
    got = deep_gemm.get_mn_major_tma_aligned_tensor(sf)
    assert got.stride() == (3 * 72, 1, 72) and torch.equal(got, sf)
    assert deep_gemm.get_mn_major_tma_aligned_tensor(got) is got
    assert deep_gemm.get_col_major_tma_aligned_tensor(sf[0]).stride() == (1, 72)
    odd = torch.rand(70, 3) + 0.1  # no power of two: nothing may round it
    for disable in (False, True):
        kept = deep_gemm.transform_sf_into_required_layout(
            odd, 70, 384, (1, 128, 128), is_sfa=True, disable_ue8m0_cast=disable
        )
        assert torch.equal(kept, odd) and kept.stride() == (1, 72)
    with pytest.raises(ValueError, match=r"sf: expected shape \(70, 4\), got \(70, 3\)"):
        deep_gemm.transform_sf_into_required_layout(odd, 70, 512, (1, 128, 128), is_sfa=True)
    with pytest.raises(TypeError, match="packed UE8M0"):
        deep_gemm.transform_sf_into_required_layout(
            odd.int(), 70, 384, (1, 128, 128), is_sfa=True
        )  # fmt: skip


def test_fp32_scales_are_never_rounded_to_powers_of_two():
    """The result with fp32 scales is theirs with either flag, and not that of rounded scales."""
    x, w = torch.randn(4, 256), torch.randn(128, 256)
    a, b = deep_gemm.per_token_cast_to_fp8(x, False), deep_gemm.per_block_cast_to_fp8(w, False)
    results = []
    for disable in (False, True):
        d = torch.empty(4, 128, dtype=torch.float32)
        deep_gemm.fp8_gemm_nt(a, b, d, disable_ue8m0_cast=disable)
        results.append(d)
    assert torch.equal(*results)
    rounded = dsk.ref.fp8.ceil_pow2(a[1])
    assert not torch.equal(rounded, a[1])
    assert torch.equal(deep_gemm.per_token_cast_to_fp8(x, True)[1], rounded)


def test_settings_are_kept(monkeypatch):
    monkeypatch.setattr(deep_gemm, "_num_sms", None)
    monkeypatch.setattr(deep_gemm, "_alignment", 128)
    assert deep_gemm.get_num_sms() > 0
    deep_gemm.set_num_sms(7)
    assert deep_gemm.get_num_sms() == 7
    assert deep_gemm.get_m_alignment_for_contiguous_layout() == 128
    deep_gemm.set_mk_alignment_for_contiguous_layout(16)
    assert deep_gemm.get_mk_alignment_for_contiguous_layout() == 16
    ends = torch.tensor([3, 20, 20, 33], dtype=torch.int32)
    want = [0] * 3 + [-1] * 13 + [1] * 4 + [-1] * 12 + [3] * 1 + [-1] * 7
    assert deep_gemm._psum_to_indices(ends, 40).tolist() == want
    for call, value_ in ((deep_gemm.set_num_sms, 0),
                         (deep_gemm.set_mk_alignment_for_contiguous_layout, -1)):  # fmt: skip
        with pytest.raises(ValueError, match="expected a positive integer"):
            call(value_)


SIGNATURES = {
    "fp8_gemm_nt": "a b d c recipe recipe_a recipe_b compiled_dims disable_ue8m0_cast",
    "m_grouped_fp8_gemm_nt_contiguous": "a b d grouped_layout recipe recipe_a recipe_b "
    "compiled_dims disable_ue8m0_cast use_psum_layout ensure_zero_padding",
    "m_grouped_fp8_gemm_nt_masked": "a b d masked_m expected_m recipe recipe_a recipe_b "
    "compiled_dims disable_ue8m0_cast",
    "k_grouped_fp8_gemm_nt_contiguous": "a b d ks_cpu grouped_layout c recipe compiled_dims "
    "use_psum_layout",
    "transform_sf_into_required_layout": "sf mn k recipe num_groups is_sfa disable_ue8m0_cast",
}
SIGNATURES |= {f"fp8_gemm_{x}": SIGNATURES["fp8_gemm_nt"] for x in ("nn", "tn", "tt")}
SIGNATURES["m_grouped_fp8_gemm_nn_contiguous"] = SIGNATURES["m_grouped_fp8_gemm_nt_contiguous"]


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_are_deep_gemms(name):
    parameters = inspect.signature(getattr(deep_gemm, name)).parameters
    assert " ".join(parameters) == SIGNATURES[name]
    if "compiled_dims" in parameters:
        dims = "mn" if name.startswith("k_") or name.endswith(("_tn", "_tt")) else "nk"
        assert parameters["compiled_dims"].default == dims


def test_bad_calls_name_argument_expected_and_actual():
    a = deep_gemm.per_token_cast_to_fp8(torch.randn(4, 256), False)
    b = deep_gemm.per_block_cast_to_fp8(torch.randn(128, 256), False)
    d = torch.empty(4, 128, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"d: expected shape \(4, 128\), got \(4, 64\)"):
        deep_gemm.fp8_gemm_nt(a, b, d[:, :64])
    with pytest.raises(ValueError, match=r"recipe: expected .*, got \(1, 64, 128\)"):
        deep_gemm.fp8_gemm_nt(a, b, d, recipe=(1, 64, 128))
    with pytest.raises(ValueError, match="compiled_dims: expected letters of 'mnk', got 'x'"):
        deep_gemm.fp8_gemm_nt(a, b, d, compiled_dims="x")
    with pytest.raises(ValueError, match=r"b: scale: expected shape .*\(1, 2\)"):
        deep_gemm.fp8_gemm_nt(a, (b[0], b[1][:, :1]), d)
    with pytest.raises(TypeError, match="a: expected fp32 scales, got torch.int32"):
        deep_gemm.fp8_gemm_nt((a[0], a[1].int()), b, d)
    with pytest.raises(ValueError, match=r"grouped_layout: expected int32 \(4,\)"):
        deep_gemm.m_grouped_fp8_gemm_nt_contiguous(
            a, (b[0][None], b[1][None]), d, torch.zeros(3, dtype=torch.int32)
        )
    with pytest.raises(ValueError, match="ks_cpu: expected multiples of 128"):
        deep_gemm.k_grouped_fp8_gemm_nt_contiguous(a, a, torch.empty(1, 4, 4), [100], None)
    with pytest.raises(TypeError, match="b: expected bfloat16, got torch.float32"):
        deep_gemm.bf16_gemm_nt(d, torch.empty(128, 128), torch.empty(4, 128))
