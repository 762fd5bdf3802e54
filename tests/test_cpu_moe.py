"""CPU fused experts against the reference, on every target this processor runs."""

from __future__ import annotations

import pytest
import torch
from cpu_targets import TARGETS, relative_error, use_target
from hypothesis import given, settings
from hypothesis import strategies as st

from dskernels.cpu import moe, pack, packing, rowwise
from dskernels.ref import moe as ref


@pytest.fixture(params=TARGETS)
def target(request):
    with use_target(request.param) as name:
        yield name


def layer(e, d, i, seed=0):
    g = torch.Generator().manual_seed(seed)
    w13 = rowwise.quantize(torch.randn(e, 2 * i, d, generator=g) * d**-0.5, (128, 128))
    w2 = rowwise.quantize(torch.randn(e, d, i, generator=g) * i**-0.5, (128, 128))
    return w13, w2


def routing(t, k, e, seed=0, dropped=0.1):
    g = torch.Generator().manual_seed(seed)
    idx = torch.rand(t, e, generator=g).topk(k).indices
    idx = idx.masked_fill(torch.rand(t, k, generator=g) < dropped, -1)
    return idx, torch.rand(t, k, generator=g)


def exact(x, w13, w2, idx, weights):
    """fp64, activations not quantised; and the same sum of magnitudes, to measure errors by."""
    a, b = w13.dequantize(torch.float64), w2.dequantize(torch.float64)
    out, magnitude = (torch.zeros(x.shape, dtype=torch.float64) for _ in range(2))
    for t, slots in enumerate(idx.tolist()):
        for slot, expert in enumerate(slots):
            if expert >= 0:
                gate, up = (a[expert] @ x[t].double()).chunk(2)
                hidden = torch.nn.functional.silu(gate) * up
                out[t] += weights[t, slot] * (b[expert] @ hidden)
                magnitude[t] += weights[t, slot] * (b[expert].abs() @ hidden.abs())
    return out, magnitude


def assert_close_to_exact(got, x, w13, w2, idx, weights, bound):
    want, magnitude = exact(x, w13, w2, idx, weights)
    assert (got.double() - want).norm() <= bound * magnitude.norm()


def assert_same_up_to_quantisation(got, x, w13, w2, idx, weights):
    """Sums that differ in their last bits can move a hidden value to the neighbouring E4M3 number.

    So the reference is met within a half of what quantising costs the reference itself.
    """
    want = ref.moe_experts(x, w13, w2, idx, weights)
    cost = relative_error(want, exact(x, w13, w2, idx, weights)[0])
    assert got.dtype == x.dtype and relative_error(got, want) < 0.5 * cost


@pytest.mark.parametrize("tokens", [1, 3, 40])
@pytest.mark.parametrize("dims", [(4, 256, 128), (5, 200, 192)])
def test_w8a8_is_the_reference(target, tokens, dims):
    e, d, i = dims
    w13, w2 = layer(e, d, i)
    idx, weights = routing(tokens, 2, e, tokens)
    x = torch.randn(tokens, d, generator=torch.Generator().manual_seed(1)).bfloat16()
    for a, b in ((w13, w2), (pack(w13), pack(w2))):
        got = moe.moe_experts(x, a, b, idx, weights)
        assert_same_up_to_quantisation(got, x, w13, w2, idx, weights)


@pytest.mark.parametrize("tokens", [1, 7, 33])
def test_w8a16_against_fp64(target, tokens):
    w13, w2 = layer(4, 256, 128)
    idx, weights = routing(tokens, 3, 4, tokens)
    x = torch.randn(tokens, 256, generator=torch.Generator().manual_seed(2)).bfloat16()
    got = moe.moe_experts(x, w13, w2, idx, weights, quantize_activations=False)
    assert_close_to_exact(got, x, w13, w2, idx, weights, 2e-3)


@pytest.mark.parametrize("quantize", [True, False])
def test_weights_too_large_to_keep_packed(target, monkeypatch, quantize):
    """One expert after the other, and only those that a token chose; the same result."""
    packs = []

    def counting(weight):
        packs.append(tuple(weight.shape))
        return pack(weight)

    w13, w2 = layer(6, 256, 128)
    x = torch.randn(9, 256, generator=torch.Generator().manual_seed(7)).bfloat16()
    idx, weights = routing(9, 2, 6)
    idx[idx == 4] = 5
    chosen = len(set(idx.flatten().tolist()) - {-1})
    monkeypatch.setattr(packing, "_CACHE_BYTES", w13.data.nbytes + w2.data.nbytes - 1)
    monkeypatch.setattr(packing, "pack", counting)
    moe.moe_experts(x, w13, w2, idx, weights, quantize_activations=quantize)
    assert len(packs) == 2  # together they are too large, each alone is kept
    monkeypatch.setattr(packing, "_CACHE_BYTES", 0)
    packs.clear()
    got = moe.moe_experts(x, w13, w2, idx, weights, quantize_activations=quantize)
    assert sorted(packs) == sorted([(256, 256), (256, 128)] * chosen)
    if quantize:
        assert_same_up_to_quantisation(got, x, w13, w2, idx, weights)
    else:
        assert_close_to_exact(got, x, w13, w2, idx, weights, 2e-3)


def test_every_token_to_one_expert_and_none(target):
    """More rows than one task takes, beside experts that get nothing."""
    w13, w2 = layer(6, 128, 64)
    x = torch.randn(900, 128, generator=torch.Generator().manual_seed(3)).bfloat16()
    idx = torch.full((900, 2), -1)
    idx[:, 1] = 4
    weights = torch.rand(900, 2, generator=torch.Generator().manual_seed(4))
    got = moe.moe_experts(x, w13, w2, idx, weights)
    assert_same_up_to_quantisation(got, x, w13, w2, idx, weights)
    assert bool((moe.moe_experts(x, w13, w2, idx * 0 - 1, weights) == 0).all())
    assert moe.moe_experts(x[:0], w13, w2, idx[:0], weights[:0]).shape == (0, 128)


def test_special_values_stay_in_their_rows(target):
    w13, w2 = layer(2, 128, 64)
    x = torch.randn(20, 128, generator=torch.Generator().manual_seed(5)).bfloat16()
    idx, weights = torch.arange(20)[:, None] % 2, torch.ones(20, 1)
    clean = moe.moe_experts(x, w13, w2, idx, weights)
    x[3, 5], x[8, 0] = torch.nan, torch.inf
    for quantize in (True, False):
        got = moe.moe_experts(x, w13, w2, idx, weights, quantize_activations=quantize)
        finite = got.isfinite().all(dim=1)
        assert finite.tolist() == [row not in (3, 8) for row in range(20)]
    got = moe.moe_experts(x, w13, w2, idx, weights)
    rest = [row for row in range(20) if row not in (3, 8)]
    # A refused block takes its whole group of rows to fp32: neighbours may move by a rounding.
    assert relative_error(got[rest], clean[rest]) < 2e-2


def test_threads_give_the_same_bits(target):
    w13, w2 = layer(4, 256, 128)
    idx, weights = routing(50, 2, 4)
    x = torch.randn(50, 256, generator=torch.Generator().manual_seed(6)).bfloat16()
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(moe.moe_experts(x, w13, w2, idx, weights))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_bad_arguments_are_named():
    w13, w2 = layer(2, 128, 64)
    x, weights = torch.randn(3, 128), torch.ones(3, 1)
    idx = torch.tensor([[0], [5], [1]])
    with pytest.raises(ValueError, match=r"topk_idx\[1, 0\]: expected -1 .. 1, got 5"):
        moe.moe_experts(x, w13, w2, idx, weights)
    with pytest.raises(ValueError, match=r"topk_weights: expected shape \[3, 1\]"):
        moe.moe_experts(x, w13, w2, idx * 0, weights[:2])


shapes = st.tuples(
    st.integers(1, 14),  # tokens
    st.integers(1, 3),  # k
    st.integers(3, 5),  # experts
    st.integers(1, 200),  # d
    st.integers(1, 2),  # i / 64
    st.integers(0, 2**16),  # seed
)


def run_random(shape) -> None:
    t, k, e, d, panels, seed = shape
    w13, w2 = layer(e, d, panels * 64, seed)
    idx, weights = routing(t, k, e, seed, dropped=0.2)
    x = torch.randn(t, d, generator=torch.Generator().manual_seed(seed)).bfloat16()
    for name in TARGETS:
        with use_target(name):
            got = moe.moe_experts(x, w13, w2, idx, weights, quantize_activations=False)
        assert_close_to_exact(got, x, w13, w2, idx, weights, 4e-3)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(shapes)
def test_random_shapes(shape):
    run_random(shape)


@pytest.mark.slow
@settings(max_examples=500, deadline=None)
@given(shapes)
def test_many_random_shapes(shape):
    run_random(shape)
