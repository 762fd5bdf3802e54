"""The MoE stem on every backend, against the reference."""

import itertools

import pytest
import torch
from backend_axis import need, on_cpu, on_device
from moe_support import routing, scaled_experts

import dskernels as dsk
from dskernels.compat.eplb import rebalance_experts
from dskernels.ops.experts import moe_experts_backward
from dskernels.ref import moe as ref
from dskernels.ref import rowwise
from dskernels.ref.moe_backward import moe_experts_backward as ref_experts_backward
from dskernels.ref.moe_backward import moe_gate_backward, moe_unpermute_backward
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


ADVERSARIAL = [
    "ties", "negative bias", "one expert takes all", "nan row", "inf row", "nan bias",
    "huge logits", "no finite bias",
]  # fmt: skip


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
    elif case == "huge logits":  # falling with the expert, of all tokens but two
        x[2:] = 300
        weight[:] = (3 - torch.arange(e) * 3 // e)[:, None] / 16
    elif case == "nan bias":
        bias[::3] = float("nan")
        bias[1::3] = float("-inf")
    elif case == "no finite bias":
        bias[::2], bias[1::2] = float("nan"), float("-inf")
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


@pytest.mark.parametrize("gate", GATES[:2] + GATES[5:6], ids=lambda g: f"e{g[0]}-{g[4]}")
@pytest.mark.parametrize("sequences,length", [(1, 1), (3, 13), (2, 33)])
def test_gate_statistics(backend, gate, sequences, length):
    """Choices counted exactly; mean affinities within fp32's roundings of fp64's, NaN where a
    token has one; and everything else as without them."""
    experts, n_group, topk_group, topk, score, _ = gate
    need("moe_gate", backend, e=experts)
    x, weight = torch.randn(sequences * length, 70), torch.randn(experts, 70) / 8
    if length > 1:
        x[-1] = torch.nan
    moved = [on_device(v, backend) for v in (x, weight, torch.randn(experts))]
    options = dict(n_group=n_group, topk_group=topk_group, topk=topk, score=score, backend=backend)
    *got, counts, affinity = dsk.moe_gate(*moved, **options, sequences=sequences)
    for a, b in zip(got, dsk.moe_gate(*moved, **options)):
        assert_bitwise_equal(on_cpu(a), on_cpu(b))
    topk_idx, _, scores = (on_cpu(v) for v in got)
    assert counts.dtype == torch.int64 and affinity.dtype == torch.float32
    share = scores.double() / (scores.double().sum(dim=-1, keepdim=True) + 1e-20)
    for s, part in enumerate(torch.arange(sequences * length).split(length)):
        want = torch.bincount(topk_idx[part].flatten(), minlength=experts)
        assert_bitwise_equal(on_cpu(counts)[s], want)
        torch.testing.assert_close(
            on_cpu(affinity)[s].double(), share[part].mean(dim=0), rtol=1e-6, atol=1e-9,
            equal_nan=True,
        )  # fmt: skip


def test_gate_statistics_make_the_balance_loss(backend):
    """Value and gradient of V3's sequence-wise loss from the statistics."""
    need("moe_gate", backend)
    if backend == "triton":
        pytest.skip("triton: the gate's backward has no kernel")
    b, s, d, e, k = 2, 9, 40, 16, 4
    leaves = [on_device(v, backend).requires_grad_() for v in (torch.randn(b * s, d),
                                                               torch.randn(e, d) / 6)]  # fmt: skip
    topk_idx, weights, scores, counts, affinity = dsk.moe_gate(
        *leaves, None, topk=k, sequences=b, backend=backend
    )
    loss = 0.1 * e / (k * s) * (counts * affinity).sum(dim=-1).mean()
    got = torch.autograd.grad(loss + weights.square().sum(), leaves)
    x, weight = (on_cpu(v.detach()).double().requires_grad_() for v in leaves)
    scores = torch.sigmoid(x @ weight.t())
    want = ref.sequence_balance_loss(scores.view(b, s, e), on_cpu(topk_idx).view(b, s, k), 0.1)
    torch.testing.assert_close(on_cpu(loss.detach()).double(), want.detach(), rtol=1e-6, atol=0)
    chosen = scores.gather(1, on_cpu(topk_idx))
    want = want + (chosen / chosen.sum(dim=-1, keepdim=True)).square().sum()
    for g, w in zip(got, torch.autograd.grad(want, (x, weight))):
        assert calc_diff(on_cpu(g), w) < 1e-10


def test_gate_of_nothing(backend):
    need("moe_gate", backend)
    x, weight = torch.randn(0, 64), torch.randn(8, 64)
    shapes = [tuple(v.shape) for v in dsk.moe_gate(x, weight, None, topk=2, backend=backend)]
    assert shapes == [(0, 2), (0, 2), (0, 8)]


@pytest.mark.parametrize("gate", GATES[:3] + GATES[5:6], ids=lambda g: f"e{g[0]}-{g[4]}")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("t,d", [(1, 24), (70, 133)])
def test_gate_gradients(backend, gate, dtype, t, d):
    """The formulas in fp64 from the same scores, within twice the error of theirs in fp32."""
    experts, n_group, topk_group, topk, score, _ = gate
    need("moe_gate", backend, e=experts, dtype=dtype)
    if backend == "triton":
        pytest.skip("triton: the gate's backward has no kernel")
    x, weight = torch.randn(t, d).to(dtype), (torch.randn(experts, d) / 8).to(dtype)
    leaves = [on_device(v, backend).requires_grad_() for v in (x, weight)]
    topk_idx, weights, scores = dsk.moe_gate(
        *leaves, None, n_group=n_group, topk_group=topk_group, topk=topk, scale=2.5, score=score,
        backend=backend,
    )  # fmt: skip
    grads = torch.randn(t, topk), torch.randn(t, experts) / 4
    moved = [on_device(g, backend) for g in grads]
    got = torch.autograd.grad((weights, scores), leaves, moved)
    rest = (on_cpu(topk_idx), on_cpu(scores.detach()), 2.5, score, score == "sigmoid")
    inputs = (*grads, x.detach().float(), weight.detach().float())
    own = moe_gate_backward(*inputs, *rest)
    scores64 = (rest[0], rest[1].double(), *rest[2:])
    exact = moe_gate_backward(*(v.double() for v in inputs), *scores64)
    for g, o, e in zip(got, own, exact):
        assert g.dtype == dtype
        bound = max(calc_diff(o.to(dtype), e) ** 0.5, 1e-7)
        assert calc_diff(on_cpu(g), e) ** 0.5 <= 2 * bound


@pytest.mark.parametrize(
    "t,experts,topk", [(9, 512, 512), (130, 8, 2)], ids=["everybody", "two tokens a warp"]
)
def test_gate_gradients_at_the_ends_of_shared_memory(backend, t, experts, topk):
    """As many choices as there is room for, side by side with other warps'; and, on one SM, warps
    that take one token after the other."""
    if backend not in ("emu", "cuda"):
        pytest.skip(f"{backend}: has no shared memory")
    need("moe_gate", backend, e=experts)
    from dskernels.cuda.moe import Moe

    class OneSm(Moe):
        def _on(self, x):
            return *super()._on(x)[:3], 1

    x, weight = torch.randn(t, 8), torch.randn(experts, 8)
    topk_idx = torch.stack([torch.randperm(experts)[:topk] for _ in range(t)])
    scores = torch.rand(t, experts)
    args = torch.randn(t, topk), torch.randn(t, experts), x, weight, topk_idx, scores
    got = OneSm(backend).moe_gate_backward(
        *(on_device(v, backend) for v in args), 2.5, "sigmoid", True
    )
    exact = moe_gate_backward(
        *(v.double() if v.is_floating_point() else v for v in args), 2.5, "sigmoid", True
    )
    for g, e in zip(got, exact):
        assert calc_diff(on_cpu(g), e) < 1e-10


# ---- permute, unpermute --------------------------------------------------------------------------


ROUTINGS = ["balanced", "zipf", "one expert", "nobody", "holes"]


def routings(backend):
    """All of them, or, where Triton's interpreter takes seconds, the most irregular one."""
    return ["holes"] if backend == "triton" and not torch.cuda.is_available() else ROUTINGS


@pytest.mark.parametrize("kind", ROUTINGS)
@pytest.mark.parametrize(
    "t,k,e,alignment", [(0, 2, 4, 1), (1, 1, 1, 1), (7, 3, 5, 4), (300, 2, 9, 1), (130, 8, 64, 16)]
)
def test_permute(backend, kind, t, k, e, alignment):
    need("moe_permute", backend)
    if t > 100 and kind not in routings(backend):
        pytest.skip("triton: seconds in the interpreter")
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
    for kind, (t, k, d) in itertools.product(
        routings(backend), [(0, 2, 8), (6, 1, 3), (23, 6, 1032)]
    ):
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
    for kind, (t, k, d) in itertools.product(routings(backend), [(5, 1, 3), (23, 6, 520)]):
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


@pytest.mark.parametrize("alignment", [1, 16])
def test_permute_gradients(backend, alignment):
    need("moe_permute", backend)
    for kind in ROUTINGS:
        topk_idx = routing(kind, 23, 4, 7)
        x = on_device(torch.randn(23, 40), backend).requires_grad_()
        out, _, row_map = dsk.moe_permute(
            x, on_device(topk_idx, backend), 7, alignment=alignment, backend=backend
        )
        grad = torch.randn(out.shape)
        (got,) = torch.autograd.grad(out, x, on_device(grad, backend))
        assert_bitwise_equal(on_cpu(got), ref.moe_unpermute(grad, on_cpu(row_map), None))


# ---- experts -------------------------------------------------------------------------------------


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


def check_plain_experts(backend, kind, t, k, e, d, i):
    """bf16 weights, forward and backward, against fp64 and the reference's own error."""
    x = torch.randn(t, d).bfloat16()
    w13 = (torch.randn(e, 2 * i, d) / d**0.5).bfloat16()
    w2 = (torch.randn(e, d, i) / i**0.5).bfloat16()
    topk_idx, weights, grad = routing(kind, t, k, e), torch.rand(t, k), torch.randn(t, d).bfloat16()

    def run(cast, name):
        leaves = [on_device(cast(v), name).requires_grad_() for v in (x, w13, w2, weights)]
        out = dsk.moe_experts(*leaves[:3], on_device(topk_idx, name), leaves[3], backend=name)
        grads = torch.autograd.grad(out, leaves, on_device(cast(grad), name))
        return [on_cpu(v.detach()) for v in (out, *grads)]

    got, exact = run(lambda v: v, backend), run(lambda v: v.double(), "ref")
    for what, g, e in zip(("out", "x", "w13", "w2", "topk_weights"), got, exact):
        assert g.shape == e.shape
        if not e.any():
            assert not g.any(), what
        else:
            assert calc_diff(g, e) < 1e-4, what
    for expert in range(w13.shape[0]):  # experts without tokens learn nothing
        if not (topk_idx == expert).any():
            assert not got[2][expert].any() and not got[3][expert].any(), expert


@pytest.mark.parametrize("kind", ROUTINGS)
@pytest.mark.parametrize("t", [0, 1, 7, 65])
def test_plain_experts_and_their_gradients(backend, kind, t):
    need("moe_experts", backend)
    if backend == "triton":
        pytest.skip("triton: experts with e4m3 weights only")
    check_plain_experts(backend, kind, t, 3, 6, 72, 40)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ROUTINGS)
def test_plain_experts_with_many_tokens(backend, kind):
    need("moe_experts", backend)
    if backend == "triton":
        pytest.skip("triton: experts with e4m3 weights only")
    check_plain_experts(backend, kind, 1024, 2, 8, 128, 64)


def check_scaled_gradients(backend, kind, t, k, e, d, i, dtype=torch.bfloat16, others=5e-5):
    """FP8 backward against the reference (the tensor core's sums, of some 13 bits, move a few of
    the hidden layer's values to the next bf16 and e4m3), and against fp64 gradients of the
    dequantised weights: up to four quantisations lie between."""
    w13, w2 = scaled_experts(e, d, i)
    x, grad = torch.randn(t, d).to(dtype), torch.randn(t, d).to(dtype)
    topk_idx, weights = routing(kind, t, k, e), torch.rand(t, k)
    inputs = grad, x, w13, w2, topk_idx, weights
    moved = [on_device(v, backend) for v in inputs]
    got = [on_cpu(v) for v in moe_experts_backward(*moved, backend=backend)]
    want = ref_experts_backward(*inputs)
    wide = [w.dequantize(torch.float64) for w in (w13, w2)]
    exact = ref_experts_backward(grad.double(), x.double(), *wide, topk_idx, weights.double())
    for what, g, w, x64 in zip(("x", "w13", "w2", "topk_weights"), got, want, exact):
        assert g.shape == w.shape and g.dtype == w.dtype, what
        if not x64.any():
            assert not g.any(), what
        else:
            assert calc_diff(g, w) < others, what
            assert calc_diff(g, x64) < 3e-3, what
    for expert in range(e):  # experts without tokens learn nothing
        if not (topk_idx == expert).any():
            assert not got[1][expert].any() and not got[2][expert].any(), expert
    assert not got[3][topk_idx < 0].any()


@pytest.mark.parametrize("kind", ROUTINGS)
@pytest.mark.parametrize("t", [0, 1, 7, 128])
def test_scaled_experts_gradients(backend, kind, t):
    need("moe_experts", backend)
    if backend == "triton":
        pytest.skip("triton: experts forward only")
    check_scaled_gradients(backend, kind, t, 3, 4, 144, 128)


def test_scaled_experts_gradients_of_wide_experts(backend):
    """Several blocks of columns, more than one block of rows an expert, fp32 tokens."""
    need("moe_experts", backend)
    if backend == "triton":
        pytest.skip("triton: experts forward only")
    check_scaled_gradients(backend, "zipf", 150, 2, 3, 128, 384, torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ROUTINGS)
def test_scaled_experts_gradients_with_many_tokens(backend, kind):
    need("moe_experts", backend)
    if backend == "triton":
        pytest.skip("triton: experts forward only")
    check_scaled_gradients(backend, kind, 4096, 2, 8, 128, 128)


@pytest.mark.parametrize("shared", [0, 1])
def test_experts_trained_in_fp8(backend, shared):
    """A master copy in bf16: forward and gradients of nn.fp8_experts are the op's on its blocks."""
    need("moe_experts", backend)
    if backend == "triton":
        pytest.skip("triton: experts forward only")
    t, k, e, d, i = 9, 2, 3, 128, 128
    w13 = (torch.randn(e, 2 * i, d) / d**0.5).bfloat16()
    w2 = (torch.randn(e, d, i) / i**0.5).bfloat16()
    x, grad = torch.randn(t, d).bfloat16(), torch.randn(t, d).bfloat16()
    topk_idx, weights = routing("holes", t, k, e - shared), torch.rand(t, k)
    scaled = [rowwise.quantize(w, (128, 128)) for w in (w13, w2)]
    options = dict(num_shared=shared)
    want = ref_experts_backward(grad, x, *scaled, topk_idx, weights, **options)

    def gradients(*wanted):
        leaves = [on_device(v.clone(), backend) for v in (x, w13, w2, weights)]
        for index in wanted:
            leaves[index].requires_grad_()
        with dsk.use_backend(backend):
            y = dsk.nn.fp8_experts(*leaves[:3], on_device(topk_idx, backend), leaves[3], **options)
            y.backward(on_device(grad, backend))
        exact = ref.moe_experts(x, *scaled, topk_idx, weights, **options)
        assert calc_diff(on_cpu(y.detach()), exact) < 5e-5
        return [None if v.grad is None else on_cpu(v.grad) for v in leaves]

    for what, leaf, g, w in zip(range(4), (x, w13, w2, weights), gradients(0, 1, 2, 3), want):
        assert g.dtype == leaf.dtype and calc_diff(g, w.to(leaf.dtype)) < 5e-5, what
    frozen = gradients(0, 3)
    assert frozen[1] is None and frozen[2] is None
    for what in (0, 3):
        assert calc_diff(frozen[what], want[what]) < 5e-5, what
    # The op itself, with FP8 weights that get no gradient.
    leaves = [on_device(v.clone(), backend).requires_grad_() for v in (x, weights)]
    rest = [on_device(v, backend) for v in (*scaled, topk_idx)]
    y = dsk.moe_experts(leaves[0], *rest, leaves[1], backend=backend, **options)
    for what, g in zip((0, 3), torch.autograd.grad(y, leaves, on_device(grad, backend))):
        assert calc_diff(on_cpu(g), want[what]) < 5e-5, what


class NotRead(RuntimeError):
    pass


@pytest.mark.parametrize("weights_are", ["e4m3", "bf16"])
def test_experts_never_wait_for_the_device(monkeypatch, weights_are):
    """No value of a tensor is read on the host, so a CUDA graph can capture the call. (What the
    kernels are given are addresses and shapes.)"""
    if not dsk.supports("moe_experts", backend="emu"):
        pytest.skip("the emulator is not there")
    from dskernels.cuda import _gemm_bf16
    from dskernels.emu import moe

    # Sizes that lie on the CPU are checked there; those of a GPU are not looked at.
    monkeypatch.setattr(_gemm_bf16, "check_k_groups", lambda sizes: None)
    t, k, e, d, i = 5, 2, 4, 128, 128
    if weights_are == "e4m3":
        w13, w2 = scaled_experts(e, d, i)
    else:
        w13, w2 = torch.randn(e, 2 * i, d).bfloat16(), torch.randn(e, d, i).bfloat16()
    x, topk_idx, weights = torch.randn(t, d).bfloat16(), routing("holes", t, k, e), torch.rand(t, k)

    def refuse(self, *_, **__):
        raise NotRead("a value was read on the host")

    for name in ("item", "tolist", "numpy", "__int__", "__float__", "__bool__", "__index__", "cpu"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    with pytest.raises(NotRead):  # the trap works: how many rows there are is a value
        moe.moe_permute(x, topk_idx, e)
    out = moe.moe_experts(x, w13, w2, topk_idx, weights)
    grads = moe.moe_experts_backward(torch.ones_like(x), x, w13, w2, topk_idx, weights)
    monkeypatch.undo()
    assert calc_diff(out, ref.moe_experts(x, w13, w2, topk_idx, weights)) < 1e-3
    want = ref_experts_backward(torch.ones_like(x), x, w13, w2, topk_idx, weights)
    assert all(calc_diff(g, w) < 1e-3 for g, w in zip(grads, want))


def test_experts_through_a_replica_map(backend):
    """Replicated experts (EPLB): choices mapped to replicas, weights stacked by replica."""
    need("moe_experts", backend)
    t, k, e, d, i = 40, 3, 6, 128, 128
    w13, w2 = scaled_experts(e, d, i)
    x, topk_idx, weights = torch.randn(t, d).bfloat16(), routing("zipf", t, k, e), torch.rand(t, k)
    load = torch.bincount(topk_idx.flatten(), minlength=e).float()[None]
    phy2log, log2phy, copies = rebalance_experts(load, 8, 1, 1, 1)
    spread = torch.arange(t * k).view(t, k) % copies[0][topk_idx]
    replicas = log2phy[0][topk_idx, spread]
    assert (copies > 1).any() and torch.equal(phy2log[0][replicas], topk_idx)
    stacked = [
        dsk.ScaledTensor(w.data.view(torch.uint8)[phy2log[0]].view(w.data.dtype),
                         w.scale[phy2log[0]], w.block, "e4m3")
        for w in (w13, w2)
    ]  # fmt: skip
    moved = [on_device(v, backend) for v in (x, *stacked, replicas, weights)]
    got = on_cpu(dsk.moe_experts(*moved, backend=backend))
    moved = [on_device(v, backend) for v in (x, w13, w2, topk_idx, weights)]
    assert calc_diff(got, on_cpu(dsk.moe_experts(*moved, backend=backend))) < 1e-6
