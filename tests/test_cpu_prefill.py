"""Prefill's gradients and the cache's rows on the CPU kernels, on every target: against fp64, and
against the reference bit for bit. The forward's tests are in test_cpu_mla.py."""

from __future__ import annotations

import functools

import pytest
import torch
from cpu_targets import TARGETS, guarded, relative_error, use_target
from hypothesis import given, settings
from hypothesis import strategies as st

import dskernels as dsk
from dskernels import _C
from dskernels.backend import Unsupported
from dskernels.cpu import mla, prefill
from dskernels.ref import mla as ref
from dskernels.ref import mla_backward as ref_backward

BOUND = {torch.float32: 3e-6, torch.bfloat16: 8e-3, torch.float16: 1.2e-3}


@pytest.fixture(params=TARGETS)
def target(request):
    with use_target(request.param) as name:
        yield name


def operands(lengths_q, lengths_k, h, dk, dv, dtype, seed=0, spare=2):
    """q, k, v, the gradients of out and lse, and the ends; NaN in rows behind the last request."""
    g = torch.Generator().manual_seed(seed)
    ends_q, ends_k = (
        torch.tensor([0, *lengths]).cumsum(0).int() for lengths in (lengths_q, lengths_k)
    )
    tq, tk = sum(lengths_q) + spare, sum(lengths_k) + spare
    q = torch.randn(tq, h, dk, generator=g)
    kv = torch.randn(tk, h, dk + dv, generator=g)
    grad, grad_lse = torch.randn(tq, h, dv, generator=g), torch.randn(h, tq, generator=g)
    q[tq - spare :], kv[tk - spare :], grad[tq - spare :] = (torch.nan,) * 3
    q, kv, grad = (x.to(dtype) for x in (q, kv, grad))
    return (q, *kv.split([dk, dv], dim=-1), grad, grad_lse, ends_q, ends_k)


def gradients(q, k, v, grad, grad_lse, ends_q, ends_k, causal=True, scale=None):
    modes = dict(causal=causal, softmax_scale=scale)
    out, lse = prefill.mla_prefill(q, k, v, ends_q, ends_k, **modes)
    saved = (grad, grad_lse, q, k, v, out, lse, ends_q, ends_k)
    return prefill.mla_prefill_backward(*saved, **modes)


def exact(q, k, v, grad, grad_lse, ends_q, ends_k, causal=True, scale=None):
    wide = (x.double() for x in (grad, grad_lse, q, k, v))
    return ref_backward.mla_prefill_backward(
        *wide, None, None, ends_q, ends_k, causal=causal, softmax_scale=scale
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dims", [(192, 128), (24, 16), (40, 72)])
def test_gradients(target, dtype, causal, dims):
    """Cached prefixes, requests without queries or keys, queries that attend nothing."""
    given_ = operands([66, 0, 3, 17, 2], [150, 5, 3, 4, 0], 2, *dims, dtype)
    got = gradients(*given_, causal=causal, scale=0.11)
    for name, a, b in zip("qkv", got, exact(*given_, causal=causal, scale=0.11)):
        assert a.dtype == dtype and a.shape == b.shape
        assert relative_error(a, b) < BOUND[dtype], name
    assert all(bool((x[-2:] == 0).all()) for x in got), "rows behind the last request"
    if causal:  # 17 queries of 4 keys: the first 13 see none
        assert bool((got[0][69:82] == 0).all())


def test_forward_of_equal_requests_as_good_as_the_reference(target):
    """bf16: error against fp64 at most twice that of the reference on the same operands."""
    q, k, v, _, _, ends, _ = operands([50, 50], [50, 50], 3, 24, 16, torch.bfloat16, spare=0)
    want = ref.mla_prefill(q.double(), k.double(), v.double(), ends, ends)[0]
    ours, theirs = (f.mla_prefill(q, k, v, ends, ends)[0] for f in (prefill, ref))
    assert relative_error(ours, want) <= 2 * relative_error(theirs, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_threads_give_the_same_bits(target, dtype):
    """One task for a request and head, or blocks of keys and then of queries."""
    given_ = operands([130, 7], [150, 70], 3, 40, 24, dtype)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 4, 64):
            torch.set_num_threads(threads)
            results.append(gradients(*given_))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_outputs_have_intact_canaries(target, dtype):
    for threads in (1, 16):
        q, k, v, grad, grad_lse, *ends = operands([70, 3], [65, 9], 2, 33, 17, dtype, spare=0)
        out, out_intact = guarded((73, 2, 17), dtype)
        lse, lse_intact = guarded((2, 73), torch.float32)
        _C.cpu.mla_prefill(q, k, v, *ends, 0.2, True, out, lse, threads)
        outputs = [guarded(x.shape, dtype) for x in (q, k, v)]
        _C.cpu.mla_prefill_backward(
            *(grad, grad_lse, q, k, v, out, lse, *ends, 0.2, True),
            *(x for x, _ in outputs),
            threads,
        )
        assert out_intact() and lse_intact() and all(intact() for _, intact in outputs)
        assert all(bool(x.isfinite().all()) for x, _ in outputs)


def query_by_query(q, k, v, grad, grad_lse, ends_q, ends_k):
    """As `exact` for square causal requests, but no query meets a key that it does not see: the
    formulas multiply those by 0, which a NaN or an infinity survives."""
    found = [torch.zeros(x.shape, dtype=torch.float64) for x in (q, k, v)]
    for begin, end in zip(ends_q.tolist(), ends_q[1:].tolist()):
        for i in range(begin, end):
            row, keys = slice(i, i + 1), slice(begin, i + 1)
            ends = torch.tensor([0, 1]), torch.tensor([0, i + 1 - begin])
            parts = exact(q[row], k[keys], v[keys], grad[row], grad_lse[:, row], *ends)
            for to, at, part in zip(found, (row, keys, keys), parts):
                to[at] += part
    return found


def with_special(name, row, value, dtype):
    """Two requests, one value of the first one's row `row` replaced in head 1."""
    given_ = operands([70, 5], [70, 5], 3, 8, 8, dtype, spare=0)
    poisoned = [x.clone() for x in given_]
    poisoned["qkv".index(name) if name in "qkv" else 3][row, 1, row % 8] = value
    return given_, poisoned


@functools.cache
def known_gradients(name, row, value, dtype):
    return query_by_query(*with_special(name, row, value, dtype)[1])


@pytest.mark.parametrize("name", ["q", "k", "v", "grad"])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_special_values_show_where_they_belong(target, name, value):
    """What depends on one is what fp64 says, finite or not. Beside it 64 rows and keys of a block
    may be refused (0 times infinity), never wrong; other heads and requests do not notice."""
    for dtype in (torch.bfloat16, torch.float32):
        for row in (0, 5, 69):
            clean, poisoned = with_special(name, row, float(value), dtype)
            want = known_gradients(name, row, float(value), dtype)
            for a, b, c in zip(gradients(*poisoned), want, gradients(*clean)):
                kept = a.isfinite()
                assert not bool(kept[~b.isfinite()].any())
                torch.testing.assert_close(a[kept].double(), b[kept], rtol=2e-2, atol=4e-2)
                assert torch.equal(a[:, (0, 2)], c[:, (0, 2)]) and torch.equal(a[70:], c[70:])
            # The last row's block is another than that of the first 64 rows. (A value meets weights
            # of 0 in the forward already, and D is made of what comes out.)
            if row == 69 and name != "v":
                assert bool(gradients(*poisoned)[0][:64].isfinite().all())


def test_gradient_of_lse_alone(target):
    q, k, v, _, _, ends, _ = operands([6, 6], [6, 6], 2, 24, 16, torch.float32, spare=0)
    grads = []
    for backend in ("cpu", "ref"):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out, lse = dsk.mla_prefill(*leaves, ends, ends, backend=backend)
        (out.square().sum() + lse.sum()).backward()
        grads.append([x.grad for x in leaves])
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("change", ["double", "wide"])
def test_what_the_kernels_do_not_take_goes_to_the_reference(change):
    width = 1025 if change == "wide" else 8
    dtype = torch.float64 if change == "double" else torch.float32
    q, k, v, _, _, *ends = operands([4, 3], [4, 3], 1, width, 4, dtype, spare=0)
    with pytest.raises(Unsupported, match="expected"):
        prefill.mla_prefill(q, k, v, *ends)
    got, want = (dsk.mla_prefill(q, k, v, *ends, backend=b)[0] for b in ("cpu", "ref"))
    torch.testing.assert_close(got, want)


def test_bad_arguments_are_named():
    q, k, v, grad, grad_lse, *ends = operands([4], [4], 2, 8, 6, torch.float32, spare=0)
    out, lse = prefill.mla_prefill(q, k, v, *ends)
    with pytest.raises(ValueError, match=r"grad: expected shape \[4, 2, 6\].*got \[4, 2, 5\]"):
        prefill.mla_prefill_backward(grad[..., :5], grad_lse, q, k, v, out, lse, *ends)
    with pytest.raises(ValueError, match=r"grad_lse: expected shape \[2, 4\].*got \[1, 4\]"):
        prefill.mla_prefill_backward(grad, grad_lse[:1], q, k, v, out, lse, *ends)


cases = st.tuples(
    st.lists(st.tuples(st.integers(0, 90), st.integers(0, 140)), min_size=1, max_size=3),
    st.integers(1, 3),  # heads
    st.integers(1, 70),  # width of a key
    st.integers(1, 70),  # width of a value
    st.booleans(),  # causal
    st.sampled_from(list(BOUND)),
    st.integers(0, 2**16),  # seed
)


def run_random_gradients(case) -> None:
    lengths, h, dk, dv, causal, dtype, seed = case
    lengths_q, lengths_k = zip(*lengths)
    given_ = operands(lengths_q, lengths_k, h, dk, dv, dtype, seed)
    want = exact(*given_, causal=causal)
    # dS cancels where a query sees few keys: errors are measured against sums of magnitudes, of
    # which |v| and |grad| give the largest.
    q, k, v, grad, grad_lse, *ends = given_
    larger = (v.double().abs(), grad.double().abs(), grad_lse.abs(), *ends)
    scale = 1 + max(x.norm() for x in exact(q.double(), k.double(), *larger, causal=causal))
    for name in TARGETS:
        with use_target(name):
            got = gradients(*given_, causal=causal)
        for a, b in zip(got, want):
            bound = BOUND[dtype] * (b.norm() + scale)
            assert (a.double() - b).norm() <= bound, name


@settings(max_examples=20, deadline=None, derandomize=True)
@given(cases)
def test_random_gradients(case):
    run_random_gradients(case)


@pytest.mark.slow
@settings(max_examples=500, deadline=None)
@given(cases)
def test_many_random_gradients(case):
    run_random_gradients(case)


# ---- cache append ------------------------------------------------------------------------------

FLOATS = [torch.bfloat16, torch.float16, torch.float32]


def caches(kind, pages, page, dl, r):
    """Two equal caches of a pattern; the rows of the first have gaps between them."""
    row = ref.fp8_row_bytes(dl, r) if kind == torch.uint8 else dl + r
    raw = torch.randint(0, 100, (pages, page + 1, row + 8)).to(kind)
    return raw, raw[:, :page, :row], raw.clone()[:, :page, :row]


def run_append(kind, dtype, tokens, pages, page, dl, r, seed) -> None:
    g = torch.Generator().manual_seed(seed)
    latent = (torch.randn(tokens, dl + 3, generator=g) * 30).to(dtype)[:, :dl]
    k_rope = torch.randn(tokens, r, generator=g).to(FLOATS[seed % 3])
    rising = torch.randperm(pages * page, generator=g)[:tokens].sort().values
    for slots in (rising, torch.randint(-1, pages * page, (tokens,), generator=g)):
        raw, ours, theirs = caches(kind, pages, page, dl, r)
        before = raw.clone()
        mla.mla_cache_append(ours, latent[: slots.numel()], k_rope[: slots.numel()], slots)
        ref.mla_cache_append(theirs, latent[: slots.numel()], k_rope[: slots.numel()], slots)
        assert torch.equal(ours, theirs)
        raw[:, :page, : ours.shape[-1]] = before[:, :page, : ours.shape[-1]]
        assert torch.equal(raw, before), "something beside the rows was written"


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("kind", [*FLOATS, torch.uint8], ids=str)
def test_append_is_bitwise_the_reference(target, kind, dtype):
    """Rising slots (threads) and any order with repetitions and -1 (the last token stays)."""
    for tokens, dl, r in [(1, 512, 64), (50, 130, 6), (7, 33, 0), (0, 64, 2)]:
        run_append(kind, dtype, tokens, 5, 16, dl, r, tokens)


def test_append_keeps_special_values(target):
    latent = torch.tensor([[torch.nan, 1.0, -torch.inf, 448.0], [1e-41, -0.0, 1e30, torch.nan]])
    for kind in (torch.bfloat16, torch.float32, torch.uint8):
        _, ours, theirs = caches(kind, 1, 4, 4, 2)
        for f, cache in ((mla, ours), (ref, theirs)):
            f.mla_cache_append(cache, latent, latent[:, :2].bfloat16(), torch.tensor([2, 0]))
        if kind != torch.uint8:
            assert torch.equal(ours.isnan(), theirs.isnan())
            assert torch.equal(ours.nan_to_num(7.0), theirs.nan_to_num(7.0))
            continue
        nan = (theirs[..., :4] & 0x7F) == 0x7F
        assert torch.equal(nan, (ours[..., :4] & 0x7F) == 0x7F)
        assert torch.equal(ours[..., :4][~nan], theirs[..., :4][~nan])
        assert torch.equal(ours[..., 4:8], theirs[..., 4:8]), "scales"


def test_append_names_bad_arguments():
    cache, rows = torch.zeros(2, 4, 10), torch.zeros(3, 8)
    slots = torch.tensor([0, 8, 1])
    with pytest.raises(ValueError, match=r"slots\[1\]: expected -1 .. 7, got 8"):
        mla.mla_cache_append(cache, rows, rows[:, :2], slots)
    with pytest.raises(ValueError, match=r"kv_cache: expected shape \[-1, -1, 9\]"):
        mla.mla_cache_append(cache, rows, rows[:, :1], slots)
    assert bool((cache == 0).all())


appends = st.tuples(
    st.sampled_from([*FLOATS, torch.uint8]), st.sampled_from(FLOATS), st.integers(0, 40),
    st.integers(1, 4), st.integers(1, 20), st.integers(1, 300), st.integers(0, 70),
    st.integers(0, 999),
)  # fmt: skip


@settings(max_examples=20, deadline=None, derandomize=True)
@given(appends)
def test_random_appends(case):
    for name in TARGETS:
        with use_target(name):
            run_append(*case)
