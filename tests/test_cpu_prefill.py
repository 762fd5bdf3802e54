"""Prefill attention on the fused CPU kernel against the reference, values and gradients."""

import pytest
import torch

import dskernels as dsk
from dskernels.backend import Unsupported
from dskernels.cpu import prefill
from dskernels.ref import mla as ref
from dskernels.ref import mla_backward as ref_backward

H, DQK, DV = 3, 24, 16


def operands(lengths, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    tokens = sum(lengths)
    q, k = (torch.randn(tokens, H, DQK, dtype=dtype) for _ in range(2))
    v = torch.randn(tokens, H, DV, dtype=dtype)
    ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return q, k, v, ends


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", [[1], [7], [64, 64], [33, 33, 33]])
@pytest.mark.parametrize("scale", [None, 0.11])
def test_equals_reference(lengths, causal, scale):
    q, k, v, ends = operands(lengths)
    modes = dict(causal=causal, softmax_scale=scale)
    out, lse = prefill.mla_prefill(q, k, v, ends, ends, **modes)
    expected, expected_lse = ref.mla_prefill(q, k, v, ends, ends, **modes)
    assert out.shape == expected.shape and lse.shape == expected_lse.shape
    assert torch.allclose(out, expected, atol=2e-6) and torch.allclose(lse, expected_lse, atol=4e-6)
    grad, none = torch.randn_like(out), torch.zeros_like(lse)
    saved = (grad, none, q, k, v, out, lse, ends, ends)
    ours = prefill.mla_prefill_backward(*saved, **modes)
    theirs = ref_backward.mla_prefill_backward(*saved, **modes)
    for a, b in zip(ours, theirs):
        assert a.shape == b.shape and torch.allclose(a, b, atol=1e-5)


def test_bf16_is_as_good_as_the_reference():
    """Error against fp64 at most twice that of the reference on the same BF16 operands."""
    q, k, v, ends = operands([50, 50], torch.bfloat16)
    exact = ref.mla_prefill(q.double(), k.double(), v.double(), ends, ends)[0]
    error = lambda out: (out.double() - exact).abs().max()  # noqa: E731
    ours, theirs = (f.mla_prefill(q, k, v, ends, ends)[0] for f in (prefill, ref))
    assert ours.dtype == torch.bfloat16 and error(ours) <= 2 * error(theirs)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda q, k, v, e: (q, k, v, torch.tensor([0, 3, 8]), torch.tensor([0, 3, 8])), "length"),
        (lambda q, k, v, e: (q[:4], k, v, torch.tensor([0, 4]), torch.tensor([0, 8])), "length"),
        (lambda q, k, v, e: (q, k, v, e[:2], e[:2]), "length"),
        (lambda q, k, v, e: (q.double(), k.double(), v.double(), e, e), "dtype"),
        (lambda q, k, v, e: (q[..., :8], k[..., :8], v, e, e), "dv"),
        (lambda q, k, v, e: (q[:0], k[:0], v[:0], e[:1], e[:1]), "length"),
    ],
)
def test_other_batches_go_to_the_reference(change, reason):
    args = change(*operands([4, 4]))
    with pytest.raises(Unsupported, match=reason):
        prefill.mla_prefill(*args)
    out, lse = dsk.mla_prefill(*args, backend="cpu")
    expected, expected_lse = ref.mla_prefill(*args)
    assert torch.allclose(out, expected, atol=1e-5)
    assert torch.allclose(lse, expected_lse, atol=1e-5)


def test_gradient_of_lse_goes_to_the_reference():
    q, k, v, ends = operands([6, 6])
    grads = []
    for backend in ("cpu", "ref"):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out, lse = dsk.mla_prefill(*leaves, ends, ends, backend=backend)
        (out.square().sum() + lse.sum()).backward()
        grads.append([x.grad for x in leaves])
    for a, b in zip(*grads):
        assert torch.allclose(a, b, atol=1e-5)
