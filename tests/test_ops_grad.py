"""Gradients: finite differences in fp64, and the reference's own autograd in every dtype."""

import pytest
import torch
from ops_cases import CASES, public, reference, tensors

import dskernels as dsk

f64 = torch.float64


def leaf(*shape, dtype=f64):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, dtype=dtype, generator=generator).requires_grad_()


COS, SIN = torch.randn(5, 3, dtype=f64), torch.randn(5, 3, dtype=f64)
IDX = torch.tensor([[0, 2], [1, -1], [2, 2], [0, 1], [-1, -1]])
ROW_MAP = torch.tensor([[0, 3], [2, -1], [4, 5], [1, 6], [-1, -1]])
CU_Q = torch.tensor([0, 3, 3, 5], dtype=torch.int32)
CU_K = torch.tensor([0, 2, 2, 7], dtype=torch.int32)

FP64 = {
    "rms_norm": (lambda x, w: dsk.rms_norm(x, w, 1e-2), (leaf(3, 4, 6), leaf(6))),
    "rms_norm-1d": (dsk.rms_norm, (leaf(6), leaf(6))),
    "rms_norm-residual": (
        lambda x, w, r: dsk.rms_norm(x, w, residual=r),
        (leaf(3, 6), leaf(6), leaf(3, 6)),
    ),
    "rope": (lambda x: dsk.rope(x, COS, SIN), (leaf(2, 5, 2, 6),)),
    "rope-halves-inverse": (
        lambda x: dsk.rope(x, COS, SIN, interleaved=False, inverse=True),
        (leaf(5, 2, 6),),
    ),
    "swiglu": (dsk.swiglu, (leaf(3, 8),)),
    "gemm": (
        lambda a, b, c, d: dsk.gemm(a, b, c=c, bias=d),
        (leaf(3, 5), leaf(4, 5), leaf(3, 4), leaf(4)),
    ),
    "gemm-swiglu": (
        lambda a, b, c, d: dsk.gemm(a, b, c=c, bias=d, epilogue="swiglu"),
        (leaf(3, 5), leaf(4, 5), leaf(3, 4), leaf(4)),
    ),
    "grouped_gemm": (
        lambda a, b, c: dsk.grouped_gemm(a, b, group_sizes=[2, 0, 3], c=c),
        (leaf(6, 5), leaf(3, 4, 5), leaf(6, 4)),
    ),
    "grouped_gemm-swiglu": (
        lambda a, b, c: dsk.grouped_gemm(a, b, group_sizes=[2, 0, 3], c=c, epilogue="swiglu"),
        (leaf(6, 5), leaf(3, 4, 5), leaf(6, 4)),
    ),
    "grouped_gemm_k": (
        lambda a, b, c: dsk.grouped_gemm_k(a, b, [2, 0, 3], c=c, out_dtype=f64),
        (leaf(4, 6), leaf(3, 6), leaf(3, 4, 3)),
    ),
    # lse is fp32 whatever the inputs are: its gradient is compared with autograd's below.
    "mla_prefill": (
        lambda q, k, v: dsk.mla_prefill(q, k, v, CU_Q, CU_K)[0],
        (leaf(6, 2, 4), leaf(8, 2, 4), leaf(8, 2, 3)),
    ),
    "mla_prefill-all": (
        lambda q, k, v: dsk.mla_prefill(q, k, v, CU_Q, CU_K, causal=False, softmax_scale=0.9)[0],
        (leaf(6, 2, 4), leaf(8, 2, 4), leaf(8, 2, 3)),
    ),
    "moe_permute": (lambda x: dsk.moe_permute(x, IDX, 4, alignment=2)[0], (leaf(5, 3),)),
    "moe_unpermute": (
        lambda y, w: dsk.moe_unpermute(y, ROW_MAP, w),
        (leaf(8, 3), leaf(5, 2)),
    ),
    "moe_unpermute-plain": (lambda y: dsk.moe_unpermute(y, ROW_MAP, None), (leaf(8, 3),)),
    "moe_experts": (
        lambda x, w13, w2, w: dsk.moe_experts(x, w13, w2, IDX, w),
        (leaf(5, 6), leaf(4, 10, 6), leaf(4, 6, 5), leaf(5, 2)),
    ),
}


@pytest.mark.parametrize("name", FP64)
def test_finite_differences(name):
    function, inputs = FP64[name]
    assert torch.autograd.gradcheck(function, inputs)


def _grads(outputs, leaves):
    """Gradients for random, but equal, gradients of the outputs; 0 where an output is infinite."""
    outputs = [out for out in outputs if out.requires_grad]
    generator = torch.Generator().manual_seed(1)
    given = [
        torch.randn(out.shape, generator=generator).to(out.dtype).masked_fill(out.isinf(), 0)
        for out in outputs
    ]
    return torch.autograd.grad(outputs, leaves, given)


@pytest.mark.parametrize("case", [c for c in CASES if c.diff], ids=lambda c: c.id)
def test_equals_autograd_through_the_reference(case):
    ours, theirs = case.requiring_grad(), case.requiring_grad()
    got = _grads(tensors(ours.call(public(ours))), ours.leaves())
    want = _grads(tensors(theirs.call(reference(theirs))), theirs.leaves())
    for g, w, x in zip(got, want, ours.leaves()):
        assert (g.dtype, g.shape) == (x.dtype, x.shape)
        # bf16: the reference's autograd rounds between its steps, the formulas round once.
        bound = 2**-6 if x.dtype == torch.bfloat16 else 2e-6
        error = (g.double() - w.double()).abs().max()
        assert error <= bound * max(1.0, float(w.abs().max()))


@pytest.mark.parametrize("case", [c for c in CASES if len(c.diff) > 1], ids=lambda c: c.id)
def test_each_gradient_alone(case):
    """Asking for one gradient gives the same as asking for all."""
    full = case.requiring_grad()
    everything = _grads(tensors(full.call(public(full))), full.leaves())
    for position, key in enumerate(case.diff):
        one = case.requiring_grad()
        for other, tensor in zip(case.diff, one.leaves()):
            if other != key:
                tensor.requires_grad_(False)
        (grad,) = _grads(tensors(one.call(public(one))), [one.leaves()[position]])
        assert torch.equal(grad, everything[position])


X = torch.randn(4, 8)
Q = dsk.quantize(X)


REFUSED = {
    "quantize": lambda: dsk.quantize(leaf(4, 8)).data.float(),
    "swiglu_quantize": lambda: dsk.swiglu_quantize(leaf(4, 8)).scale,
    "rms_norm_quantize": lambda: dsk.rms_norm_quantize(leaf(4, 8), leaf(8)).scale,
    "gemm_swiglu_quant": lambda: dsk.gemm(leaf(4, 8), leaf(6, 8), epilogue="swiglu_quant").scale,
    "gemm of ScaledTensors": lambda: dsk.gemm(Q, Q, c=leaf(4, 4)),
    "grouped_gemm": lambda: dsk.grouped_gemm(
        leaf(4, 8), leaf(2, 3, 8), m_indices=torch.tensor([0, 1, 1, -1])
    ),
    "rope": lambda: dsk.rope(leaf(5, 2, 6), leaf(5, 3), SIN),
    "moe_bias_update": lambda: dsk.moe_bias_update(leaf(3), torch.tensor([1, 2, 3]), 0.1),
    "rms_norm_backward": lambda: torch.autograd.grad(
        dsk.rms_norm(x := leaf(3, 6), leaf(6)).sum(), x, create_graph=True
    )[0],
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_gradient_says_so(name):
    with pytest.raises(NotImplementedError, match=f"^{name} is (not )?differentiable"):
        REFUSED[name]().sum().backward()


def test_decode_says_that_it_has_no_gradient():
    table, lens = torch.tensor([[0]]), torch.tensor([3])
    out, _ = dsk.mla_decode(leaf(1, 1, 2, 8), X.reshape(1, 4, 8), table, lens, head_dim_v=4)
    with pytest.raises(NotImplementedError, match="mla_decode is not differentiable"):
        out.sum().backward()


def test_absorbed_products_say_that_they_have_no_gradient():
    out = dsk.mla_absorb_output(leaf(1, 2, 4), torch.ones(2, 3, 4).double())
    with pytest.raises(NotImplementedError, match="mla_absorb_output is not differentiable"):
        out.sum().backward()
    angles = torch.zeros(1, 1)
    out = dsk.mla_absorb_queries(leaf(1, 2, 4), torch.ones(2, 2, 3).double(), angles, angles)
    with pytest.raises(NotImplementedError, match="mla_absorb_queries is not differentiable"):
        out.sum().backward()


def test_forward_mode_is_refused_not_dropped():
    with pytest.raises(NotImplementedError, match="swiglu has no forward-mode derivative"):
        torch.func.jvp(dsk.swiglu, (X,), (torch.ones_like(X),))


def test_no_gradient_where_none_is_asked_for():
    x, w = leaf(3, 6), leaf(6)
    with torch.no_grad():
        assert not dsk.rms_norm(x, w).requires_grad
    with torch.inference_mode():
        assert dsk.rms_norm(x, w).is_inference()
    assert not dsk.rms_norm(x.detach(), w.detach()).requires_grad
    indices, weights, _ = dsk.moe_gate(leaf(3, 6), leaf(8, 6), None, topk=2)
    assert weights.requires_grad and not indices.requires_grad
    assert dsk.moe_permute(leaf(3, 6), indices, 8)[0].requires_grad


def test_wrong_gradients_would_be_noticed(monkeypatch):
    """The checks above are only worth something if a wrong formula fails them."""
    from dskernels import backend as dsk_backend
    from dskernels.ref import rowwise_backward

    right = rowwise_backward.swiglu_backward
    monkeypatch.setattr(rowwise_backward, "swiglu_backward", lambda g, x: right(g, x) * 1.01)
    dsk_backend._forget()
    with pytest.raises(RuntimeError):
        torch.autograd.gradcheck(dsk.swiglu, (leaf(3, 8),))
    monkeypatch.undo()
    dsk_backend._forget()
