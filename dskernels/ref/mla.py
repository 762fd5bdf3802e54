"""Multi-head latent attention: decode over a paged latent cache, cache append, prefill.

Letters: b requests, s query tokens of a request, h heads, t tokens of all requests, dl latent
width (512), r RoPE width (64), dqk = 192 and dv = 128 the widths of prefill.

A cached token is one row [latent dl; RoPE key r], shared by all heads; its first dl values are
also the token's value vector. Plain caches are [pages, page, dl + r] in bf16 or fp32. FP8 caches
are uint8 [pages, page, row bytes], a row being

    dl e4m3 bytes | ceil(dl / 128) fp32 scales, one per 128 latents | r bf16 RoPE values

which is 512 + 16 + 128 = 656 bytes for V3; native byte order.

All attention here is softmax in fp32 (fp64 for fp64 inputs), subtracting the row's maximum. A
query that attends nothing gives out = 0 and lse = +inf. lse is the natural logarithm of the sum
of exp(scaled scores).
"""

from __future__ import annotations

import torch

from ..types import ScaledTensor
from .rowwise import quantize, rms_norm, rope

TILE = 128  # latents per scale in an FP8 cache row


def fp8_row_bytes(latent_dim: int, rope_dim: int) -> int:
    """Bytes of one token in an FP8 cache: 656 for 512 latents and 64 RoPE values."""
    return latent_dim + 4 * -(-latent_dim // TILE) + 2 * rope_dim


def mla_decode(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    head_dim_v: int = 512,
    softmax_scale: float | None = None,
    causal: bool = True,
    deterministic: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of q [b, s, h, dl + r] over a paged cache -> out [b, s, h, head_dim_v], lse.

    kv_cache     [pages, page, dl + r], or uint8 [pages, page, row bytes] (see above)
    block_table  int32 [b, max_pages]: entry p of request i is the page of tokens p*page ...;
                 entries behind ceil(seq_lens / page) are never looked at
    seq_lens     int32 [b]: cached tokens, the s query tokens included; 0 is a request with none
    causal       query j attends keys < seq_len - s + j + 1; without it, all seq_len keys

    deterministic changes nothing here: requests are computed one by one.
    lse is fp32 [b, h, s]; out has q's dtype. softmax_scale defaults to (dl + r)^-0.5, which is NOT
    DeepSeek's: the model passes its own. Rows of the cache behind seq_len are never read.
    Source: V2 paper 2.1 (absorbed form); layouts of FlashMLA.
    """
    batch, s, _, width = q.shape
    _check_decode(q, kv_cache, block_table, seq_lens, head_dim_v)
    scale = width**-0.5 if softmax_scale is None else softmax_scale
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    page = kv_cache.shape[1]
    outs, lses = [], []
    for request in range(batch):
        length = int(seq_lens[request])
        pages = block_table[request, : -(-length // page)].long()
        rows = _cache_rows(kv_cache, pages, length, head_dim_v, width).to(wide)
        keys = torch.arange(length, device=q.device)
        limit = length - s + 1 + torch.arange(s, device=q.device)
        visible = keys < (limit[:, None] if causal else length)
        scores = torch.einsum("shd,kd->hsk", q[request].to(wide), rows) * scale
        probs, lse = _softmax(scores.masked_fill(~visible, -torch.inf))
        outs.append(torch.einsum("hsk,kd->shd", probs, rows[:, :head_dim_v]))
        lses.append(lse)
    if not batch:
        return q.new_empty(0, s, q.shape[2], head_dim_v), q.new_empty(0, q.shape[2], s).float()
    return torch.stack(outs).to(q.dtype), torch.stack(lses).float()


def mla_cache_append(
    kv_cache: torch.Tensor, latent: torch.Tensor, k_rope: torch.Tensor, slots: torch.Tensor
) -> None:
    """Write tokens into the cache, in place: latent [t, dl], k_rope [t, r] at slots int64 [t].

    slot = page * page_size + offset; -1 skips the token. A uint8 cache gets the latent quantised
    in blocks (1, 128) (see `quantize`) and the RoPE key as bf16. When two tokens share a slot,
    the later one stays.
    """
    latent_dim, rope_dim = latent.shape[-1], k_rope.shape[-1]
    quantized = kv_cache.dtype == torch.uint8
    width = fp8_row_bytes(latent_dim, rope_dim) if quantized else latent_dim + rope_dim
    if kv_cache.shape[-1] != width:
        raise ValueError(
            f"kv_cache: expected rows of {width} for latent {latent_dim} and RoPE {rope_dim}, "
            f"got {tuple(kv_cache.shape)} {kv_cache.dtype}"
        )
    num_slots = kv_cache.shape[0] * kv_cache.shape[1]
    if slots.numel() and not -1 <= slots.min() <= slots.max() < num_slots:
        raise ValueError(
            f"slots: expected values in [-1, {num_slots}), got "
            f"{int(slots.min())} .. {int(slots.max())}"
        )
    if quantized:
        rows = _pack_rows(latent, k_rope)
    else:
        rows = torch.cat([latent, k_rope], dim=-1).to(kv_cache.dtype)
    ordered, tokens = slots.sort(stable=True)
    last = torch.ones_like(ordered, dtype=torch.bool)  # of the tokens that share a slot
    last[:-1] = ordered[1:] != ordered[:-1]
    write = last & (ordered >= 0)
    slot, page = ordered[write], kv_cache.shape[1]
    kv_cache[slot // page, slot % page] = rows[tokens[write]]


def mla_prefill(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    *,
    causal: bool = True,
    softmax_scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ragged batch of attentions: q, k [t, h, dqk], v [t, h, dv] -> out [t, h, dv], lse [h, t].

    cu_seqlens_q, cu_seqlens_k  int32 [b + 1], starting with 0: request i is rows
    cu_seqlens[i] .. cu_seqlens[i + 1] of q and of k, v. With causal, lengths are aligned at their
    ends (bottom right): query j of lq attends keys <= j + lk - lq, so that a later chunk of a
    prompt attends its whole past. out has q's dtype, lse is fp32; softmax_scale defaults to
    dqk^-0.5. Rows behind the last request give out = 0 and lse = +inf. Differentiable.
    """
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    ends_q = _checked_ends("cu_seqlens_q", cu_seqlens_q, q.shape[0])
    ends_k = _checked_ends("cu_seqlens_k", cu_seqlens_k, k.shape[0])
    if len(ends_q) != len(ends_k):
        raise ValueError(
            "cu_seqlens_q, cu_seqlens_k: expected the same length, "
            f"got {len(ends_q)} and {len(ends_k)}"
        )
    outs, lses = [], []
    for start_q, end_q, start_k, end_k in zip(ends_q, ends_q[1:], ends_k, ends_k[1:]):
        len_q, len_k = end_q - start_q, end_k - start_k
        q_i, k_i, v_i = q[start_q:end_q], k[start_k:end_k], v[start_k:end_k]
        scores = torch.einsum("qhd,khd->hqk", q_i.to(wide), k_i.to(wide)) * scale
        if causal:
            hidden = torch.ones(len_q, len_k, dtype=torch.bool, device=q.device)
            scores = scores.masked_fill(hidden.triu(len_k - len_q + 1), -torch.inf)
        probs, lse = _softmax(scores)
        outs.append(torch.einsum("hqk,khd->qhd", probs, v_i.to(wide)))
        lses.append(lse)
    rest = q.shape[0] - ends_q[-1]
    outs.append(torch.zeros(rest, *v.shape[1:], dtype=wide, device=q.device))
    lses.append(torch.full((q.shape[1], rest), torch.inf, dtype=wide, device=q.device))
    return torch.cat(outs).to(q.dtype), torch.cat(lses, dim=1).float()


def mla_latents(
    q_a: torch.Tensor | None,
    kv_a: torch.Tensor,
    q_weight: torch.Tensor | None,
    kv_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    kv_cache: torch.Tensor,
    slots: torch.Tensor,
    *,
    eps: float = 1e-6,
    interleaved: bool = True,
) -> torch.Tensor | None:
    """What follows the down-projections: kv_a [t, dl + r] into the cache, q_a [t, dq] normalised.

    The cache gets RMSNorm(kv_a[:, :dl]) * kv_weight [dl], rounded to kv_a's dtype, and the rotated
    kv_a[:, dl:], as `mla_cache_append` stores them at slots [t]. Returns RMSNorm(q_a) * q_weight
    [dq] in q_a's dtype; None for a model whose queries have no latent (q_a None).

    cos, sin  fp32 [t, r / 2], interleaved as in `rope`. Source: V2 paper 2.1.2 and 2.1.3.
    """
    dl = kv_weight.shape[0]
    latent = rms_norm(kv_a[:, :dl], kv_weight, eps)
    k_rope = rope(kv_a[:, None, dl:], cos, sin, interleaved=interleaved)[:, 0]
    mla_cache_append(kv_cache, latent, k_rope, slots)
    return None if q_a is None else rms_norm(q_a, q_weight, eps)


def mla_absorb_queries(
    q: torch.Tensor,
    w_uk: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    interleaved: bool = True,
) -> torch.Tensor:
    """q [t, h, n + r] -> [q_nope W_uk | rotated q_rope] [t, h, dl + r], what `mla_decode` takes.

    w_uk [h, n, dl] is the key half of the up-projection: q_nope . (W_uk c) = (q_nope W_uk) . c.
    Sums in fp32 (fp64), rounded once to q's dtype. cos, sin fp32 [t, r / 2], interleaved as in
    `rope`. Source: V2 paper 2.1.2, "absorbed into W_UQ".
    """
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    nope, turning = q.split([w_uk.shape[1], q.shape[2] - w_uk.shape[1]], dim=-1)
    absorbed = torch.einsum("thn,hnc->thc", nope.to(wide), w_uk.to(wide)).to(q.dtype)
    return torch.cat([absorbed, rope(turning, cos, sin, interleaved=interleaved)], dim=-1)


def mla_absorb_output(o: torch.Tensor, w_uv: torch.Tensor) -> torch.Tensor:
    """o [t, h, dl], attended latents, -> [t, h, v] through w_uv [h, v, dl], the value half of the
    up-projection. Sums in fp32 (fp64), rounded once to o's dtype. Source: V2 paper 2.1.2."""
    wide = torch.float64 if o.dtype == torch.float64 else torch.float32
    return torch.einsum("thc,hvc->thv", o.to(wide), w_uv.to(wide)).to(o.dtype)


def _softmax(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """scores [..., keys], -inf where hidden -> probabilities, and lse over the keys.

    Rows that see nothing get probabilities 0 and lse +inf, without a NaN in value or gradient.
    """
    if not scores.shape[-1]:
        return scores, torch.full_like(scores.sum(-1), torch.inf)
    peak = scores.detach().amax(dim=-1, keepdim=True)
    peak = torch.where(peak == -torch.inf, 0.0, peak)
    weights = torch.exp(scores - peak)
    total = weights.sum(dim=-1, keepdim=True)
    nothing = total == 0
    total = torch.where(nothing, 1.0, total)
    lse = torch.where(nothing, torch.inf, torch.log(total) + peak)
    return weights / total, lse.squeeze(-1)


def _cache_rows(
    kv_cache: torch.Tensor, pages: torch.Tensor, length: int, latent_dim: int, width: int
) -> torch.Tensor:
    """The first `length` cached tokens of one request, [length, width], dequantised."""
    page = kv_cache.shape[1]
    tokens = torch.arange(length, device=kv_cache.device)
    rows = kv_cache[pages[tokens // page], tokens % page]
    return _unpack_rows(rows, latent_dim, width) if rows.dtype == torch.uint8 else rows


def _pack_rows(latent: torch.Tensor, k_rope: torch.Tensor) -> torch.Tensor:
    scaled = quantize(latent, (1, TILE))
    # A single column counts as contiguous whatever its stride, but cannot be viewed as bytes.
    scale = scaled.scale.clone(memory_format=torch.contiguous_format)
    parts = (scaled.data, scale, k_rope.to(torch.bfloat16).contiguous())
    return torch.cat([part.view(torch.uint8) for part in parts], dim=-1)


def _unpack_rows(rows: torch.Tensor, latent_dim: int, width: int) -> torch.Tensor:
    scale_end = latent_dim + 4 * -(-latent_dim // TILE)
    data = rows[:, :latent_dim].contiguous().view(torch.float8_e4m3fn)
    scale = rows[:, latent_dim:scale_end].contiguous().view(torch.float32)
    rope = rows[:, scale_end:].contiguous().view(torch.bfloat16)[:, : width - latent_dim]
    latent = ScaledTensor(data, scale, (1, TILE)).dequantize()
    return torch.cat([latent, rope.float()], dim=-1)


def _check_decode(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    head_dim_v: int,
) -> None:
    batch, width = q.shape[0], q.shape[-1]
    if not 0 < head_dim_v <= width:
        raise ValueError(f"head_dim_v: expected 1 .. {width} (q's width), got {head_dim_v}")
    quantized = kv_cache.dtype == torch.uint8
    expected = fp8_row_bytes(head_dim_v, width - head_dim_v) if quantized else width
    if kv_cache.dim() != 3 or kv_cache.shape[-1] != expected:
        raise ValueError(
            f"kv_cache: expected [pages, page, {expected}], got {tuple(kv_cache.shape)}"
        )
    if tuple(seq_lens.shape) != (batch,) or block_table.dim() != 2 or len(block_table) != batch:
        raise ValueError(
            f"block_table, seq_lens: expected [{batch}, max_pages] and [{batch}], got "
            f"{tuple(block_table.shape)} and {tuple(seq_lens.shape)}"
        )
    pages, page = kv_cache.shape[:2]
    for request, length in enumerate(seq_lens.tolist()):
        used = -(-length // page)
        if length < 0 or used > block_table.shape[1]:
            raise ValueError(
                f"seq_lens[{request}]: expected 0 .. {block_table.shape[1] * page}, got {length}"
            )
        table = block_table[request, :used]
        if used and not 0 <= int(table.min()) <= int(table.max()) < pages:
            raise ValueError(
                f"block_table[{request}]: expected pages in [0, {pages}) for {length} tokens, "
                f"got {table.tolist()}"
            )


def _checked_ends(name: str, ends: torch.Tensor, limit: int) -> list[int]:
    values = ends.tolist()
    if not values or values[0] != 0 or values != sorted(values) or values[-1] > limit:
        raise ValueError(
            f"{name}: expected non-decreasing values from 0 to at most {limit}, got {values}"
        )
    return values
