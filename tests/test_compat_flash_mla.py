"""FlashMLA's interface, called as its own tests call it, on CPU tensors."""

import pytest
import torch
from backend_axis import need
from mla_cases import LATENT, assert_decoded, assert_within, exact, paged_case

import dskernels as dsk
from dskernels.compat import flash_mla


@pytest.fixture
def here(backend):
    """A backend that takes CPU tensors, made the current one."""
    if backend == "cuda":
        pytest.skip("CPU tensors")
    need("mla_decode", backend, page=64)
    with dsk.use_backend(backend):
        yield backend


@pytest.mark.parametrize("form", ["older", "newer"])
def test_both_forms_of_metadata(here, form):
    q, cache, table, lens = case = paged_case([140, 0, 65], 2, 9)
    if form == "older":
        metadata, splits = flash_mla.get_mla_metadata(lens, 2 * 9, 1)
        assert metadata.dtype == torch.int32 and metadata.shape[1] == 8
        assert splits.shape == (4,) and splits[0] == 0 and (splits.diff() >= 1).all()
    else:
        metadata, splits = flash_mla.get_mla_metadata()
        assert isinstance(metadata, flash_mla.FlashMLASchedMeta) and splits is None
    got = flash_mla.flash_mla_with_kvcache(
        q, cache[:, :, None], table, lens, LATENT, metadata, splits, causal=True
    )
    assert_decoded(got, case)


@pytest.mark.parametrize("kv_heads", [2, 3])
@pytest.mark.parametrize("causal", [True, False])
def test_several_kv_heads(here, kv_heads, causal):
    cases = [paged_case([70, 5], 1, 3, seed=j) for j in range(kv_heads)]
    q = torch.cat([case[0] for case in cases], dim=2)
    _, _, table, lens = cases[0]
    # The heads' pages must coincide: those of the first, filled with each head's own values.
    caches = [torch.where(cases[0][1].isnan(), torch.nan, case[1].nan_to_num()) for case in cases]
    cache = torch.stack(caches, dim=2)
    out, lse = flash_mla.flash_mla_with_kvcache(
        q, cache, table, lens, LATENT, *flash_mla.get_mla_metadata(), causal=causal
    )
    assert out.shape == (2, 1, 3 * kv_heads, LATENT) and lse.shape == (2, 3 * kv_heads, 1)
    for j, head_cache in enumerate(caches):
        heads = slice(3 * j, 3 * j + 3)
        want, want_lse = exact(q[:, :, heads], head_cache, table, lens, causal=causal)
        assert_within(out[:, :, heads], want, 8e-4, 2.01 / 128, cosine=5e-6)
        assert_within(lse[:, heads], want_lse, 1e-6, 8.01 / 65536)


def test_fp8_cache_and_a_scale(here):
    q, cache, table, lens = case = paged_case([70, 5], 1, 4, fp8=True)
    got = flash_mla.flash_mla_with_kvcache(
        q,
        cache[:, :, None].view(torch.float8_e4m3fn),
        table,
        lens,
        LATENT,
        *flash_mla.get_mla_metadata(),
        softmax_scale=0.1,
        is_fp8_kvcache=True,
    )
    rounded = here not in ("ref", "cpu")
    if here == "cpu":
        rounded = dsk.build_info()["cpu"]["target"] == "amx"
    assert_decoded(got, case, rounded, softmax_scale=0.1, causal=False)


def test_refusals_name_the_argument():
    q, cache, table, lens = paged_case([70], 1, 4)
    cache = cache[:, :, None]
    rest = (table, lens, LATENT, *flash_mla.get_mla_metadata())
    with pytest.raises(NotImplementedError, match="indices: expected None"):
        flash_mla.flash_mla_with_kvcache(q, cache, *rest, indices=lens)
    with pytest.raises(NotImplementedError, match="topk: expected None"):
        flash_mla.get_mla_metadata(lens, 4, 1, topk=8)
    with pytest.raises(NotImplementedError, match="flash_mla_sparse_fwd"):
        flash_mla.flash_mla_sparse_fwd(q)
    with pytest.raises(ValueError, match="k_cache: expected one-byte values"):
        flash_mla.flash_mla_with_kvcache(q, cache, *rest, is_fp8_kvcache=True)
    with pytest.raises(ValueError, match="q: expected a multiple of 3 heads"):
        flash_mla.flash_mla_with_kvcache(q, cache.expand(-1, -1, 3, -1), *rest)
    with pytest.raises(ValueError, match="q, k_cache: expected"):
        flash_mla.flash_mla_with_kvcache(q, cache[:, :, 0], *rest)
    with pytest.raises(ValueError, match="cache_seqlens: expected int32"):
        flash_mla.get_mla_metadata(lens.long(), 4, 1)
    with pytest.raises(TypeError, match="num_q_tokens_per_head_k"):
        flash_mla.get_mla_metadata(lens)
