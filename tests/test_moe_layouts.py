"""How slots become rows: replicas, shared experts, masked groups, quantisation on the way."""

import pytest
import torch
from backend_axis import need, on_cpu, on_device
from moe_support import routing, scaled_experts

import dskernels as dsk
from dskernels.ops.experts import moe_experts_backward
from dskernels.ref import moe as ref
from dskernels.ref import rowwise
from dskernels.ref.moe_backward import moe_experts_backward as ref_experts_backward
from dskernels.testing import assert_bitwise_equal, calc_diff

# ---- expert maps ---------------------------------------------------------------------------------


def replica_map(logical, replicas):
    """int64 [logical, replicas]: a physical expert once at most; the first logical one has none,
    the second all of its row, number 0 among them, and of the others -1 takes some, anywhere."""
    order = torch.randperm(logical * replicas)
    order[order == 0], order[replicas] = order[replicas].clone(), 0
    table = order.view(logical, replicas)
    gone = torch.rand(table.shape) < 0.3
    gone[0], gone[1] = True, False
    return table.masked_fill(gone, -1)


def chosen_by_hand(topk_idx, table):
    """choose_replicas in Python's integers."""
    chosen = topk_idx.clone()
    for token, row in enumerate(topk_idx.tolist()):
        turn = token * 2654435769 % 2**32
        for choice, logical in enumerate(row):
            there = [] if logical < 0 else [p for p in table[logical].tolist() if p >= 0]
            chosen[token, choice] = there[turn * len(there) // 2**32] if there else -1
    return chosen


def test_choice_of_replicas():
    """The rule, in integers; every token its own, whatever comes before it; evenly spread."""
    table, topk_idx = replica_map(7, 5), routing("holes", 300, 4, 7)
    got = ref.choose_replicas(topk_idx, table)
    assert_bitwise_equal(got, chosen_by_hand(topk_idx, table))
    assert_bitwise_equal(ref.choose_replicas(topk_idx[:9], table), got[:9])
    hot = torch.zeros(256, 1, dtype=torch.int64)
    for replicas in (2, 3, 4, 7):
        for step in (1, 2):  # of all tokens, and of every second one
            served = ref.choose_replicas(hot, torch.arange(replicas)[None])[::step].flatten()
            counts = torch.bincount(served, minlength=replicas)
            assert counts.max() - counts.min() <= 4, (replicas, step, counts)


@pytest.mark.parametrize("t,k,alignment", [(0, 2, 1), (1, 1, 1), (300, 3, 1), (60, 3, 16)])
@pytest.mark.parametrize("index", [torch.int64, torch.int32])
def test_permute_through_an_expert_map(backend, t, k, alignment, index):
    need("moe_permute", backend)
    if backend == "triton" and t > 100:
        pytest.skip("triton: seconds in the interpreter")
    table, topk_idx = replica_map(9, 4), routing("holes", t, k, 9)
    x = torch.randn(t, 24)
    want = ref.moe_permute(x, chosen_by_hand(topk_idx, table), 36, alignment=alignment)
    moved = [on_device(v, backend) for v in (x, topk_idx.to(index), table.to(index))]
    got = dsk.moe_permute(*moved[:2], 36, alignment=alignment, expert_map=moved[2], backend=backend)
    for a, b in zip(got, want):
        assert_bitwise_equal(on_cpu(a), b)


def test_permute_gradient_through_an_expert_map(backend):
    need("moe_permute", backend)
    table, topk_idx = replica_map(9, 4), routing("zipf", 20, 3, 9)
    x = on_device(torch.randn(20, 24), backend).requires_grad_()
    moved = on_device(topk_idx, backend), on_device(table, backend)
    out, _, row_map = dsk.moe_permute(x, moved[0], 36, expert_map=moved[1], backend=backend)
    grad = torch.randn(out.shape)
    (got,) = torch.autograd.grad(out, x, on_device(grad, backend))
    assert_bitwise_equal(on_cpu(got), ref.moe_unpermute(grad, on_cpu(row_map), None))


# ---- experts: replicas, shared ones --------------------------------------------------------------


def stacked(w, order):
    """w's experts in the given order, of which some may come twice."""
    data = w.data.view(torch.uint8)[order].view(w.data.dtype)
    return dsk.ScaledTensor(data, w.scale[order], w.block, w.dtype)


def by_slots(topk_idx, weights, shared, experts):
    """The routing with shared experts as ordinary choices of weight 1."""
    t = topk_idx.shape[0]
    own = torch.arange(experts - shared, experts).expand(t, shared)
    return torch.cat([topk_idx, own], 1), torch.cat([weights, torch.ones(t, shared)], 1)


def run_experts(backend, x, w13, w2, topk_idx, weights, **options):
    moved = [on_device(v, backend) for v in (x, w13, w2, topk_idx, weights)]
    options = {name: on_device(v, backend) if torch.is_tensor(v) else v
               for name, v in options.items()}  # fmt: skip
    return on_cpu(dsk.moe_experts(*moved, **options, backend=backend))


@pytest.mark.parametrize("kind", ["zipf", "holes", "nobody"])
@pytest.mark.parametrize("shared", [0, 1, 2])
def test_experts_with_replicas_and_shared_ones(backend, kind, shared):
    """The same bits as the choices written out, and so as many weights as there are replicas."""
    need("moe_experts", backend)
    if backend == "triton" and (kind, shared) != ("holes", 1):
        pytest.skip("triton: seconds in the interpreter")
    t, k, logical, d, i = 21, 3, 5, 128, 128
    table = replica_map(logical, 2)
    owner = torch.zeros(10 + shared, dtype=torch.int64)
    for row, column in (table >= 0).nonzero().tolist():
        owner[table[row, column]] = row
    owner[10:] = torch.arange(logical, logical + shared)
    weights13, weights2 = scaled_experts(logical + shared, d, i)
    w13, w2 = stacked(weights13, owner), stacked(weights2, owner)
    x, weights = torch.randn(t, d).bfloat16(), torch.rand(t, k)
    topk_idx = routing(kind, t, k, logical)
    got = run_experts(backend, x, w13, w2, topk_idx, weights, expert_map=table, num_shared=shared)
    slots = by_slots(chosen_by_hand(topk_idx, table), weights, shared, 10 + shared)
    assert_bitwise_equal(got, run_experts(backend, x, w13, w2, *slots))
    # Replicas hold equal weights: the sum is the logical experts', of those that have any.
    served = torch.where((table < 0).all(dim=1)[topk_idx.clamp(min=0)], -1, topk_idx)
    rest = by_slots(served, weights, shared, logical + shared)
    want = ref.moe_experts(x, weights13, weights2, *rest)
    assert calc_diff(got, want) < 1e-5 if want.any() else not got.any()


@pytest.mark.parametrize("plain", [False, True], ids=["e4m3", "bf16"])
def test_gradients_with_replicas_and_shared_experts(backend, plain):
    """The same bits as the choices written out; the weights' gradients by physical expert."""
    need("moe_experts", backend)
    if backend == "triton":
        pytest.skip("triton: experts forward only")
    t, k, d, i, shared = 11, 2, 128, 128, 1
    table = replica_map(4, 2)
    w13, w2 = scaled_experts(8 + shared, d, i)
    if plain:
        w13, w2 = (w.dequantize(torch.bfloat16) for w in (w13, w2))
    x, grad = torch.randn(t, d).bfloat16(), torch.randn(t, d).bfloat16()
    topk_idx, weights = routing("holes", t, k, 4), torch.rand(t, k)
    slots = by_slots(chosen_by_hand(topk_idx, table), weights, shared, 8 + shared)
    moved = [on_device(v, backend) for v in (grad, x, w13, w2)]
    want = moe_experts_backward(*moved, *(on_device(v, backend) for v in slots), backend=backend)
    routed = [on_device(v, backend) for v in (topk_idx, weights)]
    options = dict(expert_map=on_device(table, backend), num_shared=shared, backend=backend)
    got = moe_experts_backward(*moved, *routed, **options)
    for a, b in zip(got[:3], want):
        assert_bitwise_equal(on_cpu(a), on_cpu(b))
    assert_bitwise_equal(on_cpu(got[3]), on_cpu(want[3][:, :k]))
    # Through autograd too.
    leaf, routed[1] = moved[1].detach().requires_grad_(), routed[1].requires_grad_()
    out = dsk.moe_experts(leaf, *moved[2:], *routed, **options)
    for a, b in zip(torch.autograd.grad(out, (leaf, routed[1]), moved[0]), (got[0], got[3])):
        assert_bitwise_equal(on_cpu(a), on_cpu(b))


def test_shared_experts_alone(backend):
    """No choices at all: an ordinary SwiGLU layer for every token."""
    need("moe_experts", backend)
    w13, w2 = scaled_experts(1, 128, 128)
    x = torch.randn(5, 128).bfloat16()
    nobody = torch.zeros(5, 0, dtype=torch.int64), torch.zeros(5, 0)
    everybody = torch.zeros(5, 1, dtype=torch.int64), torch.ones(5, 1)
    got = run_experts(backend, x, w13, w2, *nobody, num_shared=1)
    assert_bitwise_equal(got, run_experts(backend, x, w13, w2, *everybody))
    assert calc_diff(got, ref.moe_experts(x, w13, w2, *everybody)) < 1e-4


# ---- the masked layout ---------------------------------------------------------------------------


def need_masked(backend):
    need("moe_experts", backend)
    if backend not in ("emu", "cuda"):
        pytest.skip(f"{backend}: has one layout")


@pytest.mark.parametrize(
    "kind,k", [("balanced", 3), ("holes", 3), ("nobody", 2), ("one expert", 1)]
)
@pytest.mark.parametrize("t", [0, 1, 7, 72])  # 72: a group may be full
def test_masked_layout_gives_the_same_bits(backend, kind, k, t):
    need_masked(backend)
    d, i = 272, 128  # a last group of 16 values
    w13, w2 = scaled_experts(6, d, i)
    x, weights = torch.randn(t, d).bfloat16(), torch.rand(t, k)
    args = backend, x, w13, w2, routing(kind, t, k, 5), weights
    for shared in (0, 1):
        got, want = (
            run_experts(*args, num_shared=shared, layout=layout)
            for layout in ("masked", "contiguous")
        )
        assert_bitwise_equal(got, want)
        if kind != "nobody":
            assert got.any() == (t > 0)


def test_masked_layout_with_replicas_and_fp32_tokens(backend):
    need_masked(backend)
    table, (w13, w2) = replica_map(5, 3), scaled_experts(15, 128, 128)
    x, weights = torch.randn(37, 128), torch.rand(37, 2)
    args = backend, x, w13, w2, routing("balanced", 37, 2, 5), weights
    got, want = (run_experts(*args, expert_map=table, layout=layout) for layout in ("masked", None))
    assert_bitwise_equal(got, want)


def test_masked_layout_has_no_room_for_an_expert_named_twice():
    if not dsk.supports("moe_experts", backend="emu"):
        pytest.skip("the emulator is not there")
    w13, w2 = scaled_experts(2, 128, 128)
    x, weights = torch.randn(4, 128).bfloat16(), torch.rand(4, 2)
    twice = torch.tensor([[0, 1], [1, 0], [-1, -1], [1, 1]])
    args = x, w13, w2, twice, weights
    with pytest.raises(ValueError, match="topk_idx: expected no index twice in a row, with the "
                                         "masked layout, got 1 twice in row 3"):  # fmt: skip
        dsk.moe_experts(*args, layout="masked", backend="emu")
    dsk.moe_experts(*args, backend="emu")
    # Where nobody reads the values, as on a GPU, the kernel stops; 3 rows still fit into 4.
    from dskernels.emu import moe

    moe.moe_experts(*args, layout="masked")
    x, weights, twice = x[1:], weights[1:], torch.tensor([[1, 0], [1, 1], [1, 1]])
    with pytest.raises(RuntimeError, match="trap"):
        moe.moe_experts(x, w13, w2, twice, weights, layout="masked")


# ---- quantisation on the way ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "t,k,e,d", [(1, 1, 8, 16), (40, 7, 8, 300), (300, 3, 1024, 144), (9, 300, 8, 128)]
)
def test_rows_quantised_on_the_way(backend, dtype, t, k, e, d):
    """The bits of quantising first and copying then, whole and cut groups, in either scale format;
    slots of one token in several chunks, as many experts as there are counters; the rest as it
    was."""
    if backend not in ("emu", "cuda"):
        pytest.skip(f"{backend}: has no such step")
    need("moe_experts", backend)
    from dskernels import cuda, emu

    stem = {"emu": emu, "cuda": cuda}[backend]
    stem = getattr(__import__(stem.__name__ + ".moe", fromlist=["moe"]), f"_{backend}")
    x = torch.randn(t, d + 8).to(dtype)[:, :d]  # rows with gaps
    x[t // 2] *= 1e-6
    topk_idx = routing("holes" if k < 8 else "zipf", t, k, 8)
    for pow2 in (False, True):
        layout = stem._layout(on_device(topk_idx, backend), e)
        got, row_map = stem._copy_quantized(layout, on_device(x, backend), pow2=pow2)
        want = rowwise.quantize(x, scale_format="pow2" if pow2 else "fp32")
        row_map = on_cpu(row_map)
        assert_bitwise_equal(row_map, ref.moe_permute(x, topk_idx, e)[2])
        tokens, slots = (row_map >= 0).nonzero(as_tuple=True)
        rows = row_map[tokens, slots]
        assert_bitwise_equal(on_cpu(got.data).view(torch.uint8)[rows],
                             want.data.view(torch.uint8)[tokens])  # fmt: skip
        assert_bitwise_equal(on_cpu(got.scale)[rows], want.scale[tokens])


# ---- FP8 gradients -------------------------------------------------------------------------------


def gradients_of_the_quantised(grad, x, w13, w2, topk_idx, weights):
    """The FP8 backward's four gradients in fp64 from the operands that it quantises: its products'
    true values. h and back are rounded to bf16, as specified; nothing else is."""
    x8, g8 = rowwise.quantize(x), rowwise.quantize(grad, scale_format="pow2")
    first, second = (w.dequantize(torch.float64) for w in (w13, w2))
    dx, dweights = torch.zeros(x.shape).double(), torch.zeros(weights.shape).double()
    d13, d2 = torch.zeros_like(first), torch.zeros_like(second)

    def turned(v, **options):
        """v [rows, c] in 128x1 blocks, the rows padded to whole blocks: [c, rows] in fp64."""
        rows = -(-v.shape[0] // 128) * 128
        padded = torch.cat([v, v.new_zeros(rows - v.shape[0], v.shape[1])]).float()
        return rowwise.quantize(padded, transpose=True, **options).dequantize(torch.float64)

    for expert in range(first.shape[0]):
        tokens, slots = (topk_idx == expert).nonzero(as_tuple=True)
        if len(tokens) == 0:
            continue
        weight = weights[tokens, slots, None].double()
        rows, grads = (v.dequantize(torch.float64)[tokens] for v in (x8, g8))
        h = (rows @ first[expert].t()).bfloat16().double()
        back = (grads @ second[expert]).bfloat16().double()
        gate, up = h.chunk(2, dim=1)
        silu, slope = gate.sigmoid() * gate, gate.sigmoid() * (1 + gate * (1 - gate.sigmoid()))
        dh = back * weight * torch.stack([up * slope, silu])
        dh = torch.cat(tuple(dh), dim=1)
        dx.index_add_(
            0, tokens, rowwise.quantize(dh.float()).dequantize(torch.float64) @ first[expert]
        )
        d13[expert] = turned(dh) @ turned(rows).t()
        d2[expert] = turned(grads, scale_format="pow2") @ turned(silu * up * weight).t()
        dweights[tokens, slots] = (back * silu * up).sum(dim=1)
    return dx, d13, d2, dweights


def scaled_gradient_errors(backend, kind, t, k, e, d, i, dtype):
    """{gradient: (against fp64 of the same quantised operands, against fp64 of the unquantised
    ones, what the quantisation alone costs)} as calc_diff; empty where all are zero."""
    w13, w2 = scaled_experts(e, d, i)
    x, grad = torch.randn(t, d).to(dtype), torch.randn(t, d).to(dtype)
    topk_idx, weights = routing(kind, t, k, e), torch.rand(t, k)
    inputs = grad, x, w13, w2, topk_idx, weights
    got = moe_experts_backward(*(on_device(v, backend) for v in inputs), backend=backend)
    same = gradients_of_the_quantised(*inputs)
    wide = [w.dequantize(torch.float64) for w in (w13, w2)]
    exact = ref_experts_backward(grad.double(), x.double(), *wide, topk_idx, weights.double())
    return {
        name: (calc_diff(on_cpu(g), q), calc_diff(on_cpu(g), v), calc_diff(q, v))
        for name, g, q, v in zip(("dx", "dw13", "dw2", "dweights"), got, same, exact)
        if v.any()
    }


@pytest.mark.parametrize(
    "kind,t,dtype",
    [
        ("balanced", 1, torch.bfloat16),
        ("zipf", 7, torch.bfloat16),
        ("one expert", 130, torch.bfloat16),
        ("holes", 150, torch.float32),
    ],
)
def test_fp8_gradients_are_the_products_of_their_operands(backend, kind, t, dtype):
    """Each gradient within the GEMM bar of fp64 on the same quantised operands; and against fp64 on
    the unquantised ones no worse than those operands are."""
    need("moe_experts", backend)
    if backend == "triton":
        pytest.skip("triton: experts forward only")
    errors = scaled_gradient_errors(backend, kind, t, 3, 4, 144, 128, dtype)
    assert len(errors) == 4
    for name, (own, total, quantisation) in errors.items():
        assert own < 1e-4, (name, own)  # the bar of a product is 1e-3
        assert total < 1.1 * quantisation + 1e-5, (name, total, quantisation)
