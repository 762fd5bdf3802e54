"""What surrounds latent attention, on every backend: latents into the cache, absorbed products."""

import pytest
import torch
from backend_axis import need, on_cpu, on_device
from mla_cases import LATENT, WIDTH, assert_within

import dskernels as dsk
from dskernels.ref import mla as ref
from dskernels.ref import rowwise
from dskernels.testing import assert_bitwise_equal

QUERY, NOPE, ROPE, VALUES = 1536, 128, 64, 128
UNTOUCHED = 0x5A  # a byte that no test writes everywhere


def angles(t):
    turn = torch.rand(t, ROPE // 2) * 6
    return turn.cos(), turn.sin()


def latents_case(t, *, fp8=False, page=16, pages=None, queries=True):
    """Outputs of the down-projections side by side, as one product of both would write them."""
    down = torch.randn(t, QUERY + WIDTH + 8).bfloat16()
    pages = pages or -(-t // page) + 2
    row = ref.fp8_row_bytes(LATENT, ROPE) if fp8 else 2 * WIDTH
    cache = torch.full((pages, page, row), UNTOUCHED, dtype=torch.uint8)
    cache = cache if fp8 else cache.view(torch.bfloat16)
    weights = [(1 + torch.randn(n) / 4).bfloat16() for n in (QUERY, LATENT)]
    q, weight = (down[:, :QUERY], weights[0]) if queries else (None, None)
    kv = down[:, QUERY : QUERY + WIDTH]
    return [q, kv, weight, weights[1], *angles(t), cache, torch.randperm(pages * page)[:t]]


def latents(case, backend, **how):
    """mla_latents on a backend -> (normalised queries, cache), on the CPU."""
    need("mla_latents", backend, dl=LATENT, r=ROPE)
    moved = [on_device(x, backend) for x in case]
    moved[6] = moved[6].clone()
    q = dsk.mla_latents(*moved, backend=backend, **how)
    return on_cpu(q), on_cpu(moved[6])


def rows_of(cache, slots):
    return cache.flatten(0, 1)[slots]


def assert_rounded(got, exact):
    """bf16 values within a unit of the last place of exact ones: sums have no pinned order."""
    assert got.dtype == torch.bfloat16
    unit = torch.exp2(exact.abs().clamp(min=2**-60).log2().floor() - 7)
    assert ((got.double() - exact).abs() <= 0.51 * unit + 1e-5 * exact.abs()).all()


def split_fp8(rows):
    """Bytes of FP8 rows -> e4m3 codes, scales, RoPE keys."""
    data, scale = rows[:, :LATENT], rows[:, LATENT : LATENT + 16].contiguous()
    rope = rows[:, LATENT + 16 :].contiguous().view(torch.bfloat16)
    return data, scale.view(torch.float32), rope


@pytest.mark.parametrize("interleaved", [True, False], ids=["pairs", "halves"])
@pytest.mark.parametrize("t", [1, 7, 40])
def test_latents_of_a_plain_cache(backend, t, interleaved):
    case = latents_case(t)
    q_a, kv_a, q_weight, kv_weight, cos, sin, before, slots = case
    q, cache = latents(case, backend, interleaved=interleaved, eps=1e-3)
    assert_rounded(q, rowwise.rms_norm(q_a.double(), q_weight.double(), 1e-3))
    got = rows_of(cache, slots)
    exact = rowwise.rms_norm(kv_a[:, :LATENT].double(), kv_weight.double(), 1e-3)
    assert_rounded(got[:, :LATENT], exact)
    turned = rowwise.rope(kv_a[:, None, LATENT:], cos, sin, interleaved=interleaved)[:, 0]
    torch.testing.assert_close(got[:, LATENT:], turned, rtol=2**-7, atol=1e-6)
    others = torch.ones(before.shape[0] * before.shape[1], dtype=torch.bool)
    others[slots] = False
    assert_bitwise_equal(rows_of(cache, others), rows_of(before, others))


@pytest.mark.parametrize("t", [1, 21])
def test_latents_of_an_fp8_cache_are_quantised_from_their_bf16(backend, t):
    """Byte for byte what quantising the plain cache's rows gives."""
    plain = latents_case(t)
    plain[1][0, 3] = 900.0  # a block whose scale is far from 1
    plain[1][0, 128:256] = 0.0  # and one that has none
    packed = [*plain]
    packed[6] = torch.full((*plain[6].shape[:2], 656), UNTOUCHED, dtype=torch.uint8)
    q, rows = latents(plain, backend)
    q_too, got = latents(packed, backend)
    assert_bitwise_equal(q_too, q)
    rows = rows_of(rows, plain[-1])
    want = torch.zeros(1, t, 656, dtype=torch.uint8)
    ref.mla_cache_append(want, rows[:, :LATENT], rows[:, LATENT:], torch.arange(t))
    for a, b in zip(split_fp8(rows_of(got, plain[-1])), split_fp8(want[0]), strict=True):
        assert_bitwise_equal(a.contiguous(), b.contiguous())


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
def test_skipped_tokens_and_shared_slots(backend, fp8):
    """-1 writes nothing; of the tokens with one slot the last stays, whole."""
    case = latents_case(300, fp8=fp8, pages=3)
    slots = torch.randint(-1, 40, (300,))
    slots[5:9] = -1
    case[-1] = slots
    _, cache = latents(case, backend)
    last = {int(s): token for token, s in enumerate(slots)}
    last.pop(-1)
    chosen = torch.tensor(sorted(last.values()))
    alone = [x[chosen] if x is not None and x.shape[0] == 300 else x for x in case]
    _, want = latents(alone, backend)
    assert_bitwise_equal(cache, want)


def test_no_query_latent_and_no_tokens(backend):
    case = latents_case(3, queries=False)
    q, cache = latents(case, backend)
    assert q is None
    with_queries = latents([torch.ones(3, QUERY).bfloat16(), case[1], torch.ones(QUERY), *case[3:]],
                           backend)  # fmt: skip
    assert_bitwise_equal(cache, with_queries[1])
    nothing = [x[:0] if x is not None and x.shape[0] == 3 else x for x in case]
    nothing[6] = case[6]
    _, untouched = latents(nothing, backend)
    assert_bitwise_equal(untouched, case[6])


def test_a_nan_stays_in_its_token(backend):
    case = latents_case(4, fp8=True)
    clean = latents(case, backend)
    case[0][1, 70], case[1][2, 9] = torch.nan, torch.nan
    q, cache = latents(case, backend)
    assert q[1].isnan().all() and not q[[0, 2, 3]].isnan().any()
    for token in (0, 1, 3):
        assert_bitwise_equal(rows_of(cache, case[-1])[token], rows_of(clean[1], case[-1])[token])
    data = rows_of(cache, case[-1])[2, :LATENT].view(torch.float8_e4m3fn).float()
    assert data.isnan().all()


def test_weights_in_fp32_and_a_strided_cache(backend):
    case = latents_case(5)
    for i in (2, 3):
        case[i] = case[i].float()
    wide = torch.zeros(case[6].shape[0], 2 * case[6].shape[1], WIDTH + 64).bfloat16()
    q, cache = latents(case, backend)
    view = on_device(wide, backend)[:, ::2, 8 : 8 + WIDTH]
    moved = [on_device(x, backend) for x in case]
    moved[6] = view
    q_too = dsk.mla_latents(*moved, backend=backend)
    assert_bitwise_equal(on_cpu(q_too), q)
    written = rows_of(on_cpu(view), case[-1])
    assert_bitwise_equal(written.contiguous(), rows_of(cache, case[-1]))


# ---- absorbed products -------------------------------------------------------------------------


def up_projections(heads):
    """Views of one weight [h * (n + v), dl], as the model's."""
    weight = (torch.randn(heads * (NOPE + VALUES), LATENT) / 16).bfloat16()
    return weight.view(heads, NOPE + VALUES, LATENT).split([NOPE, VALUES], dim=1)


@pytest.mark.parametrize("interleaved", [True, False], ids=["pairs", "halves"])
@pytest.mark.parametrize("t,heads", [(1, 3), (64, 1), (65, 2), (130, 5)])
def test_absorbed_queries(backend, t, heads, interleaved):
    need("mla_absorb_queries", backend, t=t, h=heads, dl=LATENT, r=ROPE)
    q, w_uk = torch.randn(t, heads, NOPE + ROPE).bfloat16(), up_projections(heads)[0]
    cos, sin = angles(t)
    args = [on_device(x, backend) for x in (q, w_uk, cos, sin)]
    got = on_cpu(dsk.mla_absorb_queries(*args, interleaved=interleaved, backend=backend))
    exact = torch.einsum("thn,hnc->thc", q[..., :NOPE].double(), w_uk.double())
    assert got.shape == (t, heads, WIDTH) and got.dtype == torch.bfloat16
    assert_within(got[..., :LATENT], exact, 1e-5, 2**-8 * 1.01)
    turned = rowwise.rope(q[..., NOPE:], cos, sin, interleaved=interleaved)
    torch.testing.assert_close(got[..., LATENT:], turned, rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("t,heads", [(1, 3), (64, 1), (65, 2), (130, 5)])
def test_absorbed_output(backend, t, heads):
    need("mla_absorb_output", backend, t=t, h=heads, dl=LATENT, v=VALUES)
    o, w_uv = torch.randn(t, heads, LATENT).bfloat16(), up_projections(heads)[1]
    got = on_cpu(dsk.mla_absorb_output(on_device(o, backend), on_device(w_uv, backend),
                                       backend=backend))  # fmt: skip
    exact = torch.einsum("thc,hvc->thv", o.double(), w_uv.double())
    assert got.shape == (t, heads, VALUES) and got.dtype == torch.bfloat16
    assert_within(got, exact, 2e-5, 2**-8 * 1.01)


def test_a_head_and_a_token_of_nans_stay_alone(backend):
    """Neither heads nor tokens share more than tiles in memory."""
    t, heads = 70, 3
    need("mla_absorb_output", backend)
    o, w_uv = torch.randn(t, heads, LATENT).bfloat16(), up_projections(heads)[1]
    o[:, 1], o[66] = torch.nan, torch.nan
    args = [on_device(x, backend) for x in (o, w_uv)]
    got = on_cpu(dsk.mla_absorb_output(*args, backend=backend)).isnan()
    assert torch.equal(got, o[..., :1].isnan().expand_as(got))
    q, w_uk = torch.randn(t, heads, NOPE + ROPE).bfloat16(), up_projections(heads)[0]
    q[:, 1, :NOPE], q[66, :, :NOPE] = torch.nan, torch.nan
    args = [on_device(x, backend) for x in (q, w_uk, *angles(t))]
    got = on_cpu(dsk.mla_absorb_queries(*args, backend=backend)).isnan()
    assert torch.equal(got[..., :LATENT], q[..., :1].isnan().expand(-1, -1, LATENT))
    assert not got[..., LATENT:].any()


def test_no_tokens(backend):
    need("mla_absorb_output", backend)
    w_uk, w_uv = (on_device(w, backend) for w in up_projections(2))
    cos, sin = (on_device(x, backend) for x in angles(0))
    empty = on_device(torch.empty(0, 2, LATENT).bfloat16(), backend)
    assert dsk.mla_absorb_output(empty, w_uv, backend=backend).shape == (0, 2, VALUES)
    empty = empty[..., : NOPE + ROPE].contiguous()
    got = dsk.mla_absorb_queries(empty, w_uk, cos, sin, backend=backend)
    assert got.shape == (0, 2, WIDTH)


# ---- what only the CUDA kernels have -----------------------------------------------------------


@pytest.fixture
def machine(backend):
    if backend not in ("cuda", "emu"):
        pytest.skip("limits of the CUDA kernels")
    return backend


def test_append_alone_is_the_same_kernel(machine):
    """mla_cache_append stores what it is given: rows as they come, or quantised."""
    t, pages, page = 9, 3, 16
    latent, k_rope = torch.randn(t, LATENT).bfloat16(), torch.randn(t, ROPE).bfloat16()
    slots = torch.tensor([3, -1, 40, 7, 3, 0, 47, 20, 7])
    for dtype, row in ((torch.bfloat16, WIDTH), (torch.uint8, 656)):
        want = torch.zeros(pages, page, row, dtype=dtype)
        got = on_device(want.clone(), machine)
        ref.mla_cache_append(want, latent, k_rope, slots)
        args = [on_device(x, machine) for x in (latent, k_rope, slots)]
        dsk.mla_cache_append(got, *args, backend=machine)
        assert_bitwise_equal(on_cpu(got), want)


@pytest.mark.parametrize("seed", [1, 2])
def test_random_schedules(machine, monkeypatch, seed):
    """Another order of warps, CTAs and copies: no hazard, the same bits. One CTA takes all tokens:
    sums of one are not mixed with those of the next."""
    if machine != "emu":
        pytest.skip("the emulator's schedules")
    from dskernels.cuda.mla_fused import MlaFused

    kernels = MlaFused("emu", num_sms=1)
    case = latents_case(20, fp8=True, page=16)
    q, w_uk = torch.randn(70, 3, NOPE + ROPE).bfloat16(), up_projections(3)[0]
    turn = angles(70)
    results = []
    for chosen in ("0", str(seed)):
        monkeypatch.setenv("DSK_EMU_SEED", chosen)
        moved = [*case]
        moved[6] = case[6].clone()
        results.append((kernels.mla_latents(*moved), moved[6]))
        results[-1] += (kernels.mla_absorb_queries(q, w_uk, *turn),)
    for one, other in zip(*results, strict=True):
        assert_bitwise_equal(one, other)
    assert_bitwise_equal(results[0][1], latents(case, "emu")[1])


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(kv_a=torch.float16), "kv_a: expected torch.bfloat16, got torch.float16"),
        (dict(q_a=100), "q_a: expected [..., 1536], got (100,)"),
        (dict(kv_cache=torch.float32), "kv_cache: expected torch.bfloat16 or torch.uint8, got"),
        (dict(stride=True), "kv_cache: expected 16-byte aligned rows of contiguous values"),
        (dict(kv_weight=torch.float64), "kv_weight: expected torch.bfloat16 or torch.float32, got"),
    ],
    ids=lambda v: "-".join(v) if isinstance(v, dict) else "",
)
def test_refusals_name_what_is_given(machine, change, message):
    names = ("q_a", "kv_a", "q_weight", "kv_weight", "cos", "sin", "kv_cache", "slots")
    given = dict(zip(names, latents_case(4), strict=True))
    for name, to in change.items():
        if name == "stride":
            wide = torch.zeros(3, 16, WIDTH + 4).bfloat16()
            given["kv_cache"] = wide[..., :WIDTH]
        elif isinstance(to, int):
            given["q_a"], given["q_weight"] = given["q_a"][:, :to], given["q_weight"][:to]
        else:
            given[name] = given[name].to(to)
    if "kv_a" in change:
        given["q_a"] = given["q_weight"] = None
    with pytest.raises(dsk.BackendError) as raised:
        dsk.mla_latents(**given, backend=machine)
    assert message in str(raised.value)


def test_a_slot_outside_the_cache_traps(machine):
    """Values of indices on a GPU are not read by the host: the kernel stops."""
    if machine != "emu":
        pytest.skip("a trap ends a GPU's process")
    from dskernels.cuda.mla_fused import MlaFused

    for slot in (-2, 16 * 2):
        case = latents_case(1, pages=2)
        case[-1] = torch.tensor([slot])
        with pytest.raises(Exception, match="trap"):
            MlaFused("emu").mla_latents(*case)


def test_supports_names_the_width():
    answer = dsk.supports("mla_absorb_queries", backend="emu", dl=256)
    assert not answer and "dl = 512, got 256" in answer.reason
    assert dsk.supports("mla_latents", backend="emu", dl=512, r=64)
