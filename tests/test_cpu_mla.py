"""CPU latent attention against fp64, on every target this processor runs."""

from __future__ import annotations

import pytest
import torch
from cpu_targets import TARGETS, guarded, relative_error, use_target
from hypothesis import given, settings
from hypothesis import strategies as st

from dskernels import _C
from dskernels.cpu import mla
from dskernels.ref import mla as ref

UNUSED_PAGE = 2147480000


@pytest.fixture(params=TARGETS)
def target(request):
    with use_target(request.param) as name:
        yield name


def paged(lengths, page, width, dtype, seed=0, scale=1.0):
    """Shuffled pages; everything behind a request's end is NaN, unused entries are absurd."""
    g = torch.Generator().manual_seed(seed)
    used = [-(-length // page) for length in lengths]
    cache = torch.full((sum(used) + 2, page, width), torch.nan)
    order = torch.randperm(sum(used), generator=g).tolist()
    table = torch.full((len(lengths), max(used, default=0) + 1), UNUSED_PAGE, dtype=torch.int32)
    for request, length in enumerate(lengths):
        for i in range(used[request]):
            table[request, i] = order.pop()
            count = min(page, length - i * page)
            rows = torch.randn(count, width, generator=g) * scale
            cache[table[request, i], :count] = rows
    return cache.to(dtype), table, torch.tensor(lengths, dtype=torch.int32)


def fp64(q, cache, table, lens, **kwargs):
    wide = cache if cache.dtype == torch.uint8 else cache.double()
    return ref.mla_decode(q.double(), wide, table, lens, **kwargs)


BOUND = {torch.float32: 2e-6, torch.bfloat16: 6e-3, torch.float16: 1e-3}


def check(q, cache, table, lens, lse_bound=2e-4, **kwargs):
    got, got_lse = mla.mla_decode(q, cache, table, lens, **kwargs)
    want, want_lse = fp64(q, cache, table, lens, **kwargs)
    assert got.dtype == q.dtype and got_lse.dtype == torch.float32
    assert relative_error(got, want) < BOUND[q.dtype]
    torch.testing.assert_close(got_lse.double(), want_lse.double(), rtol=2e-4, atol=lse_bound)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("page", [1, 16, 64, 5])
def test_decode(target, dtype, page):
    cache, table, lens = paged([300, 0, 1, 129], page, 576, dtype, seed=page)
    q = torch.randn(4, 1, 16, 576, generator=torch.Generator().manual_seed(9)).to(dtype)
    check(q, cache, table, lens, softmax_scale=0.05)


@pytest.mark.parametrize("s, heads", [(1, 128), (1, 7), (2, 1), (2, 40), (4, 16)])
def test_decode_heads_and_query_tokens(target, s, heads):
    """More query tokens than cached ones included: those see nothing."""
    cache, table, lens = paged([65, 2, 200], 64, 96, torch.bfloat16)
    q = torch.randn(3, s, heads, 96, generator=torch.Generator().manual_seed(1)).bfloat16()
    for causal in (True, False):
        check(q, cache, table, lens, head_dim_v=64, causal=causal)


def test_decode_fp8_cache(target):
    g = torch.Generator().manual_seed(3)
    page, pages = 64, 6
    cache = torch.full((pages, page, 656), 0xFF, dtype=torch.uint8)  # NaN everywhere else
    latent, rope = torch.randn(300, 512, generator=g), torch.randn(300, 64, generator=g)
    table = torch.tensor([[4, 1, 5, 0, 2]], dtype=torch.int32)
    tokens = torch.arange(300)
    slots = table[0].long()[tokens // page] * page + tokens % page
    ref.mla_cache_append(cache, latent, rope, slots)
    lens = torch.tensor([300], dtype=torch.int32)
    q = torch.randn(1, 2, 16, 576, generator=g).bfloat16()
    # Tiles round dequantised keys to bf16: 2^-9 of each of 512 products, scaled by 0.05.
    check(q, cache, table, lens, 5e-3 if target == "amx" else 2e-4, softmax_scale=0.05)


def test_decode_an_empty_batch_and_nothing_attended(target):
    cache, table, lens = paged([0, 0], 16, 96, torch.bfloat16)
    q = torch.randn(2, 1, 4, 96).bfloat16()
    out, lse = mla.mla_decode(q, cache, table, lens, head_dim_v=64)
    assert bool((out == 0).all()) and bool((lse == torch.inf).all())
    out, lse = mla.mla_decode(q[:0], cache, table[:0], lens[:0], head_dim_v=64)
    assert out.shape == (0, 1, 4, 64) and lse.shape == (0, 4, 1)


def test_decode_large_scores_and_special_values(target):
    """Scores up to 1e6 do not overflow; a NaN or infinity in a key shows where it is attended."""
    cache, table, lens = paged([150], 16, 96, torch.bfloat16, scale=1000.0)
    q = (torch.randn(1, 2, 5, 96, generator=torch.Generator().manual_seed(5)) * 10).bfloat16()
    got, _ = mla.mla_decode(q, cache, table, lens, head_dim_v=64)
    want, _ = fp64(q, cache, table, lens, head_dim_v=64)
    assert relative_error(got, want) < 0.02
    last = table[0, 149 // 16], 149 % 16
    for value in (torch.nan, torch.inf):
        poisoned = cache.clone()
        poisoned[last][3] = value
        got, _ = mla.mla_decode(q, poisoned, table, lens, head_dim_v=64)
        assert not bool(got[0, 1].isfinite().all()), "the last query attends the last key"


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_decode_special_values_in_every_position(target, value):
    """In q they stay in their head and token; in a cached row they show in whoever attends it."""
    cache, table, lens = paged([70], 16, 48, torch.bfloat16)
    q = torch.randn(1, 2, 3, 48, generator=torch.Generator().manual_seed(8)).bfloat16()
    clean, _ = mla.mla_decode(q, cache, table, lens, head_dim_v=32)
    for column in range(0, 48, 5):
        poisoned = q.clone()
        poisoned[0, 0, 1, column] = value
        got, lse = mla.mla_decode(poisoned, cache, table, lens, head_dim_v=32)
        hit = torch.zeros(1, 2, 3, dtype=torch.bool)
        hit[0, 0, 1] = True
        assert bool(got[hit].isnan().all()) and bool(lse.transpose(1, 2)[hit].isnan().all())
        assert torch.equal(got[~hit], clean[~hit])
    for token in range(0, 70, 3):
        for column in (0, 31, 47):
            poisoned = cache.clone()
            poisoned[table[0, token // 16], token % 16, column] = value
            got, _ = mla.mla_decode(q, poisoned, table, lens, head_dim_v=32)
            want, _ = fp64(q, poisoned, table, lens, head_dim_v=32)
            # Whoever attends it: fp64 is not finite, or knows that the row weighs nothing.
            assert torch.equal(got.isfinite(), want.isfinite()), (token, column)
            known = want.isfinite()
            torch.testing.assert_close(got[known].double(), want[known], rtol=2e-2, atol=2e-2)


def test_threads_and_splits_agree(target):
    cache, table, lens = paged([2000, 700], 64, 96, torch.bfloat16)
    q = torch.randn(2, 1, 8, 96, generator=torch.Generator().manual_seed(6)).bfloat16()
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 6):
            torch.set_num_threads(threads)
            results.append(mla.mla_decode(q, cache, table, lens, head_dim_v=64))
    finally:
        torch.set_num_threads(before)
    want, want_lse = fp64(q, cache, table, lens, head_dim_v=64)
    for out, lse in results:
        assert relative_error(out, want) < 6e-3
        torch.testing.assert_close(lse.double(), want_lse.double(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dims", [(192, 128), (24, 16), (40, 72)])
def test_prefill(target, dtype, causal, dims):
    g = torch.Generator().manual_seed(7)
    lengths_q, lengths_k, h = [130, 0, 3, 17], [300, 5, 3, 4], 3
    ends_q, ends_k = (
        torch.tensor([0, *torch.tensor(x).cumsum(0)], dtype=torch.int32)
        for x in (lengths_q, lengths_k)
    )
    tq, tk = sum(lengths_q) + 2, sum(lengths_k)
    q = torch.randn(tq, h, dims[0], generator=g).to(dtype)
    kv = torch.randn(tk, h, dims[0] + dims[1], generator=g).to(dtype)
    k, v = kv.split(list(dims), dim=-1)  # strided views, as the model makes them
    got, got_lse = mla.mla_prefill(q, k, v, ends_q, ends_k, causal=causal)
    want, want_lse = ref.mla_prefill(
        q.double(), k.double(), v.double(), ends_q, ends_k, causal=causal
    )
    assert relative_error(got, want) < BOUND[dtype]
    torch.testing.assert_close(got_lse.double(), want_lse.double(), rtol=2e-4, atol=2e-4)


def test_outputs_have_intact_canaries(target):
    cache, table, lens = paged([37], 16, 96, torch.bfloat16)
    q = torch.randn(1, 3, 5, 96).bfloat16()
    out, out_intact = guarded((1, 3, 5, 40), torch.bfloat16)
    lse, lse_intact = guarded((1, 5, 3), torch.float32)
    _C.cpu.mla_decode(q, cache, table, lens, 0.1, True, out, lse, 2)
    assert out_intact() and lse_intact()


def test_bad_arguments_are_named():
    cache, table, lens = paged([37], 16, 96, torch.bfloat16)
    q = torch.randn(1, 1, 2, 96).bfloat16()
    bad = table.clone()
    bad[0, 1] = 99
    with pytest.raises(ValueError, match=r"block_table\[0, 1\]: expected 0 .. 4, got 99"):
        mla.mla_decode(q, cache, bad, lens, head_dim_v=64)
    with pytest.raises(ValueError, match=r"seq_lens\[0\]: expected 0 .. 64, got 65"):
        mla.mla_decode(q, cache, table, lens * 0 + 65, head_dim_v=64)
    with pytest.raises(ValueError, match=r"kv_cache: expected shape \[-1, -1, 96\].*, 95\]"):
        mla.mla_decode(q, cache[..., :95], table, lens, head_dim_v=64)
    ends = torch.tensor([0, 4, 2], dtype=torch.int32)
    x = torch.randn(4, 1, 8)
    with pytest.raises(ValueError, match="cu_seqlens_q: expected non-decreasing values, got 4"):
        mla.mla_prefill(x, x, x, ends, ends)


shapes = st.tuples(
    st.integers(1, 3),  # requests
    st.integers(1, 4),  # query tokens
    st.integers(1, 34),  # heads
    st.integers(1, 70),  # latent width
    st.integers(0, 40),  # RoPE width
    st.integers(1, 33),  # page
    st.integers(0, 150),  # longest
    st.integers(0, 2**16),  # seed
)


def sums_of_magnitudes(q, cache, table, lens, dl):
    """As the output in fp64, with the absolute values of the latents: what its errors grow with."""
    out = torch.zeros(*q.shape[:-1], dl, dtype=torch.float64)
    s, page = q.shape[1], cache.shape[1]
    for request, length in enumerate(lens.tolist()):
        token = torch.arange(length)
        keys = cache[table[request].long()[token // page], token % page].double()
        scores = q[request].double() @ keys.T * q.shape[-1] ** -0.5  # [s, h, tokens]
        limit = length - s + 1 + torch.arange(s)
        scores = scores.masked_fill(token >= limit[:, None, None], -torch.inf)
        out[request] = scores.softmax(-1).nan_to_num(0.0) @ keys[:, :dl].abs()
    return out


def run_random(shape) -> None:
    b, s, h, dl, r, page, longest, seed = shape
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, longest + 1, (b,), generator=g).tolist()
    cache, table, lens = paged(lengths, page, dl + r, torch.bfloat16, seed)
    q = torch.randn(b, s, h, dl + r, generator=g).bfloat16()
    for name in TARGETS:
        with use_target(name):
            got, got_lse = mla.mla_decode(q, cache, table, lens, head_dim_v=dl)
        want, want_lse = fp64(q, cache, table, lens, head_dim_v=dl)
        magnitude = sums_of_magnitudes(q, cache, table, lens, dl)
        assert (got.double() - want).norm() <= 4e-3 * magnitude.norm(), name
        torch.testing.assert_close(got_lse.double(), want_lse.double(), rtol=2e-4, atol=2e-4)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(shapes)
def test_random_shapes(shape):
    run_random(shape)


@pytest.mark.slow
@settings(max_examples=500, deadline=None)
@given(shapes)
def test_many_random_shapes(shape):
    run_random(shape)


prefills = st.tuples(
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 80)), min_size=1, max_size=3),
    st.integers(1, 3),  # heads
    st.integers(1, 70),  # width of a key
    st.integers(1, 70),  # width of a value
    st.booleans(),  # causal
    st.integers(0, 2**16),  # seed
)


def run_random_prefill(case) -> None:
    """Requests with fewer, as many and more cached keys than queries; rows that see nothing."""
    lengths, h, dk, dv, causal, seed = case
    g = torch.Generator().manual_seed(seed)
    ends_q, ends_k = (
        torch.tensor([0, *(pair[i] for pair in lengths)]).cumsum(0).int() for i in range(2)
    )
    q = torch.randn(int(ends_q[-1]), h, dk, generator=g).bfloat16()
    kv = torch.randn(int(ends_k[-1]), h, dk + dv, generator=g).bfloat16()
    k, v = kv.split([dk, dv], dim=-1)
    wide = q.double(), k.double(), v.double()
    want, want_lse = ref.mla_prefill(*wide, ends_q, ends_k, causal=causal)
    # Values of both signs cancel in narrow sums: errors are measured against sums of magnitudes.
    magnitude, _ = ref.mla_prefill(*wide[:2], wide[2].abs(), ends_q, ends_k, causal=causal)
    for name in TARGETS:
        with use_target(name):
            got, got_lse = mla.mla_prefill(q, k, v, ends_q, ends_k, causal=causal)
        assert (got.double() - want).norm() <= 4e-3 * magnitude.norm(), name
        torch.testing.assert_close(got_lse.double(), want_lse.double(), rtol=2e-4, atol=2e-4)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(prefills)
def test_random_prefills(case):
    run_random_prefill(case)


@pytest.mark.slow
@settings(max_examples=500, deadline=None)
@given(prefills)
def test_many_random_prefills(case):
    run_random_prefill(case)
