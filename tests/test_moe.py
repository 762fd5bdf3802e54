"""The MoE stem on every backend, against the reference."""

import itertools

import pytest
import torch
from backend_axis import need, on_cpu, on_device

import dskernels as dsk
from dskernels.ref import moe as ref
from dskernels.ref import rowwise
from dskernels.ref.moe_backward import moe_unpermute_backward
from dskernels.testing import assert_bitwise_equal, calc_diff

# ---- gate ----------------------------------------------------------------------------------------

# e, n_group, topk_group, topk, score, group_score
GATES = [
    (256, 8, 4, 8, "sigmoid", None),  # V3
    (160, 8, 3, 6, "softmax", None),  # V2
    (64, 1, 1, 6, "softmax", None),  # V2-Lite
    (512, 16, 2, 16, "sigmoid", "max"),
    (6, 6, 3, 2, "sigmoid", None),  # groups of one
    (33, 3, 3, 33, "sigmoid", None),  # everybody
    (1, 1, 1, 1, "softmax", None),
]


def exact_hidden_states(t, d, e):
    """x, weight whose products sum exactly in any order: small integers, over few columns."""
    return torch.randint(-3, 4, (t, d)).float(), torch.randint(-2, 3, (e, d)).float() / 16


def check_scores(scores, x, weight, score):
    """Within twice the error of torch's own fp32 scores, and a rounding of the exponential."""
    activation = torch.sigmoid if score == "sigmoid" else lambda v: v.softmax(dim=-1)
    exact = activation(x.double() @ weight.double().t())
    own = activation(x.float() @ weight.float().t())
    assert torch.equal(scores.isnan(), exact.isnan())
    scale = exact.abs().nan_to_num() + torch.finfo(torch.float32).tiny
    error, bound = (((v - exact).abs().nan_to_num() / scale).max() for v in (scores, own))
    assert error <= 2 * bound + 4 * torch.finfo(torch.float32).eps


def gate_everywhere(backend, x, weight, bias, n_group, topk_group, topk, score, group_score):
    """The op's result, checked: scores as good as torch's fp32, and from them on every bit."""
    options = dict(n_group=n_group, topk_group=topk_group, topk=topk, scale=2.5)
    moved = [on_device(v, backend) for v in (x, weight, bias)]
    got = dsk.moe_gate(*moved, **options, score=score, group_score=group_score, backend=backend)
    topk_idx, weights, scores = (on_cpu(v) for v in got)
    check_scores(scores, x, weight, score)
    want = ref.choose_experts(
        scores,
        bias,
        **options,
        by_sum=(group_score or ("top2" if score == "sigmoid" else "max")) == "top2",
        renormalize=score == "sigmoid",
    )
    assert_bitwise_equal(topk_idx, want[0])
    assert_bitwise_equal(weights, want[1])
    return topk_idx, weights, scores


@pytest.mark.parametrize("gate", GATES, ids=lambda g: f"e{g[0]}-{g[4]}")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gate(backend, gate, dtype):
    experts, *options = gate
    need("moe_gate", backend, e=experts, dtype=dtype)
    t, d = (37, 200) if experts < 512 else (3, 70)
    x, weight = torch.randn(t, d).to(dtype), torch.randn(experts, d) / 8
    gate_everywhere(backend, x, weight, torch.randn(experts), *options)


ADVERSARIAL = ["ties", "negative bias", "one expert takes all", "nan row", "inf row", "nan bias"]


def adversarial_gate(case, t, d, e):
    x, weight = exact_hidden_states(t, d, e)
    bias = torch.randint(-2, 3, (e,)).float() / 4
    if case == "ties":
        weight[:] = weight[0]
        bias[:] = 0
    elif case == "negative bias":
        bias = bias / 8 - 1.2
    elif case == "one expert takes all":
        bias[e // 2] = 1e30
    elif case == "nan row":
        x[0] = float("nan")
    elif case == "inf row":
        x[t // 2, 0] = float("inf")
    elif case == "nan bias":
        bias[::3] = float("nan")
        bias[1::3] = float("-inf")
    return x, weight, bias


@pytest.mark.parametrize("case", ADVERSARIAL)
def test_gate_on_adversarial_inputs(backend, case):
    need("moe_gate", backend)
    for experts, *options in GATES[:2]:
        x, weight, bias = adversarial_gate(case, 9, 48, experts)
        gate_everywhere(backend, x, weight, bias, *options)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(500))
def test_gate_on_500_inputs(backend, seed):
    need("moe_gate", backend)
    torch.manual_seed(seed)
    experts, *options = GATES[seed % len(GATES)]
    case = ADVERSARIAL[seed // 7 % len(ADVERSARIAL)] if seed % 2 else "plain"
    x, weight, bias = adversarial_gate(case, 1 + seed % 40, 16 + seed, experts)
    gate_everywhere(backend, x, weight, bias, *options)


def test_gate_does_not_depend_on_the_batch(backend):
    """A token alone gets the bits that it gets among others."""
    need("moe_gate", backend)
    if backend not in ("emu", "cuda"):
        pytest.skip(f"{backend}: the order of sums over d is the matrix library's")
    x, weight = torch.randn(45, 300), torch.randn(64, 300)
    options = dict(topk=4, n_group=4, topk_group=2, backend=backend)
    among = dsk.moe_gate(x, weight, None, **options)
    for token in (0, 31, 32, 44):
        alone = dsk.moe_gate(x[token : token + 1], weight, None, **options)
        for a, b in zip(alone, among):
            assert_bitwise_equal(a[0], b[token])


def test_gate_of_nothing(backend):
    need("moe_gate", backend)
    x, weight = torch.randn(0, 64), torch.randn(8, 64)
    shapes = [tuple(v.shape) for v in dsk.moe_gate(x, weight, None, topk=2, backend=backend)]
    assert shapes == [(0, 2), (0, 2), (0, 8)]


# ---- permute, unpermute --------------------------------------------------------------------------


def routing(kind, t, k, e):
    """int64 [t, k] with the given skew."""
    if kind == "one expert":
        return torch.full((t, k), e - 1)
    if kind == "nobody":
        return torch.full((t, k), -1)
    if kind == "zipf":
        odds = 1 / torch.arange(1, e + 1).float()
        return (
            torch.multinomial(odds.expand(t, e), k, replacement=True)
            if t
            else torch.zeros(0, k).long()
        )
    balanced = torch.stack([torch.randperm(e)[:k] for _ in range(t)]) if t else torch.zeros(0, k)
    balanced = balanced.long()
    return torch.where(torch.rand(t, k) < 0.2, -1, balanced) if kind == "holes" else balanced


ROUTINGS = ["balanced", "zipf", "one expert", "nobody", "holes"]


@pytest.mark.parametrize("kind", ROUTINGS)
@pytest.mark.parametrize(
    "t,k,e,alignment", [(0, 2, 4, 1), (1, 1, 1, 1), (7, 3, 5, 4), (300, 2, 9, 1), (130, 8, 64, 16)]
)
def test_permute(backend, kind, t, k, e, alignment):
    need("moe_permute", backend)
    topk_idx = routing(kind, t, k, e)
    for x in (torch.randn(t, 24), torch.randn(t, 37).bfloat16()):
        want = ref.moe_permute(x, topk_idx, e, alignment=alignment)
        moved = on_device(x, backend), on_device(topk_idx, backend)
        got = dsk.moe_permute(*moved, e, alignment=alignment, backend=backend)
        for a, b in zip(got, want):
            assert_bitwise_equal(on_cpu(a), b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("weighted", [True, False])
def test_unpermute(backend, dtype, weighted):
    need("moe_unpermute", backend, dtype=dtype)
    for kind, (t, k, d) in itertools.product(ROUTINGS, [(0, 2, 8), (5, 1, 3), (23, 6, 1032)]):
        topk_idx = routing(kind, t, k, 7)
        y, _, row_map = ref.moe_permute(torch.randn(t, d).to(dtype), topk_idx, 7, alignment=3)
        named = torch.zeros(y.shape[0], dtype=torch.bool)
        named[row_map[row_map >= 0]] = True
        y = torch.where(named[:, None], y, torch.nan)  # rows that nobody names are not read
        weights = torch.rand(t, k) if weighted else None
        want = ref.moe_unpermute(y, row_map, weights)
        moved = [on_device(v, backend) for v in (y, row_map, weights)]
        got = on_cpu(dsk.moe_unpermute(*moved, backend=backend))
        assert_bitwise_equal(got, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("weighted", [True, False])
def test_unpermute_gradients(backend, dtype, weighted):
    need("moe_unpermute", backend, dtype=dtype)
    for kind, (t, k, d) in itertools.product(ROUTINGS, [(5, 1, 3), (23, 6, 520)]):
        topk_idx = routing(kind, t, k, 7)
        y, _, row_map = ref.moe_permute(torch.randn(t, d).to(dtype), topk_idx, 7, alignment=3)
        weights, grad = torch.rand(t, k) if weighted else None, torch.randn(t, d).to(dtype)
        want_dy, want_dweights = moe_unpermute_backward(grad, y, row_map, weights)
        y, weights = (on_device(v, backend) for v in (y, weights))
        wanted = [v.requires_grad_() for v in (y, weights) if v is not None]
        out = dsk.moe_unpermute(y, on_device(row_map, backend), weights, backend=backend)
        dy, *dweights = torch.autograd.grad(out, wanted, on_device(grad, backend))
        assert_bitwise_equal(on_cpu(dy), want_dy)
        for got in dweights:
            torch.testing.assert_close(on_cpu(got), want_dweights, rtol=1e-5, atol=1e-4)


# ---- experts -------------------------------------------------------------------------------------


def scaled_experts(e, d, i):
    w13 = rowwise.quantize(torch.randn(e, 2 * i, d) / d**0.5, (128, 128))
    return w13, rowwise.quantize(torch.randn(e, d, i) / i**0.5, (128, 128))


def check_experts(backend, kind, t, k, e, d, i, dtype=torch.bfloat16):
    w13, w2 = scaled_experts(e, d, i)
    x = torch.randn(t, d).to(dtype)
    topk_idx, weights = routing(kind, t, k, e), torch.rand(t, k)
    moved = [on_device(v, backend) for v in (x, w13, w2, topk_idx, weights)]
    got = on_cpu(dsk.moe_experts(*moved, backend=backend))
    assert got.dtype == dtype
    want = ref.moe_experts(x, w13, w2, topk_idx, weights)
    if want.numel() == 0 or kind == "nobody":
        assert_bitwise_equal(got, want)
        return
    assert calc_diff(got, want) < 1e-5  # the same quantised numbers, other sums
    unquantised = ref.moe_experts(
        x.double(), w13.dequantize().double(), w2.dequantize().double(), topk_idx, weights
    )
    assert calc_diff(got, unquantised) < 2e-3


@pytest.mark.parametrize("kind", ROUTINGS)
@pytest.mark.parametrize("t", [0, 1, 7, 128])
def test_experts(backend, kind, t):
    need("moe_experts", backend)
    check_experts(backend, kind, t, 3, 6, 256, 128)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ROUTINGS)
def test_experts_with_many_tokens(backend, kind):
    need("moe_experts", backend)
    check_experts(backend, kind, 4096, 2, 8, 128, 128)
