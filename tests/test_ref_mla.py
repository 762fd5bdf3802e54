"""The MLA reference against a dense softmax in fp64, with everything unused poisoned."""

import math

import pytest
import torch

from dskernels.ref import mla, rowwise
from dskernels.testing import UNUSED_PAGE, assert_bitwise_equal, poisoned_pages

DL, R = 24, 8
LENGTHS = torch.tensor([19, 0, 1, 16, 2], dtype=torch.int32)
TABLE = torch.tensor([[2, 0, 9], [4, 4, 4], [7, 1, 1], [5, 3, 6], [8, 6, 2]], dtype=torch.int32)
LIMITS = dict(atol=2e-6, rtol=2e-6)


def paged_problem(s, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    q = torch.randn(5, s, 3, DL + R).to(dtype)
    cache = torch.randn(10, 8, DL + R).to(dtype)
    return q, *poisoned_pages(cache, TABLE, LENGTHS)


def dense(q, rows, visible, scale, head_dim_v):
    """One query [h, d] over the rows it sees, in fp64 -> out [h, dv], lse [h]."""
    rows = rows[:visible].double()
    if visible <= 0:
        return torch.zeros(q.shape[0], head_dim_v), torch.full((q.shape[0],), torch.inf)
    scores = q.double() @ rows.T * scale
    return (scores.softmax(-1) @ rows[:, :head_dim_v]).float(), scores.logsumexp(-1).float()


@pytest.mark.parametrize("s", [1, 2, 4])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decode_equals_dense_attention(s, causal, dtype):
    q, cache, table = paged_problem(s, dtype)
    out, lse = mla.mla_decode(
        q, cache, table, LENGTHS, head_dim_v=DL, softmax_scale=0.3, causal=causal
    )
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert out.shape == (5, s, 3, DL) and lse.shape == (5, 3, s)
    for i, length in enumerate(LENGTHS.tolist()):
        rows = torch.cat([cache[p] for p in table[i].tolist() if p != UNUSED_PAGE] + [cache[0][:0]])
        for j in range(s):
            visible = length - s + j + 1 if causal else length
            want, want_lse = dense(q[i, j], rows[:length], visible, 0.3, DL)
            limits = LIMITS if dtype == torch.float32 else dict(atol=2**-8, rtol=2**-8)
            torch.testing.assert_close(out[i, j].float(), want, **limits)
            torch.testing.assert_close(lse[i, :, j], want_lse, **LIMITS)


def test_decode_default_scale_and_query_in_fp64():
    q, cache, table = paged_problem(1)
    got, _ = mla.mla_decode(q, cache, table, LENGTHS, head_dim_v=DL)
    want, _ = mla.mla_decode(
        q.double(), cache.double(), table, LENGTHS, head_dim_v=DL, softmax_scale=(DL + R) ** -0.5
    )
    assert want.dtype == torch.float64
    torch.testing.assert_close(got, want.float(), **LIMITS)
    out, lse = mla.mla_decode(q[:0], cache, table[:0], LENGTHS[:0], head_dim_v=DL)
    assert out.shape == (0, 1, 3, DL) and lse.shape == (0, 3, 1)


def test_decode_survives_large_scores():
    q, cache, table = paged_problem(1)
    out, lse = mla.mla_decode(q * 1e4, cache, table, LENGTHS, head_dim_v=DL)
    assert out.isfinite().all() and (lse[0] > 1e3).any()


@pytest.mark.parametrize("latent_dim", [512, 200], ids=["656-bytes", "ragged"])
def test_fp8_cache_round_trip_and_decode(latent_dim):
    torch.manual_seed(1)
    rope_dim = 64
    row_bytes = mla.fp8_row_bytes(latent_dim, rope_dim)
    assert row_bytes == {512: 656, 200: 200 + 8 + 128}[latent_dim]
    latent, k_rope = torch.randn(5, latent_dim).bfloat16(), torch.randn(5, rope_dim).bfloat16()
    cache = torch.full((3, 4, row_bytes), 0x7F, dtype=torch.uint8)
    slots = torch.tensor([8, 9, -1, 10, 0])
    mla.mla_cache_append(cache, latent, k_rope, slots)
    written = torch.zeros(12, dtype=torch.bool)
    written[slots[slots >= 0]] = True
    assert (cache.flatten(0, 1)[~written] == 0x7F).all(), "nothing else was touched"
    # Byte by byte: e4m3 latents, fp32 scales, bf16 RoPE values.
    row, scaled = cache[2, 0], rowwise.quantize(latent[:1])
    scale_end = latent_dim + 4 * scaled.scale.shape[1]
    assert torch.equal(row[:latent_dim], scaled.data[0].view(torch.uint8))
    assert torch.equal(row[latent_dim:scale_end].view(torch.float32), scaled.scale[0])
    assert torch.equal(row[scale_end:].view(torch.bfloat16), k_rope[0])
    # Decode equals decode over the dequantised rows.
    plain = torch.full((3, 4, latent_dim + rope_dim), torch.nan)
    order = [0, 1, 3]
    plain[2, :3, :latent_dim] = rowwise.quantize(latent[order]).dequantize()
    plain[2, :3, latent_dim:] = k_rope[order].float()
    q = torch.randn(1, 1, 2, latent_dim + rope_dim)
    table, lengths = torch.tensor([[2, UNUSED_PAGE]]), torch.tensor([3])
    keep = dict(head_dim_v=latent_dim)
    got = mla.mla_decode(q, cache, table, lengths, **keep)
    want = mla.mla_decode(q, plain, table, lengths, **keep)
    assert_bitwise_equal(got[0], want[0])
    assert_bitwise_equal(got[1], want[1])


def test_plain_cache_append():
    cache = torch.full((2, 3, DL + R), torch.nan, dtype=torch.bfloat16)
    latent, k_rope = torch.randn(4, DL), torch.randn(4, R)
    mla.mla_cache_append(cache, latent, k_rope, torch.tensor([4, -1, 1, 4]))
    assert_bitwise_equal(cache[1, 1, :DL], latent[3].bfloat16())  # the later token stays
    assert_bitwise_equal(cache[0, 1, DL:], k_rope[2].bfloat16())
    assert cache.isnan().any(-1).sum() == 4
    with pytest.raises(ValueError, match=r"slots: expected values in \[-1, 6\), got 0 .. 6"):
        mla.mla_cache_append(cache, latent[:2], k_rope[:2], torch.tensor([0, 6]))
    with pytest.raises(ValueError, match="kv_cache: expected rows of 33"):
        mla.mla_cache_append(cache, torch.randn(1, DL + 1), k_rope[:1], torch.tensor([0]))


def cu(lengths):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


@pytest.mark.parametrize("causal", [True, False])
def test_prefill_equals_dense_attention(causal):
    torch.manual_seed(2)
    lens_q, lens_k = [5, 0, 3, 4, 2], [5, 6, 9, 2, 0]
    q = torch.randn(16, 2, 12)  # two rows behind the last request
    k, v = torch.randn(23, 2, 12), torch.randn(23, 2, 7)
    q[14:], k[22:], v[22:] = torch.nan, torch.nan, torch.nan
    cu_q, cu_k = cu(lens_q), cu(lens_k)
    out, lse = mla.mla_prefill(q, k, v, cu_q, cu_k, causal=causal, softmax_scale=0.4)
    assert out.shape == (16, 2, 7) and lse.shape == (2, 16)
    for i, (len_q, len_k) in enumerate(zip(lens_q, lens_k)):
        for j in range(len_q):
            seen = min(len_k, max(0, j + len_k - len_q + 1)) if causal else len_k
            row = int(cu_q[i]) + j
            keys = slice(int(cu_k[i]), int(cu_k[i]) + seen)
            for h in range(2):
                scores = k[keys, h].double() @ q[row, h].double() * 0.4
                want = scores.softmax(0) @ v[keys, h].double()
                torch.testing.assert_close(out[row, h], want.float(), **LIMITS)
                want_lse = scores.logsumexp(0).item() if seen else math.inf
                assert lse[h, row].item() == pytest.approx(want_lse, abs=1e-6, rel=1e-6)
    assert not out[14:].any() and (lse[:, 14:] == torch.inf).all()


def test_prefill_in_chunks_equals_prefill_at_once():
    torch.manual_seed(3)
    q, k, v = torch.randn(10, 2, 6), torch.randn(10, 2, 6), torch.randn(10, 2, 4)
    whole, lse = mla.mla_prefill(q, k, v, cu([10]), cu([10]))
    for start, end in ((0, 3), (3, 4), (4, 10)):
        part, part_lse = mla.mla_prefill(
            q[start:end], k[:end], v[:end], cu([end - start]), cu([end])
        )
        torch.testing.assert_close(part, whole[start:end], **LIMITS)
        torch.testing.assert_close(part_lse, lse[:, start:end], **LIMITS)


def test_prefill_gradients_also_where_nothing_is_attended():
    torch.manual_seed(4)
    q, k, v = (torch.randn(n, 2, 4, dtype=torch.float64, requires_grad=True) for n in (6, 5, 5))
    args = cu([4, 2]), cu([2, 3])  # the first two queries see nothing

    assert torch.autograd.gradcheck(
        lambda q, k, v: mla.mla_prefill(q, k, v, *args)[0], (q, k, v), fast_mode=True
    )
    _, lse = mla.mla_prefill(q, k, v, *args)
    grads = torch.autograd.grad(lse[:, 2:].sum(), (q, k))
    assert not grads[0][:2].any()
    # d lse / d q is the attention's mean key, here for the third query, which sees one key.
    torch.testing.assert_close(grads[0][2], k[0] * 4**-0.5)
    assert grads[1].isfinite().all()


def test_errors_name_the_argument():
    q, cache, table = paged_problem(1)
    decode = dict(head_dim_v=DL)
    cases = [
        (lambda: mla.mla_decode(q, cache, table, LENGTHS), r"head_dim_v: expected 1 .. 32"),
        (
            lambda: mla.mla_decode(q, cache[..., :31], table, LENGTHS, **decode),
            r"kv_cache: expected \[pages, page, 32\]",
        ),
        (
            lambda: mla.mla_decode(q, cache, table[:4], LENGTHS, **decode),
            r"block_table, seq_lens: expected \[5, max_pages\] and \[5\]",
        ),
        (
            lambda: mla.mla_decode(q, cache, table, LENGTHS + 10, **decode),
            r"seq_lens\[0\]: expected 0 .. 24, got 29",
        ),
        (
            lambda: mla.mla_decode(q, cache, table, LENGTHS + 1, **decode),
            r"block_table\[1\]: expected pages in \[0, 10\) for 1 tokens",
        ),
        (
            lambda: mla.mla_prefill(q[0], q[0], q[0], cu([2]), cu([1])),
            "cu_seqlens_q: expected non-decreasing values from 0 to at most 1",
        ),
        (
            lambda: mla.mla_prefill(q[0], q[0], q[0], cu([1]), cu([1, 0])),
            "expected the same length, got 2 and 3",
        ),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
