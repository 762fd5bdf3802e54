"""Gradients of prefill attention on every backend that has them, at the widths of DeepSeek-V3: held
to twice the error of PyTorch's own fused bf16 attention, both against fp64."""

import pytest
import torch
from backend_axis import need, on_cpu, on_device
from executed_work import work_of
from test_mla_prefill import operands
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad, scaled_dot_product_attention

import dskernels as dsk
from dskernels.ref import mla_backward as ref
from dskernels.testing import assert_bitwise_equal, assert_close_to_exact

# Lengths of queries and of keys by request, as in the forward's tests.
BATCHES = [
    ([128], [128]),
    ([200], [200]),
    ([5, 64, 70], [5, 64, 70]),
    ([1, 130, 3], [129, 300, 3]),
    ([0, 7, 0], [0, 7, 40]),
    ([9, 150], [4, 20]),  # more queries than keys: the first ones attend nothing
    ([3, 2], [0, 2]),
]
# Rings of keys and of queries go round, often enough for a miscount to show.
LONG = [([40], [1000]), ([1000], [40])]
PINNED = ("emu", "cuda")  # where the order of every sum is


def poisoned(function, *args, **kwargs):
    """The call with all memory that torch allocates in it full of NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    # torch.use_deterministic_algorithms() would import the whole compiler first.
    torch._C._set_deterministic_algorithms(True)
    try:
        return function(*args, **kwargs)
    finally:
        torch._C._set_deterministic_algorithms(before)


def gradients(backend, given, grad, grad_lse=None, **modes):
    """dq, dk, dv by autograd of the op; skips triton, which has only the forward."""
    q, k, v, *ends = (on_device(x, backend) for x in given)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    outputs = dsk.mla_prefill(*leaves, *ends, **modes, backend=backend)
    grad_lse = torch.zeros_like(outputs[1]) if grad_lse is None else grad_lse
    grads = [on_device(x, backend) for x in (grad, grad_lse)]
    try:
        got = poisoned(torch.autograd.grad, outputs, leaves, grads)
    except dsk.BackendError as refusal:
        if backend != "triton":
            raise
        pytest.skip(str(refusal))
    assert all((x.dtype, x.shape) == (y.dtype, y.shape) for x, y in zip(got, leaves))
    return [on_cpu(x) for x in got]


def exact(given, grad, grad_lse=None, **modes):
    """The reference's formulas in fp64 (which its own tests compare with autograd)."""
    q, k, v, ends_q, ends_k = given
    grad_lse = torch.zeros(q.shape[1], q.shape[0]) if grad_lse is None else grad_lse
    wide = (x.double() for x in (grad, grad_lse, q, k, v))
    return ref.mla_prefill_backward(*wide, None, None, ends_q, ends_k, **modes)


def fused(q, k, v, seen, scale):
    """PyTorch's flash attention, which wants values as wide as keys; [h, l, d]."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        wide = pad(v, (0, q.shape[-1] - v.shape[-1]))
        parts = (x[None] for x in (q, k, wide))
        out = scaled_dot_product_attention(*parts, attn_mask=seen, scale=scale)
    return (out[0, ..., : v.shape[-1]],)


def eager(q, k, v, seen, scale):
    """The same step by step, with lse."""
    scores = (q @ k.mT * scale).masked_fill(~seen, -torch.inf)
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


def torchs(attention, given, *grads, causal=True, softmax_scale=None):
    """Gradients of PyTorch's own attention in bf16, request by request."""
    q, k, v, ends_q, ends_k = given
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    found = [torch.zeros_like(x) for x in (q, k, v)]
    for begin, end, first, last in zip(ends_q, ends_q[1:], ends_k, ends_k[1:]):
        length = last - first
        begin = max(begin, end - length) if causal else begin  # earlier ones attend nothing
        if begin == end or length == 0:
            continue
        slices = slice(begin, end), slice(first, last), slice(first, last)
        parts = [x[s].transpose(0, 1).detach() for x, s in zip((q, k, v), slices)]
        leaves = [x.requires_grad_() for x in parts]
        seen = torch.ones(end - begin, length, dtype=torch.bool)
        seen = seen.tril(length - (end - begin)) if causal else seen
        back = grads[0][begin:end].transpose(0, 1), *(g[:, begin:end].bfloat16() for g in grads[1:])
        for to, at, x in zip(
            found, slices, torch.autograd.grad(attention(*leaves, seen, scale), leaves, back)
        ):
            to[at] = x.transpose(0, 1)
    return found


def check(got, given, grad, **modes):
    baseline = torchs(fused, given, grad, **modes)
    for ours, want, theirs in zip(got, exact(given, grad, **modes), baseline):
        assert_close_to_exact(ours, want, theirs)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", BATCHES, ids=str)
def test_within_twice_torchs_own_error(backend, lengths, causal):
    need("mla_prefill", backend)
    given = operands(*lengths, heads=2)
    grad = torch.randn(given[0].shape[0], 2, 128).bfloat16()
    check(gradients(backend, given, grad, causal=causal), given, grad, causal=causal)


@pytest.mark.parametrize("lengths", LONG, ids=str)
def test_many_blocks(backend, lengths):
    need("mla_prefill", backend)
    given = operands(*lengths, heads=1)
    grad = torch.randn(given[0].shape[0], 1, 128).bfloat16()
    check(gradients(backend, given, grad, causal=False), given, grad, causal=False)


def test_one_key(backend):
    """A softmax of one key has no gradient: fp32's rounding is left of what cancels."""
    need("mla_prefill", backend)
    given = operands([1], [1], heads=2)
    grad = torch.randn(1, 2, 128).bfloat16()
    dq, dk, dv = gradients(backend, given, grad)
    assert max(dq.abs().max(), dk.abs().max()) < 1e-6
    torch.testing.assert_close(dv, grad)


def test_scale_and_heads(backend):
    need("mla_prefill", backend)
    given = operands([33, 90], [140, 90], heads=5)
    grad = torch.randn(123, 5, 128).bfloat16()
    check(gradients(backend, given, grad, softmax_scale=0.02), given, grad, softmax_scale=0.02)


def test_gradient_of_lse(backend):
    need("mla_prefill", backend)
    given = operands([70, 9], [100, 4], heads=2)  # five queries attend nothing
    grad, grad_lse = torch.randn(79, 2, 128).bfloat16() / 8, torch.randn(2, 79)
    got = gradients(backend, given, grad, grad_lse)
    baseline = torchs(eager, given, grad, grad_lse)
    for ours, want, theirs in zip(got, exact(given, grad, grad_lse), baseline):
        assert_close_to_exact(ours, want, theirs)


def test_scores_far_apart(backend):
    """Hidden scores above the row's largest would overflow; scores far below it give no weight."""
    need("mla_prefill", backend)
    given = operands([150], [200], heads=1)
    given[1][::7, :, 1::2] *= 80
    grad = torch.randn(150, 1, 128).bfloat16()
    check(gradients(backend, given, grad), given, grad)


def test_rows_outside_every_request(backend):
    """They get 0, and what they hold is never seen."""
    need("mla_prefill", backend)
    q, k, v, ends_q, ends_k = operands([40, 100], [40, 130], heads=1, rest_q=137, rest_k=150)
    grad = torch.randn(277, 1, 128).bfloat16()
    q[140:], k[170:], v[170:], grad[140:] = (torch.nan,) * 4
    dq, dk, dv = gradients(backend, (q, k, v, ends_q, ends_k), grad)
    for outside in (dq[140:], dk[170:], dv[170:]):
        assert not outside.any()
    given = q[:140], k[:170], v[:170], ends_q, ends_k
    check((dq[:140], dk[:170], dv[:170]), given, grad[:140])


def test_another_requests_nan_stays_there(backend):
    """Requests share blocks in memory, and nothing else."""
    need("mla_prefill", backend)
    given = operands([50, 60, 70], [50, 60, 70], heads=2)
    grad = torch.randn(180, 2, 128).bfloat16()
    alone = gradients(backend, given, grad)
    for x in (*given[:3], grad):
        x[50:110] = torch.nan
    for got, want in zip(gradients(backend, given, grad), alone):
        assert_bitwise_equal(got[:50], want[:50])
        assert_bitwise_equal(got[110:], want[110:])


def test_a_request_does_not_depend_on_the_batch(backend):
    need("mla_prefill", backend)
    if backend not in PINNED:
        pytest.skip(f"{backend}: sums are not pinned there")
    q, k, v, ends_q, ends_k = operands([50, 170, 3], [90, 300, 3], heads=1)
    grad = torch.randn(223, 1, 128).bfloat16()
    among = gradients(backend, (q, k, v, ends_q, ends_k), grad)
    ends = torch.tensor([0, 170]).int(), torch.tensor([0, 300]).int()
    rows, keys = slice(50, 220), slice(90, 390)
    alone = gradients(backend, (q[rows], k[keys], v[keys], *ends), grad[rows])
    for got, want in zip(alone, (among[0][rows], among[1][keys], among[2][keys])):
        assert_bitwise_equal(got, want.contiguous())


def test_bits_do_not_depend_on_the_schedule(monkeypatch):
    need("mla_prefill", "emu")
    given = operands([150, 20], [200, 20], heads=1)
    grad = torch.randn(170, 1, 128).bfloat16()
    first = gradients("emu", given, grad)
    for seed in range(1, 4):
        monkeypatch.setenv("DSK_EMU_SEED", str(seed))
        for got, want in zip(gradients("emu", given, grad), first):
            assert_bitwise_equal(got, want)


def test_work_that_is_not_needed_is_not_done():
    need("mla_prefill", "emu")

    def work(queries, keys, causal):
        given = operands([queries], [keys], heads=1)
        grad = torch.randn(queries, 1, 128).bfloat16()
        done = work_of(lambda: gradients("emu", given, grad, causal=causal))
        return done["mla_prefill_backward_keys"], done["mla_prefill_backward_queries"]

    scores = 64 * 64 / 32  # of a warpgroup's block, by warp: a thread selects each of its own
    partly, fully = (work(64, keys, False)[1] for keys in (63, 64))
    assert partly["logic"] - fully["logic"] >= 2 * scores
    assert partly["sync"] - fully["sync"] >= 8  # eight warps meet behind what they clear
    partly, fully = (work(64, keys, True)[0] for keys in (191, 192))
    assert partly["logic"] - fully["logic"] >= scores
    one, two, under, whole = (
        [side["tensor"] for side in work(length, length, causal)]
        for length, causal in ((64, False), (128, False), (200, True), (200, False))
    )
    # Of 2 x 4 blocks of 64 x 128 two are behind the diagonal.
    assert whole[0] - under[0] == 2 * (two[0] - one[0]) > 0
    assert whole[1] - under[1] == 2 * (two[1] - one[1]) > 0


@pytest.mark.parametrize("lengths", [([0, 0], [0, 3]), ([0, 4], [0, 0]), ([0], [0])], ids=str)
def test_nothing_to_attend(backend, lengths):
    need("mla_prefill", backend)
    given = operands(*lengths, heads=2)
    grad = torch.randn(given[0].shape[0], 2, 128).bfloat16()
    for got in gradients(backend, given, grad):
        assert not got.any()


def test_requests_of_none():
    """cu_seqlens of one element: every row is outside."""
    need("mla_prefill", "emu")
    given = (*operands([5], [7], heads=1)[:3], *(torch.zeros(1, dtype=torch.int32),) * 2)
    for got in gradients("emu", given, torch.randn(5, 1, 128).bfloat16()):
        assert not got.any()


def saved(dtype=torch.bfloat16, width=192):
    """Arguments of the backward op."""
    q, k = torch.randn(3, 1, width).to(dtype), torch.randn(4, 1, width).to(dtype)
    v, ends = torch.randn(4, 1, 128).to(dtype), (torch.tensor([0, 3]), torch.tensor([0, 4]))
    out, lse = dsk.mla_prefill(q, k, v, *ends, backend="ref")
    return torch.randn_like(out), torch.randn_like(lse), q, k, v, out, lse, *ends


def test_what_the_kernels_do_not_cover_is_refused():
    need("mla_prefill", "emu")
    backward = torch.ops.dskernels.mla_prefill_backward
    with pytest.raises(dsk.BackendError, match=r"q: expected torch.bfloat16, got torch.float32"):
        backward(*saved(torch.float32), True, None, "emu")
    with pytest.raises(dsk.BackendError, match="q: expected heads of width 192, got 64"):
        backward(*saved(width=64), True, None, "emu")
    with pytest.raises(dsk.BackendError, match="softmax_scale: expected a positive number, got -1"):
        backward(*saved(), True, -1.0, "emu")


@pytest.mark.slow
def test_opcheck():
    need("mla_prefill", "emu")
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    backward = torch.ops.dskernels.mla_prefill_backward.default
    torch.library.opcheck(backward, (*saved(), True, None, "emu"), test_utils=tests)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(24))
def test_random_batches(backend, seed):
    need("mla_prefill", backend)
    generator = torch.Generator().manual_seed(seed)
    draw = lambda most, n: torch.randint(0, most, (n,), generator=generator).tolist()  # noqa: E731
    requests = 1 + draw(4, 1)[0]
    queries = draw(400, requests)
    keys = [max(0, q + extra - 100) for q, extra in zip(queries, draw(400, requests))]
    heads = 1 + draw(3, 1)[0]
    given = operands(queries, keys, heads)
    grad = torch.randn(sum(queries), heads, 128).bfloat16()
    causal = seed % 3 != 0
    check(gradients(backend, given, grad, causal=causal), given, grad, causal=causal)
