"""Prefill attention on every backend, at the widths of DeepSeek-V3, against the reference."""

import pytest
import torch
from backend_axis import need, on_cpu, on_device
from executed_work import work_of

import dskernels as dsk
from dskernels.ref import mla as ref
from dskernels.testing import assert_bitwise_equal

DQK, DV = 192, 128

# Lengths of queries and of keys by request; keys >= queries is a chunk against a cached prefix.
BATCHES = [
    ([1], [1]),
    ([128], [128]),
    ([200], [200]),
    ([5, 64, 70], [5, 64, 70]),
    ([1, 130, 3], [129, 300, 3]),
    ([0, 7, 0], [0, 7, 40]),
    ([9, 150], [4, 20]),  # more queries than keys: the first ones attend nothing
    ([3, 2], [0, 2]),
    ([70], [2200]),  # stages of the ring are used again, often enough for a miscount to show
]


def operands(lengths_q, lengths_k, heads, rest_q=0, rest_k=0):
    ends_q, ends_k = (torch.tensor([0, *v]).cumsum(0).int() for v in (lengths_q, lengths_k))
    q = torch.randn(int(ends_q[-1]) + rest_q, heads, DQK).bfloat16()
    k = torch.randn(int(ends_k[-1]) + rest_k, heads, DQK).bfloat16()
    # Values of a tenth, as in FlashMLA's tests: its absolute bound is one for rounded weights.
    v = (torch.randn(int(ends_k[-1]) + rest_k, heads, DV) / 10).bfloat16()
    return q, k, v, ends_q, ends_k


def run(backend, q, k, v, ends_q, ends_k, **modes):
    moved = [on_device(x, backend) for x in (q, k, v, ends_q, ends_k)]
    out, lse = dsk.mla_prefill(*moved, **modes, backend=backend)
    assert out.dtype == q.dtype and lse.dtype == torch.float32
    return on_cpu(out), on_cpu(lse)


def check(backend, got, operands, **modes):
    """FlashMLA's bounds against fp64. The CPU's attention is the matrix library's, which rounds
    more on the way: a score near 0 is off by what its terms lose."""
    q, k, v, ends_q, ends_k = operands
    out, lse = ref.mla_prefill(q.double(), k.double(), v.double(), ends_q, ends_k, **modes)
    torch.testing.assert_close(got[0].double(), out, atol=8e-4, rtol=2.01 / 128)
    lse_atol = 1e-4 if backend == "cpu" else 1e-6
    torch.testing.assert_close(got[1], lse, atol=lse_atol, rtol=8.01 / 65536)
    if out.norm() > 0:
        x, y = got[0].double().flatten(), out.flatten()
        assert 1 - 2 * (x @ y) / (x @ x + y @ y) < 5e-6


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", BATCHES, ids=str)
def test_against_fp64(backend, lengths, causal):
    need("mla_prefill", backend, d=DQK, v=DV)
    given = operands(*lengths, heads=2)
    check(backend, run(backend, *given, causal=causal), given, causal=causal)


def test_scale_and_heads(backend):
    need("mla_prefill", backend)
    given = operands([33, 90], [140, 90], heads=5)
    check(backend, run(backend, *given, softmax_scale=0.02), given, softmax_scale=0.02)


def test_scores_far_apart(backend):
    """Weights are taken relative to the largest score of all columns: nothing overflows."""
    need("mla_prefill", backend)
    q, k, v, ends_q, ends_k = operands([20], [300], heads=1)
    k[::7, :, 1::2] *= 80
    out, lse = run(backend, q, k, v, ends_q, ends_k)
    exact, exact_lse = ref.mla_prefill(q.double(), k.double(), v.double(), ends_q, ends_k)
    assert exact_lse.max() > 100  # 2^128 is out of reach of fp32
    torch.testing.assert_close(out.double(), exact, atol=2e-3, rtol=2.01 / 128)
    torch.testing.assert_close(lse, exact_lse, atol=1e-4, rtol=8.01 / 65536)


def test_rows_behind_the_last_request(backend):
    need("mla_prefill", backend)
    q, k, v, ends_q, ends_k = operands([40, 100], [40, 100], heads=1, rest_q=137, rest_k=9)
    q[140:], k[140:], v[140:] = (torch.nan,) * 3
    out, lse = run(backend, q, k, v, ends_q, ends_k)
    assert_bitwise_equal(out[140:], torch.zeros_like(out[140:]))
    assert torch.equal(lse[:, 140:], torch.full_like(lse[:, 140:], torch.inf))
    given = q[:140], k[:140], v[:140], ends_q, ends_k
    check(backend, (out[:140], lse[:, :140]), given)


def test_another_requests_nan_stays_there(backend):
    """Requests share blocks of keys in memory, and nothing else."""
    need("mla_prefill", backend)
    q, k, v, ends_q, ends_k = operands([50, 60, 70], [50, 60, 70], heads=2)
    alone = run(backend, q, k, v, ends_q, ends_k)
    for x in (q, k, v):
        x[50:110] = torch.nan
    poisoned = run(backend, q, k, v, ends_q, ends_k)
    for rows in (slice(0, 50), slice(110, None)):
        assert_bitwise_equal(poisoned[0][rows], alone[0][rows])
        assert_bitwise_equal(poisoned[1][:, rows].contiguous(), alone[1][:, rows].contiguous())


def test_a_request_does_not_depend_on_the_batch(backend):
    need("mla_prefill", backend)
    if backend not in ("emu", "cuda"):
        pytest.skip(f"{backend}: sums are not pinned there")
    q, k, v, ends_q, ends_k = operands([50, 170], [90, 300], heads=1)
    among = run(backend, q, k, v, ends_q, ends_k)
    ends = torch.tensor([0, 170]).int(), torch.tensor([0, 300]).int()
    alone = run(backend, q[50:], k[90:], v[90:], *ends)
    assert_bitwise_equal(alone[0], among[0][50:])


def test_bits_do_not_depend_on_the_schedule(monkeypatch):
    """Another order of warps, CTAs and copies: no hazard, the same bits."""
    need("mla_prefill", "emu")
    given = operands([150, 20], [300, 20], heads=1)
    first = run("emu", *given)
    for seed in range(1, 4):
        monkeypatch.setenv("DSK_EMU_SEED", str(seed))
        for got, want in zip(run("emu", *given), first, strict=True):
            assert_bitwise_equal(got, want)


def test_work_that_is_not_needed_is_not_done():
    need("mla_prefill", "emu")

    def work(queries, keys, **modes):
        given = operands([queries], [keys], heads=1)
        return work_of(lambda: run("emu", *given, **modes))["mla_prefill"]

    partly, fully = (work(64, keys, causal=False) for keys in (127, 128))
    assert partly["logic"] - fully["logic"] >= 128 * 128 / 32  # a thread selects each score
    assert partly["sync"] - fully["sync"] >= 8  # eight warps meet behind what they clear
    one, two, under, whole = (
        work(queries, keys, causal=bool(causal))["tensor"]
        for queries, keys, causal in ((64, 128, 0), (64, 256, 0), (200, 200, 1), (200, 200, 0))
    )
    assert whole - under == two - one > 0  # a block of 128 x 128 is behind the diagonal
    assert work(2, 128, causal=True)["tensor"] == one  # and none behind the keys


def test_nothing(backend):
    need("mla_prefill", backend)
    out, lse = run(backend, *operands([0, 0], [0, 3], heads=2))
    assert out.shape == (0, 2, DV) and lse.shape == (2, 0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(40))
def test_random_batches(backend, seed):
    need("mla_prefill", backend)
    generator = torch.Generator().manual_seed(seed)
    draw = lambda most, n: torch.randint(0, most, (n,), generator=generator).tolist()  # noqa: E731
    requests = 1 + draw(4, 1)[0]
    queries = draw(400, requests)
    keys = [q + extra for q, extra in zip(queries, draw(300, requests))]
    given = operands(queries, keys, 1 + draw(3, 1)[0])
    check(backend, run(backend, *given, causal=seed % 3 != 0), given, causal=seed % 3 != 0)
