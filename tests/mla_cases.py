"""Paged latent caches with everything unused poisoned, and the bar their attention is held to."""

import torch

from dskernels.ref import mla as ref
from dskernels.testing import UNUSED_PAGE, poisoned_pages

WIDTH, LATENT = 576, 512


def paged_case(lengths, s, h, page=64, *, sharpness=1.0, seed=0, fp8=False, spare=2):
    """q bf16 [b, s, h, 576], cache, block table and lengths: shuffled pages, NaN tails, unused
    table entries that crash whoever follows them. Cached values are spread as FlashMLA's tests
    spread them; scores have a standard deviation of about sharpness / 10. `spare` pages, and as
    many columns of the table, belong to nobody."""
    g = torch.Generator().manual_seed(seed)
    lens = torch.tensor(lengths, dtype=torch.int32)
    used = [-(-length // page) for length in lengths]
    order = torch.randperm(sum(used) + spare, generator=g).int()
    columns = max(used, default=0) + spare
    table = torch.full((len(lengths), columns), UNUSED_PAGE, dtype=torch.int32)
    for request, count in enumerate(used):
        start = sum(used[:request])
        table[request, :count] = order[start : start + count]
    cache = (torch.randn(sum(used) + spare, page, WIDTH, generator=g) / 10).bfloat16()
    q = (torch.randn(len(lengths), s, h, WIDTH, generator=g) * sharpness).bfloat16()
    if fp8:
        cache = quantized(cache)
    return q, *poisoned_pages(cache, table, lens), lens


def quantized(cache):
    """The FP8 cache of the same tokens."""
    pages, page, _ = cache.shape
    rows = cache.flatten(0, 1)
    result = torch.empty(pages, page, ref.fp8_row_bytes(LATENT, WIDTH - LATENT), dtype=torch.uint8)
    ref.mla_cache_append(result, rows[:, :LATENT], rows[:, LATENT:], torch.arange(len(rows)))
    return result


def dequantized(cache):
    """The bf16 cache that an FP8 cache stands for: every latent the rounded product."""
    data = cache[..., :LATENT].contiguous().view(torch.float8_e4m3fn).float()
    scale = cache[..., LATENT : LATENT + 16].contiguous().view(torch.float32)
    rope = cache[..., LATENT + 16 :].contiguous().view(torch.bfloat16)
    return torch.cat([(data * scale.repeat_interleave(128, dim=-1)).bfloat16(), rope], dim=-1)


def exact(q, cache, table, lens, rounds=True, **how):
    """The reference in fp64. rounds: whether a backend rounds dequantised latents to bf16."""
    if cache.dtype == torch.uint8:
        wide = dequantized(cache).double() if rounds else cache
    else:
        wide = cache.double()
    return ref.mla_decode(q.double(), wide, table, lens, **how)


def assert_within(got, want, absolute, relative, cosine=None):
    """FlashMLA's own bar: every element within one of the bounds, and the whole within `cosine`."""
    got, want = got.double().cpu(), want.double()
    assert torch.equal(got.isinf(), want.isinf()) and not got.isnan().any()
    finite = want.isfinite()
    got, want = got[finite], want[finite]
    error = (got - want).abs()
    wrong = (error > absolute) & (error > relative * want.abs())
    assert not wrong.any(), f"{int(wrong.sum())} of {wrong.numel()}, worst {error.max().item():.2e}"
    if cosine is not None and want.abs().sum() > 0:
        assert 1 - 2 * (got * want).sum() / (got * got + want * want).sum() < cosine


def assert_decoded(got, case, rounds=True, **how):
    out, lse = got
    want, want_lse = exact(*case, rounds=rounds, **how)
    q = case[0]
    assert out.shape == want.shape and out.dtype == q.dtype and lse.dtype == torch.float32
    assert_within(out, want, 8e-4, 2.01 / 128, cosine=5e-6)
    assert_within(lse, want_lse, 1e-6, 8.01 / 65536)
