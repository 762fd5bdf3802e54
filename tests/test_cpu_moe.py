"""CPU router, permutation and fused experts against the reference, on every target."""

from __future__ import annotations

import pytest
import torch
from cpu_targets import TARGETS, guarded, relative_error, use_target
from hypothesis import given, settings
from hypothesis import strategies as st

from dskernels import _C
from dskernels.backend import Unsupported
from dskernels.cpu import gemm, moe, pack, packing, rowwise
from dskernels.ref import moe as ref
from dskernels.ref import moe_backward as ref_backward


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


FLOATS = [torch.bfloat16, torch.float16, torch.float32]
# experts, groups, groups in the running, k, score, group score
ROUTERS = [(256, 8, 4, 8, "sigmoid", None), (160, 8, 3, 6, "softmax", "max")]
ROUTERS += [(72, 9, 2, 5, "sigmoid", "max"), (7, 7, 3, 3, "sigmoid", "top2")]
ROUTERS += [(64, 1, 1, 6, "softmax", None), (1, 1, 1, 1, "sigmoid", None)]


def assert_same_choice(got, bias, router):
    """From the scores on the reference's bits: indices, weights, order."""
    _, groups, top, k, score, group_score = router
    topk_idx, weights, scores = got
    by_sum = (group_score or ("top2" if score == "sigmoid" else "max")) == "top2"
    want_idx, want_weights = ref.choose_experts(
        *(scores, bias), n_group=groups, topk_group=top, topk=k, scale=2.5,
        by_sum=by_sum, renormalize=score == "sigmoid",
    )  # fmt: skip
    assert torch.equal(topk_idx, want_idx)
    assert torch.equal(weights.view(torch.int32), want_weights.view(torch.int32))


def route(x, weight, bias, router):
    _, groups, top, k, score, group_score = router
    modes = dict(n_group=groups, topk_group=top, topk=k, scale=2.5)
    got = moe.moe_gate(x, weight, bias, **modes, score=score, group_score=group_score)
    assert_same_choice(got, bias, router)
    return got


@pytest.mark.parametrize("router", ROUTERS, ids=lambda r: f"e{r[0]}-{r[4]}")
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("tokens, d", [(1, 100), (3, 96), (10, 300)])
def test_gate(target, router, dtype, tokens, d):
    experts, score = router[0], router[4]
    g = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, d, generator=g).to(dtype)
    bias = torch.randn(experts, generator=g)
    for kind in (dtype, torch.float32):
        weight = (torch.randn(experts, d, generator=g) * d**-0.5).to(kind)
        _, _, scores = route(x, weight, bias, router)
        logits = x.double() @ weight.double().T
        want = logits.sigmoid() if score == "sigmoid" else logits.softmax(-1)
        torch.testing.assert_close(scores.double(), want, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("router", ROUTERS[:4], ids=lambda r: f"e{r[0]}-{r[4]}")
def test_gate_with_ties_and_special_values(target, router):
    """Equal scores, NaN tokens and weights, infinite logits and biases of any size."""
    experts = router[0]
    g = torch.Generator().manual_seed(1)
    x = torch.randint(-1, 2, (40, 64), generator=g).float()
    x[3, 5], x[4, 0], x[5] = torch.nan, torch.inf, 0
    weight = torch.randint(-1, 2, (experts, 64), generator=g) / 8
    route(x, weight, None, router)
    weight[experts // 2, 7] = torch.nan
    ties = torch.randint(-1, 2, (experts,), generator=g).float()
    for bias in (ties, ties * 3e38, ties * torch.inf, torch.full((experts,), torch.nan)):
        route(x, weight, bias, router)
    assert bool(torch.isnan(route(x, weight, ties, router)[2][3]).all())


def test_gate_does_not_depend_on_batch_or_threads(target):
    g = torch.Generator().manual_seed(2)
    x, weight = torch.randn(23, 200, generator=g), torch.randn(64, 200, generator=g)
    for kind in FLOATS:
        a, b = x.to(kind), weight.to(kind)
        among = moe.moe_gate(a, b, None, topk=4)
        before = torch.get_num_threads()
        try:
            torch.set_num_threads(5)
            for t in range(23):
                alone = moe.moe_gate(a[t : t + 1], b, None, topk=4)
                assert all(torch.equal(p[0], q[t]) for p, q in zip(alone, among))
        finally:
            torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("alignment", [1, 8])
@pytest.mark.parametrize(
    "t, k, e, d", [(0, 2, 3, 8), (1, 1, 1, 1), (37, 3, 9, 200), (64, 8, 4, 33)]
)
def test_permutation_is_bitwise_the_reference(target, dtype, alignment, t, k, e, d):
    g = torch.Generator().manual_seed(t)
    x = torch.randn(t, d + 3, generator=g).to(dtype)[:, :d]  # rows with a stride
    idx = torch.randint(-1, e, (t, k), generator=g)
    weights = torch.randn(t, k, generator=g)
    got, want = (f(x, idx, e, alignment=alignment) for f in (moe.moe_permute, ref.moe_permute))
    for a, b in zip(got, want):
        assert a.dtype == b.dtype and torch.equal(a, b)
    y, row_map = torch.randn(got[0].shape, generator=g).to(dtype), got[2]
    for factors in (weights, None):
        a, b = (f(y, row_map, factors) for f in (moe.moe_unpermute, ref.moe_unpermute))
        assert a.dtype == dtype and torch.equal(a, b)
        grad = torch.randn(t, d, generator=g).to(dtype)
        a, b = (
            f(grad, y, row_map, factors)
            for f in (moe.moe_unpermute_backward, ref_backward.moe_unpermute_backward)
        )
        assert torch.equal(a[0], b[0]) and a[1].dtype == b[1].dtype
        torch.testing.assert_close(a[1], b[1], rtol=1e-2, atol=1e-3)


def gate_gradients(tokens, d, router, x_type, weight_type, seed=0):
    """Arguments of moe_gate_backward as the forward leaves them, gradients included."""
    experts, groups, top, k, score, group_score = router
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, d + 3, generator=g).to(x_type)[:, :d]
    weight = (torch.randn(experts, d, generator=g) * d**-0.5).to(weight_type)
    modes = dict(n_group=groups, topk_group=top, topk=k, score=score, group_score=group_score)
    idx, _, scores = ref.moe_gate(x, weight, None, **modes)
    grads = torch.randn(tokens, k, generator=g), torch.randn(tokens, experts, generator=g)
    return (*grads, x, weight, idx, scores, 2.5, score, score == "sigmoid")


def check_gate_gradients(given_) -> None:
    got = moe.moe_gate_backward(*given_)
    wide = [t.double() if t.is_floating_point() else t for t in given_[:6]]
    want = ref_backward.moe_gate_backward(*wide, *given_[6:])
    for a, b, like in zip(got, want, given_[2:4]):
        assert a.dtype == like.dtype and a.shape == like.shape
        bound = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 1e-3}[a.dtype]
        assert (a.double() - b).norm() <= bound * b.norm() + 1e-6


@pytest.mark.parametrize("router", ROUTERS, ids=lambda r: f"e{r[0]}-{r[4]}")
@pytest.mark.parametrize("tokens, d", [(0, 64), (1, 100), (70, 129)])
def test_gate_gradients(target, router, tokens, d):
    for x_type, weight_type in ((torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16)):
        check_gate_gradients(gate_gradients(tokens, d, router, x_type, weight_type))


def test_gate_gradients_do_not_depend_on_threads(target):
    given_ = gate_gradients(100, 200, ROUTERS[0], torch.bfloat16, torch.float32)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 5):
            torch.set_num_threads(threads)
            results.append(moe.moe_gate_backward(*given_))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_gate_gradients_of_special_values(target):
    """A NaN token reaches its own dx and every expert's dweight, and no other token."""
    given_ = list(gate_gradients(9, 40, ROUTERS[1], torch.float32, torch.float32))
    clean = moe.moe_gate_backward(*given_)
    given_[0] = given_[0].clone()
    given_[0][4, 0] = torch.nan
    dx, dweight = moe.moe_gate_backward(*given_)
    assert bool(dx[4].isnan().all()) and bool(dweight.isnan().all())
    rest = [t for t in range(9) if t != 4]
    assert torch.equal(dx[rest], clean[0][rest])
    given_ = list(gate_gradients(9, 40, ROUTERS[1], torch.float32, torch.float32))
    given_[2] = given_[2].clone()
    given_[2][4, 7] = torch.inf
    _, dweight = moe.moe_gate_backward(*given_)
    assert not bool(dweight[:, 7].isfinite().any())
    other = [d for d in range(40) if d != 7]
    assert torch.equal(dweight[:, other], clean[1][:, other])


def test_gradients_stay_in_their_outputs(target):
    """Canaries round the gradients of the router and of unpermute."""
    *grads, x, weight, idx, scores, scale, _, _ = gate_gradients(
        5, 35, ROUTERS[3], torch.float32, torch.float32
    )
    idx = idx.contiguous()
    dx, dx_intact = guarded((5, 35), torch.float32)
    dweight, dweight_intact = guarded((7, 35), torch.float32)
    _C.cpu.moe_gate_backward(*grads, x, weight, idx, scores, scale, False, True, dx, dweight, 3)
    assert dx_intact() and dweight_intact()
    row_map = torch.arange(15).reshape(5, 3)
    y = torch.randn(15, 35)
    dy, dy_intact = guarded((15, 35), torch.float32)
    dweights, dweights_intact = guarded((5, 3), torch.float32)
    slots = torch.rand(5, 3)
    _C.cpu.moe_unpermute_backward(x[:, :35].contiguous(), y, row_map, slots, dy, dweights, 3)
    assert dy_intact() and dweights_intact()
    assert all(bool(t.isfinite().all()) for t in (dx, dweight, dy, dweights))


@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_experts_stay_in_their_output(target, tokens):
    """Canaries round the output; x behind the ends of its rows is NaN."""
    w13, w2 = (pack(w) for w in layer(3, 136, 64))
    x = torch.full((tokens, 150), torch.nan, dtype=torch.bfloat16)
    x[:, :136] = torch.randn(tokens, 136)
    idx, weights = routing(tokens, 2, 3)
    for quantize in (True, False):
        out, intact = guarded((tokens, 136), torch.bfloat16)
        _C.cpu.moe_experts(
            *(x[:, :136], w13.data, w13.marks, w13.scale, w2.data, w2.marks, w2.scale),
            *(idx, weights, 64, quantize, out, 3),
        )
        assert intact() and bool(out.isfinite().all())


@pytest.mark.parametrize("quantize", [True, False])
def test_special_values_in_every_position_of_experts(target, quantize):
    """x, both weights and the routing weights: a token that meets one is not finite, others are."""
    w13, w2 = layer(2, 128, 64)
    x = torch.randn(6, 128, generator=torch.Generator().manual_seed(8)).bfloat16()
    idx, weights = torch.arange(6)[:, None] % 2, torch.rand(6, 1) + 0.5
    mine = idx[:, 0] == 1

    def finite(x, w13, w2, weights):
        modes = dict(quantize_activations=quantize)
        return moe.moe_experts(x, w13, w2, idx, weights, **modes).isfinite()

    for column in range(0, 128, 9):
        for value in (torch.nan, torch.inf, -torch.inf):
            poisoned = x.clone()
            poisoned[3, column] = value
            kept = finite(poisoned, w13, w2, weights).all(1)
            assert kept.tolist() == [token != 3 for token in range(6)], (column, value)
    for which, (weight, rows) in enumerate(((w13, 128), (w2, 128))):
        for row in range(0, rows, 27):
            data = weight.data.clone()
            data.view(torch.uint8)[1, row, row % weight.shape[-1]] = 0x7F
            bad = type(weight)(data, weight.scale, weight.block)
            pair = (bad, w2) if which == 0 else (w13, bad)
            kept = finite(x, *pair, weights)
            # A NaN in w13 reaches one hidden value, so every output of the tokens of that expert;
            # one in w2 reaches the output of its row.
            hit = kept.logical_not()
            assert bool(hit[mine].all() if which == 0 else hit[mine][:, row].all()), (which, row)
            assert not bool(hit[~mine].any())
    for value in (torch.nan, torch.inf):
        bad = weights.clone()
        bad[2] = value
        assert finite(x, w13, w2, bad).all(1).tolist() == [token != 2 for token in range(6)]


gates = st.tuples(
    st.integers(0, 130),  # tokens
    st.integers(1, 200),  # d
    st.sampled_from(ROUTERS),
    st.sampled_from(FLOATS),
    st.sampled_from(FLOATS),
    st.integers(0, 999),
)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(gates)
def test_random_gate_gradients(case):
    given_ = gate_gradients(*case)
    for name in TARGETS:
        with use_target(name):
            check_gate_gradients(given_)


@pytest.mark.slow
@settings(max_examples=500, deadline=None)
@given(gates)
def test_many_random_gate_gradients(case):
    given_ = gate_gradients(*case)
    for name in TARGETS:
        with use_target(name):
            check_gate_gradients(given_)


def test_a_row_named_twice_goes_to_the_reference():
    grad, y = torch.randn(2, 8), torch.randn(3, 8)
    row_map = torch.tensor([[1, 2], [1, -1]])
    with pytest.raises(Unsupported, match="each row of y at most once"):
        moe.moe_unpermute_backward(grad, y, row_map, None)


def test_router_and_permutation_stay_in_their_outputs(target):
    """Canaries round every output; inputs behind their ends are NaN."""
    x = torch.full((5, 40), torch.nan)
    x[:, :35] = torch.randn(5, 35)
    weight = torch.full((9, 40), torch.nan)
    weight[:, :35] = torch.randn(9, 35)
    idx, idx_intact = guarded((5, 3), torch.int64)
    weights, weights_intact = guarded((5, 3), torch.float32)
    scores, scores_intact = guarded((5, 9), torch.float32)
    _C.cpu.moe_gate(
        *(x[:, :35], weight[:, :35], None, 3, 2, 1.0, False, True, True, idx, weights, scores, 2)
    )
    assert idx_intact() and weights_intact() and scores_intact()
    assert bool(scores.isfinite().all()) and bool((idx >= 0).all()) and bool((idx < 9).all())
    counts, sizes = torch.empty(2, 9, dtype=torch.int64)
    row_map, map_intact = guarded((5, 3), torch.int64)
    _C.cpu.moe_layout(idx, 4, counts, sizes, row_map)
    rows, rows_intact = guarded((int(sizes.sum()), 35), torch.float32)
    _C.cpu.moe_permute(x[:, :35], row_map, counts, sizes, rows, 2)
    out, out_intact = guarded((5, 35), torch.float32)
    _C.cpu.moe_unpermute(rows, row_map, weights, out, 2)
    assert map_intact() and rows_intact() and out_intact()
    assert bool(out.isfinite().all())


def test_bad_router_arguments_are_named():
    x, weight = torch.randn(3, 8), torch.randn(6, 8)
    with pytest.raises(ValueError, match="n_group: expected a divisor of 6 experts, got 4"):
        moe.moe_gate(x, weight, None, topk=2, n_group=4)
    with pytest.raises(ValueError, match="topk_idx: expected values in .*got 0 .. 6"):
        moe.moe_permute(x, torch.tensor([[0], [6], [1]]), 6)
    with pytest.raises(ValueError, match=r"row_map\[1, 0\]: expected -1 .. 2, got 3"):
        moe.moe_unpermute(x, torch.tensor([[0], [3]]), None)
    with pytest.raises(Unsupported, match="x: expected float32"):
        moe.moe_gate(x.double(), weight.double(), None, topk=2)


def autograd_of_experts(x, w13, w2, idx, weights, grad):
    """The gradients PyTorch itself gives, with a matrix product for each expert."""
    leaves = [v.clone().requires_grad_() for v in (x, w13, w2, weights)]
    x, w13, w2, weights = leaves
    out = torch.zeros(x.shape, dtype=weights.dtype)
    for expert in range(w13.shape[0]):
        tokens, slots = (idx == expert).nonzero(as_tuple=True)
        gate, up = (x[tokens] @ w13[expert].T).chunk(2, -1)
        y = (torch.nn.functional.silu(gate) * up) @ w2[expert].T
        out = out.index_add(0, tokens, y.to(out.dtype) * weights[tokens, slots, None])
    (out * grad.to(out.dtype)).sum().backward()
    return [v.grad for v in leaves]


@pytest.mark.parametrize("native_bf16", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_plain_experts_and_their_gradients(monkeypatch, dtype, native_bf16):
    """At most 1.2 times the error of PyTorch's autograd in the same type, whatever oneDNN has."""
    if not native_bf16:
        monkeypatch.setattr(gemm, "_onednn_has_bf16", lambda: False)
    g = torch.Generator().manual_seed(11)
    e, d, i, t = 5, 96, 40, 37
    idx, weights = routing(t, 3, e)
    idx[idx == 2] = 3  # an expert without tokens, and a token that names one twice
    x, grad = (torch.randn(t, d, generator=g).to(dtype) for _ in range(2))
    w13 = (torch.randn(e, 2 * i, d, generator=g) * d**-0.5).to(dtype)
    w2 = (torch.randn(e, d, i, generator=g) * i**-0.5).to(dtype)
    got = moe.moe_experts(x, w13, w2, idx, weights)
    want = ref.moe_experts(x, w13, w2, idx, weights)
    assert got.dtype == dtype and relative_error(got, want) < (
        1e-6 if dtype is torch.float32 else 2e-3
    )
    ours = moe.moe_experts_backward(grad, x, w13, w2, idx, weights)
    theirs = autograd_of_experts(x, w13, w2, idx, weights, grad)
    wide = [v.double() for v in (x, w13, w2)]
    exact = autograd_of_experts(*wide, idx, weights.double(), grad.double())
    for a, b, c in zip(ours, theirs, exact):
        assert a.dtype == b.dtype and a.shape == c.shape
        assert relative_error(a, c) <= 1.2 * relative_error(b, c) + 1e-7
    assert bool((ours[1][2] == 0).all()) and bool((ours[2][2] == 0).all())


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


routers = st.tuples(
    st.integers(1, 12),  # tokens
    st.integers(1, 90),  # d
    st.integers(1, 6),  # groups
    st.integers(1, 9),  # experts of a group
    st.sampled_from(["sigmoid", "softmax"]),
    st.sampled_from([None, "top2", "max"]),
    st.sampled_from([1, 4]),  # alignment
    st.integers(0, 2**16),  # seed
)


def run_random_router(case) -> None:
    """Choice and weights by the reference's rule, and the permutation that follows."""
    t, d, groups, size, score, group_score, alignment, seed = case
    g = torch.Generator().manual_seed(seed)
    experts, top = groups * size, 1 + seed % groups
    router = (experts, groups, top, 1 + seed % (top * size), score, group_score)
    x, weight = torch.randn(t, d, generator=g), torch.randn(experts, d, generator=g) / d
    for name in TARGETS:
        with use_target(name):
            for kind in FLOATS:
                idx, weights, _ = route(x.to(kind), weight.to(kind), None, router)
            idx = idx.masked_fill(torch.rand(idx.shape, generator=g) < 0.2, -1)
            got = moe.moe_permute(x, idx, experts, alignment=alignment)
            want = ref.moe_permute(x, idx, experts, alignment=alignment)
            assert all(torch.equal(a, b) for a, b in zip(got, want)), name
            back = moe.moe_unpermute(got[0], got[2], weights)
            assert torch.equal(back, ref.moe_unpermute(got[0], got[2], weights)), name


@settings(max_examples=20, deadline=None, derandomize=True)
@given(routers)
def test_random_routers(case):
    run_random_router(case)


@pytest.mark.slow
@settings(max_examples=500, deadline=None)
@given(routers)
def test_many_random_routers(case):
    run_random_router(case)
