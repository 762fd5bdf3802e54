"""Multi-head latent attention: decode over a paged latent cache, cache append, prefill.

Dimension letters: b requests, s query tokens of a request, h heads, t tokens of all requests,
dl latent width (512), r RoPE width (64), dqk and dv the head widths of prefill (192, 128).

A cached token is one row [latent dl; RoPE key r], shared by all heads. Plain caches are
[pages, page, dl + r]; FP8 caches are uint8 [pages, page, bytes], a row being dl e4m3 bytes, then
ceil(dl / 128) fp32 scales, then r bf16 RoPE values: 656 bytes for DeepSeek-V3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backend as _backend
from . import _check as check
from . import _values as values
from ._registry import define

CACHE_DTYPES = (*check.FLOATS, torch.uint8)
_SCALE_TILE = 128  # latents per scale of an FP8 cache row

_chosen = _backend.chosen
_run = _backend.run


def row_width(cache: Tensor, latent: int, rope: int) -> int:
    """Last dimension of a cache for these widths: values, or bytes of an FP8 cache."""
    if cache.dtype != torch.uint8:
        return latent + rope
    return latent + 4 * -(-latent // _SCALE_TILE) + 2 * rope


# ---- mla_decode --------------------------------------------------------------------------------


def mla_decode(
    q: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    *,
    head_dim_v: int = 512,
    softmax_scale: float | None = None,
    causal: bool = True,
    deterministic: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of q [b, s, h, dl + r] over a paged latent cache -> (out, lse).

    kv_cache       [pages, page, dl + r], or uint8 [pages, page, bytes] (656)
    block_table    int32 (or int64) [b, max_pages]: entry p of a request is the page of its tokens
                   p * page ..; entries behind ceil(seq_lens / page) are never looked at
    seq_lens       int32 (or int64) [b]: cached tokens, the s query tokens included; 0: none
    head_dim_v     dl: out is the attention-weighted mean of each row's first head_dim_v values
    softmax_scale  default (dl + r)^-0.5, which is NOT DeepSeek's: the model passes its own
    causal         query j attends keys < seq_len - s + j + 1; else all seq_len keys
    deterministic  the same bits for a request whatever the batch around it: its keys are split at
                   fixed places ("cuda"), or summed by one thread ("cpu")

    Returns out [b, s, h, head_dim_v] in q's dtype and lse fp32 [b, h, s], the natural logarithm;
    a query that attends nothing has out 0 and lse +inf. Not differentiable.
    Source: V2 paper 2.1.2, absorbed form; layouts of FlashMLA.
    """
    modes = (head_dim_v, softmax_scale, causal, deterministic, _chosen(backend))
    return _decode(q, kv_cache, block_table, seq_lens, *modes)


def _check_decode(q, kv_cache, block_table, seq_lens, head_dim_v):
    op = "mla_decode"
    check.rank(op, "q", q, "[b, s, h, dl + r]", 4, 4)
    check.dtype(op, "q", q, check.FLOATS)
    batch, _, _, width = q.shape
    if not 0 < head_dim_v <= width:
        check.bad_value(op, "head_dim_v", f"1 .. {width} (q's width)", head_dim_v)
    check.rank(op, "kv_cache", kv_cache, "[pages, page, row]", 3, 3)
    check.dtype(op, "kv_cache", kv_cache, CACHE_DTYPES)
    row = row_width(kv_cache, head_dim_v, width - head_dim_v)
    if kv_cache.shape[2] != row:
        check.bad_value(op, "kv_cache", f"[pages, page, {row}]", check.show(kv_cache.shape))
    check.dtype(op, "block_table", block_table, check.INDEX)
    check.rank(op, "block_table", block_table, "[b, max_pages]", 2, 2)
    if block_table.shape[0] != batch:
        expected = f"[b = {batch}, max_pages]"
        check.bad_value(op, "block_table", expected, check.show(block_table.shape))
    check.dtype(op, "seq_lens", seq_lens, check.INDEX)
    check.shape(op, "seq_lens", seq_lens, "[b]", (batch,))
    check.same_device(op, "kv_cache", kv_cache, "q", q)
    check.same_device(op, "block_table", block_table, "q", q)
    check.same_device(op, "seq_lens", seq_lens, "q", q)


def _decode_kernel(
    q, kv_cache, block_table, seq_lens, head_dim_v, softmax_scale, causal, deterministic, backend
):
    table, lens = values.pages("mla_decode", kv_cache, block_table, seq_lens)
    out, lse = _run(
        "mla_decode",
        backend,
        q.device.type,
        q,
        kv_cache,
        table,
        lens,
        head_dim_v=head_dim_v,
        softmax_scale=softmax_scale,
        causal=causal,
        deterministic=deterministic,
    )
    return out.contiguous(), lse.contiguous()


def _decode_fake(
    q, kv_cache, block_table, seq_lens, head_dim_v, softmax_scale, causal, deterministic, backend
):
    batch, s, heads, _ = q.shape
    out = q.new_empty((batch, s, heads, head_dim_v))
    return out, q.new_empty((batch, heads, s), dtype=torch.float32)


_decode = define(
    "mla_decode(Tensor q, Tensor kv_cache, Tensor block_table, Tensor seq_lens, int head_dim_v,"
    " float? softmax_scale, bool causal, bool deterministic, str backend) -> (Tensor, Tensor)",
    _check_decode,
    _decode_kernel,
    _decode_fake,
)


# ---- mla_cache_append --------------------------------------------------------------------------


def mla_cache_append(
    kv_cache: Tensor,
    latent: Tensor,
    k_rope: Tensor,
    slots: Tensor,
    *,
    backend: str | None = None,
) -> None:
    """Write tokens into the cache, in place: latent [t, dl] and k_rope [t, r] at slots [t].

    kv_cache  [pages, page, dl + r], or uint8 [pages, page, bytes]: then the latent is quantised in
              blocks (1, 128) and the RoPE key stored as bf16
    slots     int64 (or int32): page * page_size + offset; -1 skips the token. When two tokens
              share a slot, the later one stays.

    No gradient flows through the cache, so arguments that require grad are refused where grad is
    enabled.
    """
    if torch.is_grad_enabled():
        for name, tensor in (("kv_cache", kv_cache), ("latent", latent), ("k_rope", k_rope)):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                expected = "a tensor that requires no grad (call under torch.no_grad())"
                check.bad_value("mla_cache_append", name, expected, "one that does")
    _append(kv_cache, latent, k_rope, slots, _chosen(backend))


def _check_append(kv_cache, latent, k_rope, slots):
    op = "mla_cache_append"
    check.rank(op, "kv_cache", kv_cache, "[pages, page, row]", 3, 3)
    check.dtype(op, "kv_cache", kv_cache, CACHE_DTYPES)
    check.rank(op, "latent", latent, "[t, dl]", 2, 2)
    check.dtype(op, "latent", latent, check.FLOATS)
    check.rank(op, "k_rope", k_rope, "[t, r]", 2, 2)
    check.dtype(op, "k_rope", k_rope, check.FLOATS)
    tokens, width = latent.shape
    if k_rope.shape[0] != tokens:
        check.bad_value(op, "k_rope", f"[t = {tokens}, r]", check.show(k_rope.shape))
    row = row_width(kv_cache, width, k_rope.shape[1])
    if kv_cache.shape[2] != row:
        check.bad_value(op, "kv_cache", f"[pages, page, {row}]", check.show(kv_cache.shape))
    check.dtype(op, "slots", slots, check.INDEX)
    check.shape(op, "slots", slots, "[t]", (tokens,))
    for name, tensor in (("latent", latent), ("k_rope", k_rope), ("slots", slots)):
        check.same_device(op, name, tensor, "kv_cache", kv_cache)


def _append_kernel(kv_cache, latent, k_rope, slots, backend):
    limit = kv_cache.shape[0] * kv_cache.shape[1]
    slots = values.index("mla_cache_append", "slots", slots, -1, limit)
    _run("mla_cache_append", backend, kv_cache.device.type, kv_cache, latent, k_rope, slots)


def _append_fake(kv_cache, latent, k_rope, slots, backend):
    return None


_append = define(
    "mla_cache_append(Tensor(a!) kv_cache, Tensor latent, Tensor k_rope, Tensor slots,"
    " str backend) -> ()",
    _check_append,
    _append_kernel,
    _append_fake,
)


# ---- mla_prefill -------------------------------------------------------------------------------


def mla_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    causal: bool = True,
    softmax_scale: float | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """A ragged batch of attentions: q, k [t, h, dqk], v [t, h, dv] -> (out [t, h, dv], lse [h, t]).

    cu_seqlens_q,  int32 (or int64) [b + 1], from 0: request i is rows cu_seqlens[i] ..
    cu_seqlens_k   cu_seqlens[i + 1] of q, and of k and v
    causal         lengths are aligned at their ends: query j of lq attends keys <= j + lk - lq, so
                   that a later chunk of a prompt attends its whole past
    softmax_scale  default dqk^-0.5

    out has q's dtype, lse is the natural logarithm in fp32. A query that attends nothing, and rows
    behind the last request, have out 0 and lse +inf. Differentiable in q, k and v.
    """
    name = _chosen(backend)
    return _prefill(q, k, v, cu_seqlens_q, cu_seqlens_k, causal, softmax_scale, name)


def _check_prefill(q, k, v, cu_seqlens_q, cu_seqlens_k):
    op = "mla_prefill"
    check.rank(op, "q", q, "[t, h, dqk]", 3, 3)
    check.dtype(op, "q", q, check.FLOATS)
    _, heads, width = q.shape
    check.rank(op, "k", k, "[t, h, dqk]", 3, 3)
    check.shape(op, "k", k, "[t, h, dqk]", (k.shape[0], heads, width))
    check.rank(op, "v", v, "[t, h, dv]", 3, 3)
    check.shape(op, "v", v, "[t, h, dv]", (k.shape[0], heads, v.shape[2]))
    for name, tensor in (("k", k), ("v", v)):
        check.same_dtype(op, name, tensor, "q", q)
        check.same_device(op, name, tensor, "q", q)
    for name, ends in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        check.dtype(op, name, ends, check.INDEX)
        check.readable(op, name, ends, "q", q)
        check.rank(op, name, ends, "[b + 1]", 1, 1)
    check.shape(op, "cu_seqlens_k", cu_seqlens_k, "cu_seqlens_q's shape", cu_seqlens_q.shape)
    if cu_seqlens_q.shape[0] < 1:
        check.bad_value(op, "cu_seqlens_q", "[b + 1], at least one element", "[0]")


def _prefill_kernel(q, k, v, cu_q, cu_k, causal, softmax_scale, backend):
    out, lse = _run(
        "mla_prefill",
        backend,
        q.device.type,
        q,
        k,
        v,
        values.ends("mla_prefill", "cu_seqlens_q", cu_q, q.shape[0]),
        values.ends("mla_prefill", "cu_seqlens_k", cu_k, k.shape[0]),
        causal=causal,
        softmax_scale=softmax_scale,
    )
    return out.contiguous(), lse.contiguous()


def _prefill_fake(q, k, v, cu_q, cu_k, causal, softmax_scale, backend):
    tokens, heads, _ = q.shape
    out = q.new_empty((tokens, heads, v.shape[2]))
    return out, q.new_empty((heads, tokens), dtype=torch.float32)


def _prefill_save(ctx, inputs, output):
    q, k, v, cu_q, cu_k, ctx.causal, ctx.softmax_scale, ctx.backend = inputs
    ctx.save_for_backward(q, k, v, *output, cu_q, cu_k)


def _prefill_grad(ctx, grad, grad_lse):
    modes = (ctx.causal, ctx.softmax_scale, ctx.backend)
    return *_prefill_backward(grad, grad_lse, *ctx.saved_tensors, *modes), *(None,) * 5


_prefill = define(
    "mla_prefill(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k,"
    " bool causal, float? softmax_scale, str backend) -> (Tensor, Tensor)",
    _check_prefill,
    _prefill_kernel,
    _prefill_fake,
    _prefill_grad,
    _prefill_save,
)


def _check_prefill_backward(grad, grad_lse, out, lse):
    op = "mla_prefill_backward"
    check.shape(op, "grad", grad, "out's shape", out.shape)
    check.shape(op, "grad_lse", grad_lse, "lse's shape", lse.shape)


def _prefill_backward_kernel(
    grad, grad_lse, q, k, v, out, lse, cu_q, cu_k, causal, softmax_scale, backend
):
    op = "mla_prefill_backward"
    ends_q = values.ends(op, "cu_seqlens_q", cu_q, q.shape[0])
    ends_k = values.ends(op, "cu_seqlens_k", cu_k, k.shape[0])
    args = (grad, grad_lse, q, k, v, out, lse, ends_q, ends_k)
    grads = _run(op, backend, q.device.type, *args, causal=causal, softmax_scale=softmax_scale)
    return tuple(g.contiguous() for g in grads)


def _prefill_backward_fake(
    grad, grad_lse, q, k, v, out, lse, cu_q, cu_k, causal, softmax_scale, backend
):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


_prefill_backward = define(
    "mla_prefill_backward(Tensor grad, Tensor grad_lse, Tensor q, Tensor k, Tensor v, Tensor out,"
    " Tensor lse, Tensor cu_seqlens_q, Tensor cu_seqlens_k, bool causal, float? softmax_scale,"
    " str backend) -> (Tensor, Tensor, Tensor)",
    _check_prefill_backward,
    _prefill_backward_kernel,
    _prefill_backward_fake,
)
